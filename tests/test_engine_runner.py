"""Runner and engine with a stand-in for the model: order of plans, what is asked of the model, steps in flight."""

from collections import deque
from collections.abc import Callable, Sequence

import pytest
import torch
from decode_steps import random_decoder
from torch import Tensor

from tpdist.control.messages import Generate, SequenceStart, SlotBlocks, SlotWork, StepPlan, StepResult, TokenOutput
from tpdist.engine.engine import Engine, LocalExecutor
from tpdist.engine.kv_cache import allocate
from tpdist.engine.runner import PlanGapError, Runner
from tpdist.engine.scheduler import Scheduler
from tpdist.layers.attention import AttentionContext, gather_attention
from tpdist.parallel.group import RankGroup, SingleGroup
from tpdist.plan.stages import Stage, stages_of, whole
from tpdist.sampling_params import SamplingParams

VOCAB_SIZE = 50
CPU = torch.device("cpu")


class NextToken:
    """A model whose greedy answer counts upwards; it remembers for what it was asked logits."""

    def __init__(self, *, sampling_rank: bool = True) -> None:
        self.sampling_rank = sampling_rank
        self.asked: list[Tensor] = []

    def __call__(
        self,
        token_ids: Tensor,
        *,
        positions: Tensor,
        attention: AttentionContext,
        caches: Sequence[tuple[Tensor, ...]],
    ) -> Tensor:
        assert token_ids.shape == positions.shape == attention.slot_mapping.shape
        return token_ids.unsqueeze(1)

    def logits(self, hidden: Tensor) -> Tensor | None:
        self.asked.append(hidden)
        if not self.sampling_rank:
            return None
        return torch.nn.functional.one_hot((hidden[:, 0] + 1) % VOCAB_SIZE, VOCAB_SIZE).float()


class SecondOfTwo(SingleGroup):
    """Rank 1 of 2, which is told that the sampled token is 33."""

    def __init__(self) -> None:
        RankGroup.__init__(self, rank=1, size=2)

    def broadcast(self, x: Tensor) -> Tensor:
        return x.fill_(33)


def runner(model: NextToken, *, group: RankGroup | None = None) -> Runner:
    cache = allocate([], num_blocks=20, block_size=4, dtype=torch.float32, device=CPU)
    return Runner(
        model, group=group or SingleGroup(), cache=cache, max_num_seqs=4, max_model_len=64, epoch=3, device=CPU
    )


