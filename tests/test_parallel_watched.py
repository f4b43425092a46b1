"""A watched group does what its group does, and notes each collective."""

from pathlib import Path

import pytest
import torch

from tpdist.control.progress import ProgressFile, Watch
from tpdist.parallel.group import FakeGroup, PeerLostError, SingleGroup
from tpdist.parallel.watched import WatchedGroup


class Broken(SingleGroup):
    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        raise PeerLostError("gone")


def test_every_collective_is_entered_and_left_once(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path / "progress", first_rank=0, num_ranks=1)
    group = WatchedGroup(FakeGroup(rank=1, size=3), Watch(tmp_path / "progress"))
    x = torch.ones(2, 4)
    assert torch.equal(group.all_reduce(x), x)
    gathered = group.gather(x, sizes=[1, 4, 2])
    assert gathered is not None
    assert gathered.shape == (2, 7)
    assert torch.equal(group.broadcast(x), x)
    (progress,) = file.read([1])
    assert (progress.num_waits, progress.wait, progress.waiting) == (3, "broadcast", False)
    assert (group.rank, group.size, group.capturable) == (1, 3, False)
    assert WatchedGroup(SingleGroup(), Watch()).capturable


def test_a_collective_that_fails_is_never_left(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path / "progress", first_rank=0, num_ranks=1)
    group = WatchedGroup(Broken(), Watch(tmp_path / "progress"))
    with pytest.raises(PeerLostError):
        group.all_reduce(torch.ones(1))
    (progress,) = file.read([1])
    assert progress.waiting
