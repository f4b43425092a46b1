"""The table of figures in docs/reliability.md, between two comments that mark it."""

from collections.abc import Sequence
from pathlib import Path

from e2e.faults.fleet import Figures

BEGIN, END = "<!-- figures: made by the suite -->", "<!-- end of figures -->"
HEADINGS = (
    "what happens",
    "noticed",
    "serves again",
    "answered",
    "failed",
    "refused",
    "retried",
    "wrong",
    "longest wait",
)


def write_table(page: Path, figures: Sequence[Figures]) -> None:
    """Put the table of these cases into the page; cases that were not run keep their line."""
    before, _, rest = page.read_text().partition(BEGIN)
    old, _, after = rest.partition(END)
    rows = {line.split("|")[1].strip(): line for line in old.splitlines() if line.startswith("| ")}
    rows.pop(HEADINGS[0], None)
    rows |= {each.case: _row(each) for each in figures}
    head = [f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}"]
    page.write_text("\n".join([f"{before}{BEGIN}", *head, *rows.values(), f"{END}{after}"]))


def _row(each: Figures) -> str:
    noticed = "-" if each.detected_s is None else f"{each.detected_s} s"
    cells = (
        *(each.case, noticed, f"{each.recovered_s} s", each.answered, each.failed, each.refused, each.retried),
        *(each.wrong, f"{each.longest_wait_s} s"),
    )
    return f"| {' | '.join(map(str, cells))} |"
