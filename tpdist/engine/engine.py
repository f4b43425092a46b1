"""The engine on rank 0: requests in, tokens out, with the scheduler and an executor in between.

It knows nothing of sockets: whoever owns it feeds requests between steps and passes the outputs on.
"""

from collections.abc import Callable
from typing import Protocol

from tpdist.control.messages import EngineStats, Generate, StepOutputs, StepPlan
from tpdist.engine.runner import Runner
from tpdist.engine.scheduler import Scheduler, StepResult


class Executor(Protocol):
    """Runs plans on all ranks, in order."""

    @property
    def max_in_flight(self) -> int:
        """How many plans may be submitted beyond the last one collected."""

    def submit(self, plan: StepPlan) -> None: ...

    def collect(self) -> StepResult:
        """The result of the oldest plan submitted and not yet collected; waits for it."""


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

    def collect(self) -> StepResult:
        result, self._result = self._result, None
        assert result is not None, "no step was submitted, or this rank does not sample"
        return result


class Engine:
    """Keeps up to `executor.max_in_flight` steps in flight. Not thread-safe."""

    def __init__(self, scheduler: Scheduler, executor: Executor) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._num_in_flight = 0

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._num_in_flight > 0

    def add(self, request: Generate) -> None:
        """Queue a request. Raises RequestError if it can never run."""
        self._scheduler.add(request)

    def abort(self, request_id: str) -> None:
        """Forget a request; it has no more outputs. Unknown ids are ignored."""
        self._scheduler.abort(request_id)

    def stats(self) -> EngineStats:
        return self._scheduler.stats()

    def step(self) -> StepOutputs | None:
        """Submit what can run, wait for the oldest step and return what it made; None if there is nothing to do."""
        while self._num_in_flight < self._executor.max_in_flight and (plan := self._scheduler.schedule()) is not None:
            self._executor.submit(plan)
            self._num_in_flight += 1
        if self._num_in_flight == 0:
            return None
        result = self._executor.collect()
        self._num_in_flight -= 1
        return StepOutputs(step=result.step, outputs=self._scheduler.update(result), stats=self._scheduler.stats())
