"""Memory of a rank beside its weights and its KV cache.

    python tests/bench/memory.py [--runs 5]

Claim: anonymous memory of each rank (/proc/PID/smaps_rollup), less its weights and its KV cache. Every alternation is a
load that uses the whole cache first, so that all of it is resident and anything that grows with requests shows.
"""

import re
from pathlib import Path
from typing import Any

from measuring import Figure, System, alternate, model_folder, parser, show, systems, tpdist_arguments

KV_CACHE = "64MiB"
PROMPT_TOKENS, MAX_TOKENS = 500, 4


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    with model_folder(arguments) as folder:
        found = [figure for ranks in (1, 2) for figure in measure(folder, ranks=ranks, arguments=arguments)]
    show(found, as_json=arguments.json)


def measure(folder: Path, *, ranks: int, arguments: Any) -> list[Figure]:
    """What each of `ranks` ranks holds in MB, load after load."""
    words = tpdist_arguments(folder, ranks=ranks, threads=arguments.threads, kv_cache=KV_CACHE)
    with systems(tpdist=words) as running:
        ours = running["tpdist"]
        values = alternate(arguments.runs, {f"{ranks} ranks": lambda: held_mb(ours)})[f"{ranks} ranks"]
    return [
        Figure(f"rank {rank} of {ranks}, {name}", [run[rank][name] for run in values], "MB")
        for rank in range(ranks)
        for name in ("anonymous", "weights and KV cache", "beside them")
    ]


def held_mb(ours: System) -> list[dict[str, float]]:
    """Fill the cache, then read what each rank holds."""
    facts = ours.ask("facts")
    fitting = facts["kv_tokens"] // (PROMPT_TOKENS + MAX_TOKENS)
    ours.ask("load", concurrency=fitting, num_requests=fitting, prompt_tokens=PROMPT_TOKENS, max_tokens=MAX_TOKENS)
    return [held_by(rank) for rank in facts["ranks"]]


def held_by(rank: dict[str, int]) -> dict[str, float]:
    anonymous = anonymous_bytes(Path(f"/proc/{rank['pid']}/smaps_rollup").read_text())
    planned = rank["weight_bytes"] + rank["kv_bytes"]
    return {
        "anonymous": anonymous / 1e6,
        "weights and KV cache": planned / 1e6,
        "beside them": (anonymous - planned) / 1e6,
    }


def anonymous_bytes(rollup: str) -> int:
    """The line "Anonymous: N kB" of an smaps_rollup."""
    found = re.search(r"^Anonymous:\s+(\d+) kB$", rollup, re.MULTILINE)
    assert found, rollup
    return int(found[1]) * 1024


if __name__ == "__main__":
    main()
