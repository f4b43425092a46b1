"""How long the planner thinks about a large model: 126 layers (405 billion weights) over 16 GPUs of three kinds.

    python tests/bench/planner.py [--runs 5]

Claims: seconds of a plan of one rank a GPU with all layouts weighed; of sixteen stages; of one that has to shrink; of a
refusal, which also looks for what would help; and of the layers over the GPUs of one process in any order. One thread.
"""

import time
from collections.abc import Callable
from functools import partial

from measuring import Figure, alternate, parser, show
from models import llama

from tpdist.errors import PlanError
from tpdist.plan.decoder_weights import decoder_weights
from tpdist.plan.inventory import make_inventory, parse_devices
from tpdist.plan.placement import Demand, Inventory
from tpdist.plan.planner import plan_mapping, plan_ranks

CONFIG = llama(
    num_layers=126,
    hidden_size=16384,
    intermediate_size=53248,
    vocab_size=128256,
    max_position_embeddings=131072,
)
WEIGHTS = decoder_weights(CONFIG)
DEMAND = Demand(dtype="bfloat16", max_model_len=131072)
LARGE = make_inventory(parse_devices("6xH200,5xB200,5x96GiB@3.3TB/s").devices)
TIGHT = make_inventory(parse_devices("16x56GiB").devices)
SMALL = make_inventory(parse_devices("16x24GiB").devices)


def ranks(inventory: Inventory, pp_size: int | None) -> None:
    plan_ranks(CONFIG, WEIGHTS, inventory, DEMAND, tp_size=None, pp_size=pp_size, shares=None, stage_layers=None)


def refused() -> None:
    try:
        ranks(SMALL, None)
    except PlanError:
        return
    raise SystemExit("the model fits where it should not")


def one_process() -> None:
    plan_mapping(CONFIG, WEIGHTS, LARGE, DEMAND, method="exact")


CASES: dict[str, Callable[[], None]] = {
    "one rank a GPU, all layouts weighed": partial(ranks, LARGE, None),
    "sixteen stages": partial(ranks, LARGE, 16),
    "a demand that has to shrink": partial(ranks, TIGHT, 16),
    "a refusal": refused,
    "one process, any order of the GPUs": one_process,
}


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    measured = alternate(arguments.runs, {name: partial(seconds, case) for name, case in CASES.items()})
    show([Figure(name, values, "s") for name, values in measured.items()], as_json=arguments.json)


def seconds(case: Callable[[], None]) -> float:
    started = time.perf_counter()
    case()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
