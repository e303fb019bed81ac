"""More than two patterns: one set of coefficients per model that is not the base."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from mergekit.common import ModelReference

from helpers.commands import merge_here, run
from helpers.merged import tensors
from helpers.models import merge_config, qwen2_config, save_experts, write_calibration
from helpers.prepass import three_experts
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.formats.coefficients import CoefficientsFile, merge
from rpam_mergekit.models.layout import MergeModels
from rpam_mergekit.prepass.measures import expert_distance, gap, objective
from rpam_mergekit.replay.token_weights import pattern_shares
from rpam_mergekit.settings import RpamSettings

NAMES = ("long", "short", "code")


@pytest.fixture(scope="module")
def trio(tmp_path_factory, tokenizer):
    """A folder with three tiny models and a calibration file of their patterns."""
    folder = tmp_path_factory.mktemp("trio")
    save_experts(folder, qwen2_config(tokenizer), tokenizer, NAMES)
    path = write_calibration(folder / "calibration.jsonl", 24)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for number, line in enumerate(lines):
        if number % 3 == 0:
            line["pattern"] = "code"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def config_of(folder, *others, **changes):
    models = [
        {"model": str(folder / name), "parameters": {"pattern": name}}
        for name in others
    ]
    return merge_config(folder, models=models, **changes)


@pytest.mark.parametrize("granularity", ["low_rank", "tensor"])
def test_three_models_are_merged_by_the_formula(trio, tmp_path, granularity):
    parameters = {"granularity": granularity, "outside_weight": 0.3}
    config = config_of(trio, "short", "code", parameters=parameters)
    out = merge_here(config, tmp_path / "out")
    file = CoefficientsFile(out / "rpam" / "coefficients.safetensors")
    experts = {name: tensors(trio / name) for name in NAMES}
    found = tensors(out)
    assert found.keys() == experts["long"].keys()
    for name, value in found.items():
        terms = [
            (file.coefficient(f"{other}/{name}", "cpu"), experts[other][name])
            for other in ("short", "code")
        ]
        assert torch.equal(value, merge(experts["long"][name], terms))
    assert file.parts("code/lm_head.weight")["scalar"] == pytest.approx(0.15)
    assert set(file.metadata["models"]) == {"base", "short", "code"}
    assert file.metadata["fingerprint"]["patterns"] == ["long", "short", "code"]


def test_every_layer_ends_nearer_to_its_experts(trio, tmp_path):
    config = config_of(trio, "short", "code", parameters={"epochs": 20})
    out = merge_here(config, tmp_path / "out")
    file = CoefficientsFile(out / "rpam" / "coefficients.safetensors")
    for layer in file.metadata["layers"]:
        assert layer["gap_after"] < layer["gap_before"]


def test_the_coefficients_repeat_the_merge_without_calibration(trio, tmp_path):
    config = config_of(trio, "short", "code")
    out = merge_here(config, tmp_path / "out")
    path = shutil.copy(out / "rpam" / "coefficients.safetensors", tmp_path / "c")
    del config["parameters"]["calibration"]
    config["parameters"]["coefficients"] = str(path)
    again = merge_here(config, tmp_path / "again")
    assert tensors(again).keys() == tensors(out).keys()
    for shard in out.glob("*.safetensors"):
        assert shard.read_bytes() == (again / shard.name).read_bytes()


def test_coefficients_of_other_patterns_are_refused(trio, tmp_path):
    path = tmp_path / "coefficients.safetensors"
    two = merge_config(trio, parameters={"coefficients": str(path)})
    rows = (trio / "calibration.jsonl").read_text().replace("code", "short")
    (tmp_path / "two.jsonl").write_text(rows)
    two["parameters"]["calibration"] = str(tmp_path / "two.jsonl")
    merge_here(two, tmp_path / "out")
    three = config_of(trio, "short", "code", parameters={"coefficients": str(path)})
    with pytest.raises(RpamError, match="was made for the patterns long, short, the"):
        merge_here(three, tmp_path / "three")


def test_the_report_shows_every_models_coefficients(trio, tmp_path):
    out = merge_here(config_of(trio, "short", "code"), tmp_path / "out")
    process = run(["mergekit-rpam", "report", str(out), "--out", str(tmp_path / "r")])
    assert process.returncode == 0, process.stderr
    text = (tmp_path / "r" / "report.txt").read_text()
    assert "base long, code code, short short" in text
    assert "code: mlp.up_proj.weight" in text
    assert "short: mlp.up_proj.weight" in text


@pytest.mark.parametrize(
    ("patterns", "problem"),
    [
        (("short", None), "models[1].parameters.pattern: missing. Of more than two"),
        (("short", "short"), "models: several models have the pattern 'short'"),
        (("short", "long"), "models: several models have the pattern 'long'"),
        (("short", "base"), "pattern: found 'base', expected a name of lower-case"),
        (("short", "Co de"), "pattern: found 'Co de', expected a name of lower-case"),
    ],
    ids=["missing", "twice", "the base's", "reserved", "malformed"],
)
def test_patterns_that_cannot_be_are_refused(trio, tmp_path, patterns, problem):
    config = config_of(trio, "short", "code")
    for model, pattern in zip(config["models"], patterns, strict=True):
        model["parameters"] = {} if pattern is None else {"pattern": pattern}
    with pytest.raises(RpamError, match=re.escape(problem)):
        merge_here(config, tmp_path / "out")


def test_a_calibration_file_without_one_of_the_patterns(trio, tmp_path):
    rows = (trio / "calibration.jsonl").read_text().replace('"code"', '"cod"')
    (tmp_path / "bad.jsonl").write_text(rows)
    with pytest.raises(RpamError, match=r"found 'cod'\. Did you mean 'code'"):
        read_calibration(tmp_path / "bad.jsonl", NAMES)
    rows = (trio / "calibration.jsonl").read_text().replace('"code"', '"short"')
    (tmp_path / "bad.jsonl").write_text(rows)
    with pytest.raises(RpamError, match="no query has the pattern 'code'"):
        read_calibration(tmp_path / "bad.jsonl", NAMES)


def test_longs_share_is_kept_and_the_others_share_the_rest():
    assert pattern_shares(["long", "short"], 0.65) == {"long": 0.65, "short": 0.35}
    shares = pattern_shares(["long", "short", "code", "short"], 0.5)
    assert shares == {"code": 0.25, "long": 0.5, "short": 0.25}
    assert pattern_shares(["a", "b"], 0.9) == {"a": 0.5, "b": 0.5}


def test_the_gap_is_1_at_the_mean_distance_of_the_negatives():
    one = three_experts()
    assert gap([one], [one.positive]) == 0
    apart = [gap([one], [negative]) for negative in one.negatives]
    assert sum(apart) / 2 == pytest.approx(1)
    assert apart[0] != pytest.approx(apart[1])


def test_every_other_expert_is_a_negative():
    """Of query 0 (expert 2) these are 0 and 1, of query 1 (expert 1) 0 and 2."""
    one = three_experts()
    first, second = one.negatives
    experts = list(one.experts)
    assert torch.equal(first[0], experts[0][0])
    assert torch.equal(second[0], experts[1][0])
    assert torch.equal(first[1], experts[0][1])
    assert torch.equal(second[1], experts[2][1])


def test_the_contrastive_term_counts_all_negatives():
    one = three_experts()
    settings = RpamSettings(contrastive_weight=1.0, temperature=1.0)
    plain = RpamSettings()
    scale = expert_distance([one])
    hidden = one.merged
    term = objective(one, hidden, scale, 1, settings) - objective(
        one, hidden, scale, 1, plain
    )

    def closeness(a, b, query):
        mask = one.is_token[query].unsqueeze(-1)
        a, b = ((x[query] * mask).flatten() for x in (a, b))
        return (torch.nn.functional.cosine_similarity(a, b, dim=0)).exp()

    expected = 0.0
    for query in range(2):
        positive = closeness(hidden, one.positive, query)
        negatives = sum(closeness(hidden, n, query) for n in one.negatives)
        expected += -(positive / (positive + negatives)).log() / 2
    assert term.item() == pytest.approx(float(expected), rel=1e-5)


def test_entries_carry_the_pattern_only_where_there_are_several():
    base, other, third = (ModelReference.parse(f"org/{n}") for n in "abc")
    two = MergeModels(base, (other,))
    three = MergeModels(base, (other, third), NAMES)
    assert two.entry(0, "w") == "w"
    assert [three.entry(n, "w") for n in (0, 1)] == ["short/w", "code/w"]
    assert two.roles == ("base", "other")
    assert three.roles == ("base", "short", "code")
