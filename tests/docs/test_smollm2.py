"""The SmolLM2 pair: its task, data, config and adapters; no base is needed for most."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from collections import Counter

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.models import qwen2_config
from helpers.paths import ROOT
from rpam_mergekit.checks.config_file import check_keys
from rpam_mergekit.formats.calibration import read_calibration

SMOLLM2 = ROOT / "examples" / "smollm2"
# At the end: `train` and `evaluate` are the quickstart's for the other tests.
sys.path.append(str(SMOLLM2))

import base  # noqa: E402
import neutral  # noqa: E402
import respond  # noqa: E402
import words  # noqa: E402

needs_base = pytest.mark.skipif(
    not (SMOLLM2 / "base" / "config.json").exists(),
    reason="examples/smollm2/base is not there (python examples/smollm2/base.py)",
)


def script(name: str):
    """Return a script of the example under a name of its own."""
    spec = importlib.util.spec_from_file_location(
        f"smollm2_{name}", SMOLLM2 / f"{name}.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


train, evaluate = script("train"), script("evaluate")


def problem(*steps: tuple[int, str, int, int]) -> words.Problem:
    return words.Problem("How many?", steps)


TWO = problem((8, "+", 3, 11), (11, "-", 5, 6))


def test_a_problem_is_worked_out_from_its_text():
    rng = random.Random(0)
    signs = {verb.split()[0]: "+" for verb in words.ADD}
    signs |= {verb.split()[0]: "-" for verb in (*words.TAKE, words.EAT)}
    for difficulty in words.DIFFICULTIES * 20:
        drawn = words.draw(difficulty, rng)
        first, *rest = [s for s in drawn.question.split(".") if re.search(r"\d", s)]
        value = int(re.search(r"\d+", first).group())
        for sentence in rest:
            number = int(re.search(r"\d+", sentence).group())
            value += number if signs[sentence.split()[2]] == "+" else -number
            assert 0 <= value <= words.MOST
        assert (len(rest), str(value)) == (difficulty, drawn.answer)


def test_responses_are_the_steps_and_the_bare_number():
    assert words.long_response(TWO) == "<think>\n8+3=11\n11-5=6\n</think>\n6"
    assert words.short_response(TWO) == "6"


def test_splits_do_not_overlap_and_are_drawn_in_the_mix():
    found = {split: words.problems(240, split, 0) for split in words.SPLITS}
    texts = {split: {p.question for p in drawn} for split, drawn in found.items()}
    assert all(len(of) == 240 for of in texts.values())
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]
    assert Counter(p.difficulty for p in found["test"]) == {
        1: 120, 2: 24, 3: 24, 4: 24, 5: 24, 6: 24
    }  # fmt: skip


def test_questions_are_written_for_sampling(tmp_path, monkeypatch):
    out = tmp_path / "questions.jsonl"
    monkeypatch.setattr(sys, "argv", ["words.py", str(out), "--queries", "24"])
    words.main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 24
    assert rows[0].keys() == {"question", "answer", "steps"}
    assert {words.split(row["question"]) for row in rows} == {"train"}


def test_examples_share_one_row_and_see_themselves_only():
    packed = train.pack([([7, 8, 1, 2], [3, 9]), ([7, 8, 4], [5, 6, 9])])
    assert packed.inputs["input_ids"].tolist() == [[7, 8, 1, 2, 3, 4, 5, 6]]
    assert packed.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 4, 2, 3, 4]]
    assert packed.target.tolist() == [3, 9, 5, 6, 9]
    assert packed.at.tolist() == [3, 4, 5, 6, 7]
    seen = packed.inputs["attention_mask"][0, 0]
    assert seen[4].tolist() == [True] * 5 + [False] * 3
    assert seen[6].tolist() == [True, True] + [False] * 3 + [True, True, False]


def test_packed_examples_have_the_logits_of_one_row_each(tokenizer):
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(qwen2_config(tokenizer)).eval()
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(plain, config)
    rows = [([7, 8, 1, 2], [3, 9]), ([7, 8, 4], [5, 6, 9])]
    with torch.no_grad():
        together = train.predict(model, train.pack(rows))
        alone = torch.cat([train.predict(model, train.pack([row])) for row in rows])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize(
    ("text", "ended", "right", "thinks", "closed"),
    [
        ("6", True, 1, 0, 0),
        ("6", False, 0, 0, 0),
        ("16", True, 0, 0, 0),
        ("<think>\n8+3=11\n11-5=6\n</think>\n6", True, 1, 1, 1),
        ("<think>\n8+3=11\n11-5=6\n</think>\n7", True, 0, 1, 1),
        ("<think>\n</think>\n</think>\n6", True, 0, 1, 0),
        ("<think>\n8+3=11\n6", True, 0, 1, 0),
        ("11-5=6\n</think>\n6", True, 0, 1, 0),
    ],
)
def test_grading(text, ended, right, thinks, closed):
    found = respond.grade(TWO, respond.Response(text, 5, ended, 0.0))
    assert (found.accuracy, found.thinking, found.closed) == (right, thinks, closed)
    assert found.source == {"steps": 2}


def test_problems_in_a_batch_are_answered_as_alone(tokenizer, monkeypatch):
    torch.manual_seed(0)
    config = qwen2_config(tokenizer, initializer_range=0.3)
    model = AutoModelForCausalLM.from_config(config).eval()
    asked = [words.Problem(query, TWO.steps) for query in ("7+5=", "1+2*3-4=", "7-1=")]
    together = respond.respond(model, tokenizer, asked)
    monkeypatch.setattr(respond, "BATCH", 1)
    alone = respond.respond(model, tokenizer, asked)
    assert [one.text for one in together] == [one.text for one in alone]
    assert len({one.text for one in together}) == 3


def test_responses_are_kept_as_long_as_the_key_is_the_same(tmp_path):
    path = tmp_path / "cache" / "long.json"
    answers = iter(["6", "7", "8"])

    def make():
        return [respond.Response(next(answers), 2, True, 1.5)]

    asked = [respond.kept(path, key, make)[0].text for key in ("a", "a", "b", "b")]
    assert asked == ["6", "6", "7", "7"]


def test_the_area_counts_pairs():
    assert evaluate.area([0, 1], [2, 3]) == 1
    assert evaluate.area([0, 2], [1, 2]) == (1 + 1 + 0 + 0.5) / 4


def test_a_damaged_download_is_refused(tmp_path):
    path = tmp_path / base.FILE
    path.write_bytes(b"GGUF")
    with pytest.raises(base.NotFetched, match="expected b179c952"):
        base.check(path)


def test_a_base_that_is_there_is_left_as_it_is(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(sys, "argv", ["base.py", "--out", str(tmp_path)])
    base.main()
    assert "is there" in capsys.readouterr().out


def test_the_config_names_the_adapters_and_keeps_to_the_defaults():
    text = (SMOLLM2 / "rpam.yml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    assert check_keys(content) == []
    assert content["parameters"].keys() == {"calibration"}
    for name in (content["base_model"], content["models"][0]["model"]):
        model, adapter = name.split("+")
        assert model == "examples/smollm2/base"
        assert (ROOT / adapter / "adapter_config.json").exists()


def test_the_adapters_are_small_and_name_their_base():
    for pattern in train.RESPONSES:
        folder = SMOLLM2 / f"{pattern}-lora"
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["base_model_name_or_path"]) == (train.RANK, "base")
        weights = folder / "adapter_model.safetensors"
        assert weights.stat().st_size < 5.5e6
        with safe_open(weights, "pt") as file:
            assert {file.get_tensor(k).dtype for k in file.keys()} == {torch.bfloat16}
        assert {path.name for path in folder.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }


def test_the_calibration_file_has_both_patterns_and_leaks_no_held_out_query():
    queries = read_calibration(SMOLLM2 / "calibration.jsonl").queries
    assert all(words.split(query.prompt) == "train" for query in queries)
    patterns = Counter(query.pattern for query in queries)
    assert min(patterns["long"], patterns["short"]) >= 100
    for query in queries:
        assert ("<think>" in query.response) is (query.pattern == "long")


def test_general_texts_are_not_about_the_task():
    rows = (SMOLLM2 / "neutral.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 30
    assert {*json.loads(rows[0])} == {"prompt", "response"}
    assert not any("How many" in row or "<think>" in row for row in rows)


def test_no_file_names_a_place_outside_the_project():
    for path in SMOLLM2.glob("*.*"):
        if path.is_file():
            assert "/work/" not in path.read_text(encoding="utf-8"), path


@needs_base
def test_training_data_is_what_the_template_and_the_tokenizer_make_of_it():
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2 / "base")
    drawn = words.problems(12, "train", 0)
    for pattern, respond_as in train.RESPONSES.items():
        for one in drawn:
            prompt, response = train.encode(tokenizer, one, pattern)
            text = tokenizer.decode([*prompt, *response])
            ending = f"<|im_start|>assistant\n{respond_as(one)}<|im_end|>"
            assert text.endswith(f"{one.question}<|im_end|>\n{ending}")
    tokens, given = neutral.tokens_of(tokenizer, {"prompt": "Hi", "response": "Yes."})
    assert tokenizer.decode(tokens[given:]) == "Yes.<|im_end|>"


@needs_base
def test_an_adapter_starts_from_the_base_as_it_was_fetched():
    tokenizer = AutoTokenizer.from_pretrained(SMOLLM2 / "base")
    config = json.loads((SMOLLM2 / "base" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["tie_word_embeddings"]) == (30, True)
    assert "quantization_config" not in config
    assert tokenizer.eos_token == "<|im_end|>"
