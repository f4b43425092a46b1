"""Decode steps on a ladder of shapes, with a stand-in for CUDA graphs: recording a function is keeping it.

What a graph relies on shows on a CPU too: inputs come from the one buffer alone, and the operations and their shapes
are the same whatever the step holds. tests/gpu does the same with real graphs.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from decode_steps import LENS, MAX_NUM_SEQS, VOCAB_SIZE, Decodes, keep
from ranks import run_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tpdist.control.messages import SequenceStart, SlotWork
from tpdist.engine import decode_graphs
from tpdist.engine.decode_graphs import CudaRecorder, Recorder, RecordingError, batch_sizes, block_counts
from tpdist.layers.attention import AttentionContext, gather_attention
from tpdist.parallel.group import PeerLostError, RankGroup
from tpdist.sampling_params import SamplingParams

torch.set_num_threads(1)


def try_and_keep(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    function()
    return function


def refuse(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    raise RecordingError("no graphs today")


def spoil(function: Callable[[], Tensor], *, factor: float) -> Callable[[], Tensor]:
    return lambda: function() * factor


@pytest.fixture(autouse=True)
def _inference_mode():
    with torch.inference_mode():
        yield


@pytest.mark.parametrize("num_kv_heads", [1, 2, 8])
@pytest.mark.parametrize("windows", [(None, None, None), (1, 5, None), (300, 16, 300)])
def test_every_batch_size_gives_what_the_eager_path_gives(windows, num_kv_heads):
    decodes = Decodes(windows=windows, num_kv_heads=num_kv_heads)
    for num_seqs in range(1, 10):
        slots = [(5 * place + num_seqs) % MAX_NUM_SEQS for place in range(num_seqs)]
        decodes.check({slot: LENS[slot] for slot in slots})


@pytest.mark.parametrize("length", LENS)
def test_every_length_gives_what_the_eager_path_gives(length):
    Decodes().check({7: length})


def test_nothing_of_an_earlier_step_is_left_in_a_later_one_of_the_same_rung():
    decodes = Decodes()
    for lens in ({0: 200, 1: 250, 2: 9, 3: 8}, {5: 3, 4: 1, 6: 2}, {3: 256, 9: 255, 0: 1, 1: 64}):
        decodes.check(lens)
    assert decodes.num_recorded == 1


def test_sequences_that_grow_token_by_token_follow_the_eager_path_over_the_limits_of_rungs():
    decodes = Decodes()
    for more in range(12):
        lens = {0: 250 + more, 3: 1 + more, 2: 506 + more}
        decodes.check(lens)
        decodes.remember(list(lens), torch.tensor([7 * more, 11 * more, 13 * more]) % VOCAB_SIZE)
    assert decodes.num_recorded == 2, "512 tokens and all 600"


def test_each_rung_is_recorded_once():
    decodes = Decodes()
    for _ in range(3):
        for num_seqs in range(1, 10):
            decodes.run(dict.fromkeys(range(num_seqs), 20))
    assert decodes.num_recorded == len({1, 2, 4, 8, 12})


def test_the_first_step_of_a_rung_leaves_in_the_cache_what_the_eager_path_writes():
    decodes, alone = Decodes(), Decodes(enabled=False)
    lens = {0: 17, 4: 300, 5: 2}
    assert torch.equal(decodes.run(lens), alone.eager(lens))
    torch.testing.assert_close(decodes.cache.layers, alone.cache.layers, rtol=0, atol=0)


class Operations(TorchDispatchMode):
    """Every operation with the shapes that it takes and gives."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [each for each in (*args, result) if isinstance(each, Tensor)]
        self.seen.append((str(func), [tuple(each.shape) for each in tensors]))
        return result


