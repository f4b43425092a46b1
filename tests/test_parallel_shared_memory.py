import gc
import logging
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from ranks import Meeting, RanksFailed, open_store, run_processes, run_ranks
from torch import Tensor

from tpdist.parallel import hosts, segment
from tpdist.parallel.group import PeerLostError, RankGroup
from tpdist.parallel.hosts import HostsGroup, group_hosts
from tpdist.parallel.process_group import ProcessGroup, connect, disconnect
from tpdist.parallel.segment import SLOT_BYTES, MembersLostError, Segment
from tpdist.parallel.shared_memory import MAX_SHAPES, UNDIVIDED_BYTES, SharedMemoryGroup
from tpdist.parallel.store import exchange, sub_store

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
ROUNDS = 2000
GLOO_EVERY = 20


def join(rank: int, meeting: Meeting, *, host_id: str | None, name: str = "run", timeout_s: float = 60) -> RankGroup:
    size = meeting.world_size
    store = sub_store(open_store(meeting), name)
    return connect(
        rank=rank, world_size=size, tp_size=size, backend="gloo", store=store, timeout_s=timeout_s, host_id=host_id
    )


def added_in_rank_order(parts: Sequence[Tensor]) -> Tensor:
    """Written apart from the code under test: 16-bit types in float32, and rounded once."""
    wide = torch.float32 if parts[0].element_size() == 2 else parts[0].dtype
    total = parts[0].to(wide, copy=True)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(parts[0].dtype)


def same_bits(one: Tensor, other: Tensor) -> bool:
    as_bytes = [x.contiguous().view(-1).view(torch.uint8) for x in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*as_bytes)


def make_parts(seed: int, sizes: Sequence[Sequence[int]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).mul_(1000).to(dtype) for size in sizes]


