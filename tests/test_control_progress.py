"""What ranks note of their progress, and what their agent reads of it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tpdist.control.progress import WAITS, ProgressFile, Watch, process_state

ALL_REDUCE = WAITS.index("all_reduce")


def test_what_a_rank_notes_is_there_to_be_read(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path / "progress", first_rank=4, num_ranks=3)
    watches = [Watch(tmp_path / "progress", local_rank=local_rank) for local_rank in range(3)]
    watches[1].begin_step(7)
    watches[1].enter(ALL_REDUCE)
    watches[2].enter(ALL_REDUCE)
    watches[2].leave()
    untouched, inside, left = file.read([os.getpid()] * 3)
    assert (untouched.rank, untouched.step, untouched.num_waits, untouched.waiting) == (4, 0, 0, False)
    assert (inside.rank, inside.step, inside.num_waits, inside.wait, inside.waiting) == (5, 7, 1, "all_reduce", True)
    assert (left.rank, left.num_waits, left.waiting) == (6, 1, False)
    assert inside.process in ("R", "S")
    assert (untouched.in_step, inside.in_step) == (False, True)
    watches[0].idle(True)
    watches[1].leave()
    watches[1].end_step()
    idle, ended, _ = file.read([os.getpid()] * 3)
    assert (idle.waiting, idle.num_waits) == (True, 0)
    assert (ended.waiting, ended.in_step, ended.step) == (False, False, 7)


def test_another_process_reads_what_one_notes_even_when_that_is_stopped(tmp_path: Path) -> None:
    file = ProgressFile(tmp_path / "progress", first_rank=0, num_ranks=1)
    program = (
        "import sys; from pathlib import Path; from tpdist.control.progress import Watch\n"
        "watch = Watch(Path(sys.argv[1])); watch.begin_step(3); watch.enter(1); print('noted', flush=True); input()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "progress")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"noted\n"
        child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, child.pid, os.WSTOPPED)
        (progress,) = file.read([child.pid])
        child.kill()
    assert (progress.step, progress.num_waits, progress.waiting, progress.process) == (3, 1, True, "T")


def test_the_file_of_the_next_epoch_begins_anew_and_the_old_ranks_write_elsewhere(tmp_path: Path) -> None:
    ProgressFile(tmp_path / "progress", first_rank=0, num_ranks=1)
    old = Watch(tmp_path / "progress")
    old.begin_step(9)
    file = ProgressFile(tmp_path / "progress", first_rank=0, num_ranks=2)
    old.begin_step(10)
    assert [each.step for each in file.read([os.getpid()] * 2)] == [0, 0]


def test_a_process_that_is_not_there_has_no_state() -> None:
    assert process_state(2**22 + 1) == ""


def test_without_a_file_notes_go_nowhere(tmp_path: Path) -> None:
    watch = Watch()
    watch.begin_step(1)
    watch.enter(ALL_REDUCE)
    watch.leave()
    with pytest.raises(FileNotFoundError):
        Watch(tmp_path / "none")