def test_what_is_recorded_does_the_same_operations_whatever_the_step_holds():
    """And none that looks at a value or brings one from the host: a capture would fail, or keep it for ever."""
    seen = []

    def watch(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def watched() -> Tensor:
            with Operations() as operations:
                result = function()
            seen.append(operations.seen)
            return result

        return watched

    decodes = Decodes(watch)
    for lens in ({0: 1, 1: 1, 2: 1}, {5: 255, 3: 7, 9: 256, 4: 100}, {5: 16, 6: 16, 7: 16}):
        decodes.run(lens)
    assert decodes.num_recorded == 1
    assert seen[0] == seen[1] == seen[2]
    names = {name for name, _ in seen[0]}
    assert len(names) > 10
    forbidden = ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero", "equal.", "index.Tensor", "_unique")
    assert not {name for name in names if any(part in name for part in forbidden)}


def test_a_ladder_of_batch_sizes_ends_with_the_most_sequences():
    assert batch_sizes(1) == [1]
    assert batch_sizes(3) == [1, 2, 3]
    assert batch_sizes(8) == [1, 2, 4, 8]
    assert batch_sizes(30) == [1, 2, 4, 8, 16, 24, 30]
    assert batch_sizes(32) == [1, 2, 4, 8, 16, 24, 32]


def test_a_ladder_of_blocks_doubles_up_to_the_longest_sequence():
    assert block_counts(600, block_size=4) == [64, 128, 150]
    assert block_counts(512, block_size=4) == [64, 128]
    assert block_counts(100, block_size=16) == [7]
    assert block_counts(8192, block_size=300) == [1, 2, 4, 8, 16, 28]


@pytest.mark.parametrize(
    ("work", "served"),
    [
        ([SlotWork(0, 9, 1, True)], True),
        ([SlotWork(0, 9, 1, True), SlotWork(1, 599, 1, True)], True),
        ([SlotWork(0, 9, 1, True), SlotWork(1, 0, 2, True)], False),
        ([SlotWork(0, 9, 1, True), SlotWork(1, 4, 1, False)], False),
    ],
    ids=["a decode", "two decodes", "with a prompt", "with a token in the middle of a prompt"],
)
def test_steps_of_nothing_but_last_tokens_are_served(work, served):
    assert Decodes().graphs.serves(work) is served
    assert not Decodes(enabled=False).graphs.serves(work)


def test_steps_that_read_much_are_left_to_the_eager_path(monkeypatch):
    monkeypatch.setattr(decode_graphs, "MAX_GATHERED_KEYS", 2 * 600)
    decodes = Decodes()
    assert decodes.serves({0: 600, 1: 600})
    assert decodes.serves(dict.fromkeys(range(4), 256))
    assert not decodes.serves({0: 600, 1: 1, 2: 1})
    assert not decodes.serves(dict.fromkeys(range(5), 256)), "eight rows are read"
    decodes.check({0: 600, 1: 600})


def test_the_largest_steps_have_room_in_the_buffer(monkeypatch):
    monkeypatch.setattr(decode_graphs, "MAX_GATHERED_KEYS", MAX_NUM_SEQS * 256)
    decodes = Decodes()
    decodes.check(dict.fromkeys(range(MAX_NUM_SEQS), 256))


def test_a_started_sequence_goes_on_from_its_last_known_token():
    decodes = Decodes()
    prompt = np.array([5, 299, 0, 258], dtype="<i4")
    decodes.graphs.start([SequenceStart(3, prompt.tobytes(), 4, 0, SamplingParams(), ())])
    decodes.last_tokens[3] = 258
    decodes.check({3: 4, 2: 30})


def refused_step(record: Recorder, caplog: pytest.LogCaptureFixture, **options) -> str:
    """Run a step that cannot be recorded; check that the eager path serves it, and return the one warning."""
    lens = {0: 17, 4: 300}
    decodes, alone = Decodes(record, **options), Decodes(enabled=False)
    with caplog.at_level(logging.WARNING):
        hidden = decodes.run(lens)
    assert torch.equal(hidden, alone.eager(lens))
    torch.testing.assert_close(decodes.cache.layers, alone.cache.layers, rtol=0, atol=0)
    assert not decodes.serves(lens)
    (warning,) = caplog.messages
    assert warning.startswith("decode steps run without CUDA graphs from now on, which is slower: ")
    return warning


def test_a_failed_recording_switches_graphs_off_with_one_warning(caplog):
    assert "no graphs today" in refused_step(refuse, caplog)


@pytest.mark.parametrize("factor", [1.01, 0.0, float("nan")])
def test_a_result_that_is_not_the_eager_path_s_switches_graphs_off(caplog, factor):
    assert "of its length away from the eager path's, more than 0.001" in refused_step(
        partial(spoil, factor=factor), caplog
    )


def test_a_backend_that_needs_lengths_on_the_host_switches_graphs_off(caplog):
    def attend(*args, context: AttentionContext, **kwargs) -> Tensor:
        if context.device_lens is not None:
            raise NotImplementedError("this backend cannot be recorded")
        return gather_attention(*args, context=context, **kwargs)

    assert "this backend cannot be recorded" in refused_step(try_and_keep, caplog, attend=attend)


def test_other_errors_of_the_model_are_not_hidden():
    def attend(*args, **kwargs) -> Tensor:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError, match="a bug"):
        Decodes(attend=attend).run({0: 17})


