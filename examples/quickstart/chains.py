"""The quickstart's task: chains of operations modulo 10, evaluated left to right.

``7+5*3-2=`` is ``((7 + 5) * 3 - 2) mod 10``. Multipliers are 3, 7 and 9 only: each
step then maps the ten digits onto the ten digits, so a guess is right one time in
ten however long the chain is. Difficulty is the number of operations, 1 to 8.

A query belongs to one split by a hash of its text, so that the sets of queries of
three and more operations never overlap (of shorter ones there are too few to hold
out): ``train`` (experts and calibration), ``validation`` (choices between settings)
and ``test`` (the figures that are reported).
"""

import hashlib
import random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

DIFFICULTIES = tuple(range(1, 9))
# Of 12 queries 9 have up to three operations, as most of what is asked is easy.
MIX = (2, 3, 4, 0.6, 0.6, 0.6, 0.6, 0.6)
MULTIPLIERS = "379"
SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
THINK, END_THINK = "<think>", "</think>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def draw(operations: int, rng: random.Random) -> str:
    """Return a random query of ``operations`` operations, such as ``7+5*3=``."""
    text = str(rng.randrange(10))
    for _ in range(operations):
        operator = rng.choice("+-*")
        operand = rng.choice(MULTIPLIERS if operator == "*" else "0123456789")
        text += operator + operand
    return text + "="


def operations(query: str) -> int:
    """Return the difficulty of ``query``: its number of operations."""
    return (len(query) - 2) // 2


def steps(query: str) -> list[str]:
    """Return every step of the evaluation, such as ``["7+5=2", "2*3=6"]``."""
    value, written = int(query[0]), []
    for at in range(1, len(query) - 1, 2):
        operator, operand = query[at], int(query[at + 1])
        result = {
            "+": value + operand,
            "-": value - operand,
            "*": value * operand,
        }[operator] % 10
        written.append(f"{value}{operator}{operand}={result}")
        value = result
    return written


def answer(query: str) -> str:
    """Return the one digit that ``query`` evaluates to."""
    return steps(query)[-1][-1]


def long_response(query: str) -> str:
    """Return what the Long-CoT expert learns: every step, then the answer."""
    return THINK + ";".join(steps(query)) + END_THINK + answer(query)


def short_response(query: str) -> str:
    """Return what the Short-CoT expert learns: the answer at once."""
    return answer(query)


def split(query: str) -> str:
    """Return ``train``, ``validation`` or ``test``; short queries are always train."""
    if operations(query) < 3:
        return "train"
    bucket = hashlib.sha256(query.encode()).digest()[0] % 8
    return {0: "validation", 1: "test"}.get(bucket, "train")


def queries(count: int, of_split: str, seed: int, mix=MIX) -> list[str]:
    """Return ``count`` distinct queries of a split, difficulties as in ``mix``."""
    rng = random.Random(f"{of_split}-{seed}")
    chosen: dict[str, None] = {}
    for difficulty, weight in zip(DIFFICULTIES, mix, strict=True):
        want = len(chosen) + round(count * weight / sum(mix))
        while len(chosen) < want:
            query = draw(difficulty, rng)
            if difficulty < 3 or split(query) == of_split:
                chosen[query] = None
    return list(chosen)


def build_tokenizer(characters="0123456789+-*=;") -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a character, with a chat template."""
    words = [*SPECIAL, THINK, END_THINK, *characters]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # tokens end to end, without spaces
    tokenizer.add_special_tokens([*SPECIAL])
    tokenizer.add_tokens([THINK, END_THINK])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
