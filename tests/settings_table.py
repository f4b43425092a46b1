"""The table of all settings in docs/operations.md, made from tpdist.settings.

    python tests/settings_table.py      rewrite the table in the page

test_readme.py fails when the page holds another one.
"""

from collections.abc import Iterator
from pathlib import Path

from tpdist.cli.options import HEADINGS
from tpdist.settings import OPTIONS
from tpdist.settings_options import Option

PAGE = Path(__file__).parents[1] / "docs/operations.md"
BEGIN = "<!-- settings: made by tests/settings_table.py -->\n"
END = "<!-- end of settings -->\n"


def render() -> str:
    """All options as Markdown, one table a section."""
    return "\n".join("\n".join(_section(section)) + "\n" for section in HEADINGS)


def _section(section: str) -> Iterator[str]:
    yield f"**{HEADINGS[section]}**\n"
    yield "| variable | flag | default | meaning |"
    yield "|---|---|---|---|"
    yield from (_row(option) for option in OPTIONS.values() if option.section == section)


def _row(option: Option) -> str:
    variables = " or ".join(f"`{variable}`" for variable in option.variables)
    flag = f"`{option.flag} {option.metavar}`".replace(" `", "`")
    if option.off_flag:
        flag += f", `{option.off_flag}`"
    hidden = option.default is None or (option.is_switch and not option.default)
    default = "" if hidden else f"`{option.default}`"
    cells = (variables, flag, default, option.description)
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def in_page(text: str) -> str:
    """What stands between the two marks of the page."""
    return text.partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}{render()}{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
