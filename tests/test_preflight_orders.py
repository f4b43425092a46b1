"""What a node does for an examination: children that are killed, models that are read, limits."""

import asyncio
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import within

from tpdist import builtin
from tpdist.preflight import machine, model_files, orders
from tpdist.preflight.model_files import examine_model, read_speed
from tpdist.preflight.orders import Station
from tpdist.preflight.words import Failed, Findings, Listen, Port, Reduce

DEADLINE_S = 60.0


def reduce_of(port: int, *, timeout_s: float = 1.0, world_size: int = 2) -> Reduce:
    return Reduce(
        backend="gloo",
        first_rank=0,
        num_ranks=1,
        world_size=world_size,
        host="127.0.0.1",
        port=port,
        interface="lo",
        timeout_s=timeout_s,
    )


async def one_rank_of_two(timeout_s: float) -> object:
    station = Station(environ=os.environ)
    try:
        port = station.open_store("127.0.0.1", 0)
        return await station.carry_out(reduce_of(port, timeout_s=timeout_s))
    finally:
        await station.close()


@pytest.mark.slow
def test_a_sum_whose_other_rank_does_not_come_fails_in_time() -> None:
    answer = asyncio.run(within(DEADLINE_S, one_rank_of_two(1.0)))
    assert isinstance(answer, Failed)
    assert answer.problem.startswith("rank 0: ")


def test_a_rank_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orders, "GRACE_S", 0.0)
    answer = asyncio.run(within(DEADLINE_S, one_rank_of_two(0.05)))
    assert answer == Failed(problem="`python -m tpdist.preflight.collective` did not end within 0.05 s and was killed")


def test_an_address_that_is_not_ours_cannot_be_listened_on() -> None:
    async def listen_elsewhere() -> object:
        return await Station(environ={}).carry_out(Listen(host="192.0.2.1", token=bytes(16)))

    assert isinstance(asyncio.run(within(DEADLINE_S, listen_elsewhere())), Failed)


def test_a_station_that_is_closed_does_not_listen_any_more() -> None:
    async def open_and_close() -> int:
        station = Station(environ={})
        opened = await station.carry_out(Listen(host="127.0.0.1", token=bytes(16)))
        await station.close()
        assert isinstance(opened, Port)
        return opened.port

    port = asyncio.run(within(DEADLINE_S, open_and_close()))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_findings_hold_the_model_or_what_is_wrong_with_it(tmp_path: Path) -> None:
    async def find(model: Path) -> Findings:
        return await Station(environ=os.environ).findings(str(model), revision=None, explicit={"seed": 1})

    good = asyncio.run(within(DEADLINE_S, find(builtin.path())))
    assert good.probe is not None
    assert good.model is not None
    assert good.model.read_bytes > 0
    assert good.explicit == {"seed": 1}
    bad = asyncio.run(within(DEADLINE_S, find(tmp_path)))
    assert bad.model is None
    assert "config.json" in bad.model_problem
    assert bad.model_exit_code == 4


def test_a_model_is_checked_and_its_largest_file_read() -> None:
    found = examine_model(str(builtin.path()))
    size = (builtin.path() / "model.safetensors").stat().st_size
    assert found.read_bytes == size
    assert 0 < found.total_bytes <= size
    assert "config.json" in found.digests


def test_reading_stops_at_its_limits(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(3 * model_files.BLOCK_BYTES))
    assert read_speed(file, most_bytes=1)[0] == model_files.BLOCK_BYTES
    assert read_speed(file, most_s=0.0)[0] == 0


def test_a_child_whose_parent_has_gone_does_not_start() -> None:
    command = [sys.executable, "-m", "tpdist.preflight.model_files", "m", "--parent-pid", "1"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0


def test_limits_are_read_from_the_kernel(tmp_path: Path) -> None:
    found = machine.limits(shared_memory=tmp_path / "none", infiniband=tmp_path)
    assert found.shm_bytes == 0
    assert not found.infiniband
    (tmp_path / "mlx5_0").mkdir()
    assert machine.limits(infiniband=tmp_path).infiniband
