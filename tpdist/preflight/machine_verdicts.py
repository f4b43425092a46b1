"""What a node's own findings mean: a line for each check, green or red, and what to do about each red one. Pure.

Exit codes: 4 for a model that cannot be read, 3 for one that is not supported, 2 for what somebody has to set otherwise
on a machine.
"""

from collections.abc import Iterator

from tpdist.control.messages import ProbeReport
from tpdist.control.state import name_of
from tpdist.errors import CheckpointError, JoinError, PlanError, SettingsError
from tpdist.plan.amounts import amount
from tpdist.preflight.words import Findings, Limits, Line, ModelFound, NodeExamined

GREEN, RED, SKIPPED = "green", "red", "skipped"
MIN_MEMORY_BYTES = 1024**3
MIN_SHM_BYTES = 512 * 1024**2
"""NCCL's ranks of one machine exchange through /dev/shm; containers have 64 MiB of it by default."""
MIN_OPEN_FILES = 1024


def where(node: NodeExamined) -> str:
    """A node as its user knows it."""
    return f"{name_of(node.register.worker_id)} ({node.register.hostname})"


def node_lines(node: NodeExamined, place: str, *, device: str) -> Iterator[Line]:
    """What a node is by itself."""
    findings = node.findings
    if findings is None:
        yield red(
            "checkup",
            place,
            "it came, but did not say what it found",
            "look at what its `tpdist doctor` prints; a GPU or a disk may be stuck (`nvidia-smi`, `dmesg`)",
            JoinError.exit_code,
        )
        return
    yield from probe_lines(findings, place, device=device)
    yield from limit_lines(findings.limits, place, num_gpus=num_gpus(findings))
    yield from model_lines(findings, place)


def probe_lines(findings: Findings, place: str, *, device: str) -> Iterator[Line]:
    """Versions, devices, memory."""
    probe = findings.probe
    if probe is None:
        step = "run `tpdist probe` there; a GPU may be stuck (`nvidia-smi`, `dmesg`)"
        yield red("versions", place, findings.probe_problem, step, SettingsError.exit_code)
        return
    yield _versions_line(probe, place)
    yield _devices_line(probe, place, device=device)
    found = f"{amount(probe.available_bytes)} of {amount(probe.memory_bytes)} available, {probe.num_cpus} CPUs"
    if probe.available_bytes < MIN_MEMORY_BYTES:
        step = "end what uses the memory, or raise the limit of the container or service (cgroup)"
        yield red("memory", place, found, step, SettingsError.exit_code)
    else:
        yield green("memory", place, found)


def _versions_line(probe: ProbeReport, place: str) -> Line:
    named = {name: getattr(probe, name) for name in ("tpdist", "python", "torch", "cuda", "nccl", "driver")}
    found = ", ".join(f"{name} {version}" for name, version in named.items() if version is not None)
    if probe.torch is None:
        return red("versions", place, found, "install torch: `pip install tpdist` does", SettingsError.exit_code)
    return green("versions", place, found)


def _devices_line(probe: ProbeReport, place: str, *, device: str) -> Line:
    gpus = [each for each in probe.devices if each.kind == "cuda"]
    if gpus:
        names = dict.fromkeys(each.name for each in gpus)
        counted = ", ".join(f"{sum(each.name == name for each in gpus)}x {name}" for name in names)
        free = min(each.free_bytes for each in gpus)
        return green("devices", place, f"{counted}, at least {amount(free)} free on each")
    if device == "cuda":
        step = "see `nvidia-smi` and CUDA_VISIBLE_DEVICES, or leave --device (TPDIST_DEVICE) at auto"
        return red("devices", place, "no GPU, and --device cuda asks for one", step, SettingsError.exit_code)
    if device == "auto" and probe.driver is not None:
        found = f"no GPU for torch {probe.torch}, though there is a driver ({probe.driver})"
        built = "install a torch that is built for CUDA" if probe.cuda is None else "see CUDA_VISIBLE_DEVICES"
        return red("devices", place, found, f"{built}, or set --device cpu", SettingsError.exit_code)
    return green("devices", place, f"no GPU: ranks run on the CPU ({probe.devices[0].name})" if probe.devices else "-")


def limit_lines(limits: Limits, place: str, *, num_gpus: int) -> Iterator[Line]:
    """What the kernel grants."""
    found = amount(limits.shm_bytes)
    if num_gpus > 1 and limits.shm_bytes < MIN_SHM_BYTES:
        step = "give the container more: `docker run --shm-size=1g` or `--ipc=host`; NCCL's ranks need it"
        yield red("/dev/shm", place, found, step, SettingsError.exit_code)
    else:
        yield green("/dev/shm", place, found if num_gpus > 1 else f"{found} (only several GPUs need it)")
    files = limits.open_files
    found = "no limit" if files is None else f"{files}"
    if files is not None and files < MIN_OPEN_FILES:
        step = "`ulimit -n 65536` before the start, or LimitNOFILE=65536 in its systemd unit"
        yield red("open files", place, found, step, SettingsError.exit_code)
    else:
        yield green("open files", place, found)
    locked = limits.locked_bytes
    if limits.infiniband and num_gpus and locked is not None:
        step = "`ulimit -l unlimited`, LimitMEMLOCK=infinity in its unit, or `docker run --ulimit memlock=-1`"
        yield red("locked memory", place, f"{amount(locked)}, and InfiniBand needs all", step, SettingsError.exit_code)
    else:
        yield green(
            "locked memory", place, "no limit" if locked is None else f"{amount(locked)} (only InfiniBand needs more)"
        )


def model_lines(findings: Findings, place: str) -> Iterator[Line]:
    """The model, if one was named."""
    if findings.model_problem:
        step = "put the same model on every node; MODEL is its folder there, or a Hugging Face id"
        if findings.model_exit_code == PlanError.exit_code:
            step = "serve a model of a kind that is supported"
        yield red("model", place, findings.model_problem, step, findings.model_exit_code or CheckpointError.exit_code)
    elif findings.model is not None:
        yield green("model", place, _read_words(findings.model))


def _read_words(model: ModelFound) -> str:
    speed = model.read_bytes / max(model.read_s, 1e-9)
    cached = "" if model.from_disk else ", perhaps from the page cache"
    all_of_it = model.total_bytes / max(speed, 1e-9)
    return f"{amount(model.total_bytes)}, read at {rate(speed)}{cached}: {seconds(all_of_it)} for all of it"


# -- words -----------------------------------------------------------------------------------------------------------


def rate(bytes_per_s: float) -> str:
    """As in 1.25 GB/s."""
    for unit, factor in (("GB/s", 1e9), ("MB/s", 1e6)):
        if bytes_per_s >= factor:
            return f"{bytes_per_s / factor:.3g} {unit}"
    return f"{bytes_per_s / 1e3:.3g} KB/s"


def seconds(value: float) -> str:
    """As in 52.3 us, 1.2 ms or 4.1 s."""
    for unit, factor in (("s", 1.0), ("ms", 1e-3)):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value < 1000 else f"{value:.0f} s"
    return f"{value * 1e6:.3g} us"


def num_gpus(findings: Findings) -> int:
    """That torch sees there."""
    return 0 if findings.probe is None else sum(device.kind == "cuda" for device in findings.probe.devices)


def green(check: str, place: str, found: str) -> Line:
    """A line of what is as it should be."""
    return Line(check=check, where=place, state=GREEN, found=found)


def red(check: str, place: str, found: str, next_step: str, exit_code: int) -> Line:
    """A line of what has to be changed, and how."""
    return Line(check=check, where=place, state=RED, found=found, next_step=next_step, exit_code=exit_code)
