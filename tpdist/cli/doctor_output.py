"""A diagnosis on the terminal: one table, then what the planner says. Shows and decides nothing."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tpdist.preflight.words import Diagnosis, Line

STYLES = {"green": "green", "red": "bold red", "skipped": "yellow"}
MARKS = {"green": "ok", "red": "RED", "skipped": "-"}


def print_diagnosis(diagnosis: Diagnosis, *, console: Console | None = None) -> None:
    """All of it on stdout. The first column says in words what its colour says."""
    console = console or Console(highlight=False)
    console.print(lines_table(diagnosis.lines))
    for sentence in diagnosis.advice:
        console.print(f"plan: {sentence}", markup=False)
    console.print(summary(diagnosis.lines), markup=False)


def lines_table(lines: tuple[Line, ...]) -> Table:
    """A row for each line; below what was found, a red one has the next step. A name stands once for its lines."""
    table = Table("", "check", "where", "found", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    before = None
    for line in lines:
        found = Text(line.found)
        if line.next_step:
            found.append(f"\n-> {line.next_step}", style="bold")
        place = "" if line.where == before and line.state != "red" else line.where
        table.add_row(Text(MARKS[line.state], style=STYLES[line.state]), Text(line.check), Text(place), found)
        before = line.where
    return table


def summary(lines: tuple[Line, ...]) -> str:
    """How many lines are red."""
    red = sum(line.state == "red" for line in lines)
    return f"{red} of {len(lines)} lines are red" if red else f"all {len(lines)} lines are green"
