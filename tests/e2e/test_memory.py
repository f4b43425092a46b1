"""Each rank holds its share of the weights, and nothing at full size on the way: measured on real rank processes."""

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from checkpoints import make_checkpoint

from tpdist import LLM, SamplingParams

NUM_RANKS = 4
SAMPLE_INTERVAL_S = 0.01
# What a rank needs beside its weights: the interpreter and torch (about 140 MB), the KV cache and its activations.
CONSTANT_BYTES = 256 * 1024**2
KV_CACHE_BYTES = 8 * 1024**2


@pytest.mark.e2e
@pytest.mark.slow
def test_each_of_four_ranks_stays_within_its_share_of_the_weights(tmp_path: Path) -> None:
    folder = make_checkpoint(
        tmp_path / "model",
        dtype=torch.bfloat16,
        tokenizer=True,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=50_001,
    )
    with (
        peak_anonymous_bytes() as peaks,
        LLM(
            folder, tensor_parallel_size=NUM_RANKS, kv_cache_memory_bytes=KV_CACHE_BYTES, threads=1, max_model_len=256
        ) as llm,
    ):
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, temperature=0, ignore_eos=True))
        shares = {rank.pid: rank.weight_bytes for node in llm.cluster_state().nodes for rank in node.ranks}
    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert len(shares) == NUM_RANKS
    assert sum(shares.values()) < 1.01 * whole
    for pid, share in shares.items():
        allowed = 1.1 * share + CONSTANT_BYTES
        assert peaks[pid] <= allowed, f"rank of {share:,} weight bytes took {peaks[pid]:,}, allowed {allowed:,.0f}"
    assert max(1.1 * share + CONSTANT_BYTES for share in shares.values()) < whole, "the model is too small to tell"


@contextmanager
def peak_anonymous_bytes() -> Iterator[dict[int, int]]:
    """The highest anonymous memory of each child process of this one, sampled while this lasts."""
    peaks: dict[int, int] = defaultdict(int)
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_INTERVAL_S):
            for child in psutil.Process().children(recursive=True):
                peaks[child.pid] = max(peaks[child.pid], _anonymous_bytes(child.pid))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield peaks
    finally:
        done.set()
        thread.join()


def _anonymous_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    values = [int(line.split()[1]) for line in lines if line.startswith("RssAnon:")]
    return values[0] * 1024 if values else 0
