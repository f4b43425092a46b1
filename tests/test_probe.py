"""The probe: fast without a driver, and honest about affinity and cgroups."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import msgspec
import psutil
import pytest

from tpdist.cli.frame import run
from tpdist.control.messages import ProbeReport
from tpdist.preflight import cgroup, probe


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def trees(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "proc", tmp_path / "sys"


def test_the_probe_runs_as_a_module_without_importing_torch() -> None:
    program = (
        "import sys; sys.argv = ['probe', '--json']; from tpdist.preflight.probe import main; main()\n"
        "print([name for name in ('torch', 'transformers', 'pydantic', 'zmq') if name in sys.modules])"
    )
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True, env=hidden
    )
    report_line, modules = result.stdout.splitlines()
    assert modules == "[]"
    report = msgspec.json.decode(report_line, type=ProbeReport)
    assert report.torch == version("torch")
    assert [device.kind for device in report.devices] == ["cpu"]
    assert report.devices[0].total_bytes == report.memory_bytes
    assert 0 < report.available_bytes <= report.memory_bytes
    assert 1 <= report.num_cpus <= len(os.sched_getaffinity(0))


def test_python_m_tpdist_probe_prints_one_line_of_json() -> None:
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    argv = [sys.executable, "-m", "tpdist.probe", "--json"]
    result = subprocess.run(argv, capture_output=True, timeout=60, check=True, env=hidden)
    report = msgspec.json.decode(result.stdout, type=ProbeReport)
    assert result.stdout.count(b"\n") == 1
    assert report.host_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def test_tpdist_probe_prints_tables_or_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert run(["probe"]) == 0
    text = capsys.readouterr().out
    assert version("torch") in text
    assert "cpu:0" in text
    assert run(["probe", "--json"]) == 0
    assert msgspec.json.decode(capsys.readouterr().out, type=ProbeReport).tpdist == version("tpdist")


def test_without_cgroups_the_machine_is_the_limit(trees: tuple[Path, Path]) -> None:
    proc, sys_ = trees
    assert cgroup.memory(proc=proc, sys=sys_).total_bytes == psutil.virtual_memory().total
    assert cgroup.num_cpus(proc=proc, sys=sys_) == len(os.sched_getaffinity(0))


def test_version_2_limits_hold_and_reclaimable_cache_is_available(trees: tuple[Path, Path]) -> None:
    proc, sys_ = trees
    write(proc / "self/cgroup", "0::/pod/main\n")
    inner, outer = sys_ / "fs/cgroup/pod/main", sys_ / "fs/cgroup/pod"
    write(inner / "memory.max", "max\n")
    write(inner / "cpu.max", "max 100000\n")
    write(outer / "memory.max", "1000000\n")
    write(outer / "memory.current", "600000\n")
    write(outer / "memory.stat", "anon 100000\ninactive_file 500000\n")
    write(outer / "cpu.max", "150000 100000\n")
    assert cgroup.memory(proc=proc, sys=sys_) == cgroup.Memory(1_000_000, 900_000)
    assert cgroup.num_cpus(proc=proc, sys=sys_) == 1


def test_version_1_limits_hold_where_a_container_sees_only_its_own_part(trees: tuple[Path, Path]) -> None:
    proc, sys_ = trees
    write(proc / "self/cgroup", "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n0::/docker/abc\n")
    write(sys_ / "fs/cgroup/memory/memory.limit_in_bytes", "2000000\n")
    write(sys_ / "fs/cgroup/memory/memory.usage_in_bytes", "500000\n")
    write(sys_ / "fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 100000\n")
    write(sys_ / "fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us", "50000\n")
    write(sys_ / "fs/cgroup/cpu,cpuacct/cpu.cfs_period_us", "100000\n")
    assert cgroup.memory(proc=proc, sys=sys_) == cgroup.Memory(2_000_000, 1_600_000)
    assert cgroup.num_cpus(proc=proc, sys=sys_) == 1


def test_an_unlimited_version_1_group_changes_nothing(trees: tuple[Path, Path]) -> None:
    proc, sys_ = trees
    write(proc / "self/cgroup", "4:memory:/\n1:cpu:/\n")
    write(sys_ / "fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n")
    write(sys_ / "fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(sys_ / "fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert cgroup.memory(proc=proc, sys=sys_).total_bytes == psutil.virtual_memory().total
    assert cgroup.num_cpus(proc=proc, sys=sys_) == len(os.sched_getaffinity(0))


def test_a_group_over_its_limit_has_nothing_available(trees: tuple[Path, Path]) -> None:
    proc, sys_ = trees
    write(proc / "self/cgroup", "0::/\n")
    write(sys_ / "fs/cgroup/memory.max", "100\n")
    write(sys_ / "fs/cgroup/memory.current", "150\n")
    assert cgroup.memory(proc=proc, sys=sys_) == cgroup.Memory(100, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\n", "535.129.03"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
        ("", None),
    ],
)
def test_the_driver_version_is_read_from_the_kernel_module(tmp_path: Path, text: str, expected: str | None) -> None:
    write(tmp_path / "version", text)
    assert probe.driver_version(tmp_path / "version") == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [("cuda: Optional[str] = None", None), ("cuda: Optional[str] = '13.0'", "13.0"), ('cuda = "12.8"', "12.8")],
)
def test_torchs_cuda_version_is_read_from_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, expected: str | None
) -> None:
    write(tmp_path / "torch/__init__.py", "raise ImportError('must not be imported')")
    write(tmp_path / "torch/version.py", f"__version__ = '2.13.0'\ndebug = False\n{line}\nhip: Optional[str] = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert probe.torch_cuda_version() == expected


def test_an_empty_list_of_visible_devices_hides_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "DRIVER_DEVICE", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert probe.driver_present()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert probe.driver_present()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not probe.driver_present()


@pytest.mark.gpu
@pytest.mark.skipif(not probe.driver_present(), reason="no NVIDIA driver")
def test_on_a_machine_with_gpus_they_are_reported_with_their_memory() -> None:
    report = probe.probe()
    assert report.driver is not None
    assert report.nccl is not None
    for device in report.devices:
        assert device.kind == "cuda"
        assert 0 < device.free_bytes <= device.total_bytes


def test_a_probe_does_not_outlive_who_asked_for_it() -> None:
    """One that waits for a stuck GPU goes with its agent; here that has gone before."""
    command = [sys.executable, "-m", "tpdist.probe", "--json", "--parent-pid"]
    asked = subprocess.run([*command, str(os.getpid())], capture_output=True, timeout=60)
    assert asked.returncode == 0
    left = subprocess.run([*command, "1"], capture_output=True, text=True, timeout=60)
    assert left.returncode != 0
    assert "the parent process 1 has ended" in left.stderr
