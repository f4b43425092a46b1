"""A step while the scheduler plans it, and what it remembers of the step until the result is back.

It knows what a plan may hold, not who ought to be in it.
"""

from dataclasses import dataclass, field

from tpdist.control.messages import SequenceStart, SlotBlocks, SlotWork, StepPlan
from tpdist.engine.sequence import Sequence


@dataclass
class InFlight:
    """Who waits for a result of one step, by slot. `scoring`: sequences that want the log-probabilities of their
    prompt, each with the first position that it ran."""

    step: int
    sampling: dict[int, Sequence] = field(default_factory=dict)
    scoring: dict[int, tuple[Sequence, int]] = field(default_factory=dict)


class Draft:
    """`budget` is how many tokens the step may still take, `num_started` how many known tokens the sequences have that
    start in it."""

    def __init__(self, *, step: int, budget: int) -> None:
        self.budget = budget
        self.num_started = 0
        self.in_flight = InFlight(step)
        self._start: list[SequenceStart] = []
        self._blocks: list[SlotBlocks] = []
        self._work: list[SlotWork] = []

    def start(self, sequence: Sequence, slot: int) -> None:
        self.num_started += sequence.num_tokens
        self._start.append(sequence.start_in(slot))

    def add_blocks(self, sequence: Sequence, blocks: list[int]) -> None:
        """Tell the ranks of `blocks` that `sequence` got behind those it had, if there are any."""
        assert sequence.slot is not None
        if blocks:
            self._blocks.append(SlotBlocks(sequence.slot, tuple(blocks)))

    def work(self, sequence: Sequence, count: int) -> None:
        """Run the next `count` tokens of `sequence`, which has blocks for them; sample if they are the last."""
        slot, start = sequence.slot, sequence.num_scheduled
        assert slot is not None
        sample = count == sequence.num_unscheduled
        self._work.append(SlotWork(slot, start, count, sample))
        self.budget -= count
        if sequence.prefilling and sequence.wants_score_after(start):
            self.in_flight.scoring[slot] = (sequence, start)
        sequence.num_scheduled = start + count
        if sample:
            sequence.prefilling, sequence.sample_pending = False, True
            self.in_flight.sampling[slot] = sequence

    def plan(self, *, epoch: int, free: list[int], sampled: list[tuple[int, int]]) -> StepPlan | None:
        """The finished step, or None if nothing is to run. `free`: slots given up since the plan before; `sampled`:
        tokens that the ranks do not know yet."""
        if not self._work:
            assert not self._start, "a sequence was started, but its plan is not sent"
            return None
        return StepPlan(
            epoch=epoch,
            step=self.in_flight.step,
            sampled=tuple(sampled),
            free=tuple(free),
            start=tuple(self._start),
            blocks=tuple(self._blocks),
            work=tuple(self._work),
        )