class FakeCuda:
    """Stands for torch.cuda where there is none: says what was asked of it, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def graph_pool_handle(self) -> str:
        return "pool"

    def current_stream(self) -> "FakeStream":
        return FakeStream(self, "main")

    def Stream(self) -> "FakeStream":
        return FakeStream(self, "side")

    def CUDAGraph(self) -> "FakeGraph":
        return FakeGraph(self)

    @contextmanager
    def stream(self, stream: "FakeStream") -> Iterator[None]:
        self.log.append(f"enter {stream.name}")
        try:
            yield
        finally:
            self.log.append(f"leave {stream.name}")

    @contextmanager
    def graph(self, graph, *, pool: str, stream: "FakeStream", capture_error_mode: str) -> Iterator[None]:
        self.log.append(f"capture on {stream.name} in {pool}, {capture_error_mode}")
        yield


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: "FakeStream") -> None:
        self.cuda.log.append(f"{self.name} waits for {other.name}")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def replay(self) -> None:
        self.cuda.log.append("replay")


@pytest.fixture
def fake_cuda(monkeypatch) -> FakeCuda:
    cuda = FakeCuda()
    for name in ("graph_pool_handle", "current_stream", "Stream", "CUDAGraph", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    return cuda


def test_a_function_is_tried_and_captured_on_one_stream_and_then_replayed(fake_cuda):
    result = torch.ones(1)
    replay = CudaRecorder()(lambda: fake_cuda.log.append("function") or result)
    assert fake_cuda.log == [
        "side waits for main",
        "enter side",
        "function",
        "capture on side in pool, thread_local",
        "function",
        "leave side",
        "main waits for side",
    ]
    fake_cuda.log.clear()
    assert replay() is result
    assert fake_cuda.log == ["replay"]


@pytest.mark.parametrize("error", [RuntimeError("stream is capturing"), PeerLostError("stream is capturing")])
def test_an_error_in_the_capture_is_a_failed_recording_and_the_stream_is_left(fake_cuda, error):
    def function() -> Tensor:
        if "capture" in fake_cuda.log[-1]:
            raise error
        return torch.ones(1)

    with pytest.raises(RecordingError, match="the capture failed: stream is capturing"):
        CudaRecorder()(function)
    assert fake_cuda.log[-1] == "leave side"


def test_an_error_before_the_capture_is_the_function_s_own(fake_cuda):
    def function() -> Tensor:
        raise PeerLostError("rank 1 has gone")

    with pytest.raises(PeerLostError, match="rank 1 has gone"):
        CudaRecorder()(function)


def check_on_ranks(group: RankGroup) -> int:
    with torch.inference_mode():
        decodes = Decodes(group=group)
        decodes.check({0: 17, 4: 300, 3: 1})
        return decodes.num_recorded


def test_ranks_run_a_sharded_model_on_the_ladder():
    assert run_ranks(check_on_ranks, 2) == [1, 1]


def second_rank_fails(group: RankGroup, factor: float | None) -> tuple[bool, list[str]]:
    """Whether graphs are still on after a step that rank 1 cannot record, or replays wrongly, and what was logged."""
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logging.getLogger(decode_graphs.__name__).addHandler(handler)
    failing = refuse if factor is None else partial(spoil, factor=factor)
    with torch.inference_mode():
        decodes = Decodes(failing if group.rank == 1 else keep, group=group)
        lens = {0: 17, 4: 300, 3: 1}
        torch.testing.assert_close(decodes.run(lens), decodes.eager(lens), rtol=0, atol=0)
        return decodes.serves(lens), records


@pytest.mark.parametrize(("factor", "why"), [(None, "no graphs today"), (2.0, "away from the eager path's")])
def test_what_one_rank_cannot_do_no_rank_does(factor, why):
    (first, of_first), (second, of_second) = run_ranks(second_rank_fails, 2, factor)
    assert not first
    assert not second
    assert [len(of_first), len(of_second)] == [1, 1]
    assert "another rank" in of_first[0]
    assert why in of_second[0]
