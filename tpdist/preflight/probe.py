"""What this machine can do: versions, devices, memory and CPUs, read by a short-lived child of the agent.

Imports torch only where there is an NVIDIA driver to ask; elsewhere torch's versions are read from its files, which
takes milliseconds and not seconds.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import signal
import socket
import sys
from argparse import ArgumentParser
from pathlib import Path

import msgspec

from tpdist.control.messages import DeviceInfo, ProbeReport
from tpdist.parent import follow_parent
from tpdist.preflight import cgroup

DRIVER_DEVICE = Path("/dev/nvidiactl")
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
CPU_INFO = Path("/proc/cpuinfo")


def probe() -> ProbeReport:
    """Read everything now. On a machine with a driver this makes a CUDA context on each visible device."""
    memory = cgroup.memory()
    cuda = torch_cuda_version()
    devices, nccl = _cuda_devices() if cuda is not None and driver_present() else ((), None)
    return ProbeReport(
        hostname=socket.gethostname(),
        host_id=_read(BOOT_ID),
        num_cpus=cgroup.num_cpus(),
        memory_bytes=memory.total_bytes,
        available_bytes=memory.available_bytes,
        python=platform.python_version(),
        tpdist=importlib.metadata.version("tpdist"),
        torch=_version("torch"),
        cuda=cuda,
        nccl=nccl,
        driver=driver_version(),
        devices=devices or (_cpu(memory),),
    )


def driver_present() -> bool:
    """Whether asking torch for CUDA devices can find any. CUDA_VISIBLE_DEVICES belongs to the driver, not to tpdist's
    settings: set but empty, it hides all devices."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and DRIVER_DEVICE.exists()


def driver_version(path: Path = DRIVER_VERSION) -> str | None:
    """Of the NVIDIA kernel module, as in "570.133.20"; None without one."""
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", _read(path))
    return found[0] if found else None


def torch_cuda_version() -> str | None:
    """The CUDA version that torch was built for, read from its version.py without importing torch; None for a build
    without CUDA, and without torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    text = _read(Path(spec.origin).with_name("version.py"))
    found = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else None


def _cuda_devices() -> tuple[tuple[DeviceInfo, ...], str | None]:
    """The devices, and NCCL's version. The one place that may import torch, seconds long."""
    cuda = importlib.import_module("tpdist.preflight.cuda")
    return cuda.devices(), cuda.nccl_version()


def _cpu(memory: cgroup.Memory) -> DeviceInfo:
    model = re.search(r"^model name\s*:\s*(.+)$", _read(CPU_INFO), re.MULTILINE)
    return DeviceInfo(
        kind="cpu",
        index=0,
        name=model[1] if model else platform.machine(),
        total_bytes=memory.total_bytes,
        free_bytes=memory.available_bytes,
    )


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: Path) -> str:
    """The file, stripped; "" where it does not exist."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def main() -> None:
    """Print the report on stdout as JSON: on one line with --json, indented for people without."""
    parser = ArgumentParser(prog="python -m tpdist.probe", description="What this machine has, as JSON.")
    parser.add_argument("--json", action="store_true", help="on one line")
    parser.add_argument("--parent-pid", type=int, metavar="PID", help="end with this process, which must be the parent")
    arguments = parser.parse_args()
    if arguments.parent_pid is not None:
        follow_parent(arguments.parent_pid, signal.SIGKILL)
    report = msgspec.json.encode(probe())
    sys.stdout.write((report if arguments.json else msgspec.json.format(report)).decode() + "\n")
