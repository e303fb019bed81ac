"""Held-out queries: at every scale what the merge would be, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.commands import merge_here
from helpers.models import merge_config, qwen2_config, save_pair
from helpers.models import write_calibration as write_queries
from helpers.prepass import build
from rpam_mergekit.chat.prompts import encode_calibration, make_batches
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.prepass.run import PrePass
from rpam_mergekit.routing import probes
from rpam_mergekit.routing.figures import AS_SOLVED, SCALES
from rpam_mergekit.routing.holdout import as_many, split_queries
from rpam_mergekit.routing.opening import opening_queries

COEFFICIENTS = Path("rpam") / "coefficients.safetensors"
FIXED = {"model.layers.1.self_attn.q_proj.weight": 0.25}


@pytest.fixture(scope="module")
def many(tmp_path_factory, tokenizer) -> Path:
    """A pair as `pair`, with 70 calibration queries of either pattern."""
    folder = tmp_path_factory.mktemp("many")
    save_pair(folder, qwen2_config(tokenizer), tokenizer)
    write_queries(folder / "calibration.jsonl", count=140)
    return folder


def probed(folder: Path, **parameters) -> PrePass:
    """Return a pre-pass that has held queries out, and has run; `point` is its result.

    As a merge makes it, but with `FIXED` weights.
    """
    plain = build(folder, dtype="float32", **{"batch_tokens": 256, **parameters})
    calibration = read_calibration(folder / "calibration.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "long")
    queries, _ = encode_calibration(calibration, tokenizer, 1000, plain.settings)
    solving, held_out = split_queries(queries, 0.1, 0)
    prepass = PrePass(
        plain.experts,
        make_batches(solving, plain.settings),
        plain.settings,
        fixed=FIXED,
        quiet=True,
        held_out=make_batches(held_out, plain.settings),
        of_solved=make_batches(as_many(solving, held_out, 0), plain.settings),
        end=tokenizer.eos_token_id,
    )
    prepass.point = prepass.run().operating_point
    return prepass


@pytest.mark.parametrize(
    ("reasoning", "scale"), [(0.0, 1.0), (0.2, 0.8), (-0.25, 1.25)]
)
def test_the_model_on_disk_is_the_one_measured_at_its_scale(
    many, tmp_path, monkeypatch, reasoning, scale
):
    """Of every tensor but those that the user set."""
    monkeypatch.setattr(probes, "choose_scale", lambda *_: AS_SOLVED)
    models = [
        {
            "model": str(many / "short"),
            "parameters": {
                "weight": [{"filter": name, "value": v} for name, v in FIXED.items()]
            },
        }
    ]
    parameters = {"epochs": 1, "reasoning": reasoning}
    config = merge_config(many, models=models, parameters=parameters)
    out = merge_here(config, tmp_path / "out")
    prepass = probed(many, epochs=1)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    last: list = []
    model.model.layers[-1].register_forward_hook(lambda *call: last.append(call[2]))
    number = SCALES.index(scale)
    for batch, merged in zip(
        prepass.probes.batches, prepass.probes.merged, strict=True
    ):
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        counted = batch.attention_mask.bool()
        torch.testing.assert_close(
            last.pop()[counted], merged[number][counted], rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("limit", [0, 16])
def test_what_is_measured_is_what_the_models_own_forward_pass_gives(many, limit):
    """But for tokens behind a middle that is left out, which nothing tells."""
    prepass = probed(many, max_response_tokens=limit)
    point = prepass.point
    model = AutoModelForCausalLM.from_pretrained(many / "long", dtype=torch.float32)
    end = prepass.end
    found: dict[str, list[float]] = {"first": [], "closing": [], "end": [], "body": []}
    jumps = 0
    for batch in prepass.measured["held_out"]:
        for query in batch.queries:
            if query.pattern != "long":
                continue
            ids = torch.tensor([[*query.ids, end]])
            with torch.no_grad():
                logs = model.eval()(input_ids=ids).logits[0].double().log_softmax(-1)
            values = [
                float(logs[n - 1, ids[0, n]])
                for n in range(query.prompt_tokens, ids.shape[1])
            ]
            found["first"].append(values[0])
            found["closing"].append(values[query.closing - query.prompt_tokens])
            found["end"].append(values[-1])
            told = [
                value
                for n, value in enumerate(values, start=query.prompt_tokens)
                if n not in query.jumps
            ]
            found["body"].append(sum(told) / len(told))
            jumps += len(query.jumps)
    assert bool(jumps) == bool(limit)
    expert = point.held_out.patterns["long"].expert
    for name, values in found.items():
        assert expert[name] == pytest.approx(sum(values) / len(values), abs=1e-4)


def test_as_many_are_measured_of_those_solved_on(many):
    point = probed(many).point
    assert point.held_out.queries == point.solved.queries == 32
    assert {p.queries for p in point.held_out.patterns.values()} == {16}
    assert point.scores.keys() == {str(scale) for scale in SCALES}


def test_held_out_queries_are_not_solved_on(many):
    prepass = probed(many)
    solved = {q for batch in prepass.batches for q in batch.queries}
    held_out = {q for batch in prepass.measured["held_out"] for q in batch.queries}
    assert not solved & held_out
    of_solved = {q for batch in prepass.measured["solved"] for q in batch.queries}
    assert of_solved <= solved


def test_a_merge_records_its_operating_point_and_says_it(many, tmp_path, capsys):
    out = merge_here(merge_config(many, parameters={"epochs": 1}), tmp_path / "out")
    record = json.loads((out / "rpam.json").read_text())
    file = CoefficientsFile(out / COEFFICIENTS)
    assert record["operating_point"] == file.metadata["operating_point"]
    assert record["scale"] == file.scale == record["operating_point"]["scale"]
    assert record["operating_point"]["held_out"]["patterns"]["long"]["queries"] == 16


def test_another_operating_point_needs_no_pre_pass(many, tmp_path):
    parameters = {"epochs": 1, "coefficients": str(tmp_path / "c.safetensors")}
    config = merge_config(many, parameters=parameters)
    merge_here(config, tmp_path / "first")
    before = (tmp_path / "c.safetensors").read_bytes()
    config["parameters"]["reasoning"] = 1.0
    out = merge_here(config, tmp_path / "second")
    assert (tmp_path / "c.safetensors").read_bytes() == before
    merged = AutoModelForCausalLM.from_pretrained(out).state_dict()
    base = AutoModelForCausalLM.from_pretrained(many / "long").state_dict()
    for name, value in base.items():  # at 1 it is the model that thinks
        assert torch.equal(value, merged[name]), name


def test_the_probability_of_opening_is_the_models_own(many):
    prepass = build(many)
    model = AutoModelForCausalLM.from_pretrained(many / "long", dtype=torch.float32)
    queries = [query for batch in prepass.batches for query in batch.queries]
    found = []
    for query in opening_queries(queries, 0):
        with torch.no_grad():
            ids = torch.tensor([query.ids[: query.prompt_tokens]])
            logits = model.eval()(input_ids=ids).logits[0, -1]
        found.append(float(logits.softmax(-1)[query.ids[query.prompt_tokens]]))
    assert len(found) == 32
    mean = sum(found) / len(found)
    assert prepass.opening_probability() == pytest.approx(mean, rel=1e-4)


def test_an_opening_term_makes_opening_likelier_where_it_is_asked_for(many):
    def opens(**parameters) -> float:
        point = probed(many, epochs=40, **parameters).point
        return point.solved.patterns["long"].first

    assert opens(opening_weight=10.0) > opens(opening_weight=0.0) + 0.02


def test_decoder_logits_are_those_of_single_tokens_of_any_queries(many):
    prepass = build(many)
    decoder, experts = prepass.decoder, prepass.experts
    weights = experts.load(0, experts.outside)
    prepass._recorder(prepass.batches).streams(prepass.outside())
    hidden = torch.randn(7, decoder.model.config.hidden_size)
    every = decoder.logits(weights, hidden)
    assert every.shape == (7, decoder.model.config.vocab_size)
    torch.testing.assert_close(decoder.logits(weights, hidden[3:4])[0], every[3])
