"""Files that people start from: configs, launch scripts, container files, constraints, the Makefile."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

from tpdist.settings import OPTIONS, Role, Settings

ROOT = Path(__file__).parents[1]
INVENTORIES = [ROOT / "configs/two-machines.toml"]
CONFIGS = [path for path in sorted((ROOT / "configs").glob("*.toml")) if path not in INVENTORIES]
SCRIPTS = [ROOT / ".ci/run", *sorted((ROOT / "launch").iterdir())]
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


@pytest.mark.parametrize("script", SCRIPTS[1:], ids=lambda path: path.name)
def test_launch_scripts_set_only_variables_that_exist(script: Path) -> None:
    known = {variable for option in OPTIONS.values() for variable in option.variables}
    assert set(re.findall(r"\b(?:MISTRALRS|TPDIST)_[A-Z_]+", script.read_text())) <= known


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
@pytest.mark.parametrize("target", ["demo", "test", "check"])
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
    assert {"demo", "test", "check", "format", "clean"} <= {line.split()[0] for line in result.stdout.splitlines()}
