"""What HTTP costs: streaming clients of `tpdist serve` against the engine in process.

    python tests/bench/serving.py [--runs 5]

Claims: tokens per second of 64 concurrent streams through HTTP, over those of 64 requests in process; and how much
later the first token of an idle system comes through HTTP. The clients run on the same machine, in one process.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

from measuring import (
    Figure,
    alternate,
    http_generator,
    model_folder,
    parser,
    ratio,
    served,
    show,
    systems,
    tpdist_arguments,
)

IDLE = {"concurrency": 1, "num_requests": 8, "prompt_tokens": 16, "max_tokens": 1}
KV_CACHE = "512MiB"


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--clients", type=int, default=64, metavar="N", help="default: 64")
    options.add_argument("--tokens", type=int, default=32, metavar="N", help="of each answer (default: 32)")
    arguments = options.parse_args()
    clients = arguments.clients
    load = {"concurrency": clients, "num_requests": clients, "prompt_tokens": 16, "max_tokens": arguments.tokens}
    flags = ("--threads", str(arguments.threads), "--kv-cache-memory-bytes", KV_CACHE, "--log-level", "WARNING")
    with (
        model_folder(arguments) as folder,
        systems(engine=tpdist_arguments(folder, ranks=1, threads=arguments.threads, kv_cache=KV_CACHE)) as running,
        served(folder, *flags) as url,
    ):
        engine = running["engine"]
        http = http_generator(url, folder)
        http(**IDLE)
        measured = alternate(
            arguments.runs,
            {
                "engine idle": lambda: first_token_ms(lambda: engine.ask("load", **IDLE)),
                "http idle": lambda: first_token_ms(lambda: http(**IDLE)),
                "engine": lambda: float(engine.ask("load", **load)["tokens_per_s"]),
                "http": lambda: float(http(**load)["tokens_per_s"]),
            },
        )
    pairs = zip(measured["http idle"], measured["engine idle"], strict=True)
    found = [
        Figure(f"in process, {clients} at once", measured["engine"], "tokens/s"),
        Figure(f"HTTP, {clients} streams", measured["http"], "tokens/s"),
        Figure("in process, idle, first token", measured["engine idle"], "ms"),
        Figure("HTTP, idle, first token", measured["http idle"], "ms"),
        ratio("tokens/s of HTTP over in process", measured["http"], measured["engine"]),
        Figure("added to the first token by HTTP", [high - low for high, low in pairs], "ms"),
    ]
    show(found, as_json=arguments.json)


def first_token_ms(measure: Callable[[], dict[str, Any]]) -> float:
    """The median over the requests of one load."""
    return median(measure()["ttft_s"]) * 1e3


if __name__ == "__main__":
    main()
