"""A forward pass of a model whose layers are on the disk, or in CPU memory, with tpdist.bigmodel and with Accelerate.

    python tests/bench/offload.py [--runs 7] [--tokens 128] [--warm]

Claims: seconds of a forward pass of Accelerate over those of tpdist.bigmodel, layers on the disk and in CPU memory; and
the same of tpdist.bigmodel without reading ahead over those with it. The random bfloat16 llama is that of the other
benchmarks with fewer layers; its embeddings and output layer stay in memory. All run in this process, one at a time.

The disk is really read: before each pass all files leave the page cache (fsync, then posix_fadvise with DONTNEED),
unless --warm. A pass that reads ahead reads the first layer of the next one too, and counts until that is done, so that
each pass pays for as many bytes as it has layers. Accelerate is measured with its own copy of the weights, which its
load_checkpoint_and_dispatch writes, and with the checkpoint's own files through an offload_index, as transformers does.
"""

import copy
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import accelerate
import torch
from measuring import Figure, alternate, model_folder, parser, ratio, show
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tpdist import bigmodel
from tpdist.bigmodel.align import AlignDevicesHook
from tpdist.bigmodel.sources import DiskSource
from tpdist.checkpoint.tensors import find_tensors

NUM_LAYERS = 6
ON_DISK = {"model.layers": "disk", "": "cpu"}


def skeleton(folder: Path) -> nn.Module:
    """The model without memory; the type is the checkpoint's."""
    config = AutoConfig.from_pretrained(folder)
    with bigmodel.init_empty_weights():
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def accelerate_map(model: nn.Module) -> dict[str, Any]:
    """ON_DISK as Accelerate understands it: layer by layer, as its own planner writes it."""
    layers = {name: "disk" for name, _ in model.named_modules() if name.count(".") == 2 and "layers" in name}
    return {"model.embed_tokens": "cpu", **layers, "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


def accelerate_with_a_copy(folder: Path, copies: Path) -> nn.Module:
    model = skeleton(folder)
    made: nn.Module = accelerate.load_checkpoint_and_dispatch(
        model, str(folder), accelerate_map(model), offload_folder=str(copies), dtype=torch.bfloat16
    )
    return made


def accelerate_in_place(folder: Path, copies: Path) -> nn.Module:
    """Its dispatch_model on the checkpoint's own file; what is not on the disk is loaded by us, as it needs it."""
    model = skeleton(folder)
    bigmodel.load_checkpoint_in_model(model, folder, ON_DISK)
    index = {
        name: {"safetensors_file": str(entry.file), "weight_name": name, "dtype": "bfloat16"}
        for name, entry in find_tensors(folder).tensors.items()
        if ".layers." in name
    }
    made: nn.Module = accelerate.dispatch_model(model, accelerate_map(model), offload_index=index)
    return made


def files_of(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def leave_page_cache(files: Iterable[Path]) -> None:
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def sources(model: nn.Module) -> Iterator[DiskSource]:
    for module in model.modules():
        hook = module.__dict__.get("_hf_hook")
        if isinstance(hook, AlignDevicesHook):
            yield from (item.source for item in hook.offloaded if isinstance(item.source, DiskSource))


def prompt(folder: Path, num_tokens: int) -> torch.Tensor:
    """Random ids, the same in every run: [1, num_tokens]."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, AutoConfig.from_pretrained(folder).vocab_size, (1, num_tokens), generator=generator)


def timed(model: nn.Module, token_ids: torch.Tensor, files: list[Path], logits: list[torch.Tensor]) -> float:
    """Seconds of one pass, with what it reads ahead. The logits are kept for the comparison."""
    reading = set(sources(model))
    leave_page_cache(files)
    started = time.perf_counter()
    with torch.inference_mode():
        logits.append(model(input_ids=token_ids, use_cache=False).logits)
    for source in reading:
        source.settle()
    return time.perf_counter() - started


def models(folder: Path, copies: Path) -> dict[str, nn.Module]:
    whole = bigmodel.load_checkpoint_and_dispatch(skeleton(folder), folder, {"": "cpu"})
    return {
        "disk, reading ahead": bigmodel.load_checkpoint_and_dispatch(skeleton(folder), folder, ON_DISK),
        "disk, not ahead": bigmodel.load_checkpoint_and_dispatch(skeleton(folder), folder, ON_DISK, prefetch_blocks=0),
        "disk, Accelerate, a copy": accelerate_with_a_copy(folder, copies),
        "disk, Accelerate, in place": accelerate_in_place(folder, copies),
        "CPU, Accelerate": accelerate.cpu_offload(copy.deepcopy(whole), execution_device=torch.device("cpu")),
        "CPU": bigmodel.cpu_offload(whole, execution_device="cpu"),
    }


def main() -> None:
    options = parser(__doc__ or "", runs=7)
    options.set_defaults(layers=NUM_LAYERS)
    options.add_argument("--tokens", type=int, default=128, metavar="N", help="of the prompt (default: 128)")
    options.add_argument("--warm", action="store_true", help="leave the files in the page cache")
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    with model_folder(arguments) as folder, TemporaryDirectory(prefix="tpdist-bench-") as copies:
        running = models(folder, Path(copies))
        files = [] if arguments.warm else files_of(folder, Path(copies))
        token_ids = prompt(folder, arguments.tokens)
        logits: list[torch.Tensor] = []
        measures: dict[str, Callable[[], float]] = {
            name: lambda model=model: timed(model, token_ids, files, logits)  # type: ignore[misc]
            for name, model in running.items()
        }
        for measure in measures.values():
            measure()
        measured = alternate(arguments.runs, measures)
    if not all(torch.equal(found, logits[0]) for found in logits):
        raise SystemExit("the systems do not compute the same logits")
    found = [Figure(name, values, "s") for name, values in measured.items()]
    found.append(ratio("disk: not ahead / ahead", measured["disk, not ahead"], measured["disk, reading ahead"]))
    for peer in ("a copy", "in place"):
        theirs = measured[f"disk, Accelerate, {peer}"]
        found.append(ratio(f"disk: Accelerate, {peer} / ahead", theirs, measured["disk, reading ahead"]))
    found.append(ratio("CPU: Accelerate / tpdist", measured["CPU, Accelerate"], measured["CPU"]))
    show(found, as_json=arguments.json)


if __name__ == "__main__":
    main()
