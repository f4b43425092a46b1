"""Decoding against transformers, the memory bandwidth, and itself with two ranks.

    python tests/bench/decode.py [--runs 5]

Claims, for one sequence and for sixteen: tokens per second of tpdist with one rank and with two, over those of
transformers with as many threads; of one sequence also the bytes per second that it reads (weights without the
embedding table, keys and values) over a plain read of 2 GiB with as many threads.
"""

from measuring import (
    Figure,
    System,
    alternate,
    machine_arguments,
    model_folder,
    parser,
    ratio,
    show,
    systems,
    tpdist_arguments,
    transformers_arguments,
)

PROMPT_TOKENS = 16
BATCHES = (1, 16)
TPDIST = {"one": "tpdist, one rank", "two": "tpdist, two ranks"}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--tokens", type=int, default=48, metavar="N", help="of each answer (default: 48)")
    arguments = options.parse_args()
    with (
        model_folder(arguments) as folder,
        systems(
            one=tpdist_arguments(folder, ranks=1, threads=arguments.threads),
            two=tpdist_arguments(folder, ranks=2, threads=arguments.threads),
            transformers=transformers_arguments(folder, threads=arguments.threads),
            machine=machine_arguments(threads=arguments.threads),
        ) as running,
    ):
        facts = running["one"].ask("facts")
        measured = measure(running, runs=arguments.runs, tokens=arguments.tokens)
    context = PROMPT_TOKENS + arguments.tokens / 2
    token_bytes = facts["weight_bytes"] + context * facts["kv_bytes_per_token"]
    show(figures(measured, token_bytes=token_bytes), as_json=arguments.json)


def measure(running: dict[str, System], *, runs: int, tokens: int) -> dict[str, list[float]]:
    """Tokens per second by system and batch ("one 16"), and bytes per second under "read"."""

    def tpdist(name: str, batch: int) -> float:
        load = {"concurrency": batch, "num_requests": batch, "prompt_tokens": PROMPT_TOKENS, "max_tokens": tokens}
        return float(running[name].ask("load", **load)["decode_tokens_per_s"])

    def peer(batch: int) -> float:
        answer = running["transformers"].ask("decode", batch=batch, prompt_tokens=PROMPT_TOKENS, max_tokens=tokens)
        return float(answer["decode_tokens_per_s"])

    measures = {"read": lambda: float(running["machine"].ask("read")["bytes_per_s"])}
    for batch in BATCHES:
        measures |= {f"{name} {batch}": lambda name=name, batch=batch: tpdist(name, batch) for name in TPDIST}
        measures[f"transformers {batch}"] = lambda batch=batch: peer(batch)
    return alternate(runs, measures)


def figures(measured: dict[str, list[float]], *, token_bytes: float) -> list[Figure]:
    """Speeds, then what is claimed of them. One sequence reads `token_bytes` for a token."""
    names = {**TPDIST, "transformers": "transformers"}
    found = [Figure("plain read", [rate / 1e9 for rate in measured["read"]], "GB/s")]
    for batch in BATCHES:
        found += [
            Figure(f"{name}, batch {batch}", measured[f"{key} {batch}"], "tokens/s") for key, name in names.items()
        ]
    for key, name in names.items():
        read = [speed * token_bytes for speed in measured[f"{key} 1"]]
        found.append(ratio(f"{name}, batch 1, over the plain read", read, measured["read"]))
    for batch in BATCHES:
        for key, name in TPDIST.items():
            title = f"{name} over transformers, batch {batch}"
            found.append(ratio(title, measured[f"{key} {batch}"], measured[f"transformers {batch}"]))
        found.append(ratio(f"two ranks over one, batch {batch}", measured[f"two {batch}"], measured[f"one {batch}"]))
    return found


if __name__ == "__main__":
    main()
