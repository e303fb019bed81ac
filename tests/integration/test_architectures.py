"""Every architecture of the matrix is merged end to end, or refused with its reason.

By mergekit's own planner and writer, in this process. The matrix is in
tests/helpers/architectures.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mergekit.merge
import pytest
import torch
from mergekit.config import MergeConfiguration
from mergekit.io.tasks import LoaderCache
from mergekit.options import MergeOptions
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

import rpam_mergekit.merging.fit
from helpers.architectures import (
    BIASES,
    CONV1D,
    EXPERTS,
    MERGED,
    REFUSED,
    SLIDING,
    TIED,
    table,
)
from helpers.merged import COEFFICIENTS, tensors
from helpers.models import merge_config, save_pair, tiny_config, write_calibration
from helpers.paths import ROOT
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.coefficients import CoefficientsFile, merge
from rpam_mergekit.merging import hooks
from rpam_mergekit.prepass.run import PrePass
from rpam_mergekit.replay.decoder import Decoder
from rpam_mergekit.replay.recording import merged_outside

# For a pair of encoder-decoder models another is put there.
MODEL_CLASS = "helpers.models.AutoModelForCausalLM"
EXACT = 1e-4  # relative; 0 for most, the state space models' kernels round


@pytest.fixture(autouse=True)
def _quiet(monkeypatch) -> Iterator[None]:
    """Silence what transformers reports of tiny models; forget their loaders."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    monkeypatch.setattr(LoaderCache, "loaders", {})
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def prepasses(monkeypatch) -> list[PrePass]:
    """The pre-passes that the test has run."""
    kept: list[PrePass] = []

    class Kept(PrePass):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            kept.append(self)

    monkeypatch.setattr(rpam_mergekit.merging.fit, "PrePass", Kept)
    return kept


def merge_pair(folder: Path, **parameters) -> Path:
    """Merge the pair in `folder` in this process; return the output folder."""
    write_calibration(folder / "calibration.jsonl", count=6)
    settings = {"epochs": 1, "batch_size": 3, "rank": 2, **parameters}
    config = merge_config(folder, parameters=settings)
    hooks.activate()
    mergekit.merge.run_merge(
        MergeConfiguration.model_validate(config),
        str(folder / "out"),
        MergeOptions(quiet=True, write_model_card=False),
    )
    return folder / "out"


def load(folder: Path):
    """Return the model, and by kind the keys that its checkpoint lacks or misfits."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), {kind: found for kind, found in info.items() if found}


def last_hidden_states(model, prepass: PrePass) -> Iterator[torch.Tensor]:
    """Yield what leaves the model's last decoder layer, batch by batch."""
    last: list = []
    layers = model.get_submodule(prepass.decoder.path)
    layers[-1].register_forward_hook(lambda *call: last.append(call[2]))
    for batch in prepass.batches:
        with torch.no_grad():
            model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                use_cache=False,
            )
        output = last.pop()
        yield output if isinstance(output, torch.Tensor) else output[0]


def assert_merged_by_formula(folder: Path) -> None:
    """Every tensor on disk is the formula's; experts may be fused in the merge only."""
    file = CoefficientsFile(folder / "out" / COEFFICIENTS)
    long, short = (
        {**load(folder / name)[0].state_dict(), **tensors(folder / name)}
        for name in ("long", "short")
    )
    for name, value in tensors(folder / "out").items():
        expected = merge(long[name], [(file.coefficient(name, "cpu"), short[name])])
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("architecture", MERGED, ids=lambda entry: entry.name)
def test_an_architecture_is_merged_end_to_end(
    architecture, tmp_path, tokenizer, prepasses
):
    save_pair(tmp_path, tiny_config(architecture, tokenizer), tokenizer)
    out = merge_pair(tmp_path)
    assert_merged_by_formula(tmp_path)
    merged, lost = load(out)
    assert lost == load(tmp_path / "long")[1]
    (prepass,) = prepasses
    outputs = last_hidden_states(merged, prepass)
    for batch, stream, output in zip(
        prepass.batches, prepass.streams, outputs, strict=True
    ):
        counted = batch.attention_mask.bool()
        hidden, length = output[counted], output[counted].norm()
        assert (hidden - stream.merged[counted]).norm() < EXACT * length
        assert (hidden - stream.experts[0][counted]).norm() > 0.01 * length
    assert_logits_are_the_models(merged, prepass)


