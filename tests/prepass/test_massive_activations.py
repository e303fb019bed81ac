"""A token with huge hidden states, as trained language models have, blinds a plain gap.

Planted: the first token of every prompt has an embedding a thousand times as long as
the others', which the residual stream carries through all layers, and which differs a
little between the experts. No coefficient of a layer can change that difference.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.commands import run
from helpers.models import merge_config, qwen2_config, save_pair, write_calibration
from helpers.prepass import build
from rpam_mergekit.prepass.objective import CAP, token_factors

LENGTH = 1000.0


@pytest.fixture(scope="module")
def massive(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("massive")
    save_pair(folder, qwen2_config(tokenizer), tokenizer)
    write_calibration(folder / "calibration.jsonl")
    first = tokenizer.convert_tokens_to_ids("<|user|>")
    for name, factor in (("long", 1.0), ("short", 1.02)):
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        with torch.no_grad():
            row = model.model.embed_tokens.weight[first]
            row.copy_(factor * LENGTH * torch.ones_like(row))
        model.save_pretrained(folder / name)
    return folder


def closed(folder: Path, form: str) -> float:
    """Return what share of the last layer's gap the solving closes, as reported."""
    solution = build(folder, token_scale=form, epochs=40).run()
    report = solution.layers[-1]
    return 1 - report.gap_after / report.gap_before


def test_a_plain_gap_is_blind_and_a_scaled_one_is_not(massive):
    assert abs(closed(massive, "none")) < 0.02
    for form in ("capped", "length"):
        assert closed(massive, form) > 0.15


def test_without_such_a_token_the_cap_changes_next_to_nothing(pair):
    assert closed(pair, "capped") == pytest.approx(closed(pair, "none"), abs=0.02)


@pytest.mark.parametrize(("form", "heavy"), [("none", True), ("capped", False)])
def test_the_report_shows_how_much_lies_on_one_token(massive, form, heavy):
    for report in build(massive, token_scale=form).run().layers:
        assert (report.heaviest_token > 0.9) is heavy


def test_a_merge_whose_objective_lies_on_one_token_says_so(massive, tmp_path):
    config = merge_config(massive, parameters={"token_scale": "none", "epochs": 1})
    path = tmp_path / "rpam.yml"
    path.write_text(str(config).replace("'", '"'))  # JSON is YAML
    process = run(["mergekit-yaml", str(path), str(tmp_path / "out")])
    assert process.returncode == 0, process.stderr
    said = "warning: in 3 of 3 layers more than half of the objective lies on one token"
    assert said in process.stderr


def test_tokens_of_usual_length_count_as_they_are():
    lengths = torch.tensor([[0.5, 1.0, CAP, 4 * CAP, 1000 * CAP]])
    factors = token_factors(lengths, 1.0, "capped")
    expected = torch.tensor([[1.0, 1.0, 1.0, 0.25, 0.001]])
    torch.testing.assert_close(factors, expected)
    torch.testing.assert_close(token_factors(lengths, 1.0, "length"), 1 / lengths)
    assert (token_factors(lengths, 1.0, "none") == 1).all()
