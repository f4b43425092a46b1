"""Files that people start from: configs, launch scripts, container files, constraints, the Makefile."""

import os
import re
import shutil
import signal
import subprocess
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from dependency_audit import report

from tpdist.settings import OPTIONS, Role, Settings

ROOT = Path(__file__).parents[1]
INVENTORIES = [ROOT / "configs/two-machines.toml"]
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.toml")) if path not in INVENTORIES]
RECIPES = sorted((ROOT / "launch").iterdir())
SCRIPTS = [ROOT / ".ci/run", *(path for path in RECIPES if path.suffix != ".yaml")]
CONSTRAINTS = ROOT / "configs/constraints.txt"


def variables_in(text: str) -> dict[str, str]:
    """The assignments to tpdist's variables in a text, as an environment."""
    return dict(re.findall(r"\b((?:MISTRALRS|TPDIST)_[A-Z_]+)=([^\s\"']+)", text))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.name)
def test_every_config_file_is_accepted_and_explains_itself(config: Path) -> None:
    settings = Settings.load({"config": str(config)}, environ={})
    given = tomllib.loads(config.read_text())
    assert given.keys() <= settings.model_fields_set
    assert config.read_text().startswith("# ")


def test_the_two_node_file_works_with_the_environment_that_it_shows(tmp_path: Path) -> None:
    config = ROOT / "configs/two-node.toml"
    _, head, worker = re.split(r"# on the (?:head|worker):", config.read_text().split("\n\n")[0])
    key = tmp_path / "cluster.key"
    key.touch(mode=0o600)
    for text, role in ((head, Role.HEAD), (worker, Role.WORKER)):
        environ = variables_in(text) | {"TPDIST_KEY_FILE": str(key)}
        settings = Settings.load({"config": str(config)}, environ=environ)
        assert (settings.role, settings.world_size, settings.store_port) == (role, 16, 7101)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses_and_stops_at_the_first_error(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=30)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


@pytest.mark.parametrize("recipe", [*RECIPES, ROOT / "docker/compose.yaml"], ids=lambda path: path.name)
def test_recipes_set_only_variables_that_exist(recipe: Path) -> None:
    known = {variable for option in OPTIONS.values() for variable in option.variables}
    assert set(re.findall(r"\b(?:MISTRALRS|TPDIST)_[A-Z_]*[A-Z]\b", recipe.read_text())) <= known


