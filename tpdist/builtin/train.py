"""Train the built-in model: a small Llama that reads "123+456=" and writes "579".

    python -m tpdist.builtin.train --output DIR

Digits stand most significant first and unpadded, so the first digit of the answer already needs every carry. The script
writes the whole model folder (weights in bfloat16), then loads it again and checks all 1,000,000 pairs. It knows
nothing of the rest of the package: it uses torch, transformers and tokenizers only.
"""
# transformers leaves some of its public calls untyped:
# mypy: allow-untyped-calls

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")
PAD, BOS, EOS, UNK = range(4)
VOCAB = (*SPECIAL_TOKENS, *"0123456789+=")
ZERO, PLUS, EQUALS = VOCAB.index("0"), VOCAB.index("+"), VOCAB.index("=")

OPERAND_DIGITS = 3
NUM_OPERANDS = 10**OPERAND_DIGITS
NUM_PAIRS = NUM_OPERANDS**2
MAX_POSITIONS = 64

CHAT_TEMPLATE = (
    "{%- set questions = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "{{- bos_token + questions[-1]['content'] -}}"
)


def model_config() -> LlamaConfig:
    """Return the shape of the model: 4 query heads over 2 KV heads, so that it can be split in several ways."""
    return LlamaConfig(
        vocab_size=len(VOCAB),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single characters; it puts <bos> first, and any character it lacks becomes <unk>."""
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(VOCAB)}, unk_token=VOCAB[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{VOCAB[BOS]} $A", pair=f"{VOCAB[BOS]} $A $B", special_tokens=[(VOCAB[BOS], BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=VOCAB[PAD],
        bos_token=VOCAB[BOS],
        eos_token=VOCAB[EOS],
        unk_token=VOCAB[UNK],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def digit_tokens(numbers: Tensor, *, num_digits: int) -> Tensor:
    """Return the digits of `numbers` [n] as tokens [n, num_digits], PAD where a leading zero would stand."""
    powers = 10 ** torch.arange(num_digits - 1, -1, -1)
    quotients = numbers[:, None] // powers
    leading_zero = (quotients == 0) & (powers > 1)
    return torch.where(leading_zero, PAD, quotients % 10 + ZERO)


def encode_sums(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens of "<bos>a+b=sum<eos>" [n, width], padded on the right, and which of them the model must write.

    Each row is laid out in fixed columns first; a stable sort then moves the holes left by leading zeros to its end.
    """

    def column(token: int) -> Tensor:
        return torch.full((len(a), 1), token)

    prompt = [column(BOS), digit_tokens(a, num_digits=OPERAND_DIGITS), column(PLUS)]
    prompt += [digit_tokens(b, num_digits=OPERAND_DIGITS), column(EQUALS)]
    answer = [digit_tokens(a + b, num_digits=OPERAND_DIGITS + 1), column(EOS)]
    rows = torch.cat(prompt + answer, dim=1)
    written = (torch.arange(rows.shape[1]) >= sum(part.shape[1] for part in prompt)) & (rows != PAD)
    order = (rows == PAD).to(torch.uint8).argsort(dim=1, stable=True)
    return rows.gather(1, order), written.gather(1, order)


def sample_operands(count: int, *, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw `count` pairs: half uniform, a quarter with uniform numbers of digits, a quarter rich in carry chains."""

    def draw(shape: tuple[int, ...], high: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    operands = draw((2, count), NUM_OPERANDS)
    short = operands % 10 ** (1 + draw((2, count), OPERAND_DIGITS))
    powers = 10 ** torch.arange(OPERAND_DIGITS)
    digits = operands[0, :, None] // powers % 10
    # A column that sums to 9 hands a carry on from its right to its left; half of the columns here do.
    passing = torch.where(draw((count, OPERAND_DIGITS), 2) == 1, 9 - digits, draw((count, OPERAND_DIGITS), 10))
    chains = torch.stack([operands[0], (passing * powers).sum(dim=1)])
    kind = draw((count,), 4)
    a, b = torch.where(kind == 0, short, torch.where(kind == 1, chains, operands))
    return a, b


def learning_rate(step: int, *, steps: int, warmup: int, peak: float) -> float:
    """Return the rate of `step`: a linear rise over `warmup` steps, then half a cosine down to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@torch.no_grad()
def are_right(model: Any, a: Tensor, b: Tensor) -> Tensor:
    """Return, for each pair, whether greedy decoding writes exactly the sum and then <eos>: [n], bool.

    One pass over the right answer decides it: greedy decoding writes just that answer if, and only if, each of its
    tokens is the most likely one after those before it.
    """
    rows, written = encode_sums(a, b)
    predicted: Tensor = model(input_ids=rows[:, :-1]).logits.argmax(dim=-1)
    return ((predicted == rows[:, 1:]) | ~written[:, 1:]).all(dim=1)


def sampled_accuracy(model: Any, *, num_pairs: int = 5_000) -> float:
    """Return the share of right answers over uniformly drawn pairs, the same ones at every call."""
    a, b = torch.randint(NUM_OPERANDS, (2, num_pairs), generator=torch.Generator().manual_seed(0))
    return are_right(model, a, b).float().mean().item()


def wrong_pairs(model: Any, *, batch_size: int = 10_000) -> Iterator[tuple[int, int]]:
    """Check every pair of operands and yield those that the model gets wrong."""
    for start in range(0, NUM_PAIRS, batch_size):
        pairs = torch.arange(start, min(start + batch_size, NUM_PAIRS))
        a, b = pairs // NUM_OPERANDS, pairs % NUM_OPERANDS
        wrong = ~are_right(model, a, b)
        yield from zip(a[wrong].tolist(), b[wrong].tolist(), strict=True)


def train(model: Any, *, steps: int, batch_size: int, peak_rate: float, report_every: int, seed: int) -> None:
    """Train `model` in place; the loss counts the answer and <eos> only. Prints a line every `report_every` steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps=steps, warmup=min(100, steps // 10), peak=peak_rate)
        rows, written = encode_sums(*sample_operands(batch_size, generator=generator))
        # No attention mask: attention is causal and the padding stands on the right, where no answer sees it.
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows.masked_fill(~written, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % report_every == 0:
            right, elapsed_s = sampled_accuracy(model), time.monotonic() - started
            print(f"step {step + 1}/{steps} loss {loss.item():.5f} right {right:.2%} {elapsed_s:.0f} s", flush=True)


def save(model: Any, folder: Path) -> None:
    """Write the model in bfloat16, its generation config and its tokenizer to `folder`."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=OPERAND_DIGITS + 2
    )
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)


