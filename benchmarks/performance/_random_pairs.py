"""Pairs of random checkpoints and prompts of real lengths, for benchmarks. No command.

The second model is the first one changed as fine-tuning changes one: by a matrix of
low rank and a little noise. Prompts of the two patterns prefer different tokens, so
that coefficients can tell them apart and what they learn holds for other prompts.
Nothing here is trained: these pairs show cost, never quality.
"""

import io
import json
import random
from contextlib import redirect_stdout
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.qwen2 import modeling_qwen2  # noqa: F401 (not in a run)
from transformers.models.qwen3 import modeling_qwen3  # noqa: F401
from transformers.utils import logging

import rpam_mergekit.cli.fit  # noqa: F401 (not in a run)
from rpam_mergekit.cli.main import main as mergekit_rpam

# Tokens of the prompts and solutions in the pool of the method's authors (GSM8K,
# MATH-500, AIME24) by Qwen's tokenizer, at 0, 5, ... 100 % of the 166 long and 1646
# short ones; and of the right responses that a merged Qwen3-4B gave to AIME24, for the
# long pattern's responses.
PROMPT_TOKENS = {
    "long": "15 40 45 50 54 56 59 62 65 69 73 78 80 85 96 106 115 142 162 232 700",
    "short": "8 26 32 36 38 41 43 46 49 53 55 58 61 64 68 72 77 83 93 112 791",
}
RESPONSE_TOKENS = {
    "long": "1296 2411 3364 3535 3616 4219 4579 4914 5971 6232 6799 7118 8078 9250 "
    "10693 11790 12671 13183 13676 15221 17665",
    "short": "1 49 57 66 72 79 85 93 99 106 114 122 131 140 150 164 176 198 227 297 "
    "939",
}
TEMPLATE_TOKENS = 8  # what Qwen3's chat template puts around a single turn
WORDS = 512  # tokens that prompts are made of
RANK = 4
PATTERNS = ("long", "short")

logging.disable_progress_bar()


def small_config(
    hidden: int = 128, layers: int = 4, vocabulary: int = WORDS, **changes
) -> Qwen2Config:
    """Return a Qwen2 config of the usual proportions and an untied head."""
    heads = max(hidden // 64, 2)
    return Qwen2Config(
        **{
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "vocab_size": vocabulary,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            **changes,
        }
    )


# Of published models: layers, width, that of the MLP, heads, of keys, vocabulary, tied.
FULL = {
    "qwen2.5-1.5b": (28, 1536, 8960, 12, 2, 151936, True),
    "qwen3-4b": (36, 2560, 9728, 32, 8, 151936, True),
    "qwen2.5-7b": (28, 3584, 18944, 28, 4, 152064, False),
    "qwen2.5-14b": (48, 5120, 13824, 40, 8, 152064, False),
    "qwen2.5-32b": (64, 5120, 27648, 40, 8, 152064, False),
    "llama-3.3-70b": (80, 8192, 28672, 64, 8, 128256, False),
    "qwen3-30b-a3b": (48, 2048, 768, 32, 4, 151936, False),
}


def full_config(name: str, layers: int | None = None) -> PretrainedConfig:
    """Return the config of a model of `FULL` or of `tiny`, with fewer layers."""
    if name == "tiny":
        return small_config(64, layers or 4)
    depth, width, inner, heads, keys, vocabulary, tied = FULL[name]
    shared = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers or depth,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    }
    if name == "qwen3-30b-a3b":
        return Qwen3MoeConfig(
            **shared,
            head_dim=128,
            moe_intermediate_size=inner,
            num_experts=128,
            num_experts_per_tok=8,
        )
    if name.startswith("qwen3"):
        return Qwen3Config(**shared, head_dim=128)
    return (LlamaConfig if name.startswith("llama") else Qwen2Config)(**shared)


def write_pair(
    folder: Path,
    config: PretrainedConfig,
    per_pattern: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    longest: int | None = None,
    device: str = "cpu",
) -> list[tuple[int, int]]:
    """Write `long`, `short` and `calibration.jsonl` into `folder`.

    Returns the tokens of every query's prompt and response. Of a model, a decoder layer
    is made at a time, and is a shard.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        layer = name.split(".layers.")[-1].split(".")[0] if ".layers." in name else "0"
        shards.setdefault(f"model-{int(layer):04d}.safetensors", {})[name] = (
            parameter.shape
        )
    generator = torch.Generator(device).manual_seed(seed)
    places: dict[str, str] = {}
    for pattern in PATTERNS:
        (folder / pattern).mkdir(parents=True, exist_ok=True)
    for shard, shapes in shards.items():
        pair = {n: _fine_tuned(n, s, generator, device) for n, s in shapes.items()}
        for number, pattern in enumerate(PATTERNS):
            tensors = {n: both[number].to("cpu", dtype) for n, both in pair.items()}
            save_file(tensors, folder / pattern / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(shapes, shard)
    index = json.dumps({"metadata": {}, "weight_map": places})
    config.dtype = str(dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    for pattern in PATTERNS:
        (folder / pattern / "model.safetensors.index.json").write_text(index)
        config.save_pretrained(folder / pattern)
        _tokenizer().save_pretrained(folder / pattern)
    return _write_calibration(folder / "calibration.jsonl", per_pattern, seed, longest)


def checkpoint_bytes(folder: Path) -> int:
    """Return the size of one of the pair's two checkpoints."""
    return sum(p.stat().st_size for p in (folder / "long").glob("*.safetensors"))


