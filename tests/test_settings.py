"""Every setting is validated, with all findings at once and suggestions."""

from __future__ import annotations

import pytest

from rpam_mergekit.errors import RpamError
from rpam_mergekit.grading.responses import Markers
from rpam_mergekit.parameters import parse_settings
from rpam_mergekit.settings import PRESETS, RpamSettings


def refused(parameters: dict) -> tuple[str, ...]:
    with pytest.raises(RpamError) as caught:
        parse_settings(parameters)
    return caught.value.findings


def test_defaults_need_nothing():
    assert parse_settings({}) == RpamSettings()


def test_numbers_may_come_as_text_as_yaml_reads_1e_3():
    assert parse_settings({"learning_rate": "1e-3"}).learning_rate == 1e-3


def test_the_users_own_weight_is_left_to_mergekit():
    parse_settings({"weight": [{"filter": "lm_head", "value": 0.0}]})


def test_a_misspelt_parameter_gets_a_suggestion():
    (finding,) = refused({"granularty": "tensor"})
    assert "parameters.granularty" in finding
    assert "Did you mean 'granularity'?" in finding


def test_an_unknown_parameter_lists_the_known_ones():
    (finding,) = refused({"zzz": 1})
    assert "calibration" in finding
    assert "temperature" in finding


def test_a_misspelt_choice_gets_a_suggestion():
    (finding,) = refused({"granularity": "lowrank"})
    assert "found 'lowrank'" in finding
    assert "Did you mean 'low_rank'?" in finding


def test_all_findings_come_together():
    findings = refused({"epoch": 3, "rank": -1, "temperature": 0, "seed": [1, 2]})
    assert len(findings) == 4


def test_one_of_a_known_pair_of_brackets_names_both():
    for given in ({"think_open": "[THINK]"}, {"think_close": "[/THINK]"}):
        assert parse_settings(given).markers() == Markers("[THINK]", "[/THINK]")
    named = {"think_open": "(", "think_close": ")"}
    assert parse_settings(named).markers() == Markers("(", ")")
    assert parse_settings({}).markers() is None
    assert parse_settings({"think_open": "none"}).markers() is None


def test_brackets_of_which_one_is_missing_are_refused():
    (finding,) = refused({"think_open": "("})
    assert finding.startswith("parameters.think_close: missing. '(' is of no known")
    (finding,) = refused({"think_close": ")"})
    assert finding.startswith("parameters.think_open: missing. ')' is of no known")
    (finding,) = refused({"think_open": "none", "think_close": ")"})
    assert finding.startswith("parameters.think_close: found ')', but think_open is")


def test_what_opens_the_thinking_belongs_to_what_is_solved():
    assert {
        "thinking",
        "think_open",
        "think_close",
    } <= RpamSettings().cache_key().keys()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("epochs", 2.5),
        ("batch_size", "many"),
        ("learning_rate", 0),
        ("contrastive_weight", -1),
        ("queries_per_pattern", 0),
        ("tokens", "response"),
        ("solver", "sgd"),
        ("preset", "papers"),
        ("alignment", "mean"),
        ("max_tokens", 0),
        ("max_response_tokens", -1),
        ("max_response_tokens", 15),
        ("max_response_tokens", 2.5),
        ("regularization", -0.1),
    ],
)
def test_a_wrong_value_names_the_parameter_and_the_value(name, value):
    (finding,) = refused({name: value})
    assert f"parameters.{name}: found {value!r}" in finding


def test_lbfgs_is_for_few_coefficients():
    for granularity in ("layer", "module", "tensor"):
        parse_settings({"solver": "lbfgs", "granularity": granularity})
    (finding,) = refused({"solver": "lbfgs", "granularity": "element"})
    assert "Use solver adam" in finding


def test_the_paper_preset_is_as_published_and_can_be_overridden():
    settings = parse_settings({"preset": "paper", "epochs": 100})
    assert settings.tokens == "prompt"
    assert settings.alignment == "sum"
    assert settings.granularity == "element"
    assert settings.initial_weight == settings.outside_weight == 0.5
    assert settings.epochs == 100


def test_qa_merging_is_the_paper_on_the_most_divergent_layers():
    paper = parse_settings({"preset": "paper"}).model_dump(exclude={"preset"})
    second = parse_settings({"preset": "qa-merging"}).model_dump(exclude={"preset"})
    assert second == {**paper, "layers": 0.3}


def test_presets_name_only_settings():
    for preset in PRESETS.values():
        assert preset.keys() <= RpamSettings.model_fields.keys()


def test_every_setting_has_a_description():
    assert all(field.description for field in RpamSettings.model_fields.values())


def test_a_limit_on_responses_is_said_where_it_is_not_the_default():
    """So that coefficients from before there was one are as good as ever."""
    default = RpamSettings().max_response_tokens
    plain = RpamSettings().cache_key()
    assert "max_response_tokens" not in plain
    assert parse_settings({"max_response_tokens": default}).cache_key() == plain
    changed = parse_settings({"max_response_tokens": 77}).cache_key()
    assert changed == {**plain, "max_response_tokens": 77}


def test_a_limit_on_responses_beside_prompts_alone_is_refused():
    for given in ({"tokens": "prompt"}, {"preset": "paper"}):
        parse_settings(given)
        (finding,) = refused({**given, "max_response_tokens": 64})
        assert "found beside tokens 'prompt'" in finding
    parse_settings(
        {"preset": "paper", "tokens": "prompt+response", "max_response_tokens": 64}
    )


def test_the_problem_is_the_same_wherever_things_lie():
    one = parse_settings({"preset": "paper", "calibration": "a.jsonl"})
    two = parse_settings(
        {**PRESETS["paper"], "coefficients": "c", "activations": "disk"}
    )
    assert one.cache_key() == two.cache_key()
    assert one.cache_key() != parse_settings({}).cache_key()
