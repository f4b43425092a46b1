"""The engine on rank 0: requests in, tokens out, with the scheduler and an executor in between.

It knows nothing of sockets: whoever owns it feeds requests between steps and passes the outputs on.
"""

from collections.abc import Callable
from typing import Protocol

from tpdist.control.messages import EngineStats, Generate, StepOutputs, StepPlan, StepResult
from tpdist.engine.runner import Runner
from tpdist.engine.scheduler import Scheduler


class Executor(Protocol):
    """Runs plans on all ranks, in order."""

    @property
    def max_in_flight(self) -> int:
        """How many plans may be submitted beyond the last one collected."""

    def submit(self, plan: StepPlan) -> None: ...

    def collect(self) -> StepResult | None:
        """The result of the oldest plan submitted and not yet collected, if it is there. Does not wait."""


class LocalExecutor:
    """Runs this rank's share in this process, one step at a time. `send` passes each plan to the other ranks first."""

    max_in_flight = 1

    def __init__(self, runner: Runner, *, send: Callable[[StepPlan], None] | None = None) -> None:
        self._runner = runner
        self._send = send
        self._result: StepResult | None = None

    def submit(self, plan: StepPlan) -> None:
        assert self._result is None, "the step before is not collected"
        if self._send is not None:
            self._send(plan)
        self._result = self._runner.execute(plan)
        assert self._result is not None, "this rank does not sample"

    def collect(self) -> StepResult | None:
        result, self._result = self._result, None
        return result


class PipelineExecutor:
    """Runs the first stage in this process, while the others work on earlier steps. `send` passes each plan to the
    other ranks first; `receive` gives the next result of the last stage, if one has come."""

    def __init__(
        self,
        runner: Runner,
        *,
        num_stages: int,
        send: Callable[[StepPlan], None],
        receive: Callable[[], StepResult | None],
    ) -> None:
        self.max_in_flight = num_stages
        self._runner = runner
        self._send = send
        self._receive = receive

    def submit(self, plan: StepPlan) -> None:
        self._send(plan)
        self._runner.execute(plan)

    def collect(self) -> StepResult | None:
        return self._receive()


class Engine:
    """Keeps up to `executor.max_in_flight` steps in flight. Not thread-safe.

    `num_in_flight`: steps without a result. `idle`: the last `step` had nothing to do, and so has the next unless a
    request or a result comes.
    """

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self.num_in_flight = 0
        self.idle = True

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self.num_in_flight > 0

    def add(self, request: Generate) -> None:
        """Queue a request. Raises RequestError if it can never run."""
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Forget a request; it has no more outputs. Unknown ids are ignored."""
        self._scheduler.abort(request_id)

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def step(self) -> StepOutputs | None:
        """Submit what can run, and return what the oldest step made if that is known; None otherwise."""
        submitted = self._submit()
        result = self._executor.collect() if self.num_in_flight else None
        self.idle = not submitted and result is None
        if result is None:
            return None
        self.num_in_flight -= 1
        return StepOutputs(step=result.step, outputs=self._scheduler.update(result), stats=self._scheduler.stats())

    def _submit(self) -> bool:
        """Whether there was anything to submit. One step at a time: its result may be there by then."""
        if self.num_in_flight == self._executor.max_in_flight or (plan := self._scheduler.schedule()) is None:
            return False
        self._executor.submit(plan)
        self.num_in_flight += 1
        return True
