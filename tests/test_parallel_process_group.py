import os
import socket
import time

import pytest
import torch
from ranks import Meeting, RanksFailed, open_store, run_processes, run_ranks

from tpdist.errors import JoinError
from tpdist.parallel.group import PeerLostError, RankGroup, SingleGroup
from tpdist.parallel.process_group import connect, disconnect
from tpdist.parallel.store import agree_minimum, create_store, wait_for_all


def collectives(rank: int, meeting: Meeting, sizes: list[int], host_id: str | None) -> dict[str, object]:
    size = len(sizes)
    group = connect(
        rank=rank,
        world_size=size,
        tp_size=size,
        backend="gloo",
        store=open_store(meeting),
        timeout_s=30,
        host_id=host_id,
    )
    generator = torch.Generator().manual_seed(0)
    parts = torch.randn(group.size, 5, 7, generator=generator)
    mine = parts[group.rank]
    return {
        "float32": group.all_reduce(mine.clone()),
        "bfloat16": group.all_reduce(mine.bfloat16()),
        "strided": group.all_reduce(mine.clone().t()),
        "empty": group.all_reduce(torch.empty(0, 7)),
        "gather": group.gather(torch.full((2, sizes[group.rank]), group.rank), sizes=sizes),
        "broadcast": group.broadcast(torch.tensor([10 + group.rank, 20 + group.rank])),
        "broadcast strided": group.broadcast(mine.clone().t()),
    }


@pytest.mark.parametrize("host_id", ["", None], ids=["gloo", "shared memory"])
@pytest.mark.parametrize("sizes", [[3, 1], [2, 2, 2], [4, 0, 1]])
def test_collectives_agree_with_the_sum_concatenation_and_first_rank(sizes, host_id):
    world_size = len(sizes)
    parts = torch.randn(world_size, 5, 7, generator=torch.Generator().manual_seed(0))
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    for rank, seen in enumerate(run_processes(collectives, world_size, sizes, host_id)):
        assert torch.equal(seen["float32"], total)
        assert torch.equal(seen["bfloat16"], sum(part.bfloat16().float() for part in parts).bfloat16())
        assert torch.equal(seen["strided"], total.t())
        assert seen["empty"].shape == (0, 7)
        expected = torch.repeat_interleave(torch.arange(world_size), torch.tensor(sizes)).tolist()
        assert seen["gather"] is None if rank else seen["gather"].tolist() == [expected] * 2
        assert seen["broadcast"].tolist() == [10, 20]
        assert torch.equal(seen["broadcast strided"], parts[0].t())


def groups_of_two(rank: int, meeting: Meeting) -> list[float]:
    group = connect(rank=rank, world_size=4, tp_size=2, backend="gloo", store=open_store(meeting), timeout_s=30)
    seen = [group.rank, group.size, group.all_reduce(torch.tensor([10.0**rank])).item()]
    disconnect()
    return seen


def test_consecutive_ranks_form_a_tensor_parallel_group():
    assert run_processes(groups_of_two, 4) == [[0, 2, 11], [1, 2, 11], [0, 2, 1100], [1, 2, 1100]]


def test_one_rank_needs_no_process_group():
    assert isinstance(connect(rank=0, world_size=1, tp_size=1, backend="gloo", store=None, timeout_s=1), SingleGroup)
    disconnect()


def lose_the_last_rank(group: RankGroup) -> tuple[str, bool, float]:
    if group.rank == group.size - 1:
        os._exit(9)
    began = time.monotonic()
    try:
        while True:
            group.all_reduce(torch.ones(3))
    except PeerLostError as error:
        return str(error), isinstance(error.__cause__, RuntimeError), time.monotonic() - began


def test_a_killed_rank_is_reported_with_its_exit_code():
    with pytest.raises(RanksFailed, match="rank 2: ended with exit code 9"):
        run_ranks(lose_the_last_rank, 3)


def survive(rank: int, meeting: Meeting) -> object:
    group = connect(
        rank=rank, world_size=3, tp_size=3, backend="gloo", store=open_store(meeting), timeout_s=20, host_id=""
    )
    if rank < 2:
        return lose_the_last_rank(group)
    return "gone"


def test_a_collective_over_gloo_with_a_lost_peer_raises_soon_and_names_itself():
    seen = run_processes(survive, 3)
    for rank, (message, has_cause, waited_s) in enumerate(seen[:2]):
        assert f"all_reduce of (3,) failed on rank {rank} of 3: a peer has gone" in message
        assert has_cause
        assert waited_s < 10


def raise_on_both(group: RankGroup) -> None:
    raise ValueError(f"made by rank {group.rank}")


def test_run_ranks_shows_the_tracebacks_of_all_ranks():
    with pytest.raises(RanksFailed) as failed:
        run_ranks(raise_on_both, 2)
    assert "ValueError: made by rank 0" in str(failed.value)
    assert "ValueError: made by rank 1" in str(failed.value)


def sleep_on_rank_one(rank: int, meeting: Meeting) -> None:
    time.sleep(60 * rank)


def test_run_ranks_kills_what_has_not_ended_by_the_deadline():
    began = time.monotonic()
    with pytest.raises(RanksFailed, match="rank 1: did not end within 2 s"):
        run_processes(sleep_on_rank_one, 2, deadline_s=2)
    assert time.monotonic() - began < 20


def meet(rank: int, meeting: Meeting) -> int:
    store = open_store(meeting)
    wait_for_all(store, key="loaded", rank=rank, world_size=3, timeout_s=20)
    return agree_minimum(store, key="blocks", value=100 - rank, rank=rank, world_size=3, timeout_s=20)


def test_ranks_agree_on_the_minimum_through_the_store():
    assert run_processes(meet, 3) == [98, 98, 98]


def a_store() -> object:
    return create_store(host="127.0.0.1", port=0, world_size=1, is_master=True, listen_fd=None, timeout_s=5)


def test_waiting_names_the_ranks_that_did_not_come():
    store = a_store()
    store.set("loaded/2", "here")
    with pytest.raises(PeerLostError, match=r"'loaded': no word from ranks \[0, 3\] within 0.2 s"):
        wait_for_all(store, key="loaded", rank=1, world_size=4, timeout_s=0.2)


def test_the_store_takes_over_an_inherited_listening_socket():
    listener = socket.create_server(("127.0.0.1", 0))
    address = {"host": "127.0.0.1", "port": listener.getsockname()[1], "world_size": 2, "timeout_s": 5}
    master = create_store(**address, is_master=True, listen_fd=listener.detach())
    create_store(**address, is_master=False, listen_fd=None).set("word", "hello")
    assert master.get("word") == b"hello"


def test_a_store_that_cannot_be_reached_is_a_join_error_with_its_address():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(JoinError, match=rf"cannot reach the store at 127.0.0.1:{port} within 1 s"):
        create_store(host="127.0.0.1", port=port, world_size=2, is_master=False, listen_fd=None, timeout_s=1)


def connect_without_the_other(rank: int, meeting: Meeting) -> tuple[str, float]:
    began = time.monotonic()
    try:
        connect(rank=0, world_size=2, tp_size=2, backend="gloo", store=open_store(meeting), timeout_s=1)
    except PeerLostError as error:
        return str(error), time.monotonic() - began
    return "connected", 0.0


def test_connecting_to_a_rank_that_never_comes_ends_at_the_deadline():
    [(message, waited_s)] = run_processes(connect_without_the_other, 1)
    assert "connecting rank 0 to the other 1 ranks over gloo failed, deadline 1 s" in message
    assert waited_s < 10