def _fine_tuned(
    name: str, shape: torch.Size, generator: torch.Generator, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a random tensor, and the same after something like fine-tuning."""

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device)

    if len(shape) == 1:
        middle = 1.0 if "norm" in name else 0.0
        first = middle + 0.1 * noise(*shape)
        return first, first + 0.02 * noise(*shape)
    rows, columns = shape
    if "embed" in name:
        first = noise(*shape)
        first[: WORDS // 2] += noise(columns)  # so that patterns can be told apart
        return first, first + 0.1 * noise(*shape)
    scale = columns**-0.5
    first = scale * noise(*shape)
    change = noise(rows, RANK) @ noise(RANK, columns) / RANK**0.5
    return first, first + scale * (0.4 * change + 0.2 * noise(*shape))


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words w0, w1, ... whatever class it is loaded as."""
    tokenizer = Tokenizer(models.WordLevel({"<|pad|>": 0}))
    words = [AddedToken(f"w{n} ", normalized=False) for n in range(1, WORDS)]
    tokenizer.add_tokens(words)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>")


def prompts(
    per_pattern: int, seed: int = 0, longest: int | None = None
) -> list[tuple[list[int], str]]:
    """Return token ids and pattern of prompts whose lengths are those of the pool."""
    rng = random.Random(seed)
    found = []
    for number in range(2 * per_pattern):
        pattern = PATTERNS[number % 2]
        length = _draw(PROMPT_TOKENS[pattern], rng) + TEMPLATE_TOKENS
        found.append((_words(min(length, longest or length), pattern, rng), pattern))
    return found


def _write_calibration(
    path: Path, per_pattern: int, seed: int, longest: int | None
) -> list[tuple[int, int]]:
    """Write a calibration file of `prompts`, with responses; return both's tokens.

    Long-CoT responses are thousands of tokens long: `max_tokens` cuts them.
    """
    lengths = []
    rng = random.Random(seed + 1)
    drawn = prompts(per_pattern, seed, longest)
    with open(path, "w") as file:
        for ids, pattern in drawn:
            length = _draw(RESPONSE_TOKENS[pattern], rng)
            response = _words(min(length, longest or length), pattern, rng)
            lengths.append((len(ids), len(response)))
            line = {"prompt": _text(ids), "pattern": pattern}
            file.write(json.dumps({**line, "response": _text(response)}) + "\n")
    return lengths


def _draw(quantiles: str, rng: random.Random) -> int:
    """Return a length between two neighbouring quantiles."""
    lengths = [int(length) for length in quantiles.split()]
    place = rng.random() * (len(lengths) - 1)
    low = int(place)
    return round(lengths[low] + (place - low) * (lengths[low + 1] - lengths[low]))


def _words(count: int, pattern: str, rng: random.Random) -> list[int]:
    """Return tokens, four of five from the pattern's half of the vocabulary."""
    halves = range(1, WORDS // 2), range(WORDS // 2, WORDS)
    own, other = halves if pattern == "long" else halves[::-1]
    return [rng.choice(own if rng.random() < 0.8 else other) for _ in range(count)]


def _text(ids: list[int]) -> str:
    return "".join(f"w{number} " for number in ids)


def rpam_config(folder: Path, **parameters: object) -> dict:
    """Return the merge config of the pair in `folder`."""
    return {
        "merge_method": "rpam",
        "base_model": str(folder / "long"),
        "models": [{"model": str(folder / "short")}],
        "parameters": {
            "calibration": str(folder / "calibration.jsonl"),
            **parameters,
        },
    }


def fit_pair(
    folder: Path, device: str = "cpu", out: Path | None = None, **parameters: object
) -> Path:
    """Run `mergekit-rpam fit` afresh, in this process; return the coefficients file."""
    out = out or folder / "coefficients.safetensors"
    out.unlink(missing_ok=True)
    config = folder / "fit.yml"
    config.write_text(yaml.safe_dump(rpam_config(folder, **parameters)))
    options = ["--out", str(out), "--device", device, "--quiet"]
    with redirect_stdout(io.StringIO()):  # it prints the path
        mergekit_rpam(["fit", str(config), *options], standalone_mode=False)
    return out
