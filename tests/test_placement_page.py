"""docs/placement.md shows what was really printed: its blocks run, from top to bottom, and print what stands there.

    python tests/test_placement_page.py      run them, and write into the page what they print now

A block of bash or Python that runs is marked `<!-- runs: NAME -->`; the block of text behind it, if there is one, is
all that it prints, but for spaces at the ends of lines. Bash blocks run one by one in one folder, stdout and stderr
together. Python blocks are one session in the same folder, of which only stdout counts. A picture that a block makes
is in docs/ under the name that PICTURES gives it.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pytest

from tpdist import bigmodel, builtin, multi_gpu

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/placement.md"
PICTURES = {"plan.svg": ROOT / "docs/placement-plan.svg"}
RUN_S = 120
NUM_PORTS = 5

BLOCK = re.compile(
    r"<!-- runs: (?P<name>[\w-]+) -->\n```(?P<language>sh|python)\n(?P<code>.*?)```\n"
    r"(?P<shown>\n```text\n(?P<output>.*?)```\n)?",
    re.DOTALL,
)

# Runs each line of JSON on stdin as Python, and answers with what it printed.
SESSION = """
import contextlib, io, json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
names = {"__name__": "__main__"}
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(json.loads(line), "docs/placement.md", "exec"), names)
    print(json.dumps(printed.getvalue()), file=answers, flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block of the page. `output`: what it prints, as the page shows it."""

    name: str
    language: str
    code: str
    output: str


class Runs(Protocol):
    """Runs a block and returns what it prints."""

    def __call__(self, block: Block) -> str: ...


def page() -> str:
    return PAGE.read_text(encoding="utf-8")


def blocks() -> list[Block]:
    """The blocks that run, in their order."""
    return [
        Block(name=found["name"], language=found["language"], code=found["code"], output=found["output"] or "")
        for found in BLOCK.finditer(page())
    ]


def free_ports() -> int:
    """The first of NUM_PORTS that are free, below those that the kernel gives away by itself."""
    for first in range(21000, 32000, NUM_PORTS):
        with ExitStack() as stack:
            try:
                for port in range(first, first + NUM_PORTS):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first
    raise AssertionError("no free ports")


def environment() -> dict[str, str]:
    """A shell with .venv/bin on its PATH, no settings of tpdist, no GPU, and lines of 80 characters."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("TPDIST_", "MISTRALRS_"))}
    path = f"{Path(sys.executable).parent}:{clean['PATH']}"
    return {
        **clean,
        "PATH": path,
        "MODEL": str(builtin.path()),
        "PORT": str(free_ports()),
        "COLUMNS": "80",
        "PYTHONUTF8": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "no_proxy": "127.0.0.1",
    }


def without_line_ends(text: str) -> str:
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def run_shell(code: str, folder: Path, env: dict[str, str]) -> str:
    """What a script prints. Nothing of it is left afterwards."""
    command = ["bash", "-uo", "pipefail", "-c", code]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as process:
        try:
            return process.communicate(timeout=RUN_S)[0]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def session(folder: Path) -> Iterator[Runs]:
    """Bash and Python in a folder, until it ends."""
    env = environment()
    command = [sys.executable, "-c", SESSION]
    with ExitStack() as stack:
        log = stack.enter_context((folder / "session.log").open("w+"))
        python = stack.enter_context(
            subprocess.Popen(
                command, cwd=folder, env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        )
        stack.callback(python.kill)

        def run(block: Block) -> str:
            if block.language == "sh":
                return without_line_ends(run_shell(block.code, folder, env))
            assert python.stdin is not None
            assert python.stdout is not None
            python.stdin.write(json.dumps(block.code) + "\n")
            python.stdin.flush()
            answer = python.stdout.readline()
            assert answer, f"block {block.name} failed: {(folder / 'session.log').read_text()[-3000:]}"
            printed: str = json.loads(answer)
            return without_line_ends(printed)

        yield run


# -- what runs --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """What all blocks printed, by name, and the pictures that they made."""

    printed: dict[str, str]
    pictures: dict[str, str]


def run_all(folder: Path, *, tell: Callable[[str], None] = lambda _: None) -> Ran:
    printed = {}
    with session(folder) as run:
        for block in blocks():
            tell(block.name)
            printed[block.name] = run(block)
    return Ran(printed, {name: (folder / name).read_text(encoding="utf-8") for name in PICTURES})


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return run_all(tmp_path_factory.mktemp("page"))


@pytest.mark.e2e
@pytest.mark.parametrize("block", blocks(), ids=lambda block: block.name)
def test_a_block_prints_what_the_page_shows(ran: Ran, block: Block) -> None:
    assert ran.printed[block.name] == block.output


@pytest.mark.e2e
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_the_one_that_its_block_makes(ran: Ran, name: str) -> None:
    assert ran.pictures[name] == PICTURES[name].read_text(encoding="utf-8")


# -- what stands on the page ------------------------------------------------------------------------------------------


def test_every_block_of_output_belongs_to_a_block_that_runs() -> None:
    names = [block.name for block in blocks()]
    assert len(names) == len(set(names)) > 30
    assert page().count("```text\n") == sum(bool(found["shown"]) for found in BLOCK.finditer(page()))


def test_the_page_names_every_function_of_transformer_lens() -> None:
    functions = {
        name
        for name, value in vars(multi_gpu).items()
        if callable(value) and not name.startswith("_") and getattr(value, "__module__", "") == multi_gpu.__name__
    }
    code = "".join(block.code for block in blocks())
    missing = {name for name in functions if f"{name}(" not in code}
    assert len(functions) == 9
    assert not missing


def test_the_page_names_only_what_bigmodel_has() -> None:
    section = page().partition("\n## Any torch module")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.+?`) +\|", section, re.MULTILINE)
    shown = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert shown == set(bigmodel.__all__)


@pytest.mark.parametrize("name", re.findall(r"!\[[^\]]*\]\((\S+\.svg)\)", page()))
def test_a_drawing_is_well_formed_and_describes_itself(name: str) -> None:
    drawing = ElementTree.parse(PAGE.parent / name).getroot()
    assert {"title", "desc"} <= {child.tag.rpartition("}")[2] for child in drawing}


# -- writing it -------------------------------------------------------------------------------------------------------


def fill(text: str, printed: dict[str, str]) -> str:
    """The page with what its blocks print."""

    def with_output(found: "re.Match[str]") -> str:
        code = f"<!-- runs: {found['name']} -->\n```{found['language']}\n{found['code']}```\n"
        output = printed[found["name"]]
        return f"{code}\n```text\n{output}```\n" if output else code

    return BLOCK.sub(with_output, text)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        made = run_all(Path(folder), tell=lambda name: print(name, flush=True))
        for name, target in PICTURES.items():
            shutil.copyfile(Path(folder) / name, target)
    PAGE.write_text(fill(page(), made.printed), encoding="utf-8")


if __name__ == "__main__":
    main()
