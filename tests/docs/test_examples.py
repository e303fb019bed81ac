"""The example configs: their names and keys, and merges of tiny pairs of their kind."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import chains
import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.options import MergeOptions
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from helpers.commands import merge_here
from helpers.exporting import quiet
from helpers.merged import tensors
from helpers.models import TINY, save_experts
from helpers.pages import shell_lines
from helpers.paths import QUICKSTART, ROOT
from rpam_mergekit.checks.config_file import check_keys
from rpam_mergekit.checks.examine import examine_merge
from rpam_mergekit.checks.inputs import merge_models, read_inputs
from rpam_mergekit.cli.main import main
from rpam_mergekit.parameters import parse_settings

EXAMPLES = ROOT / "examples"
# The published names: the Long-CoT model, the Short-CoT model.
PAIRS = {
    "deepseek-r1-distill-qwen-1.5b": (
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "Qwen/Qwen2.5-Math-1.5B",
    ),
    "deepseek-r1-distill-qwen-7b": (
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        "Qwen/Qwen2.5-Math-7B",
    ),
    "qwen3-4b-2507": ("Qwen/Qwen3-4B-Thinking-2507", "Qwen/Qwen3-4B-Instruct-2507"),
}
# The kind of either model, and whether its head is tied to its embeddings.
KINDS = {
    "deepseek-r1-distill-qwen-1.5b": (Qwen2Config, False, True),
    "deepseek-r1-distill-qwen-7b": (Qwen2Config, False, False),
    "qwen3-4b-2507": (Qwen3Config, True, True),
}
ROWS = 32  # of the embeddings: more than there are tokens
RENAMED = {"<|user|>": "<|im_start|>", "<|end|>": "<|im_end|>"}
OPENING = chains.CHAT_TEMPLATE.replace("<|assistant|>", "<|assistant|><think>\n")


def text_of(name: str) -> str:
    return (EXAMPLES / name / "rpam.yml").read_text(encoding="utf-8")


def test_all_examples_are_listed_and_tested():
    folders = {path.parent.name for path in EXAMPLES.glob("*/rpam.yml")}
    assert folders == {*PAIRS, QUICKSTART.name, "smollm2"}
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| \[`([^`]+)`\]", listed, re.MULTILINE)) == folders
    for _, target in re.findall(r"\[([^\]]+)\]\(([^)#]+)[^)]*\)", listed):
        assert (EXAMPLES / target).exists(), target


@pytest.mark.parametrize("name", PAIRS)
def test_an_example_names_its_published_pair_and_has_no_unknown_key(name):
    content = yaml.safe_load(text_of(name))
    assert check_keys(content) == []
    config = MergeConfiguration.model_validate(content)
    settings = parse_settings(config.parameters or {})
    models = merge_models(config, read_inputs(config))
    assert models is not None
    assert tuple(str(model) for model in models.every) == PAIRS[name]
    assert models.patterns == ("long", "short")
    assert settings.calibration == "calibration.jsonl"
    assert (config.dtype, config.out_dtype) == ("float32", "bfloat16")
    assert config.tokenizer_source is None


@pytest.mark.parametrize("name", [*PAIRS, "README.md"])
def test_the_commands_of_an_example_parse(name):
    """Also: both models are sampled by their names, and no flag is needed."""
    if name == "README.md":
        lines = shell_lines(EXAMPLES / name)
    else:
        comments = re.findall(r"^#   (.*)$", text_of(name), re.MULTILINE)
        lines = "\n".join(comments).replace("\\\n", " ").splitlines()
        sampled = [shlex.split(line) for line in lines if " sample " in line]
        assert tuple(words[2] for words in sampled) == PAIRS[name]
        assert not any("--opened-by-prompt" in words for words in sampled)
    commands = [line for line in lines if line.startswith("mergekit-rpam ")]
    assert commands
    for line in commands:
        command, *arguments = shlex.split(line)[1:]
        found = main.get_command(None, command)
        assert found is not None
        if command == "check":  # its argument must exist
            continue
        found.make_context(command, arguments)


def stand_in(renamed: dict[str, str], template: str) -> PreTrainedTokenizerFast:
    """Return the quickstart's tokenizer with a line break, and tokens renamed."""
    plain = chains.build_tokenizer("0123456789+-*=;\n")
    text = plain.backend_tokenizer.to_str()
    for token, name in renamed.items():
        text = text.replace(json.dumps(token), json.dumps(name))
        template = template.replace(token, name)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        pad_token="<|pad|>",
        eos_token=renamed.get("<|end|>", "<|end|>"),
    )
    tokenizer.chat_template = template
    return tokenizer