def random_shape(rng: random.Random) -> list[int]:
    """Mostly small; now and then around the size of a slot, whatever the dtype, or larger."""
    if rng.random() < 0.03:
        return [max(0, SLOT_BYTES // rng.choice((2, 4, 8)) * rng.choice((1, 2)) + rng.randint(-2, 2))]
    return [rng.randint(0, 9) for _ in range(rng.randint(1, 2))] + [rng.randint(0, 40)]


def check_one_round(groups: Sequence[RankGroup], seed: int) -> None:
    """One random collective on each of `groups`; all ranks draw the same numbers."""
    rng = random.Random(seed)
    size, rank = groups[0].size, groups[0].rank
    dtype, shape, name = rng.choice(DTYPES), random_shape(rng), rng.choice(("all_reduce", "gather", "broadcast"))
    widths = [rng.randint(0, shape[-1]) if name == "gather" else shape[-1] for _ in range(size)]
    parts = make_parts(seed, [[*shape[:-1], width] for width in widths], dtype)
    expected = {
        "all_reduce": lambda: added_in_rank_order(parts),
        "broadcast": lambda: parts[0],
        "gather": lambda: torch.cat(parts, dim=-1),
    }[name]()
    for group in groups:
        mine = parts[rank].clone()
        if name == "gather":
            seen = group.gather(mine, sizes=widths)
            assert (seen is None) == (rank > 0)
        else:
            seen = getattr(group, name)(mine)
        assert seen is None or same_bits(seen, expected), f"round {seed}: {name} of {shape} {dtype} on {group}"


def many_rounds_with_delays(rank: int, meeting: Meeting) -> int:
    shared = join(rank, meeting, host_id=None, name="shared")
    disconnect()
    gloo = join(rank, meeting, host_id="", name="gloo")
    assert isinstance(shared, SharedMemoryGroup)
    assert isinstance(gloo, ProcessGroup)
    delays = random.Random(rank)
    for seed in range(ROUNDS):
        if delays.random() < 0.05:
            time.sleep(delays.uniform(0, 0.004))
        elif delays.random() < 0.2:
            sum(range(delays.randint(0, 20_000)))
        check_one_round([shared, gloo] if seed % GLOO_EVERY == 0 else [shared], seed)
    return ROUNDS


@pytest.mark.parametrize(
    "world_size", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_mixed_collectives_of_delayed_ranks_equal_gloo_and_the_written_sum_bit_by_bit(world_size):
    assert run_processes(many_rounds_with_delays, world_size) == [ROUNDS] * world_size


def around_the_limits(group: RankGroup) -> int:
    elements = [limit // 2 + more for limit in (UNDIVIDED_BYTES, SLOT_BYTES, 3 * SLOT_BYTES) for more in (-1, 0, 1)]
    for dtype in (torch.bfloat16, torch.float32):
        for count in elements:
            parts = make_parts(count, [[count]] * group.size, dtype)
            assert same_bits(group.all_reduce(parts[group.rank].clone()), added_in_rank_order(parts))
            assert same_bits(group.broadcast(parts[group.rank].clone()), parts[0])
    return len(elements)


@pytest.mark.parametrize("world_size", [2, 3])
def test_tensors_around_the_size_of_a_slot_and_of_several(world_size):
    assert run_ranks(around_the_limits, world_size) == [9] * world_size


def gather_large(group: RankGroup, num_rows: int, widths: list[int]) -> bool:
    parts = make_parts(0, [[num_rows, width] for width in widths], torch.float32)
    seen = group.gather(parts[group.rank], sizes=widths)
    return seen is None if group.rank else same_bits(seen, torch.cat(parts, dim=-1))


@pytest.mark.parametrize(
    ("num_rows", "widths"),
    [(1, [16000, 16000]), (3, [SLOT_BYTES // 4 + 1, 5]), (300, [700, 1001, 0]), (2, [1, SLOT_BYTES])],
    ids=["logits of one row", "a row larger than a slot", "many rows", "a row of several slots"],
)
def test_gather_joins_shards_larger_than_a_slot(num_rows, widths):
    assert all(run_ranks(gather_large, len(widths), num_rows, widths))


def strided(group: RankGroup, width: int) -> bool:
    parts = make_parts(0, [[3, width]] * group.size, torch.float32)
    mine = [parts[group.rank].clone().t() for _ in range(2)]
    total, copied = group.all_reduce(mine[0]), group.broadcast(mine[1])
    return same_bits(total, added_in_rank_order(parts).t()) and same_bits(copied, parts[0].t())


@pytest.mark.parametrize("width", [5, SLOT_BYTES])
def test_a_strided_tensor_keeps_its_layout(width):
    assert run_ranks(strided, 2, width) == [True, True]


def the_order_shows(group: RankGroup) -> float:
    # In float32, 1e8 + 1 == 1e8: only the order of ranks gives 1.
    return group.all_reduce(torch.tensor([(1e8, -1e8, 1.0)[group.rank]])).item()


def test_ranks_are_added_in_their_order():
    assert run_ranks(the_order_shows, 3) == [1.0] * 3


def more_shapes_than_are_kept(group: RankGroup) -> bool:
    return all(group.all_reduce(torch.ones(n)).sum() == n * group.size for n in [*range(2 * MAX_SHAPES), 1, 2, 3])


def test_more_shapes_than_views_are_kept_for():
    assert run_ranks(more_shapes_than_are_kept, 2) == [True, True]


def in_and_out_of_inference_mode(group: RankGroup) -> list[float]:
    with torch.inference_mode():
        inside = group.all_reduce(torch.ones(3)).sum().item()
    return [inside, group.all_reduce(torch.ones(3)).sum().item()]


def test_a_shape_that_was_first_seen_in_inference_mode_serves_outside_of_it():
    assert run_ranks(in_and_out_of_inference_mode, 2) == [[6, 6], [6, 6]]


def kill_one_in_the_middle(group: RankGroup) -> None:
    for step in range(10_000):
        if group.rank == 1 and step == 500:
            os.kill(os.getpid(), signal.SIGKILL)
        group.all_reduce(torch.ones(3))


def test_a_rank_that_is_killed_in_the_middle_is_named_within_seconds():
    # run_ranks gives the others a few seconds to say what they saw.
    with pytest.raises(RanksFailed) as failed:
        run_ranks(kill_one_in_the_middle, 3)
    assert "rank 1: ended with exit code -9" in str(failed.value)
    for rank in (0, 2):
        expected = f"PeerLostError: all_reduce of (3,) failed on rank {rank}: rank 1 of this host has gone"
        assert expected in str(failed.value)


def share_directly(rank: int, meeting: Meeting, *, timeout_s: float) -> tuple[Segment, Callable[[str, str], list[str]]]:
    """A segment without a process group, and a way to exchange words beside it."""
    store, size = open_store(meeting), meeting.world_size

    def tell(key: str, value: str) -> list[str]:
        return exchange(store, key=key, value=value, rank=rank, ranks=range(size), timeout_s=30)

    memory = segment.create(size=size, timeout_s=timeout_s) if rank == 0 else None
    address = tell("address", memory.address if memory else "")[0]
    if memory is None:
        memory = segment.attach(address, member=rank, size=size, timeout_s=timeout_s)
    tell("attached", "")
    return memory, tell


def stop_before_the_step(rank: int, meeting: Meeting) -> str:
    memory, tell = share_directly(rank, meeting, timeout_s=0.3)
    pids = tell("pid", str(os.getpid()))
    group = SharedMemoryGroup(memory, ranks=[4, 5, 6])
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
        return "stopped"
    try:
        group.all_reduce(torch.ones(2))
    except PeerLostError as lost:
        return str(lost)
    finally:
        if rank == 0:
            # Once rank 2 has given up, too.
            exchange(open_store(meeting), key="late", value="", rank=0, ranks=[0, 2], timeout_s=30)
            os.kill(int(pids[1]), signal.SIGCONT)
        else:
            exchange(open_store(meeting), key="late", value="", rank=2, ranks=[0, 2], timeout_s=30)
    return "added up"


def test_a_rank_that_is_stopped_is_named_at_the_deadline():
    late = "rank 5 of this host has not come within 0.3 s"
    assert run_processes(stop_before_the_step, 3) == [
        f"all_reduce of (2,) failed on rank 4: {late}",
        "stopped",
        f"all_reduce of (2,) failed on rank 6: {late}",
    ]


def leave_after_the_step(rank: int, meeting: Meeting) -> list[str]:
    memory, tell = share_directly(rank, meeting, timeout_s=20)
    step = memory.begin()
    if rank == 1:
        memory.post(step)
        del memory
    tell("left", "")
    if rank == 1:
        return []
    memory.post(step)
    memory.meet(step)
    try:
        memory.post(memory.begin())
        memory.meet(step + 1)
    except MembersLostError as lost:
        return [f"met in step {step}", str(lost)]
    return ["met twice"]


def test_a_rank_that_left_after_its_part_is_missed_in_the_next_step_only():
    assert run_processes(leave_after_the_step, 2) == [["met in step 1", "members [1] have gone"], []]


def mapped_and_open() -> tuple[int, int]:
    """How many mappings and descriptors of shared memory this process has."""
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return Path("/proc/self/maps").read_text().count("memfd:tpdist"), sum("memfd:tpdist" in link for link in links)


def free_the_group(rank: int, meeting: Meeting) -> list[object]:
    before = set(os.listdir("/dev/shm"))
    group = join(rank, meeting, host_id=None)
    group.all_reduce(torch.ones(3))
    named = [name for name in set(os.listdir("/dev/shm")) - before if "tpdist" in name]
    during = mapped_and_open()
    disconnect()
    del group
    gc.collect()
    return [named, during, mapped_and_open()]


def test_the_memory_has_no_name_and_goes_with_the_group():
    for named, during, after in run_processes(free_the_group, 2):
        assert named == []
        # Python keeps a descriptor of its own for a mapping.
        assert during == (1, 2)
        assert after == (0, 0)


def connect_where_memory_cannot_be_shared(rank: int, meeting: Meeting, refuse: str) -> tuple[str, float, list[str]]:
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    hosts.logger.addHandler(handler)
    if refuse == "create" and rank == 0:
        # What the shared memory of a full machine says is said of a file that may not grow.
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    if refuse == "attach" and rank == 1:
        # The kernel refuses a lock there.
        segment.LOCKS_AT = -10_000
    group = join(rank, meeting, host_id=None)
    return type(group).__name__, group.all_reduce(torch.tensor([1.0 + rank])).item(), lines


@pytest.mark.parametrize("refuse", ["create", "attach"])
def test_all_ranks_use_gloo_and_the_first_says_why_if_one_cannot_attach(refuse):
    seen = run_processes(connect_where_memory_cannot_be_shared, 3, refuse)
    assert [(kind, total) for kind, total, _ in seen] == [("ProcessGroup", 6.0)] * 3
    [line] = seen[0][2]
    reason = {"create": "rank 0: [Errno 27] File too large", "attach": "rank 1: [Errno 22] Invalid argument"}[refuse]
    assert line == f"ranks [0, 1, 2] do not share memory and use gloo, which is slower: {reason}"
    assert seen[1][2] == seen[2][2] == []


def test_another_file_under_the_announced_number_is_refused(tmp_path):
    with (tmp_path / "other").open("w+b") as other:
        other.write(bytes(64))
        other.flush()
        address = f"{os.getpid()}/{other.fileno()}/{bytes(15).hex()}01"
        with pytest.raises(OSError, match="is another file than the one that was announced"):
            segment.attach(address, member=1, size=2, timeout_s=1)


def over_hosts(rank: int, meeting: Meeting, host_ids: list[str]) -> list[object]:
    group = join(rank, meeting, host_id=host_ids[rank])
    widths = [1 + rank for rank in range(group.size)]
    seen = [
        type(group).__name__,
        group.all_reduce(make_parts(1, [[5, 7]] * group.size, torch.float32)[rank]),
        group.gather(torch.full((2, widths[rank]), rank), sizes=widths),
        group.broadcast(torch.tensor([10 + rank])).item(),
        [group.all_reduce(torch.full((n,), 1.0 + rank)).sum().item() for n in (0, 3, SLOT_BYTES)],
    ]
    disconnect()
    return seen


@pytest.mark.parametrize(
    ("host_ids", "kind"),
    [
        ("aabb", HostsGroup),
        ("abb", HostsGroup),
        ("aab", HostsGroup),
        ("aba", ProcessGroup),
        ("ab", ProcessGroup),
        ("aaa", SharedMemoryGroup),
    ],
)
def test_collectives_over_hosts_agree_in_bits(host_ids, kind):
    size = len(host_ids)
    parts = make_parts(1, [[5, 7]] * size, torch.float32)
    inside = [added_in_rank_order([parts[place] for place in host]) for host in group_hosts(host_ids)]
    joined = torch.repeat_interleave(torch.arange(size), torch.arange(1, size + 1)).tolist()
    total = size * (size + 1) / 2
    for rank, seen in enumerate(run_processes(over_hosts, size, list(host_ids))):
        name, added, gathered, broadcast, sums = seen
        assert name == kind.__name__
        assert same_bits(added, added_in_rank_order(inside))
        assert gathered is None if rank else gathered.tolist() == [joined] * 2
        assert broadcast == 10
        assert sums == [0, 3 * total, SLOT_BYTES * total]


def two_groups_of_two_hosts(rank: int, meeting: Meeting) -> list[object]:
    store, host_id = open_store(meeting), "abcc"[rank]
    group = connect(rank=rank, world_size=4, tp_size=2, backend="gloo", store=store, timeout_s=60, host_id=host_id)
    seen = [type(group).__name__, group.rank, group.all_reduce(torch.tensor([10.0**rank])).item()]
    disconnect()
    return seen


def test_each_tensor_parallel_group_finds_its_own_hosts():
    assert run_processes(two_groups_of_two_hosts, 4) == [
        ["ProcessGroup", 0, 11],
        ["ProcessGroup", 1, 11],
        ["SharedMemoryGroup", 0, 1100],
        ["SharedMemoryGroup", 1, 1100],
    ]


def test_hosts_are_runs_of_consecutive_ranks_and_an_empty_id_stands_alone():
    assert group_hosts("aabba") == [[0, 1], [2, 3], [4]]
    assert group_hosts(["", "", "a", "a"]) == [[0], [1], [2, 3]]
