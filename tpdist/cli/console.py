"""Where a node that serves shows what people like to see beside its log."""

from rich.console import Console


class LogConsole(Console):
    """Standard error. Once nobody reads it any more, nothing is shown, and the program goes on: rich would end it."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)

    def on_broken_pipe(self) -> None:
        self.quiet = True
