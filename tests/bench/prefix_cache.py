"""What the prefix cache saves: the same first 1,000 tokens twice.

    python tests/bench/prefix_cache.py [--runs 5]

Claim: the time to first token of a second request with the same prefix, and another end, over that of the first. Every
alternation has a prefix of its own.
"""

from measuring import Figure, alternate, model_folder, parser, ratio, show, systems, tpdist_arguments

END_TOKENS = 8


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--prefix-tokens", type=int, default=1000, metavar="N", help="default: 1000")
    arguments = options.parse_args()
    prefix = arguments.prefix_tokens
    load = {"concurrency": 1, "num_requests": 2, "prompt_tokens": prefix + END_TOKENS, "max_tokens": 2}
    with (
        model_folder(arguments) as folder,
        systems(tpdist=tpdist_arguments(folder, ranks=1, threads=arguments.threads)) as running,
    ):
        ours = running["tpdist"]
        ours.ask("load", **load)
        measured = alternate(
            arguments.runs,
            {"a prefix, twice": lambda: ours.ask("load", **load, shared_prefix_tokens=prefix)["ttft_s"]},
        )["a prefix, twice"]
    first, second = ([times[index] * 1e3 for times in measured] for index in range(2))
    found = [
        Figure(f"first token, {prefix} new tokens", first, "ms"),
        Figure(f"first token, the same {prefix} tokens again", second, "ms"),
        ratio("second over first", second, first),
    ]
    show(found, as_json=arguments.json)


if __name__ == "__main__":
    main()
