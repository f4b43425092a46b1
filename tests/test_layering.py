"""The layout of the package as rules: imports point downward, each outside library has one home, ranks stay lean.

Read from the source with ast, so that a rule holds in code that no other test runs.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tpdist"

# From the ground up; modules of one room may import each other, and everything below.
ROOMS = (
    ("errors",),
    ("log", "parent", "sampling_params"),
    ("settings_options", "settings_values"),
    ("settings_roles",),
    ("settings_cluster",),
    ("settings_placement",),
    ("settings",),
    ("place",),
    ("plan",),
    ("control",),
    ("introduction",),
    ("parallel",),
    ("layers",),
    ("checkpoint",),
    ("models",),
    ("bigmodel", "multi_gpu"),
    ("engine",),
    ("preflight", "probe"),
    ("meeting", "run_directory"),
    ("loading", "cache_room"),
    ("rank",),
    ("worker",),
    ("node",),
    ("torchrun",),
    ("server",),
    ("launcher",),
    ("llm",),
    ("bench", "builtin"),
    ("cli",),
    ("__main__", "__init__"),
)
LEVEL = {name: level for level, room in enumerate(ROOMS) for name in room}

# Outside library -> the only parts of the package that may import it.
HOMES = {
    "zmq": ("control/channel.py",),
    "torch.distributed": ("parallel/",),
    "torch.multiprocessing": (),
    "safetensors": ("checkpoint/",),
    "click": ("cli/",),
    "rich": ("cli/",),
    "pydantic_settings": ("settings.py", "settings_cluster.py"),
    "transformers": ("server/", "builtin/train.py"),
    "fastapi": ("server/",),
    "uvicorn": ("server/",),
    "jinja2": ("server/",),
    "prometheus_client": ("server/",),
    "huggingface_hub": ("checkpoint/",),
    # Pickle decodes into code: it has no place in a system whose nodes listen to each other.
    "pickle": (),
    "marshal": (),
    "shelve": (),
}

PICKLING_FUNCTIONS = {"torch.load", "torch.save", "numpy.load", "np.load"}
# Python 3.11's swallows a cancellation that comes as its work ends (cpython#86296): asyncio.timeout does not.
SWALLOWING_FUNCTIONS = {"asyncio.wait_for"}
PICKLING_METHODS = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "scatter_object_list",
    "send_object_list",
    "recv_object_list",
    "send_pyobj",
    "recv_pyobj",
}

# Settings are read in one module. The others hand the environment on to the processes that they start, except for the
# probe: CUDA_VISIBLE_DEVICES is the driver's and no setting of ours.
ENVIRONMENT_READERS = (
    "settings.py",
    "preflight/probe.py",
    "worker.py",
    "torchrun.py",
    "launcher.py",
    "llm.py",
    "cli/serve.py",
    "cli/generate.py",
    "cli/bench.py",
    "cli/demo.py",
    "cli/doctor.py",
)

# Modules named at run time: commands, the part of the probe that needs torch, and the lazy names of the package.
IMPORTLIB_USERS = ("cli/frame.py", "cli/serve.py", "preflight/probe.py", "__init__.py")

TORCH_FREE = (
    "plan/",
    "control/",
    "cli/",
    "server/",
    "node.py",
    "place.py",
    "introduction.py",
    "launcher.py",
    "llm.py",
    "settings.py",
    "settings_cluster.py",
    "settings_options.py",
    "settings_placement.py",
    "settings_roles.py",
    "settings_values.py",
    "models/registry.py",
    "models/llama.py",
    "models/mistral.py",
    "models/qwen2.py",
    "models/qwen3.py",
    "checkpoint/index.py",
    "engine/sequence.py",
    "engine/block_manager.py",
    "engine/scheduler.py",
    "engine/block_tables.py",
    "engine/draft.py",
    "engine/limits.py",
    "bench/__init__.py",
    "bench/events.py",
    "bench/http.py",
    "bench/in_process.py",
    "bench/load.py",
    "bench/openai_server.py",
    "bench/plot.py",
    "bench/prompts.py",
    "bench/report.py",
    "bench/roofline.py",
    "bench/session.py",
    "preflight/cgroup.py",
    "preflight/consult.py",
    "preflight/crossing.py",
    "preflight/doctor.py",
    "preflight/examine.py",
    "preflight/link.py",
    "preflight/machine.py",
    "preflight/machine_verdicts.py",
    "preflight/model_files.py",
    "preflight/orders.py",
    "preflight/probe.py",
    "preflight/verdicts.py",
    "preflight/words.py",
    "probe.py",
)


@dataclass(frozen=True)
class Source:
    """One file of the package; `name` is its path in the package, with slashes."""

    name: str
    tree: ast.Module

    @property
    def module(self) -> str:
        return "tpdist." + self.name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")

    @property
    def room(self) -> str:
        return self.name.removesuffix(".py").split("/")[0]

    def imports(self) -> Iterator[str]:
        """Dotted names, as far as a statement spells them: `from a import b` counts as a.b."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name}:{node.lineno}: write the whole name of the module"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    def names(self) -> Iterator[str]:
        """Dotted expressions, such as torch.distributed.all_reduce."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Attribute):
                yield ast.unparse(node)


SOURCES = [
    Source(path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(), str(path)))
    for path in sorted(PACKAGE.rglob("*.py"))
]
every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.name)


def lives_in(source: Source, homes: tuple[str, ...]) -> bool:
    return any(source.name == home or (home.endswith("/") and source.name.startswith(home)) for home in homes)


def stands_for(name: str, library: str) -> bool:
    return name == library or name.startswith(library + ".")


@every_source
def test_every_module_has_a_room(source: Source) -> None:
    assert source.room in LEVEL, f"{source.name} stands in no room: give it one in ROOMS"


@every_source
def test_imports_point_downward(source: Source) -> None:
    for name in source.imports():
        if not name.startswith("tpdist."):
            continue
        room = name.split(".")[1]
        if room in LEVEL:
            assert LEVEL[room] <= LEVEL[source.room], f"{source.name} imports {name}, which stands above it"


@every_source
def test_every_outside_library_is_used_at_its_home_only(source: Source) -> None:
    for name in (*source.imports(), *source.names()):
        for library, homes in HOMES.items():
            if stands_for(name, library):
                assert lives_in(source, homes), f"{source.name} uses {name}, whose home is {homes or 'nowhere'}"


@every_source
def test_no_import_hides_in_a_function(source: Source) -> None:
    for function in ast.walk(source.tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for node in ast.walk(function):
                hidden = isinstance(node, ast.Import | ast.ImportFrom)
                assert not hidden, f"{source.name}: import in {function.name}, line {function.lineno}"


@every_source
def test_modules_are_named_at_run_time_only_where_that_is_the_point(source: Source) -> None:
    used = {name for name in source.names() if name.endswith(".import_module")}
    called = {node.id for node in ast.walk(source.tree) if isinstance(node, ast.Name)} & {"__import__", "import_module"}
    assert not used | called or lives_in(source, IMPORTLIB_USERS), f"{source.name} uses {used | called}"


@every_source
def test_the_environment_is_read_at_one_place(source: Source) -> None:
    names = {*source.names(), *source.imports()}
    used = names & {"os.environ", "os.getenv", "os.environb", "os.putenv"}
    assert not used or lives_in(source, ENVIRONMENT_READERS), f"{source.name} uses {used}"


@every_source
def test_nothing_is_unpickled(source: Source) -> None:
    for name in source.names():
        called = name.split(".")[-1]
        assert name not in PICKLING_FUNCTIONS, f"{source.name} uses {name}, which reads or writes pickles"
        assert called not in PICKLING_METHODS, f"{source.name} uses {name}, which sends pickles"


@every_source
def test_no_cancellation_is_swallowed(source: Source) -> None:
    used = SWALLOWING_FUNCTIONS.intersection(source.names())
    assert not used, f"{source.name} uses {used}: use asyncio.timeout"


@every_source
def test_torch_free_modules_do_not_name_torch(source: Source) -> None:
    if lives_in(source, TORCH_FREE):
        named = [name for name in source.imports() if stands_for(name, "torch")]
        assert not named, f"{source.name} imports {named}"


def modules_after_importing(module: str, unwanted: tuple[str, ...]) -> str:
    program = f"import sys, {module}\nprint(*[name for name in {unwanted} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


LEAN = [source.module for source in SOURCES if lives_in(source, TORCH_FREE)]


def test_torch_free_modules_stay_so_through_all_that_they_import() -> None:
    """One process for all: they are many, and none of them may bring torch in."""
    program = (
        "import importlib, sys\n"
        f"for module in {LEAN}:\n"
        "    importlib.import_module(module)\n"
        "    assert 'torch' not in sys.modules, f'{module} imports torch'\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["tpdist.rank", "tpdist.engine.runner", "tpdist.models.decoder"])
def test_ranks_import_no_tokenizer_and_no_web_server(module: str) -> None:
    if module not in {source.module for source in SOURCES}:
        pytest.skip(f"{module} is not written")
    assert modules_after_importing(module, ("transformers", "fastapi", "uvicorn", "click", "pydantic_settings")) == ""


def test_the_command_line_starts_without_heavy_imports() -> None:
    heavy = ("torch", "transformers", "fastapi", "uvicorn", "zmq", "numpy", "pydantic_settings", "huggingface_hub")
    assert modules_after_importing("tpdist.__main__", heavy) == ""


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (test_every_module_has_a_room, "stray.py", ""),
        (test_imports_point_downward, "plan/x.py", "from tpdist.control import agent"),
        (test_imports_point_downward, "control/x.py", "from tpdist import cli"),
        (test_every_outside_library_is_used_at_its_home_only, "engine/x.py", "import zmq.asyncio"),
        (test_every_outside_library_is_used_at_its_home_only, "layers/x.py", "torch.distributed.barrier()"),
        (test_every_outside_library_is_used_at_its_home_only, "control/x.py", "from pickle import loads"),
        (test_no_import_hides_in_a_function, "llm.py", "async def f():\n    import json"),
        (test_modules_are_named_at_run_time_only_where_that_is_the_point, "llm.py", "importlib.import_module('zmq')"),
        (test_the_environment_is_read_at_one_place, "rank.py", "from os import environ"),
        (test_the_environment_is_read_at_one_place, "plan/x.py", "x = os.environ['HOME']"),
        (test_nothing_is_unpickled, "checkpoint/x.py", "torch.load('x')"),
        (test_nothing_is_unpickled, "control/channel.py", "socket.recv_pyobj()"),
        (test_torch_free_modules_do_not_name_torch, "plan/x.py", "from torch import nn"),
    ],
)
def test_each_rule_notices_what_it_forbids(rule: Callable[[Source], None], name: str, text: str) -> None:
    with pytest.raises(AssertionError):
        rule(Source(name, ast.parse(text)))