@pytest.fixture
def fake_tpdist(tmp_path: Path) -> dict[str, str]:
    """An environment in which `tpdist` and `ssh` only write down how they were called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("tpdist", "ssh"):
        program = folder / name
        program.write_text(
            f'#!/usr/bin/env bash\n{{ env | grep ^MISTRALRS_ | sort; echo "{name} $*"; }} >"{tmp_path}/call.$$"\n'
            'exit "${FAKE_CODE:-0}"\n'
        )
        program.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MISTRALRS_", "TPDIST_"))}
    return {**clean, "PATH": f"{folder}:{clean['PATH']}"}


def calls(tmp_path: Path) -> list[str]:
    return sorted(file.read_text() for file in tmp_path.glob("call.*"))


def test_local_sh_starts_a_head_and_its_workers(tmp_path: Path, fake_tpdist: dict[str, str]) -> None:
    argv = [str(ROOT / "launch/local.sh"), "3", "./model", "--dtype", "float32"]
    subprocess.run(argv, env=fake_tpdist, check=True, timeout=30)
    roles = []
    for call in calls(tmp_path):
        environ = variables_in(call)
        roles.append((Settings.load({}, environ=environ).role, environ["MISTRALRS_MN_GLOBAL_WORLD_SIZE"]))
        assert re.search(r"tpdist serve ./model --port 800[0-2] --dtype float32", call)
    assert sorted(roles, key=str) == [(Role.HEAD, "3"), (Role.WORKER, "3"), (Role.WORKER, "3")]


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP"])
def test_a_signal_to_all_of_local_sh_reaches_each_node_once(
    tmp_path: Path, fake_tpdist: dict[str, str], name: str
) -> None:
    (tmp_path / "bin/tpdist").write_text(
        "#!/usr/bin/env bash\n"
        f'for each in TERM INT HUP; do trap "echo $each >>{tmp_path}/told.$$" $each; done\n'
        f"touch {tmp_path}/told.$$\n"
        f"until [ -s {tmp_path}/told.$$ ]; do read -t 0.1 <> <(:) || true; done\n"
        "read -t 0.5 <> <(:) || true\n"
    )
    argv = [str(ROOT / "launch/local.sh"), "3", "./model"]
    with subprocess.Popen(argv, env=fake_tpdist, start_new_session=True) as script:
        deadline = time.monotonic() + 20
        while len(list(tmp_path.glob("told.*"))) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(script.pid, signal.Signals[f"SIG{name}"])
        assert script.wait(timeout=20) == 0
    assert [file.read_text() for file in tmp_path.glob("told.*")] == [f"{name}\n"] * 3


def test_local_sh_ends_with_the_code_of_a_node_that_failed(fake_tpdist: dict[str, str]) -> None:
    argv = [str(ROOT / "launch/local.sh"), "2", "./model"]
    assert subprocess.run(argv, env={**fake_tpdist, "FAKE_CODE": "5"}, timeout=30).returncode == 5


def test_ssh_sh_starts_the_head_on_the_first_host(tmp_path: Path, fake_tpdist: dict[str, str]) -> None:
    argv = [str(ROOT / "launch/ssh.sh"), "./my model", "me@alpha", "beta"]
    subprocess.run(argv, env={**fake_tpdist, "GLOBAL_WORLD_SIZE": "4"}, check=True, timeout=30)
    beta, alpha = sorted(calls(tmp_path), key=lambda call: "alpha env" in call)
    assert Settings.load({}, environ=variables_in(alpha)).role is Role.HEAD
    assert Settings.load({}, environ=variables_in(beta)).head_address == ("alpha", 7100)
    assert alpha.rstrip().endswith(r"tpdist serve ./my\ model")


def test_slurm_sbatch_starts_a_node_on_each_host_the_head_on_the_first(
    tmp_path: Path, fake_tpdist: dict[str, str]
) -> None:
    folder = tmp_path / "bin"
    (folder / "scontrol").write_text("#!/usr/bin/env bash\nprintf 'alpha\\n'; seq 100000\n")
    (folder / "srun").write_text(
        "#!/usr/bin/env bash\n"
        "while [[ $1 == --* ]]; do shift; done\n"
        'for ((node = 0; node < SLURM_NNODES; node++)); do SLURM_NODEID=$node "$@"; done\n'
    )
    for program in ("scontrol", "srun"):
        (folder / program).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "any", "SLURM_NNODES": "3", "SLURM_GPUS_PER_NODE": "h100:8"}
    script = str(ROOT / "launch/slurm.sbatch")
    subprocess.run(["bash", script], env={**fake_tpdist, **slurm, "MODEL": "/my model"}, check=True, timeout=30)
    assert_head_and_workers(calls(tmp_path), num_workers=2, head="alpha", world_size=24)
    assert all(call.endswith("tpdist serve /my model\n") for call in calls(tmp_path))


def assert_head_and_workers(said: list[str], *, num_workers: int, head: str, world_size: int) -> None:
    """One head, and workers 0, 1, ... that look for it on one port, all with a global size."""
    nodes = [Settings.load({}, environ=variables_in(call)) for call in said]
    heads = [node for node in nodes if node.role is Role.HEAD]
    workers = [node for node in nodes if node.role is Role.WORKER]
    assert [node.head_num_workers for node in heads] == [num_workers]
    assert sorted(node.worker_id for node in workers if node.worker_id is not None) == list(range(num_workers))
    assert {node.head_address for node in workers} <= {(head, heads[0].head_port)}
    assert {node.world_size for node in nodes} == {world_size}


@pytest.mark.parametrize("name", ["local.sh", "ssh.sh"])
def test_a_launch_script_without_arguments_says_how_to_use_it(name: str) -> None:
    result = subprocess.run([str(ROOT / "launch" / name)], capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert f"launch/{name} " in result.stderr


def test_the_two_services_of_compose_are_a_head_and_its_worker(tmp_path: Path) -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    key = tmp_path / "cluster.key"
    key.touch(mode=0o600)
    head, worker = (
        Settings.load({}, environ=compose["services"][name]["environment"] | {"TPDIST_KEY_FILE": str(key)})
        for name in ("head", "worker")
    )
    assert (head.role, head.head_num_workers, head.world_size) == (Role.HEAD, 1, 2)
    assert worker.head_address == ("head", head.head_port)
    assert compose["services"]["head"]["environment"]["TPDIST_KEY_FILE"] == "/run/secrets/cluster_key"


def test_the_services_of_compose_are_checked_restarted_and_given_time_to_drain() -> None:
    compose = yaml.safe_load((ROOT / "docker/compose.yaml").read_text())
    for service in compose["services"].values():
        assert "/readyz" in service["healthcheck"]["test"][-1]
        compile(service["healthcheck"]["test"][-1], "healthcheck", "exec")
        assert seconds(service["healthcheck"]["start_period"]) >= Settings.load({}, environ={}).load_timeout_s
        assert service["restart"].startswith("on-failure")
        assert seconds(service["stop_grace_period"]) > Settings.load({}, environ={}).shutdown_timeout_s


def seconds(text: str) -> float:
    return float(text[:-1]) * {"s": 1, "m": 60}[text[-1]]


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, Any]:
    """The objects of the manifest by their kind."""
    manifest = (ROOT / "launch/k8s-lws.yaml").read_text()
    return {each["kind"]: each for each in yaml.safe_load_all(manifest)}


@pytest.fixture(scope="module")
def pod(kubernetes: dict[str, Any]) -> dict[str, Any]:
    """What all pods of a group are made from: without a template of its own the leader takes the workers'."""
    template = kubernetes["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]
    assert "leaderTemplate" not in template
    spec: dict[str, Any] = template["workerTemplate"]["spec"]
    return spec


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_pods_of_a_group_are_a_head_and_its_workers(
    tmp_path: Path, fake_tpdist: dict[str, str], pod: dict[str, Any], size: int
) -> None:
    container = pod["containers"][0]
    command = [*container["command"], *container["args"]]
    fixed = {each["name"]: each["value"] for each in container["env"] if not each["name"].startswith("TPDIST_")}
    for index in range(size):
        group = {
            "LWS_LEADER_ADDRESS": "tpdist-0.tpdist.ns",
            "LWS_GROUP_SIZE": str(size),
            "LWS_WORKER_INDEX": str(index),
        }
        subprocess.run(command, env={**fake_tpdist, **fixed, **group}, check=True, timeout=30)
    said = calls(tmp_path)
    assert_head_and_workers(said, num_workers=size - 1, head="tpdist-0.tpdist.ns", world_size=size * 8)
    assert {variables_in(call)["MISTRALRS_MN_LOCAL_WORLD_SIZE"] for call in said} == {"8"}
    assert all(call.endswith("tpdist serve /model\n") for call in said)


def test_the_settings_of_a_pod_are_accepted_and_match_what_kubernetes_is_told(
    tmp_path: Path, kubernetes: dict[str, Any], pod: dict[str, Any]
) -> None:
    container = pod["containers"][0]
    environ = {each["name"]: each["value"] for each in container["env"]}
    assert environ["RANKS_PER_NODE"] == container["resources"]["limits"]["nvidia.com/gpu"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert Path(environ["TPDIST_KEY_FILE"]).parent == Path(mounts["key"])
    key = tmp_path / "cluster.key"
    key.touch(mode=0o600)
    settings = Settings.load({}, environ={**environ, "TPDIST_KEY_FILE": str(key)})
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert (settings.host, settings.port) == ("0.0.0.0", ports["http"])
    assert f"$LWS_LEADER_ADDRESS:{ports['control']}\n" in container["args"][0]
    sleep_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > settings.shutdown_timeout_s + sleep_s
    assert {volume["name"] for volume in pod["volumes"]} == {
        mount["name"] for each in (container, pod["initContainers"][0]) for mount in each["volumeMounts"]
    }


def test_a_pod_is_probed_where_tpdist_answers_and_long_enough(pod: dict[str, Any]) -> None:
    container = pod["containers"][0]
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}
    startup = container["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= Settings.load({}, environ={}).fetch_timeout_s


def test_a_group_is_restarted_as_one_and_its_workers_do_not_wait_for_a_ready_leader(kubernetes: dict[str, Any]) -> None:
    spec = kubernetes["LeaderWorkerSet"]["spec"]
    assert kubernetes["LeaderWorkerSet"]["apiVersion"] == "leaderworkerset.x-k8s.io/v1"
    assert spec["startupPolicy"] == "LeaderCreated"
    assert spec["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_the_key_of_a_pod_belongs_to_its_user_alone(tmp_path: Path, pod: dict[str, Any]) -> None:
    """The very command, on a secret as it looks with fsGroup: readable by the group."""
    (init,) = pod["initContainers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["secret"]["secret"]["defaultMode"] == 0o400
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] != 0
    secret, copy = tmp_path / "secret/cluster.key", tmp_path / "key/cluster.key"
    for file in (secret, copy):
        file.parent.mkdir()
    secret.write_text(bytes(range(32)).hex())
    secret.chmod(0o440)
    command = [
        part.replace("/secret/", f"{secret.parent}/").replace("/key/", f"{copy.parent}/") for part in init["command"]
    ]
    for _ in range(2):
        subprocess.run(command, check=True, timeout=30)
    assert copy.stat().st_mode & 0o777 == 0o400
    assert Settings.load({"key_file": str(copy)}, environ={}).key_file == copy


def test_only_http_is_open_to_strangers_of_a_group(kubernetes: dict[str, Any], pod: dict[str, Any]) -> None:
    labels = kubernetes["LeaderWorkerSet"]["spec"]["leaderWorkerTemplate"]["workerTemplate"]["metadata"]["labels"]
    policy = kubernetes["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels == kubernetes["Service"]["spec"]["selector"]
    between, others = policy["ingress"]
    assert between == {"from": [{"podSelector": {"matchLabels": labels}}]}
    assert others == {"ports": [{"port": "http"}]}
    assert kubernetes["Service"]["metadata"]["name"] != kubernetes["LeaderWorkerSet"]["metadata"]["name"]
    assert pod["enableServiceLinks"] is False


def test_the_dockerfile_copies_only_what_exists_and_runs_as_a_user() -> None:
    text = (ROOT / "docker/Dockerfile").read_text()
    copied = re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists() or name == "README.md", name
    assert re.search(r"^USER tpdist$", text, re.MULTILINE)


def test_constraints_are_exact_and_name_no_build_of_torch() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    assert "torch==2.13.0" in lines


def test_constraints_hold_every_package_that_tpdist_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = {re.split(r"[\[>=<]", text)[0] for text in [*project["dependencies"], *extras["test"], *extras["dev"]]}
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in CONSTRAINTS.read_text().splitlines()}
    assert {name.lower().replace("_", "-") for name in asked} - {"tpdist"} <= pinned


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["demo", "test", "check", "audit"])
def test_every_target_makes_its_environment_with_torch_first(target: str) -> None:
    result = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", target, "VENV=/no/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    commands = result.stdout.splitlines()
    installs = [line for line in commands if " pip install " in line]
    assert installs[0].endswith("pip install --quiet torch==2.13.0")
    assert "-c configs/constraints.txt" in installs[1]
    assert commands[-1].startswith("/no/venv/bin/")


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_without_a_target_lists_the_targets() -> None:
    result = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    assert {"demo", "test", "check", "audit", "format", "clean"} <= {
        line.split()[0] for line in result.stdout.splitlines()
    }


def test_each_rule_that_the_code_scan_skips_has_its_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    skips = tomllib.loads(text)["tool"]["bandit"]["skips"]
    assert re.findall(r'^    "(B\d+)", # .{20,}$', text, re.MULTILINE) == skips == sorted(skips)


def test_a_dependency_scan_tells_what_it_found_from_what_it_could_not_see() -> None:
    good = {"name": "good", "version": "1", "vulns": []}
    bad = {"name": "bad", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
    unseen = {"name": "unseen", "skip_reason": "not found"}
    assert report([good, unseen], "") == (0, ["1 packages audited, 0 known vulnerabilities", "not audited: unseen"])
    code, lines = report([good, bad], "")
    assert (code, lines[0]) == (1, "bad 2: CVE-1, fixed in ['3']")
    for packages, problem in (([unseen], ""), ([], "not found")):
        code, lines = report(packages, problem)
        assert code == 0
        assert lines == ["NOT AUDITED: no vulnerability data can be reached from here (not found)"]