def scheduler(**changes: int) -> Scheduler:
    sizes = {"num_blocks": 20, "block_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 8, "max_model_len": 64}
    return Scheduler(**(sizes | changes), vocab_size=VOCAB_SIZE, epoch=3)


def request(name: str, prompt: Sequence[int], *, max_tokens: int = 4) -> Generate:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
    return Generate(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling)


def run(engine: Engine) -> list[TokenOutput]:
    outputs: list[TokenOutput] = []
    while True:
        step = engine.step()
        outputs.extend(step.outputs if step else ())
        if engine.idle:
            return outputs


def prefill(step: int, *, epoch: int = 3, sample: bool = True) -> StepPlan:
    start = SequenceStart(0, bytes(8), 2, 0, SamplingParams(temperature=0), ())
    work = SlotWork(0, 0, 2, True) if sample else SlotWork(0, 0, 1, False)
    return StepPlan(epoch=epoch, step=step, start=(start,), blocks=(SlotBlocks(0, (0,)),), work=(work,))


@pytest.mark.parametrize(("epoch", "step"), [(3, 2), (3, 0), (4, 1), (2, 1)])
def test_a_plan_that_is_not_the_next_one_is_refused_with_both_numbers(epoch: int, step: int) -> None:
    wrong = f"step {step} in epoch {epoch}, but step 1 in epoch 3 is next"
    with pytest.raises(PlanGapError, match=wrong):
        runner(NextToken()).execute(prefill(step, epoch=epoch))


def test_a_chunk_that_does_not_end_the_prompt_asks_for_no_logits() -> None:
    model = NextToken()
    assert runner(model).execute(prefill(1, sample=False)) == StepResult(1, ())
    assert model.asked == []


def test_logits_are_asked_for_the_last_token_of_each_sequence_only() -> None:
    model = NextToken()
    engine = Engine(scheduler(), LocalExecutor(runner(model)))
    engine.add(request("a", [1, 2, 3]))
    engine.add(request("b", [5, 6]))
    engine.step()
    assert [len(hidden) for hidden in model.asked] == [2]


def test_a_rank_that_does_not_sample_goes_on_from_the_broadcast_token() -> None:
    model = NextToken(sampling_rank=False)
    second = runner(model, group=SecondOfTwo())
    assert second.execute(prefill(1)) is None
    decode = StepPlan(epoch=3, step=2, work=(SlotWork(0, 2, 1, True),))
    assert second.execute(decode) is None
    assert [hidden.tolist() for hidden in model.asked] == [[[0]], [[33]]]


def prompt_logprobs_plan(num_tokens: int, *, step: int = 1) -> StepPlan:
    """Slot 0 asks for nothing; slot 1 for the log-probabilities of its prompt, which counts upwards from 40."""
    plain = SequenceStart(0, bytes(8), 2, 0, SamplingParams(temperature=0), ())
    prompt = b"".join(((40 + i) % VOCAB_SIZE).to_bytes(4, "little") for i in range(num_tokens))
    asking = SequenceStart(1, prompt, num_tokens, 0, SamplingParams(temperature=0, prompt_logprobs=0), ())
    return StepPlan(
        epoch=3,
        step=step,
        start=(plain, asking),
        blocks=(SlotBlocks(0, (0,)), SlotBlocks(1, tuple(range(1, 17)))),
        work=(SlotWork(0, 0, 2, True), SlotWork(1, 0, num_tokens, True)),
    )


def test_logits_of_a_prompt_are_asked_for_in_parts_and_alike_on_every_rank() -> None:
    first, second = NextToken(), NextToken(sampling_rank=False)
    result = runner(first).execute(prompt_logprobs_plan(60))
    assert runner(second, group=SecondOfTwo()).execute(prompt_logprobs_plan(60)) is None
    assert [len(hidden) for hidden in first.asked] == [32, 27, 2]
    assert all(torch.equal(a, b) for a, b in zip(first.asked, second.asked, strict=True))
    assert torch.equal(torch.cat(first.asked[:2]).squeeze(1), torch.arange(40, 99) % VOCAB_SIZE)
    assert result is not None
    assert [*result.prompt_logprobs] == [1]
    expected = [((token % VOCAB_SIZE,), 1) for token in range(41, 100)]
    assert [(entry.token_ids, entry.rank) for entry in result.prompt_logprobs[1]] == expected


def test_a_decode_after_the_prompt_adds_no_logprobs_of_the_prompt() -> None:
    model = NextToken()
    both = runner(model)
    both.execute(prompt_logprobs_plan(6))
    model.asked.clear()
    result = both.execute(StepPlan(epoch=3, step=2, work=(SlotWork(1, 6, 1, True), SlotWork(0, 2, 1, True))))
    assert result == StepResult(2, ((1, 47), (0, 2)))
    assert [len(hidden) for hidden in model.asked] == [2]


def test_warming_up_leaves_no_trace_in_the_slots() -> None:
    warm = runner(NextToken())
    warm.warm_up(10_000)
    engine = Engine(scheduler(), LocalExecutor(warm))
    engine.add(request("a", [1, 2, 3]))
    assert [token for output in run(engine) for token in output.token_ids] == [4, 5, 6, 7]


def test_the_engine_returns_nothing_when_it_is_idle() -> None:
    engine = Engine(scheduler(), LocalExecutor(runner(NextToken())))
    assert engine.step() is None
    assert not engine.has_work


def test_requests_that_come_and_go_between_steps_get_their_answers() -> None:
    engine = Engine(scheduler(), LocalExecutor(runner(NextToken())))
    engine.add(request("a", range(10), max_tokens=3))
    engine.add(request("gone", [1]))
    engine.step()
    engine.abort("gone")
    engine.abort("never was there")
    engine.add(request("b", [20], max_tokens=2))
    outputs = run(engine)
    assert [output.token_ids[0] for output in outputs if output.request_id == "a"] == [10, 11, 12]
    assert [output.token_ids[0] for output in outputs if output.request_id == "b"] == [21, 22]
    assert [output.finish_reason for output in outputs].count("length") == 2
    assert engine.stats().kv_cache_usage == 0


def test_each_plan_is_sent_to_the_other_ranks_before_this_rank_runs_it() -> None:
    sent: list[int] = []
    local = runner(NextToken())

    def send(plan: StepPlan) -> None:
        assert local.step == plan.step - 1
        sent.append(plan.step)

    engine = Engine(scheduler(), LocalExecutor(local, send=send))
    engine.add(request("a", [1], max_tokens=3))
    run(engine)
    assert sent == [1, 2, 3]


class TwoInFlight:
    """An executor whose results come late, as those of a pipeline do: not before the next step, or the next look."""

    max_in_flight = 2

    def __init__(self, local: Runner) -> None:
        self.local = local
        self.results: deque[StepResult | None] = deque()
        self.just_submitted = False
        self.most = 0

    def submit(self, plan: StepPlan) -> None:
        self.results.append(self.local.execute(plan))
        self.most = max(self.most, len(self.results))
        self.just_submitted = True

    def collect(self) -> StepResult | None:
        late, self.just_submitted = self.just_submitted and len(self.results) < 2, False
        return None if late else self.results.popleft()


def test_with_two_steps_in_flight_two_sequences_take_turns() -> None:
    executor = TwoInFlight(runner(NextToken()))
    engine = Engine(scheduler(max_num_batched_tokens=4), executor)
    engine.add(request("a", [1, 2, 3, 4]))
    engine.add(request("b", [11, 12, 13, 14]))
    outputs = run(engine)
    assert executor.most == 2
    for name, expected in (("a", [5, 6, 7, 8]), ("b", [15, 16, 17, 18])):
        assert [output.token_ids[0] for output in outputs if output.request_id == name] == expected


class Handing:
    """The pipe between two stages in one process: what the first sends, the second receives."""

    def __init__(self, waiting: deque[tuple[int, Tensor]], *, is_first: bool) -> None:
        self.is_first, self.is_last = is_first, not is_first
        self._waiting = waiting

    def send(self, x: Tensor, *, step: int) -> None:
        self._waiting.append((step, x.clone()))

    def receive(self, num_tokens: int, *, step: int) -> Tensor:
        sent, x = self._waiting.popleft()
        assert (sent, len(x)) == (step, num_tokens)
        return x


class TwoStages:
    """Two runners as one executor; the second runs a step when its result is asked for."""

    def __init__(self, first: Runner, second: Runner) -> None:
        self.stages = first, second
        self.plans: deque[StepPlan] = deque()
        self.max_in_flight = 2

    def submit(self, plan: StepPlan) -> None:
        assert self.stages[0].execute(plan) is None
        self.plans.append(plan)

    def collect(self) -> StepResult | None:
        return self.stages[1].execute(self.plans.popleft())


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("num_blocks", [400, 40], ids=["room for all", "with preemption"])
def test_tokens_are_the_same_with_recorded_decodes(num_blocks: int, num_stages: int) -> None:
    def stage_runner(stage: Stage, pipe: Handing | None, *, use_graphs: bool) -> Runner:
        with torch.inference_mode():
            model = random_decoder(
                group=SingleGroup(),
                windows=(None, 5, 9),
                num_kv_heads=2,
                attend=gather_attention,
                dtype=torch.float32,
                device=CPU,
                stage=stage,
            )
        cache = allocate(model.cache_shapes(), num_blocks=num_blocks, block_size=4, dtype=torch.float32, device=CPU)
        return Runner(
            model,
            group=SingleGroup(),
            cache=cache,
            max_num_seqs=6,
            max_model_len=100,
            epoch=3,
            device=CPU,
            pipe=pipe,
            use_graphs=use_graphs,
            record=record,
        )

    def make_executor(*, use_graphs: bool) -> LocalExecutor | TwoStages:
        if num_stages == 1:
            return LocalExecutor(stage_runner(whole(3), None, use_graphs=use_graphs))
        waiting: deque[tuple[int, Tensor]] = deque()
        first, second = (
            stage_runner(stage, Handing(waiting, is_first=stage.is_first), use_graphs=use_graphs)
            for stage in stages_of((1, 2), 3)
        )
        return TwoStages(first, second)

    def answers(*, use_graphs: bool) -> dict[str, list[int]]:
        executor = make_executor(use_graphs=use_graphs)
        sizes = {"num_blocks": num_blocks, "max_num_seqs": 6, "max_num_batched_tokens": 18, "max_model_len": 100}
        scheduler = Scheduler(**sizes, block_size=4, vocab_size=300, epoch=3, num_stages=num_stages)
        engine = Engine(scheduler, executor)
        for index in range(12):
            prompt = tuple((7 * index + place) % 300 for place in range(1 + 3 * index))
            sampling = SamplingParams(max_tokens=30, temperature=float(index % 2), seed=index)
            engine.add(Generate(request_id=str(index), prompt_token_ids=prompt, sampling=sampling))
        tokens: dict[str, list[int]] = {}
        for output in run(engine):
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        return tokens

    replays = 0

    def record(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def replay() -> Tensor:
            nonlocal replays
            replays += 1
            return function()

        return replay

    expected = answers(use_graphs=False)
    assert replays == 0
    assert answers(use_graphs=True) == expected
    assert replays > 20