def write_responses(path: Path) -> None:
    """Write queries with responses as they are sampled behind an opened block."""
    rng = random.Random(0)
    lines = []
    for number in range(16):
        query, long = chains.draw(1 + number % 8, rng), number % 2
        response = chains.short_response(query)
        if long:
            response = chains.long_response(query).removeprefix(chains.THINK)
        pattern = "long" if long else "short"
        lines.append({"prompt": query, "pattern": pattern, "response": response})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_pair(folder: Path, name: str) -> None:
    """Write tiny random models of the kind of an example's pair."""
    kind, *tied = KINDS[name]
    for role, one in zip(("long", "short"), tied, strict=True):
        long = role == "long"
        tokenizer = stand_in({} if long else RENAMED, OPENING if long else "")
        if not long:
            tokenizer.chat_template = chains.CHAT_TEMPLATE.replace(
                "<|end|>", RENAMED["<|end|>"]
            )
        own = {"head_dim": 8} if kind is Qwen3Config else {}
        config = kind(**TINY, **own, vocab_size=ROWS, tie_word_embeddings=one)
        names = ("long", "short") if long else ("other", "short")
        with quiet():
            save_experts(folder, config, tokenizer, names, torch.bfloat16)


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_of_an_examples_kind_goes_through(name, tmp_path, monkeypatch):
    """By the example's own text, with the names replaced and fewer epochs."""
    monkeypatch.chdir(tmp_path)
    write_pair(tmp_path, name)
    write_responses(tmp_path / "calibration.jsonl")
    text = text_of(name)
    for published, folder in zip(PAIRS[name], ("long", "short"), strict=True):
        text = text.replace(f" {published} ", f" {tmp_path / folder} ")
    text = text.replace("parameters:\n", "parameters:\n  epochs: 1\n")
    (tmp_path / "rpam.yml").write_text(text)
    result = CliRunner().invoke(main, ["check", "rpam.yml", "--no-estimate"])
    assert result.exit_code == 0, result.output
    renamed = f"2 special tokens have other names in {tmp_path / 'long'} than in"
    assert renamed in result.output
    assert (
        "opens the thinking: it ends prompts with '<think>\\n'. The merged model"
        in (result.output)
    )
    config = yaml.safe_load(text)
    request = examine_merge(
        MergeConfiguration.model_validate(config), MergeOptions(), text
    ).request
    assert request is not None
    assert request.calibration is not None
    with quiet():
        out = merge_here(config, tmp_path / "out")
        merged = AutoModelForCausalLM.from_pretrained(out)
    base, found = tensors(tmp_path / "long"), tensors(out)
    assert found.keys() == base.keys()
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    changed = {key for key in base if not torch.equal(base[key], found[key])}
    assert changed == {key for key in base if ".layers." in key}
    _, long_is_tied, _ = KINDS[name]
    assert ("lm_head.weight" in found) is not long_is_tied
    assert AutoConfig.from_pretrained(out).tie_word_embeddings is long_is_tied
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == OPENING.replace("<think>\n", "")
    assert "<|im_end|>" not in tokenizer.get_vocab()
    conversation = [{"role": "user", "content": "7+5="}]
    prompt = tokenizer.apply_chat_template(
        conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert torch.isfinite(merged(**prompt).logits).all()
