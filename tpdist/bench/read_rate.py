"""`python -m tpdist.bench.read_rate`: bytes per second of a plain read of memory, in a process of its own.

On CPUs the sum of a large tensor, by as many threads as the ranks have together; on a GPU a copy, which reads and
writes each byte. The best of several passes: other work on the machine can only make a pass slower.
"""

import argparse
import json
import time

import torch

NUM_BYTES = {"cpu": 1 << 31, "cuda": 1 << 29}
"""Far more than any cache holds; on a GPU two of these must fit beside a model."""
PASSES = 5
FLOAT_BYTES = 4


def cpu_bytes_per_s(buffer: torch.Tensor) -> float:
    """One pass over `buffer`: [any number of elements], by torch's threads."""
    started = time.perf_counter()
    buffer.sum()
    return buffer.nbytes / (time.perf_counter() - started)


def cuda_bytes_per_s(source: torch.Tensor, target: torch.Tensor) -> float:
    """One copy of `source` to `target`, of equal shapes on one device; each byte counts twice."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    target.copy_(source)
    torch.cuda.synchronize()
    return 2 * source.nbytes / (time.perf_counter() - started)


def read_rate(*, device: str, num_bytes: int | None = None, passes: int = PASSES) -> float:
    """The best of `passes`, in bytes per second. `num_bytes` None: NUM_BYTES of the device."""
    num_elements = (num_bytes or NUM_BYTES[device]) // FLOAT_BYTES
    buffer = torch.ones(num_elements, dtype=torch.float32, device=device)
    if device == "cpu":
        return max(cpu_bytes_per_s(buffer) for _ in range(passes))
    target = torch.empty_like(buffer)
    return max(cuda_bytes_per_s(buffer, target) for _ in range(passes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=tuple(NUM_BYTES), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(json.dumps({"bytes_per_s": read_rate(device=arguments.device)}))


if __name__ == "__main__":
    main()
