"""README and docs/ say what is so: their commands run, their links lead somewhere, and what they list exists."""

import ast
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import settings_table

from tpdist import builtin
from tpdist.cli.frame import COMMANDS
from tpdist.control import messages
from tpdist.control.agent import STARTING
from tpdist.control.state import RANK_PHASES
from tpdist.errors import BY_EXIT_CODE
from tpdist.server.metrics import Metrics
from tpdist.settings import OPTIONS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "tpdist"
README = ROOT / "README.md"
OPERATIONS = ROOT / "docs/operations.md"
ARCHITECTURE = ROOT / "docs/architecture.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# Options of other programs that our pages show.
FOREIGN_FLAGS = {"--nproc-per-node", "--nnodes", "--node-rank", "--master-addr", "--master-port", "--runs", "--warm"}
FOREIGN_FLAGS |= {"--jobid", "--overlap", "--nodes", "--ntasks", "--signal", "--build", "--wait", "--from-file"}
FOREIGN_FLAGS |= {"--reliability", "--soak", "--curve"}
READY_S = 120
RUN_S = 120
STOP_S = 40


def section(page: Path, heading: str) -> str:
    """The text under a heading, up to the next of its level."""
    level = heading.split(" ")[0]
    text = page.read_text(encoding="utf-8").partition(f"\n{heading}\n")[2]
    assert text, f"{page.name} has no {heading!r}"
    return re.split(rf"\n{level} ", text)[0]


def first_cells(text: str) -> list[str]:
    """What stands in the first column of the tables in a text, headings left out."""
    rows = re.findall(r"^\| (.+?) +(?<!\\)\|", text, re.MULTILINE)
    rules = re.findall(r"^\| (.+?) +\|.*\n\|---", text, re.MULTILINE)
    return [row for row in rows if row not in rules]


# -- links and names --------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@every_page
def test_every_link_between_pages_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors(file), f"{page.name} links to {target}; there are {anchors(file)}"


@every_page
def test_every_variable_and_flag_on_a_page_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    variables = {variable for option in OPTIONS.values() for variable in option.variables}
    commands = [command.load() for command in COMMANDS.values()]
    flags = {
        flag for command in commands for param in command.params for flag in (*param.opts, *param.secondary_opts)
    } | FOREIGN_FLAGS
    used = set(re.findall(r"\b(?:TPDIST|MISTRALRS)_[A-Z_]*[A-Z]\b(?!_)", text))
    assert used <= variables | {"MISTRALRS_MN"}, used - variables
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) <= flags | {"--help"}


@every_page
def test_every_command_on_a_page_exists(page: Path) -> None:
    code = re.findall(r"```.*?```|`[^`\n]+`", page.read_text(encoding="utf-8"), re.DOTALL)
    used = set(re.findall(r"(?<!from )(?<!that )\btpdist ([a-z]+)", "\n".join(code)))
    assert used <= set(COMMANDS), used - set(COMMANDS)


def test_the_tree_in_the_readme_is_the_real_one() -> None:
    tree = section(README, "## The tree").partition("```text\n")[2].partition("```")[0]
    ours: list[str] = []
    for line in tree.splitlines():
        names = re.findall(r"(?:^|(?<=  ))(?:[\w*]+\.py|\w+/)(?=\s|$)", line.strip())
        assert names, f"no file in {line!r}"
        assert line.startswith("  ") or (ROOT / names[0]).is_dir(), line
        if line.startswith("  "):
            ours += names
    missing = [name for name in ours if not list(PACKAGE.glob(name.rstrip("/")))]
    assert not missing
    real = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    shown = {path.name for name in ours for path in PACKAGE.glob(name.rstrip("/"))}
    assert real == shown


def test_the_readme_stays_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 225


# -- what the program says of itself ----------------------------------------------------------------------------------


def test_the_table_of_settings_is_up_to_date() -> None:
    shown = settings_table.in_page(OPERATIONS.read_text(encoding="utf-8"))
    assert shown == settings_table.render(), "run: python tests/settings_table.py"


def test_the_exit_codes_are_all_explained() -> None:
    codes = [int(code) for code in first_cells(section(README, "## Exit codes"))]
    assert codes == sorted({0, 1, *BY_EXIT_CODE})


def test_the_metrics_are_all_explained() -> None:
    rendered = Metrics(lambda: STARTING).render().decode()
    real = re.findall(r"^# TYPE (\w+) (\w+)$", rendered, re.MULTILINE)
    shown = re.findall(r"^\| `(\w+)` \| (\w+) \|", section(OPERATIONS, "## Metrics"), re.MULTILINE)
    assert sorted(shown) == sorted(pair for pair in real if not pair[0].endswith("_created"))


def test_the_phases_are_all_explained_in_their_order() -> None:
    shown = first_cells(section(ARCHITECTURE, "## Phases and deadlines"))
    assert shown == ["register", "compare", *RANK_PHASES, "recover", "draining", "ended"]


