"""Memory of a rank beside its weights and its KV cache, while it works.

    python tests/bench/memory.py [--runs 5]

Claim: the most anonymous memory of each rank during a load (/proc/PID/smaps_rollup, read every 0.1 s), less its weights
and its KV cache. Every load has as many requests at once as the cache holds, and twice as many in all; their prompts
stay in the cache until no block of it is unused. One such load runs before the first that counts, so that the whole
cache is resident.
"""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from measuring import Figure, System, alternate, model_folder, parser, show, systems, tpdist_arguments

MAX_TOKENS = 4
SAMPLE_S = 0.1


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--prompt-tokens", type=int, default=500, metavar="N", help="of each request (default: 500)")
    options.add_argument("--kv-cache", default="64MiB", metavar="SIZE", help="of each rank (default: 64MiB)")
    arguments = options.parse_args()
    with model_folder(arguments) as folder:
        found = [figure for ranks in (1, 2) for figure in measure(folder, ranks=ranks, arguments=arguments)]
    show(found, as_json=arguments.json)


def measure(folder: Path, *, ranks: int, arguments: Any) -> list[Figure]:
    """What each of `ranks` ranks holds at most in MB, load after load."""
    words = tpdist_arguments(folder, ranks=ranks, threads=arguments.threads, kv_cache=arguments.kv_cache)
    with systems(tpdist=words) as running:
        ours = running["tpdist"]
        load(ours, prompt_tokens=arguments.prompt_tokens)
        measures = {f"{ranks} ranks": lambda: held_mb(ours, prompt_tokens=arguments.prompt_tokens)}
        values = alternate(arguments.runs, measures)[f"{ranks} ranks"]
    return [
        Figure(f"rank {rank} of {ranks}, {name}", [run[rank][name] for run in values], "MB")
        for rank in range(ranks)
        for name in ("anonymous", "weights and KV cache", "beside them")
    ]


def load(ours: System, *, prompt_tokens: int) -> None:
    """Requests that fill the cache twice over. Ends the benchmark if not one of them fits."""
    facts = ours.ask("facts")
    needed = prompt_tokens + MAX_TOKENS
    if needed > min(facts["max_tokens"], facts["kv_tokens"]):
        raise SystemExit(
            f"a prompt of {prompt_tokens} tokens and {MAX_TOKENS} new ones do not fit: a sequence has at most "
            f"{facts['max_tokens']}, the KV cache {facts['kv_tokens']}; lower --prompt-tokens or raise --kv-cache"
        )
    fitting = facts["kv_tokens"] // needed
    sizes = {"prompt_tokens": prompt_tokens, "max_tokens": MAX_TOKENS}
    ours.ask("load", concurrency=fitting, num_requests=2 * (fitting + 1), **sizes)


def held_mb(ours: System, *, prompt_tokens: int) -> list[dict[str, float]]:
    """The most that each rank holds during one load."""
    ranks = ours.ask("facts")["ranks"]
    with peaks([rank["pid"] for rank in ranks]) as most:
        load(ours, prompt_tokens=prompt_tokens)
    return [held_by(rank, anonymous=most[rank["pid"]]) for rank in ranks]


def held_by(rank: dict[str, int], *, anonymous: int) -> dict[str, float]:
    planned = rank["weight_bytes"] + rank["kv_bytes"]
    return {
        "anonymous": anonymous / 1e6,
        "weights and KV cache": planned / 1e6,
        "beside them": (anonymous - planned) / 1e6,
    }


@contextmanager
def peaks(pids: Sequence[int]) -> Iterator[dict[int, int]]:
    """The most anonymous bytes of each process up to now, while the block runs."""
    most = dict.fromkeys(pids, 0)
    ended = threading.Event()

    def sample() -> None:
        while True:
            for pid in pids:
                most[pid] = max(most[pid], read_anonymous_bytes(pid))
            if ended.wait(SAMPLE_S):
                return

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield most
    finally:
        ended.set()
        sampler.join()


def read_anonymous_bytes(pid: int) -> int:
    return anonymous_bytes(Path(f"/proc/{pid}/smaps_rollup").read_text())


def anonymous_bytes(rollup: str) -> int:
    """The line "Anonymous: N kB" of an smaps_rollup."""
    found = re.search(r"^Anonymous:\s+(\d+) kB$", rollup, re.MULTILINE)
    assert found, rollup
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
