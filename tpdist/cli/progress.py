"""A progress bar for loading weights, drawn only when stderr is a terminal."""

from types import TracebackType
from typing import Self

from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from tpdist.cli.console import LogConsole
from tpdist.control.messages import RankUpdate


class LoadProgress:
    """Sums the bytes of this node's ranks into one bar, which goes when all of them have loaded."""

    def __init__(self) -> None:
        self._console = LogConsole()
        self._progress = Progress(
            TextColumn("loading weights"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            redirect_stdout=False,
        )
        self._task: TaskID | None = None
        self._ranks: dict[int, RankUpdate] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop()

    def update(self, update: RankUpdate) -> None:
        """Take a rank's word on how far it is."""
        if not self._console.is_terminal or update.phase not in ("load", "warmup"):
            return
        self._ranks[update.rank] = update
        if all(each.phase == "warmup" for each in self._ranks.values()):
            self._stop()
            return
        if self._task is None:
            self._task = self._progress.add_task("load", total=None)
            self._progress.start()
        done, total = (sum(getattr(each, name) for each in self._ranks.values()) for name in ("done", "total"))
        self._progress.update(self._task, completed=done, total=total or None)

    def _stop(self) -> None:
        if self._task is not None:
            self._progress.stop()
            self._task = None
