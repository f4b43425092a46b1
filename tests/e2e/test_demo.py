"""The first command of a newcomer, and that the model it asks can be trusted to answer."""

import json
import random
import subprocess
import sys

import pytest

from tpdist import LLM, SamplingParams, builtin

pytestmark = pytest.mark.e2e


def test_the_demo_asks_both_nodes_and_every_answer_is_right() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tpdist", "demo", "--json"], capture_output=True, text=True, timeout=150
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["wrong"] == 0
    assert {answer["node"] for answer in report["answers"]} == {"head", "worker"}
    assert [rank["rank"] for node in report["cluster"]["nodes"] for rank in node["ranks"]] == [0, 1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_built_in_model_adds_random_numbers(dtype: str) -> None:
    draw = random.Random(0)
    pairs = [(draw.randrange(1000), draw.randrange(1000)) for _ in range(200)]
    with LLM(builtin.path(), dtype=dtype, threads=1) as llm:
        outputs = llm.generate([f"{a}+{b}=" for a, b in pairs], SamplingParams(max_tokens=6, temperature=0))
    assert [output.outputs[0].text for output in outputs] == [str(a + b) for a, b in pairs]
