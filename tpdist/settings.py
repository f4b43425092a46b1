"""All that a user can set, read once from flags, environment, `--config` file and defaults, and checked before use.

The only module that reads the environment. It knows neither the other nodes nor the devices of this one: what needs
them is decided later, from values that never change after `Settings.load`.
"""

import os
import stat
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import ValidationError, field_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource

from tpdist.errors import SettingsError
from tpdist.log import LogFormat
from tpdist.settings_options import MAX_COUNT, nearest, option, options_of
from tpdist.settings_placement import PlacementSettings
from tpdist.settings_roles import AGENT_VARIABLE, MAX_PORT, HostPort, Role, Torchrun
from tpdist.settings_values import NO_FILE, file_problem, parse_bytes

__all__ = ["AGENT_VARIABLE", "OPTIONS", "SHARED", "HostPort", "Role", "Settings", "Torchrun"]

# Plan and engine settings: they hold on all nodes, and travel from the head to the workers.
SHARED = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "pipeline_layers",
    "tensor_shares",
    "optimize",
    "device",
    "dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "block_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "seed",
    "enable_prefix_caching",
    "enforce_eager",
    "max_seq_len",
    "max_batch_size",
    "max_image_length",
    "max_num_images",
)
FILES = ("api_key_file", "ssl_certfile", "ssl_keyfile")


