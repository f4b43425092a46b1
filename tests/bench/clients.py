"""Many clients against one, through the HTTP API of `tpdist serve`.

    python tests/bench/clients.py [--runs 5]

Claim: tokens per second of 16 streaming clients together, over those of a client alone.
"""

from measuring import Figure, alternate, http_generator, model_folder, parser, ratio, served, show


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--clients", type=int, default=16, metavar="N", help="default: 16")
    options.add_argument("--tokens", type=int, default=48, metavar="N", help="of each answer (default: 48)")
    arguments = options.parse_args()
    clients = arguments.clients
    request = {"prompt_tokens": 16, "max_tokens": arguments.tokens}
    flags = ("--threads", str(arguments.threads), "--kv-cache-memory-bytes", "512MiB", "--log-level", "WARNING")
    with model_folder(arguments) as folder, served(folder, *flags) as url:
        http = http_generator(url, folder)
        http(concurrency=clients, num_requests=clients, prompt_tokens=16, max_tokens=2)
        measured = alternate(
            arguments.runs,
            {
                "one": lambda: float(http(concurrency=1, num_requests=1, **request)["tokens_per_s"]),
                "many": lambda: float(http(concurrency=clients, num_requests=clients, **request)["tokens_per_s"]),
            },
        )
    found = [
        Figure("1 client", measured["one"], "tokens/s"),
        Figure(f"{clients} clients", measured["many"], "tokens/s"),
        ratio(f"{clients} clients over 1", measured["many"], measured["one"]),
    ]
    show(found, as_json=arguments.json)


if __name__ == "__main__":
    main()