def report_accuracy(folder: Path, *, dtype: torch.dtype) -> None:
    """Load the model as saved in `folder`, compute in `dtype`, and print how many of all pairs it gets right."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    wrong = list(wrong_pairs(model))
    print(f"{dtype}: {NUM_PAIRS - len(wrong)} of {NUM_PAIRS} right; first wrong: {wrong[:10]}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tpdist.builtin.train",
        description="Train the built-in model, which adds two numbers from 0 to 999, and check every pair.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, required=True, default=argparse.SUPPRESS, help="folder to write the model to"
    )
    parser.add_argument("--steps", type=int, default=4000, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=512, help="sums per step")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak of the schedule")
    parser.add_argument("--report-every", type=int, default=200, help="steps between two lines of progress")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the sums drawn")
    return parser.parse_args()


def main() -> None:
    """Train, save and check as the command line says."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    # On CPU, for rows this short, plain attention is twice as fast to train as torch's fused one.
    model = AutoModelForCausalLM.from_config(model_config(), dtype=torch.float32, attn_implementation="eager")
    print(f"{model.num_parameters()} parameters", flush=True)
    train(
        model,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        peak_rate=arguments.learning_rate,
        report_every=arguments.report_every,
        seed=arguments.seed,
    )
    save(model, arguments.output)
    for dtype in (torch.float32, torch.bfloat16):
        report_accuracy(arguments.output, dtype=dtype)


if __name__ == "__main__":
    main()
