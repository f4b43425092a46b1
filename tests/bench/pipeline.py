"""Two pipeline stages against two tensor-parallel ranks, one thread each.

    python tests/bench/pipeline.py [--runs 5]

Claims: tokens per second of two stages over those of two tensor-parallel ranks, with 64 clients and with 8. With 8,
each stage runs two batches of four in the time in which a tensor-parallel rank runs one batch of eight: weights are
read twice. What that costs at best is measured beside: the products of half of the model's layers, packed, on one
thread, once with eight rows over twice with four.
"""

import json
from pathlib import Path

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
)

PROMPT_TOKENS = 16
CLIENTS = (64, 8)
NAMES = {"stages": "two stages", "tensor": "two tensor-parallel ranks"}


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--tokens", type=int, default=48, metavar="N", help="of each answer (default: 48)")
    arguments = options.parse_args()
    with (
        model_folder(arguments) as folder,
        systems(
            stages=tpdist_arguments(folder, ranks=2, stages=2, threads=arguments.threads),
            tensor=tpdist_arguments(folder, ranks=2, threads=arguments.threads),
            machine=machine_arguments(threads=1),
        ) as running,
    ):
        shapes = half_of_the_layers(folder)

        def speed(name: str, clients: int) -> float:
            load = {"prompt_tokens": PROMPT_TOKENS, "max_tokens": arguments.tokens}
            answer = running[name].ask("load", concurrency=clients, num_requests=clients, **load)
            return float(answer["decode_tokens_per_s"])

        def allowed() -> float:
            """One step of eight rows over two of four."""
            took = running["machine"].ask("layers", rows=[8, 4], shapes=shapes)["step_s"]
            return float(took["8"] / (2 * took["4"]))

        measures = {
            f"{name} {clients}": lambda name=name, clients=clients: speed(name, clients)
            for clients in CLIENTS
            for name in NAMES
        }
        measured = alternate(arguments.runs, {**measures, "allowed": allowed})
    show(figures(measured), as_json=arguments.json)


def half_of_the_layers(folder: Path) -> list[tuple[int, int]]:
    """The weights of a stage, [out_features, in_features], as tpdist fuses them."""
    config = json.loads((folder / "config.json").read_text())
    hidden, intermediate = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    query, key_value = (config[name] * head_dim for name in ("num_attention_heads", "num_key_value_heads"))
    layer = [(query + 2 * key_value, hidden), (hidden, query), (2 * intermediate, hidden), (hidden, intermediate)]
    return layer * (config["num_hidden_layers"] // 2)


def figures(measured: dict[str, list[float]]) -> list[Figure]:
    found = [
        Figure(f"{name}, {clients} clients", measured[f"{key} {clients}"], "tokens/s")
        for clients in CLIENTS
        for key, name in NAMES.items()
    ]
    found += [
        ratio(
            f"stages over tensor parallel, {clients} clients",
            measured[f"stages {clients}"],
            measured[f"tensor {clients}"],
        )
        for clients in CLIENTS
    ]
    reached = [high / low for high, low in zip(measured["stages 8"], measured["tensor 8"], strict=True)]
    return [
        *found,
        Figure("a step of 8 rows over two of 4, half of the layers", measured["allowed"]),
        ratio("8 clients: reached of what two batches of 4 allow", reached, measured["allowed"]),
    ]


if __name__ == "__main__":
    main()