def assert_logits_are_the_models(model, prepass: PrePass) -> None:
    """Final norm and head, of single tokens of any queries, give the model's logits."""
    head = merged_outside(prepass.experts, prepass.outside(), embeddings=False)
    batch, stream = prepass.batches[-1], prepass.streams[-1]
    counted = batch.attention_mask.bool()
    with torch.no_grad():
        ours = prepass.decoder.logits(head, stream.merged[counted].flip(0)).flip(0)
        logits = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            use_cache=False,
        ).logits[counted]
    assert (ours - logits).norm() < 10 * EXACT * logits.norm()


@pytest.mark.parametrize("architecture", MERGED, ids=lambda entry: entry.name)
def test_a_feature_that_the_table_names_is_there(architecture, tokenizer):
    config, features = tiny_config(architecture, tokenizer), architecture.features
    layers = Decoder(config).layers
    linear = [m for m in layers.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    assert config.tie_word_embeddings is (TIED in features)
    assert any(isinstance(m, Conv1D) for m in linear) is (CONV1D in features)
    if architecture.kind == EXPERTS:
        assert any("experts" in name for name, _ in layers.named_parameters())
    if BIASES in features:
        assert any(m.bias is not None for m in linear)
    if SLIDING in features:
        windows = ("sliding_window", "attention_window_size", "window_size")
        assert 4 in [getattr(config, key, None) for key in windows]


@pytest.mark.parametrize(
    ("refusal", "architecture"),
    [(refusal, entry) for refusal in REFUSED for entry in refusal.architectures],
    ids=lambda value: getattr(value, "name", ""),
)
def test_an_architecture_is_refused_before_a_layer_is_run(
    refusal, architecture, tmp_path, tokenizer, monkeypatch
):
    def run(*_):
        raise AssertionError("a layer was run")

    monkeypatch.setattr(Decoder, "replay", run)
    config = tiny_config(architecture, tokenizer)
    if config.is_encoder_decoder:
        monkeypatch.setattr(MODEL_CLASS, AutoModelForSeq2SeqLM)
    save_pair(tmp_path, config, tokenizer)
    with pytest.raises(RpamError) as refused:
        merge_pair(tmp_path)
    assert refusal.message in str(refused.value)
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_experts_that_no_token_reaches_keep_the_initial_weight(
    tmp_path, tokenizer, prepasses
):
    """Of four experts one is used per token: the first, or the second where a sum is
    negative. Half the sum and a quarter of it never win."""
    (mixtral,) = (entry for entry in MERGED if entry.name == "mixtral")
    config = tiny_config(mixtral, tokenizer)
    config.num_experts_per_tok = 1
    for folder in save_pair(tmp_path, config, tokenizer):
        file = folder / "model.safetensors"
        weights = load_file(file)
        for name in [n for n in weights if n.endswith("gate.weight")]:
            weights[name] = torch.tensor([1, -1, 0.5, 0.25])[:, None].repeat(1, 32)
        save_file(weights, file, metadata={"format": "pt"})
    out = merge_pair(tmp_path, epochs=3, initial_weight=0.375)
    coefficients = CoefficientsFile(out / COEFFICIENTS)
    fused = [name for name in coefficients.names if "experts" in name]
    assert len(fused) == 8
    for name in fused:
        parts = coefficients.parts(name)
        assert parts.keys() == {"row", "column", "left", "right"}
        assert (parts["row"][2:] == 0.375).all()
        assert not parts["column"][2:].any()
        assert not parts["right"][2:].any()
        assert (coefficients.coefficient(name, "cpu")[2:] == 0.375).all()
        assert (parts["row"][:2] != 0.375).all()
    assert_merged_by_formula(tmp_path)


def test_the_page_shows_the_matrix():
    page = ROOT / "docs" / "architectures.md"
    assert table() in page.read_text(encoding="utf-8")
