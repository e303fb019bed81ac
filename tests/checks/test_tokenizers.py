"""Vocabularies, special tokens and chat templates that do not go together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mergekit.common import ModelReference
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.checking import edit, found, noted
from helpers.models import merge_config, qwen2_config, save_pair, write_calibration
from rpam_mergekit.models.completeness import check_complete
from rpam_mergekit.models.tokenizers import Differences

PADDED = 32  # rows of the embedding, more than the tokenizer has


@pytest.fixture
def own(tmp_path, tokenizer) -> Path:
    """A pair whose embeddings have more rows than there are tokens."""
    save_pair(tmp_path, qwen2_config(tokenizer, vocab_size=PADDED), tokenizer)
    write_calibration(tmp_path / "calibration.jsonl")
    return tmp_path


def rename(model: Path, change: Callable[[dict], None]) -> None:
    """Change the tokenizer.json of a model."""
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def swapped(content: dict) -> None:
    """Give two digits each other's ids."""
    vocabulary = content["model"]["vocab"]
    vocabulary["1"], vocabulary["2"] = vocabulary["2"], vocabulary["1"]


def renamed(content: dict) -> None:
    """Rename the first special token, as DeepSeek-R1-Distill-Qwen did with Qwen's."""
    first = content["added_tokens"][0]
    vocabulary = content["model"]["vocab"]
    if first["content"] in vocabulary:
        vocabulary["<|renamed|>"] = vocabulary.pop(first["content"])
    first["content"] = "<|renamed|>"


# Merging by id


def test_other_tokens_at_the_same_ids_are_refused(check, own):
    rename(own / "short", swapped)
    found(check(merge_config(own)), "the tokenizers differ: 2 of 22 token ids (9 %)")


def test_special_tokens_of_other_names_are_noted(check, own):
    rename(own / "short", renamed)
    noted(
        check(merge_config(own)),
        "1 special tokens have other names in",
        "'<|renamed|>')",
    )


def test_a_model_without_a_tokenizer_is_noted(check, own):
    for path in (own / "short").glob("tokenizer*"):
        path.unlink()
    noted(check(merge_config(own)), "short: its tokenizer cannot be loaded")


def test_a_base_model_without_a_tokenizer_is_refused(check, own):
    for path in (own / "long").glob("tokenizer*"):
        path.unlink()
    found(check(merge_config(own)), "long: its tokenizer cannot be loaded")


def test_few_other_tokens_are_a_note():
    """Below one in a hundred ids."""

    class Tokens:
        def __init__(self, count: int) -> None:
            self.added_tokens_decoder: dict[int, str] = {}
            self.vocab = {f"t{i}": i for i in range(count)}

        def get_vocab(self) -> dict[str, int]:
            return self.vocab

    first, second = Tokens(300), Tokens(300)
    second.vocab["u7"] = second.vocab.pop("t7")
    difference = Differences.of(first, second)
    assert difference.ordinary == [7]
    assert difference.named([7]) == "7 ('t7' / 'u7')"
    assert not difference.same


def test_ends_of_responses_that_differ_are_noted(check, own):
    edit(own / "short" / "generation_config.json", eos_token_id=[3, 4])
    edit(own / "long" / "generation_config.json", eos_token_id=5)
    noted(check(merge_config(own)), "responses end with 5 (", "with 3 (", "or 4 (")


# Chat templates


def template(model: Path, text: str) -> None:
    (model / "chat_template.jinja").write_text(text)


def test_a_template_that_opens_the_thinking_block_is_noted(check, own):
    opens = "{{ messages[0].content }}{% if add_generation_prompt %}<think>{% endif %}"
    template(own / "long", opens)
    noted(
        check(merge_config(own)),
        r"opens the thinking: it ends prompts with '<think>'. The merged model is to "
        "decide, so that this is taken out of the output's chat template",
    )
    noted(
        check(merge_config(own, parameters={"thinking": "template"})),
        "thinking: template keeps that. The merged model cannot answer at once",
        "8 responses of the calibration file begin with the opening, which their",
    )


def test_a_base_without_a_template_is_noted(check, own):
    (own / "long" / "chat_template.jinja").unlink()
    noted(
        check(merge_config(own)),
        "the tokenizer has no chat template",
        "short has one; a template can be set in chat_template",
    )


# mergekit's `tokenizer`


@pytest.mark.parametrize(
    "tokenizer_keys",
    [
        {"tokenizer_source": "base"},
        {"tokenizer_source": "union"},
        {"tokenizer": {"source": "union", "pad_to_multiple_of": 8}},
    ],
    ids=lambda keys: json.dumps(keys)[:50],
)
def test_a_tokenizer_that_all_models_have_only_cuts_padding(
    own, mergekit_yaml, tokenizer_keys
):
    config = merge_config(own, parameters={"outside_weight": 0.25})
    assert mergekit_yaml(config).returncode == 0
    plain = shutil.copytree(own / "out", own / "plain")
    shutil.rmtree(own / "out")
    process = mergekit_yaml({**config, **tokenizer_keys})
    assert process.returncode == 0, process.stderr
    vocabulary = AutoTokenizer.from_pretrained(own / "long").get_vocab()
    count = len(vocabulary)
    rows = 24 if "tokenizer" in tokenizer_keys else count
    cut, whole = (load_file(one / "model.safetensors") for one in (own / "out", plain))
    for name, value in whole.items():
        if "embed" in name or "lm_head" in name:
            assert len(cut[name]) == rows
            assert torch.equal(cut[name][:count], value[:count])
        else:
            assert torch.equal(cut[name], value), name
    check_complete(own / "out", ModelReference.parse(str(own / "long")))
    ids = torch.arange(count)[None]
    logits = [
        AutoModelForCausalLM.from_pretrained(one)(ids).logits[..., :count]
        for one in (own / "out", plain)
    ]
    assert torch.allclose(*logits)
    assert AutoTokenizer.from_pretrained(own / "out").get_vocab() == vocabulary


def test_the_base_by_name_is_a_source(check, own):
    result = check(merge_config(own, tokenizer_source=str(own / "long")))
    noted(result, "tokenizer: embeddings and head get 22 rows instead of the 32 of")


def test_a_tokenizer_is_refused_where_tokens_differ(check, own):
    rename(own / "short", renamed)
    found(
        check(merge_config(own, tokenizer_source="base")),
        "tokenizer_source: mergekit would align the vocabularies by token",
        "<|renamed|>",
        "Leave it out",
    )


def test_tokens_without_a_row_of_the_embedding(check, pair):
    """transformers adds an end of text to Qwen2's tokenizers that have none."""
    config = merge_config(pair, tokenizer_source="base")
    found(check(config), "its 22 tokens have ids up to 21;", "of 21 rows")


def test_the_tokenizer_of_another_model_is_refused(check, own):
    config = merge_config(own, tokenizer={"source": str(own / "short")})
    found(check(config), "tokenizer.source: found", "use 'base'")


def test_sources_of_single_tokens_are_refused(check, own):
    tokens = {"1": {"source": str(own / "short")}}
    config = merge_config(own, tokenizer={"source": "base", "tokens": tokens})
    found(check(config), "tokenizer.tokens: found 1.")