def test_the_messages_are_all_explained() -> None:
    shown = set(re.findall(r"\b[A-Z][a-z]+(?:[A-Z][a-z]+)*\b", section(ARCHITECTURE, "## Messages")))
    real = {kind.__name__ for kind in messages.Message.__subclasses__()}
    assert real <= shown, real - shown


def texts_in_source() -> tuple[str, list[str]]:
    """All text in the package's source: constants (of an f-string the pieces), and every f-string as a regex."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    constants = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    templates = ["".join(map(as_regex, node.values)) for node in nodes if isinstance(node, ast.JoinedStr)]
    long_enough = [template for template in templates if len(template.replace(".*", "")) > 12]
    return re.sub(r"%[sd]|`", "", "\n".join(constants)), long_enough


def as_regex(piece: ast.expr) -> str:
    return re.escape(str(piece.value)) if isinstance(piece, ast.Constant) else ".*"


def test_the_error_messages_that_are_explained_can_occur() -> None:
    known, templates = texts_in_source()
    shown = re.findall(r"`([^`]+)`", "\n".join(first_cells(section(OPERATIONS, "## Reading errors"))))
    assert len(shown) > 30
    for message in shown:
        pieces = [piece.strip(" :;,()=.") for piece in message.split("...")]
        literal = all(len(piece) < 8 or piece in known for piece in pieces)
        assert literal or any(re.search(template, message) for template in templates), message


def test_the_drawing_is_well_formed_and_describes_itself() -> None:
    drawing = ElementTree.parse(ROOT / "docs/request.svg").getroot()
    names = {child.tag.rpartition("}")[2] for child in drawing}
    assert {"title", "desc"} <= names


# -- commands ---------------------------------------------------------------------------------------------------------


def block(name: str) -> str:
    """The code block of the README that is marked with this name."""
    found = re.search(rf"<!-- runs: {name} -->\n```\w+\n(.*?)```\n", README.read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"the README has no block {name}"
    return found[1]


def environment(**variables: str) -> dict[str, str]:
    """A reader's shell with .venv/bin on its PATH, and no setting of tpdist but `variables`."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("TPDIST_", "MISTRALRS_"))}
    path = f"{Path(sys.executable).parent}:{clean['PATH']}"
    return {**clean, "PATH": path, "TPDIST_DEVICE": "cpu", "no_proxy": "127.0.0.1", **variables}


def run(script: str, folder: Path, **variables: str) -> str:
    """What a script of the README prints. Fails unless it ends with 0."""
    command = ["bash", "-euo", "pipefail", "-c", script]
    env = environment(**variables)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@contextmanager
def running(script: str, folder: Path, **variables: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A script that goes on while this lasts; nothing of it is left afterwards."""
    command = ["bash", "-euo", "pipefail", "-c", script]
    process = subprocess.Popen(command, cwd=folder, env=environment(**variables), start_new_session=True)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def free_ports(count: int) -> list[str]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [str(each.getsockname()[1]) for each in sockets]


def wait_ready(port: str) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        try:
            with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                assert json.loads(answer.read())["state"] == "ready"
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"nobody was ready on port {port} within {READY_S} s")


@pytest.mark.e2e
def test_the_command_for_one_machine_adds_two_numbers(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    assert run(block("generate"), tmp_path) == "579\n"


@pytest.mark.e2e
def test_the_python_example_adds_numbers(tmp_path: Path) -> None:
    script = tmp_path / "example.py"
    script.write_text(block("python"))
    lines = run(f"python {script}", tmp_path).splitlines()
    assert [line.split()[:2] for line in lines] == [["123+456=", "579"], ["7+8=", "15"]]


@pytest.mark.e2e
def test_the_commands_for_several_machines_serve_curl_and_the_openai_client(tmp_path: Path) -> None:
    control, http, other_http = free_ports(3)
    head, worker = (block(name).replace("7100", control) for name in ("head", "worker"))
    curl, openai = (block(name).replace("8000", http) for name in ("curl", "openai"))
    model = str(builtin.path())
    (tmp_path / "client.py").write_text(openai)
    run(block("key"), tmp_path)
    with (
        running(worker, tmp_path, MODEL=model, TPDIST_PORT=other_http, HEAD="127.0.0.1") as second,
        running(head, tmp_path, MODEL=model, TPDIST_PORT=http) as first,
    ):
        wait_ready(http)
        answers = run(curl, tmp_path)
        assert '"content":"579"' in answers
        assert "worker-0" in answers
        assert run("python client.py", tmp_path) == "579"
        os.killpg(first.pid, signal.SIGTERM)
        assert first.wait(STOP_S) in (0, -signal.SIGTERM)
        assert second.wait(STOP_S) == 0
