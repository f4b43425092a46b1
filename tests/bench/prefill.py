"""The time of a prompt against transformers and the matrix rate.

    python tests/bench/prefill.py [--runs 5]

Claims: the time to first token of a prompt of 512 tokens, over the time of a forward pass of transformers; and 2 FLOP
for each weight and token in that time, over the rate of a plain product of large bfloat16 matrices. One rank; all have
the same number of threads. The embedding table is no product, and the output layer's is of the last token alone.
"""

from statistics import median

from measuring import (
    Figure,
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

NUM_REQUESTS = 2
"""In each alternation; the median counts."""


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--prompt-tokens", type=int, default=512, metavar="N", help="default: 512")
    arguments = options.parse_args()
    tokens = arguments.prompt_tokens
    with (
        model_folder(arguments) as folder,
        systems(
            tpdist=tpdist_arguments(folder, ranks=1, threads=arguments.threads),
            transformers=transformers_arguments(folder, threads=arguments.threads),
            machine=machine_arguments(threads=arguments.threads),
        ) as running,
    ):
        ours, peer = running["tpdist"], running["transformers"]
        load = {"concurrency": 1, "num_requests": NUM_REQUESTS, "prompt_tokens": tokens, "max_tokens": 1}
        ours.ask("load", **load)
        peer.ask("prefill", prompt_tokens=tokens)
        flop = 2 * ours.ask("facts")["layer_weights"] * tokens
        measured = alternate(
            arguments.runs,
            {
                "matmul": lambda: float(running["machine"].ask("matmul")["flop_per_s"]),
                "tpdist": lambda: median(ours.ask("load", **load)["ttft_s"]),
                "transformers": lambda: median(
                    time_s
                    for _ in range(NUM_REQUESTS)
                    for time_s in peer.ask("prefill", prompt_tokens=tokens)["ttft_s"]
                ),
            },
        )
    rates = {name: [flop / time_s for time_s in measured[name]] for name in ("tpdist", "transformers")}
    found = [Figure("plain product of matrices", [rate / 1e9 for rate in measured["matmul"]], "GFLOP/s")]
    for name in rates:
        found.append(Figure(f"{name}, {tokens} tokens", [time_s * 1e3 for time_s in measured[name]], "ms"))
    found.append(ratio("time of tpdist over transformers", measured["tpdist"], measured["transformers"]))
    for name, rate in rates.items():
        found.append(ratio(f"{name}, rate over the plain product", rate, measured["matmul"]))
    show(found, as_json=arguments.json)


if __name__ == "__main__":
    main()
