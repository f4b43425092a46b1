"""Settings: where values come from, what a node refuses to mean, and what travels to other nodes."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from tpdist.errors import SettingsError
from tpdist.settings import OPTIONS, SHARED, HostPort, Role, Settings, Torchrun
from tpdist.settings_values import parse_bytes

MN = "MISTRALRS_MN_"
HEAD = {MN + "GLOBAL_WORLD_SIZE": "4", MN + "HEAD_NUM_WORKERS": "1", MN + "HEAD_PORT": "7100"}
WORKER = {MN + "GLOBAL_WORLD_SIZE": "4", MN + "WORKER_ID": "0", MN + "WORKER_SERVER_ADDR": "head:7100"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "job",
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def load(environ: dict[str, str] | None = None, **flags: object) -> Settings:
    return Settings.load(flags, environ=environ or {})


def without(environ: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in environ.items() if key != MN + name}


def test_without_any_setting_a_node_is_single_with_the_documented_defaults() -> None:
    settings = load()
    assert settings.role is Role.SINGLE
    assert (settings.host, settings.port, settings.device, settings.dtype) == ("127.0.0.1", 8000, "auto", "auto")
    assert (settings.register_timeout_s, settings.load_timeout_s, settings.heartbeat_interval_s) == (600, 1800, 1)
    assert (settings.node_lost_s, settings.hang_timeout_s, settings.shutdown_timeout_s) == (10, 60, 30)
    assert (settings.max_restarts, settings.store_port) == (3, 0)
    assert settings.explicit() == {}
    assert settings.world_size is None


@pytest.mark.parametrize(
    ("environ", "role", "world_size"),
    [
        ({MN + "LOCAL_WORLD_SIZE": "3"}, Role.SINGLE, 3),
        ({"TPDIST_TENSOR_PARALLEL_SIZE": "2", "MISTRALRS_PIPELINE_PARALLEL": "3"}, Role.SINGLE, 6),
        (HEAD, Role.HEAD, 4),
        (HEAD | {MN + "HEAD_NUM_WORKERS": "0"}, Role.HEAD, 4),
        (WORKER, Role.WORKER, 4),
        (TORCHRUN, Role.TORCHRUN, 4),
    ],
)
def test_the_role_and_the_world_size_follow_from_the_environment(
    environ: dict[str, str], role: Role, world_size: int
) -> None:
    settings = load(environ)
    assert (settings.role, settings.world_size) == (role, world_size)


def test_a_flag_wins_over_the_environment_over_the_config_file_over_the_default(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text('port = 1\nmax-num-seqs = 2\nseed = 3\nhost = "file"\n')
    environ = {"TPDIST_CONFIG": str(config), "TPDIST_PORT": "10", "TPDIST_MAX_NUM_SEQS": "20"}
    settings = load(environ, port="100", dtype=None)
    assert (settings.port, settings.max_num_seqs, settings.seed, settings.block_size) == (100, 20, 3, 16)
    assert settings.host == "file"


def test_an_empty_variable_counts_as_unset() -> None:
    settings = load({"TPDIST_PORT": "", MN + "WORKER_ID": "", MN + "NO_SUCH": ""})
    assert (settings.port, settings.role) == (8000, Role.SINGLE)


@pytest.mark.parametrize(("text", "value"), [("1", True), ("true", True), ("0", False), ("false", False)])
def test_switches_are_read_from_numbers_and_words(text: str, value: bool) -> None:
    settings = load({"TPDIST_INSECURE": text, "MISTRALRS_NO_NCCL": text})
    assert (settings.insecure, settings.no_nccl) == (value, value)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4096", 4096), ("4GiB", 4 * 2**30), ("1.5 MiB", 3 * 2**19), ("2gb", 2 * 10**9), ("1e9", 10**9), ("7B", 7)],
)
def test_sizes_are_read_with_their_unit(text: str, num_bytes: int) -> None:
    assert load({"TPDIST_KV_CACHE_MEMORY_BYTES": text}).kv_cache_memory_bytes == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "4 gigs", "-1GiB", "1.2.3MiB"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"number|float"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1:7100", ("10.0.0.1", 7100)),
        ("head.cluster.local:1", ("head.cluster.local", 1)),
        ("[fe80::1]:65535", ("fe80::1", 65535)),
        ("[fe80::1%eth0]:7100", ("fe80::1%eth0", 7100)),
    ],
)
def test_the_address_of_the_head_may_be_a_name_ipv4_or_bracketed_ipv6(text: str, address: tuple[str, int]) -> None:
    assert load(WORKER | {MN + "WORKER_SERVER_ADDR": text}).head_address == HostPort(*address)


def test_the_address_of_the_head_has_a_second_name() -> None:
    environ = without(WORKER, "WORKER_SERVER_ADDR") | {"MISTRALRS_WORKER_SERVER_ADDR": "head:7100"}
    assert load(environ).head_address == HostPort("head", 7100)
    assert load(WORKER | environ).head_address == HostPort("head", 7100)


WRONG_VALUES = {
    "a port that is no number": ({"TPDIST_PORT": "http"}, ["TPDIST_PORT=http", "integer"]),
    "a port out of range": ({"TPDIST_PORT": "65536"}, ["TPDIST_PORT=65536", "65535"]),
    "a head port out of range": (HEAD | {MN + "HEAD_PORT": "0"}, [MN + "HEAD_PORT=0", "1"]),
    "no ranks at all": ({MN + "LOCAL_WORLD_SIZE": "0"}, [MN + "LOCAL_WORLD_SIZE=0", "1"]),
    "a negative worker id": (WORKER | {MN + "WORKER_ID": "-1"}, [MN + "WORKER_ID=-1", "0"]),
    "an unknown dtype": ({"TPDIST_DTYPE": "int8"}, ["TPDIST_DTYPE=int8", "'bfloat16'"]),
    "two wrong values": ({"TPDIST_PORT": "x", "TPDIST_SEED": "y"}, ["TPDIST_PORT=x", "TPDIST_SEED=y"]),
    "more than all memory": ({"TPDIST_GPU_MEMORY_UTILIZATION": "1.5"}, ["TPDIST_GPU_MEMORY_UTILIZATION=1.5", "1"]),
    "a size without a number": ({"TPDIST_KV_CACHE_MEMORY_BYTES": "GiB"}, ["TPDIST_KV_CACHE_MEMORY_BYTES", "MiB"]),
    "an address without a port": (
        WORKER | {MN + "WORKER_SERVER_ADDR": "head"},
        ["WORKER_SERVER_ADDR=head", "HOST:PORT"],
    ),
    "an address with a large port": (WORKER | {MN + "WORKER_SERVER_ADDR": "head:70000"}, ["head:70000", "65535"]),
    "an IPv6 address without brackets": (WORKER | {MN + "WORKER_SERVER_ADDR": "fe80::1:7100"}, ["[IPv6]:PORT"]),
    "an address that is a URL": (WORKER | {MN + "WORKER_SERVER_ADDR": "tcp://head:7100"}, ["HOST:PORT"]),
    "brackets around a name": (WORKER | {MN + "WORKER_SERVER_ADDR": "[head]:7100"}, ["[head]:7100"]),
}

CONTRADICTIONS = {
    "a standby with a place": (
        WORKER | {"TPDIST_STANDBY": "1"},
        ["TPDIST_STANDBY=1 makes this node a worker without a place, which contradicts MISTRALRS_MN_WORKER_ID=0"],
    ),
    "a standby without a head": (
        {"TPDIST_STANDBY": "1"},
        ["which also needs MISTRALRS_MN_GLOBAL_WORLD_SIZE and MISTRALRS_MN_WORKER_SERVER_ADDR"],
    ),
    "a head without its port": (without(HEAD, "HEAD_PORT"), ["HEAD_NUM_WORKERS=1", "HEAD_PORT"]),
    "a head without its workers": (without(HEAD, "HEAD_NUM_WORKERS"), ["HEAD_PORT=7100", "HEAD_NUM_WORKERS"]),
    "a head without the world size": (without(HEAD, "GLOBAL_WORLD_SIZE"), ["HEAD_PORT=7100", "GLOBAL_WORLD_SIZE"]),
    "a worker without its id": (without(WORKER, "WORKER_ID"), ["WORKER_SERVER_ADDR=head:7100", "WORKER_ID"]),
    "a worker without its head": (without(WORKER, "WORKER_SERVER_ADDR"), ["WORKER_ID=0", "WORKER_SERVER_ADDR"]),
    "a worker without the world size": (without(WORKER, "GLOBAL_WORLD_SIZE"), ["WORKER_ID=0", "GLOBAL_WORLD_SIZE"]),
    "a head that is a worker": (HEAD | WORKER, ["HEAD_NUM_WORKERS=1", "HEAD_PORT=7100", "WORKER_ID=0"]),
    "a world without a role": ({MN + "GLOBAL_WORLD_SIZE": "4"}, ["GLOBAL_WORLD_SIZE=4", "HEAD_PORT", "WORKER_ID"]),
    "device mapping on a head": (HEAD | {"MISTRALRS_NO_NCCL": "1"}, ["NO_NCCL=1", "HEAD_NUM_WORKERS=1"]),
    "device mapping on a worker": (WORKER | {"MISTRALRS_NO_NCCL": "1"}, ["NO_NCCL=1", "WORKER_ID=0"]),
    "device mapping of two ranks": (
        {"MISTRALRS_NO_NCCL": "1", "TPDIST_TENSOR_PARALLEL_SIZE": "2"},
        ["NO_NCCL=1", "TPDIST_TENSOR_PARALLEL_SIZE=2", "asks for 2"],
    ),
    "device mapping of two stages": (
        {"MISTRALRS_NO_NCCL": "1", "MISTRALRS_PIPELINE_PARALLEL": "2"},
        ["NO_NCCL=1", "MISTRALRS_PIPELINE_PARALLEL=2"],
    ),
    "device mapping under torchrun": (TORCHRUN | {"MISTRALRS_NO_NCCL": "1"}, ["NO_NCCL=1", "torchrun asks for 4"]),
    "more local ranks than ranks": (
        HEAD | {MN + "LOCAL_WORLD_SIZE": "5"},
        ["LOCAL_WORLD_SIZE=5", "GLOBAL_WORLD_SIZE=4"],
    ),
    "a head that leaves nothing": (
        HEAD | {MN + "LOCAL_WORLD_SIZE": "4"},
        ["GLOBAL_WORLD_SIZE=4", "LOCAL_WORLD_SIZE=4", "0 ranks are left for 1 worker"],
    ),
    "more nodes than ranks": (HEAD | {MN + "HEAD_NUM_WORKERS": "4"}, ["GLOBAL_WORLD_SIZE=4", "HEAD_NUM_WORKERS=4"]),
    "ranks for no node": (
        HEAD | {MN + "HEAD_NUM_WORKERS": "0", MN + "LOCAL_WORLD_SIZE": "3"},
        ["GLOBAL_WORLD_SIZE=4", "LOCAL_WORLD_SIZE=3", "1 ranks are left"],
    ),
    "sizes that multiply to another": (
        HEAD | {"TPDIST_TENSOR_PARALLEL_SIZE": "4", "MISTRALRS_PIPELINE_PARALLEL": "2"},
        ["TPDIST_TENSOR_PARALLEL_SIZE=4", "MISTRALRS_PIPELINE_PARALLEL=2", "8 ranks", "GLOBAL_WORLD_SIZE=4"],
    ),
    "stages that do not divide the ranks": (
        WORKER | {"MISTRALRS_PIPELINE_PARALLEL": "3"},
        ["MISTRALRS_PIPELINE_PARALLEL=3", "GLOBAL_WORLD_SIZE=4"],
    ),
    "a size that does not divide torchrun's": (TORCHRUN | {"TPDIST_TENSOR_PARALLEL_SIZE": "3"}, ["WORLD_SIZE=4"]),
    "local ranks that are not the product": (
        {MN + "LOCAL_WORLD_SIZE": "3", "TPDIST_TENSOR_PARALLEL_SIZE": "2"},
        ["TPDIST_TENSOR_PARALLEL_SIZE=2", "LOCAL_WORLD_SIZE=3"],
    ),
    "two heads under two names": (
        WORKER | {"MISTRALRS_WORKER_SERVER_ADDR": "other:7100"},
        ["MISTRALRS_MN_WORKER_SERVER_ADDR=head:7100", "MISTRALRS_WORKER_SERVER_ADDR=other:7100"],
    ),
    "torchrun and a role": (TORCHRUN | HEAD, ["HEAD_NUM_WORKERS=1", "TORCHELASTIC_RUN_ID=job"]),
    "torchrun and local ranks": (TORCHRUN | {MN + "LOCAL_WORLD_SIZE": "2"}, ["LOCAL_WORLD_SIZE=2", "torchrun"]),
    "torchrun without a rank": ({**TORCHRUN, "RANK": ""}, ["RANK", "TORCHELASTIC_RUN_ID=job"]),
    "a role with a typing error": (
        HEAD | {MN + "HEAD_PROT": "1"},
        [MN + "HEAD_PROT", "nearest is " + MN + "HEAD_PORT"],
    ),
    "half of a certificate": ({"TPDIST_SSL_KEYFILE": __file__}, ["TPDIST_SSL_CERTFILE", "TPDIST_SSL_KEYFILE"]),
    "a file that is not there": ({"TPDIST_API_KEY_FILE": "/no/tokens"}, ["TPDIST_API_KEY_FILE=/no/tokens"]),
    "a key that is not there": ({"TPDIST_KEY_FILE": "/no/key"}, ["TPDIST_KEY_FILE=/no/key", "tpdist keygen"]),
    "a config that is not there": ({"TPDIST_CONFIG": "/no/file.toml"}, ["/no/file.toml", "No such file"]),
    "nodes lost between heartbeats": (
        {"TPDIST_NODE_LOST_S": "2", "TPDIST_HEARTBEAT_INTERVAL_S": "2"},
        ["TPDIST_NODE_LOST_S=2", "TPDIST_HEARTBEAT_INTERVAL_S=2"],
    ),
}


@pytest.mark.parametrize(("environ", "words"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_a_wrong_value_is_refused_with_the_variable_and_what_is_right(
    environ: dict[str, str], words: list[str]
) -> None:
    assert_refused(environ, words)


@pytest.mark.parametrize(("environ", "words"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_a_contradiction_is_refused_with_the_variables_and_the_numbers(
    environ: dict[str, str], words: list[str]
) -> None:
    assert_refused(environ, words)


def assert_refused(environ: dict[str, str], words: list[str]) -> None:
    with pytest.raises(SettingsError) as refused:
        load(environ)
    assert refused.value.exit_code == 2
    for word in words:
        assert word in str(refused.value)


def test_a_wrong_flag_is_named_as_a_flag() -> None:
    with pytest.raises(SettingsError, match=r"^--port=x: "):
        load({"TPDIST_PORT": "1"}, port="x")


def test_a_keyword_that_is_no_option_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(
        SettingsError, match="tensor_paralel_size is not an option; the nearest is tensor_parallel_size"
    ):
        load(tensor_paralel_size=2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 8000", ["prot is not an option", "the nearest is port"]),
        ("port = 'x'", ["node.toml: port=x", "integer"]),
        ("port = ", ["node.toml", "not TOML"]),
        ("[http]\nport = 1", ["http is not an option"]),
        ("config = 'other.toml'", ["config cannot be set"]),
    ],
)
def test_a_wrong_config_file_is_refused_with_its_name(tmp_path: Path, text: str, words: list[str]) -> None:
    config = tmp_path / "node.toml"
    config.write_text(text)
    with pytest.raises(SettingsError) as refused:
        load(config=str(config))
    for word in words:
        assert word in str(refused.value)


@pytest.mark.parametrize("variable", ["TPDIST_KEY_FILE", "TPDIST_API_KEY_FILE"])
def test_a_file_that_is_none_is_told_from_one_that_is_not_there(variable: str, tmp_path: Path) -> None:
    wrong = {tmp_path: "a folder, not a file", Path("/dev/null"): "not a regular file", tmp_path / "x": "no such file"}
    wrong |= {Path(__file__) / "x": "no such file", tmp_path / ("x" * 300): "File name too long"}
    for path, problem in wrong.items():
        with pytest.raises(SettingsError) as refused:
            load({variable: str(path)})
        assert f"{variable}={path}: {problem}" in str(refused.value)


def test_a_key_that_others_can_read_is_refused_with_its_mode(tmp_path: Path) -> None:
    key = tmp_path / "cluster.key"
    key.touch()
    key.chmod(0o640)
    with pytest.raises(SettingsError, match=r"has mode 0640.*chmod 600"):
        load({"TPDIST_KEY_FILE": str(key)})
    key.chmod(0o600)
    assert load({"TPDIST_KEY_FILE": str(key)}).key_file == key


def test_unknown_tpdist_variables_are_kept_with_the_nearest_name_and_others_are_left_alone() -> None:
    settings = load({"TPDIST_MAX_NUM_SEQ": "1", "MISTRALRS_LOGS": "1", "PATH": "/bin"})
    assert settings.unknown_variables == (("TPDIST_MAX_NUM_SEQ", "TPDIST_MAX_NUM_SEQS"),)


def test_torchrun_is_read_from_its_variables() -> None:
    assert load(TORCHRUN | {"TORCHELASTIC_RESTART_COUNT": "2"}).torchrun == Torchrun(
        run_id="job",
        rank=3,
        world_size=4,
        local_rank=1,
        local_world_size=2,
        group_rank=1,
        group_world_size=2,
        master_addr="10.0.0.1",
        master_port=29500,
        restart_count=2,
    )
    assert load().torchrun is None


def test_explicit_settings_are_those_that_somebody_set_even_to_the_default(tmp_path: Path) -> None:
    config = tmp_path / "node.toml"
    config.write_text("block_size = 32\nport = 1\n")
    environ = {"TPDIST_DTYPE": "auto", "TPDIST_CONFIG": str(config), "TPDIST_HANG_TIMEOUT_S": "5"}
    assert load(environ, seed="7").explicit() == {"dtype": "auto", "block_size": 32, "seed": 7}


def test_shared_settings_are_all_that_must_hold_on_every_node() -> None:
    shared = load({"TPDIST_KV_CACHE_MEMORY_BYTES": "1KiB"}).shared()
    assert set(shared) == set(SHARED)
    assert shared["kv_cache_memory_bytes"] == 1024
    assert set(SHARED) <= set(OPTIONS)


def test_settings_never_change() -> None:
    with pytest.raises(ValidationError):
        load().port = 1  # type: ignore[misc]


def test_every_option_has_a_help_text_and_names_of_its_own() -> None:
    variables = [variable for option in OPTIONS.values() for variable in option.variables]
    assert len(variables) == len(set(variables))
    assert all(option.description.endswith(".") for option in OPTIONS.values())
    assert OPTIONS["kv_cache_memory_bytes"].flag == "--kv-cache-memory-bytes"
    assert OPTIONS["kv_cache_memory_bytes"].variable == "TPDIST_KV_CACHE_MEMORY_BYTES"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"placement": "first-fit", "tensor_parallel_size": "2"},
            "TPDIST_PLACEMENT=first-fit means one rank, but .*=2",
        ),
        ({"offload_folder": "/tmp", "pipeline_layers": "1,2"}, "TPDIST_OFFLOAD_FOLDER=/tmp means one rank, for which"),
        ({"no_nccl": True, "pipeline_layers": "1,2"}, "asks for|TPDIST_PIPELINE_LAYERS means nothing"),
        ({"device_map": "auto", "tensor_shares": "1,2"}, "TPDIST_TENSOR_SHARES means nothing"),
        ({"device_layers": "4", "device_map": "auto"}, "--device-layers says where each layer is"),
        (
            {"pipeline_layers": "1,2", "pipeline_parallel_size": "3"},
            "names 2 stages, but MISTRALRS_PIPELINE_PARALLEL=3",
        ),
        ({"max_memory": "cpu"}, "must be sizes by device"),
        ({"max_memory": "0=1GiB,cpu=2GiB,0=3GiB"}, "has 0 twice"),
        ({"device_map": "{"}, "must be one of auto, balanced"),
        ({"tensor_shares": "1,0"}, "must be whole numbers of at least 1"),
        ({"trace_folder": "/nowhere"}, "TPDIST_TRACE_FOLDER=/nowhere: no such folder"),
    ],
)
def test_placements_that_contradict_each_other_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        Settings.load(options, environ={})


def test_layers_of_stages_say_how_many_stages_and_ranks_there_are() -> None:
    settings = Settings.load({"pipeline_layers": "1,2", "tensor_parallel_size": "2"}, environ={})
    assert (settings.num_stages, settings.world_size) == (2, 4)
    assert settings.shared()["pipeline_layers"] == [1, 2]
    assert settings.explicit() == {"pipeline_layers": [1, 2], "tensor_parallel_size": 2}


def test_layers_of_stages_are_not_taken_for_torchrun_s_ranks() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load({"no_nccl": True, "pipeline_layers": "1,2"}, environ={})
    assert "TPDIST_PIPELINE_LAYERS means nothing" in str(caught.value)
    assert "torchrun" not in str(caught.value)


@pytest.mark.parametrize("option", [{"offload_folder": "/tmp"}, {"placement": "exact"}, {"placement": "first-fit"}])
def test_what_means_something_for_one_process_only_asks_for_one(option: dict[str, object]) -> None:
    assert Settings.load(option, environ={}).one_process


def test_one_port_for_two_sockets_of_a_node_is_found() -> None:
    head = {"global_world_size": "2", "head_num_workers": "1"}

    def problems(**ports: str) -> list[str]:
        return list(Settings.load({**head, **ports}, environ={}).taken_twice())

    own = "each needs a port of its own; change one"
    assert problems(port="8003", head_port="8003") == [f"TPDIST_PORT=8003, MISTRALRS_MN_HEAD_PORT=8003: {own}"]
    twice = problems(head_port="8083", store_port="8083")
    assert twice == [f"MISTRALRS_MN_HEAD_PORT=8083, TPDIST_STORE_PORT=8083: {own}"]
    assert problems(port="0", head_port="8003", store_port="0") == []
    worker = {"global_world_size": "2", "worker_id": "0", "worker_server_addr": "a:8000", "store_port": "8000"}
    assert list(Settings.load(worker, environ={}).taken_twice()) == []


def test_an_empty_device_map_or_limit_is_one_that_was_given() -> None:
    assert Settings.load({"device_map": {}}, environ={}).one_process
    assert Settings.load({"max_memory": {}}, environ={}).one_process
    assert not Settings.load({}, environ={}).one_process
