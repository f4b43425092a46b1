"""Every error that tpdist raises on purpose, and the exit code that a command ends with for it.

    TpdistError              1   a bug, or nothing more exact is known
      SettingsError          2   wrong usage or settings; seen by one node alone
      PlanError              3   the model cannot be sharded so, or is of an unsupported kind
        DoesNotFitError      3   devices have too little memory; others, or less to hold, would do
      CheckpointError        4   checkpoint missing, damaged, or not the model its config.json describes
      JoinError              5   a node did not join, or disagrees with the head
      LostError              6   a node or rank was lost and the restart budget is spent
      InterruptedByUser    130   Ctrl-C, or another signal before the answer
      RequestError           -   one request cannot be served; becomes an HTTP 400 or 503, never ends a process

A message says what happened with the values, where (node, rank, file, tensor), and what to do next.
"""

from collections.abc import Sequence


class TpdistError(Exception):
    """Base of all; `exit_code` is what a command that ends with this error returns."""

    exit_code = 1


class SettingsError(TpdistError):
    exit_code = 2


class PlanError(TpdistError):
    exit_code = 3


class DoesNotFitError(PlanError):
    """`helps`: what would make it fit, a sentence each. The message ends with them."""

    def __init__(self, message: str, *, helps: Sequence[str] = ()) -> None:
        super().__init__("\n".join([message, *(f"  - {each}" for each in helps)]))
        self.message = message
        self.helps = tuple(helps)


class CheckpointError(TpdistError):
    exit_code = 4


class JoinError(TpdistError):
    exit_code = 5


class LostError(TpdistError):
    exit_code = 6


class InterruptedByUser(TpdistError):
    exit_code = 130


class RequestError(TpdistError):
    """A request that cannot be served. `param` names the field of the request, if one is to blame; `status` is the
    HTTP status: 400 for a wrong request, 503 when the cluster cannot serve it now."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


BY_EXIT_CODE: dict[int, type[TpdistError]] = {
    error.exit_code: error
    for error in (SettingsError, PlanError, CheckpointError, JoinError, LostError, InterruptedByUser)
}


def error_for(exit_code: int, message: str) -> TpdistError:
    """The error whose exit code another process reported, so that every node ends with the first cause."""
    return BY_EXIT_CODE.get(exit_code, TpdistError)(message)