class Settings(PlacementSettings):
    """Every option with its value on this node. Make one with `load`; it is frozen.

    `unknown_variables` holds TPDIST_ variables that no option reads, each with the nearest name that one does.
    """

    device: Literal["auto", "cuda", "cpu"] = option(
        "auto", "Where ranks run; auto: CUDA if there is any.", section="model", metavar="auto|cuda|cpu"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Of weights and activations; auto: the checkpoint's.",
        section="model",
        metavar="auto|float32|bfloat16|float16",
    )
    max_model_len: int | None = option(
        None, "Most tokens of one sequence; default: the model's.", section="model", metavar="N", ge=1, le=MAX_COUNT
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a Hugging Face id.", section="model", metavar="REVISION"
    )
    tokenizer: str | None = option(
        None, "Folder or Hugging Face id of the tokenizer; default: MODEL.", section="model", metavar="PATH"
    )
    chat_template: str | None = option(
        None, "File with a Jinja chat template; default: the tokenizer's.", section="model", metavar="FILE"
    )
    served_model_name: str | None = option(
        None, "The model's name in the HTTP API; default: MODEL.", section="model", metavar="NAME"
    )

    max_num_seqs: int = option(
        256, "Most sequences that run at once.", section="engine", metavar="N", ge=1, le=MAX_COUNT
    )
    max_num_batched_tokens: int = option(
        2048,
        "Most tokens in one step; with several stages, in all steps that are in flight together.",
        section="engine",
        metavar="N",
        ge=1,
        le=MAX_COUNT,
    )
    block_size: int = option(
        16, "Tokens in one block of the KV cache.", section="engine", metavar="N", ge=1, le=MAX_COUNT
    )
    gpu_memory_utilization: float = option(
        0.9, "Part of a GPU's memory that a rank may use.", section="engine", metavar="FRACTION", gt=0, le=1
    )
    kv_cache_memory_bytes: int | None = option(
        None,
        "KV cache of each rank, as 4GiB or a number; default: what --gpu-memory-utilization leaves, on CPU a quarter "
        "of the available memory (at most 4 GiB) divided by the node's ranks.",
        section="engine",
        metavar="SIZE",
        ge=1,
    )
    seed: int = option(
        0, "For the requests that bring no seed.", section="engine", metavar="N", ge=-(2**63), le=2**63 - 1
    )
    enable_prefix_caching: bool = option(
        True, "Keep the blocks of ended requests for prompts that begin alike.", section="engine", metavar=""
    )
    enforce_eager: bool = option(False, "Use no CUDA graphs.", section="engine", metavar="")

    host: str = option("127.0.0.1", "Address of the HTTP API.", section="http", metavar="ADDRESS")
    port: int = option(
        8000,
        "Port of the HTTP API; 0: any free one, named in the log.",
        section="http",
        metavar="PORT",
        ge=0,
        le=MAX_PORT,
    )
    api_key_file: Path | None = option(
        None, "Bearer tokens of the HTTP API, one a line.", section="http", metavar="FILE"
    )
    ssl_certfile: Path | None = option(None, "Certificate of the HTTP API.", section="http", metavar="FILE")
    ssl_keyfile: Path | None = option(None, "Private key of that certificate.", section="http", metavar="FILE")

    register_timeout_s: float = option(
        600, "For all nodes to register with the head.", section="deadlines", metavar="S", gt=0
    )
    fetch_timeout_s: float = option(
        7200, "For a download of the model on a node.", section="deadlines", metavar="S", gt=0
    )
    load_timeout_s: float = option(
        1800, "For all ranks to connect, load and warm up.", section="deadlines", metavar="S", gt=0
    )
    heartbeat_interval_s: float = option(
        1, "Between two signs of life of a node.", section="deadlines", metavar="S", gt=0
    )
    node_lost_s: float = option(10, "Silence after which a node is lost.", section="deadlines", metavar="S", gt=0)
    hang_timeout_s: float = option(
        60, "Work without a finished step after which a rank hangs.", section="deadlines", metavar="S", gt=0
    )
    max_restarts: int = option(
        3,
        "Most restarts of the ranks in an hour; 0: the first lost rank or node ends the cluster, and a worker that "
        "loses its head ends.",
        section="deadlines",
        metavar="N",
        ge=0,
    )
    retry_timeout_s: float = option(
        60,
        "For the ranks to come back for a request that has produced nothing yet; then it fails.",
        section="deadlines",
        metavar="S",
        ge=0,
    )
    shutdown_timeout_s: float = option(
        30, "For running requests to finish after SIGTERM.", section="deadlines", metavar="S", ge=0
    )

    config: Path | None = option(
        None, "TOML file of option names and values; flags and environment win.", section="general", metavar="FILE"
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = option(
        "INFO", "Least level that is logged.", section="general", metavar="DEBUG|INFO|WARNING|ERROR"
    )
    log_format: LogFormat = option(
        "text", "json: one object a line, for programs.", section="general", metavar="text|json"
    )
    trace_folder: Path | None = option(
        None, "Folder for a file of each rank: when each part of each step ran.", section="general", metavar="FOLDER"
    )
    debug: bool = option(False, "Show a traceback when a command ends with an error.", section="general", metavar="")

    unknown_variables: tuple[tuple[str, str], ...] = ()

    @field_validator("kv_cache_memory_bytes", mode="before")
    @classmethod
    def _accept_units(cls, value: object) -> object:
        return parse_bytes(value)

    @field_validator("log_level", mode="before")
    @classmethod
    def _accept_lower_case(cls, value: object) -> object:
        return value.upper() if isinstance(value, str) else value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """`load` merges the sources itself: an error names where its value was written."""
        return (init_settings,)

    @classmethod
    def load(cls, flags: Mapping[str, object], *, environ: Mapping[str, str] | None = None) -> Self:
        """Read the settings of this process: flag > environment > `--config` file > default.

        `flags` are options by name; None means not given. An empty variable is one that is not set.
        Raises SettingsError with every wrong value, or every contradiction, one a line.
        """
        variables = {name: value for name, value in (os.environ if environ is None else environ).items() if value}
        from_flags = {name: value for name, value in flags.items() if value is not None}
        _refuse_unknown(from_flags, origin="the options given")
        unknown = _unknown_variables(variables)
        from_environ = _read_environ(variables)
        path = from_flags.get("config", from_environ.get("config"))
        from_file = {} if path is None else _read_file(Path(str(path)))
        values: dict[str, Any] = {**from_file, **from_environ, **from_flags}
        try:
            settings = cls(**values, torchrun=Torchrun.read(variables), unknown_variables=unknown)
        except ValidationError as error:
            origins = _origins(from_flags, variables, path)
            raise SettingsError("\n".join(_messages(error, origins))) from error
        problems = [*settings.contradictions(), *settings._local_contradictions()]
        if problems:
            raise SettingsError("\n".join(problems))
        return settings

    def explicit(self) -> dict[str, Any]:
        """The plan and engine settings that somebody set on this node, as JSON values."""
        return {name: value for name, value in self.shared().items() if name in self.model_fields_set}

    def shared(self) -> dict[str, Any]:
        """All plan and engine settings, as JSON values: what a head sends to its workers."""
        values = {name: getattr(self, name) for name in SHARED} | {"pipeline_parallel_size": self.num_stages}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def _local_contradictions(self) -> Iterator[str]:
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            yield "--ssl-certfile (TPDIST_SSL_CERTFILE) and --ssl-keyfile (TPDIST_SSL_KEYFILE) need each other"
        if self.heartbeat_interval_s >= self.node_lost_s:
            yield (
                f"TPDIST_NODE_LOST_S={self.node_lost_s:g} must be more than "
                f"TPDIST_HEARTBEAT_INTERVAL_S={self.heartbeat_interval_s:g}, or every node is lost between heartbeats"
            )
        for name in FILES:
            path = getattr(self, name)
            if path is not None and (problem := file_problem(path)):
                yield f"{OPTIONS[name].variable}={path}: {problem}"
        if self.trace_folder is not None and not self.trace_folder.is_dir():
            yield f"TPDIST_TRACE_FOLDER={self.trace_folder}: no such folder"
        if self.key_file is not None:
            yield from _key_file_problems(self.key_file)

    def taken_twice(self) -> Iterator[str]:
        """Ports that two sockets of a node that serves HTTP are to listen on."""
        of_head = {} if self.head_num_workers is None else {"head_port": self.head_port, "store_port": self.store_port}
        ports = {"port": self.port, **of_head}
        for name, other in combinations([name for name, port in ports.items() if port], 2):
            if ports[name] == ports[other]:
                listed = ", ".join(f"{OPTIONS[each].variable}={ports[each]}" for each in (name, other))
                yield f"{listed}: each needs a port of its own; change one"


def asked_log_format(flags: Mapping[str, object], *, environ: Mapping[str, str] | None = None) -> LogFormat:
    """How settings that turn out to be wrong are to be reported."""
    variables = os.environ if environ is None else environ
    asked = flags.get("log_format") or variables.get("TPDIST_LOG_FORMAT")
    return "json" if asked == "json" else "text"


OPTIONS = options_of(Settings.model_fields)
_NAME_OF_VARIABLE = {variable: name for name, known in OPTIONS.items() for variable in known.variables}


def _key_file_problems(path: Path) -> Iterator[str]:
    """Whether it holds a key is seen by those who read it."""
    if problem := file_problem(path):
        file = path if problem == NO_FILE else "FILE"
        yield f"TPDIST_KEY_FILE={path}: {problem}; make it once with `tpdist keygen {file}` and copy it to all nodes"
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        yield f"TPDIST_KEY_FILE={path} has mode {mode:04o}, so that others can read it; run `chmod 600 {path}`"


def _unknown_variables(variables: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """TPDIST_ variables may belong to another tool; a wrong MISTRALRS_MN_ one would silently change the node's role."""
    ours = sorted(name for name in variables if name.startswith(("TPDIST_", "MISTRALRS_MN_")))
    known = {*_NAME_OF_VARIABLE, AGENT_VARIABLE}
    unknown = tuple((name, nearest(name, _NAME_OF_VARIABLE)) for name in ours if name not in known)
    wrong = [(name, near) for name, near in unknown if name.startswith("MISTRALRS_MN_")]
    if wrong:
        message = "{} is not a variable that tpdist reads; the nearest is {}"
        raise SettingsError("\n".join(message.format(*pair) for pair in wrong))
    return unknown


def _read_environ(variables: Mapping[str, str]) -> dict[str, object]:
    known = {name: value for name, value in variables.items() if name in _NAME_OF_VARIABLE}
    for setting in OPTIONS.values():
        given = {name: known[name] for name in setting.variables if name in known}
        if len(set(given.values())) > 1:
            values = " and ".join(f"{name}={value}" for name, value in given.items())
            raise SettingsError(f"{values} are two names of one setting with different values; unset one")
    source = EnvSettingsSource(Settings)
    source.env_vars = {name.lower(): value for name, value in known.items()}
    return {_NAME_OF_VARIABLE.get(key, key): value for key, value in source().items()}


def _read_file(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            values = tomllib.load(file)
    except OSError as error:
        raise SettingsError(f"--config {path}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config {path}: not TOML: {error}") from error
    values = {name.replace("-", "_"): value for name, value in values.items()}
    _refuse_unknown(values, origin=str(path))
    if "config" in values:
        raise SettingsError(f"{path}: config cannot be set in a config file")
    return values


def _refuse_unknown(names: Iterable[str], *, origin: str) -> None:
    wrong = [
        f"{origin}: {name} is not an option; the nearest is {nearest(name, OPTIONS)}"
        for name in names
        if name not in OPTIONS
    ]
    if wrong:
        raise SettingsError("\n".join(wrong))


def _origins(flags: Mapping[str, object], variables: Mapping[str, str], path: object) -> dict[str, str]:
    """Where the value of each option was written, as its user would look for it."""
    origins = {name: f"{path}: {name}" for name in OPTIONS}
    origins |= {_NAME_OF_VARIABLE[variable]: variable for variable in variables if variable in _NAME_OF_VARIABLE}
    return origins | {name: OPTIONS[name].flag for name in flags}


def _messages(error: ValidationError, origins: Mapping[str, str]) -> Iterator[str]:
    for problem in error.errors():
        key = str(problem["loc"][0])
        what = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be", 1)
        yield f"{origins[_NAME_OF_VARIABLE.get(key, key)]}={problem['input']!s}: {what}"
