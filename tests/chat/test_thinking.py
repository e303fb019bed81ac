"""The merged model decides whether it thinks: prompts, responses, template, record."""

from __future__ import annotations

import json
import shutil
from decimal import Decimal
from pathlib import Path

import chains
import pytest
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from transformers import AutoTokenizer

from helpers.commands import merge_here, run, succeeded
from helpers.merged import COEFFICIENTS, shard_bytes
from helpers.models import merge_config, qwen2_config, save_pair
from rpam_mergekit.chat.thinking import ThinkingMode, opens, thinking_of
from rpam_mergekit.checks.templates import TemplateInUse
from rpam_mergekit.cli.main import main
from rpam_mergekit.errors import RpamError
from rpam_mergekit.evaluate.sweep import _merge, interpolation, thinking_settings
from rpam_mergekit.formats.calibration import CalibrationQuery
from rpam_mergekit.formats.coefficients import CoefficientsFile
from rpam_mergekit.grading.brackets import KNOWN
from rpam_mergekit.grading.responses import Markers
from rpam_mergekit.settings import RpamSettings

PLAIN = chains.CHAT_TEMPLATE
# Of the quickstart's tokens, of which none is a line break.
R1 = PLAIN.replace("<|assistant|>", "<|assistant|><think>")
QWEN = """\
{%- for message in messages %}
    {%- set content = message.content.split('</think>')[-1] %}
    {%- if message.role == 'assistant' and loop.last %}
        {%- set content = '<think>' + message.content.split('<think>')[-1] %}
    {%- endif %}
    {{- '<|' + message.role + '|>' + content + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|><think>' }}
{%- endif %}
"""
ONCE = PLAIN.replace("<|assistant|>", "<|assistant|>{{ '<th' }}{{ 'ink>' }}")
# No template can be made of it: the assistant's turns are marked.
MARKED = ONCE.replace(
    "{{ m['content'] }}", "{% generation %}{{ m['content'] }}{% endgeneration %}"
)
SECOND = [{"role": "user", "content": "1+1="}]


def set_template(model: Path, template: str) -> None:
    (model / "chat_template.jinja").write_text(template, encoding="utf-8")


def prompt_of(folder: Path, **given) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(
        SECOND, tokenize=False, add_generation_prompt=True, **given
    )


def change_responses(path: Path, change) -> None:
    """Change every response of a calibration file, given it and its pattern."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["response"] = change(line["response"], line["pattern"])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def behind_an_opening(response: str, pattern: str) -> str:
    """Return a response as servers return it where the prompt opens the block."""
    return response.removeprefix("<think>") if pattern == "long" else response


@pytest.fixture
def own(pair, tmp_path) -> Path:
    """A copy of the tiny pair whose Long opens the thinking by its template."""
    for name in ("long", "short"):
        shutil.copytree(pair / name, tmp_path / name)
    set_template(tmp_path / "long", R1)
    shutil.copy(pair / "calibration.jsonl", tmp_path)
    change_responses(tmp_path / "calibration.jsonl", behind_an_opening)
    return tmp_path


def record_of(out: Path) -> dict:
    return json.loads((out / "rpam.json").read_text())["thinking"]


def checked(folder: Path, config: dict) -> str:
    (folder / "rpam.yml").write_text(yaml.safe_dump(config))
    arguments = ["check", str(folder / "rpam.yml"), "--no-estimate"]
    return CliRunner().invoke(main, arguments).output


# Responses


def mode_of(template: str | None, *responses: str, **settings) -> ThinkingMode:
    queries = [
        CalibrationQuery(prompt="1+1=", pattern="long", response=one)
        for one in responses
    ]
    tokenizer = chains.build_tokenizer()
    return thinking_of(tokenizer, template, queries, RpamSettings(**settings))


LINE = PLAIN.replace("<|assistant|>", "<|assistant|>{{ '<think>\n' }}")


@pytest.mark.parametrize(
    ("response", "pattern", "right"),
    [
        ("1+1=2</think>2", "long", "<think>\n1+1=2</think>2"),
        ("\n1+1=2</think>2", "long", "<think>\n\n1+1=2</think>2"),
        ("<think>\n1+1=2</think>2", "long", "<think>\n1+1=2</think>2"),
        ("<think>1+1=2</think>2", "long", "<think>\n1+1=2</think>2"),
        ("1+1=2</think>2", "short", "<think>\n1+1=2</think>2"),
        ("2", "short", "2"),
        ("</think>\n2", "short", "2"),
        ("\n\n</think>\n\n2", "code", "2"),
        ("</think>\n2", "long", "<think>\n</think>\n2"),
        ("<think>\n\n</think>\n\n2", "short", "<think>\n\n</think>\n\n2"),
    ],
)
def test_a_response_is_what_the_model_has_to_say(response, pattern, right):
    assert mode_of(LINE).response(response, pattern) == right


@pytest.mark.parametrize(
    ("response", "right"),
    [
        ("<think>\n1+1=2</think>2", "1+1=2</think>2"),
        ("<think>1+1=2</think>2", "1+1=2</think>2"),
        ("1+1=2</think>2", "1+1=2</think>2"),
        ("</think>\n2", "</think>\n2"),
        ("2", "2"),
    ],
)
def test_a_template_that_is_kept_has_opened_already(response, right):
    mode = mode_of(LINE, thinking="template")
    assert mode.prompt("1+1=<think>\n") == "1+1=<think>\n"
    assert mode.response(response, "short") == right


def test_a_template_that_does_not_open_leaves_whole_responses_alone():
    for setting in ("model", "template"):
        mode = mode_of(PLAIN, "<think>1</think>1", thinking=setting)
        assert mode.prompt("1+1=<think>") == "1+1=<think>"
        assert mode.response("<think>1</think>1", "long") == "<think>1</think>1"
        assert mode.response("1</think>1", "long") == "<think>1</think>1"  # as others
        assert not mode.takes_out
        assert not mode.keeps


def test_what_a_response_lacks_is_what_its_models_own_template_opens_with():
    """Where the template in use is another, of the base or of the config."""
    queries = [CalibrationQuery(prompt="1+1=", pattern="long", response="2</think>2")]
    tokenizer, settings = chains.build_tokenizer(), RpamSettings()
    mode = thinking_of(tokenizer, PLAIN, queries, settings, [PLAIN, None, R1])
    assert mode.opening == ""
    assert mode.response("2</think>2", "long") == "<think>2</think>2"
    assert mode_of(PLAIN).response("2</think>2", "long") == "<think>\n2</think>2"


@pytest.mark.parametrize("markers", KNOWN, ids=lambda markers: markers.open)
def test_known_brackets_are_recognised_from_template_and_responses(markers):
    template = PLAIN.replace("<|assistant|>", f"<|assistant|>{markers.open}")
    mode = mode_of(template)
    assert (mode.markers, mode.opening) == (markers, markers.open)
    whole = f"{markers.open}1+1=2{markers.close}2"
    mode = mode_of(PLAIN, whole, "2")
    assert (mode.markers, mode.opening) == (markers, "")
    assert mode.thinks(whole)
    assert not mode.thinks("2")


def test_the_end_of_a_channel_alone_is_no_thinking():
    """gpt-oss closes every turn with it."""
    channel = KNOWN[-1]
    whole = f"{channel.open}2{channel.close}<|start|>assistant<|channel|>final"
    mode = mode_of(PLAIN, whole)
    assert mode.markers == channel
    assert mode.response("2<|end|>", "short") == "2<|end|>"
    assert mode_of(PLAIN, "2<|end|>").markers == Markers()


def test_other_brackets_are_named():
    template = PLAIN.replace("<|assistant|>", "<|assistant|>(thinks: ")
    assert mode_of(template).opening == ""
    mode = mode_of(template, think_open="(thinks:", think_close=":)")
    assert mode.opening == "(thinks: "
    assert mode.response("1 :)2", "long") == "(thinks: 1 :)2"
    assert mode_of(PLAIN, think_close="[/THINK]").markers == KNOWN[1]


def test_a_long_that_thinks_without_brackets_is_left_alone():
    mode = mode_of(R1, think_open="none")
    assert mode.markers is None
    assert mode.response("1</think>1", "long") == "1</think>1"
    assert mode.prompt("1+1=<think>") == "1+1=<think>"
    assert opens(chains.build_tokenizer(), R1) == "<think>"


# Merges


@pytest.fixture(scope="module")
def plain(pair, tmp_path_factory) -> Path:
    """The output of the pair as it is, whose template does not open the thinking."""
    return merge_here(merge_config(pair), tmp_path_factory.mktemp("plain") / "out")


@pytest.mark.parametrize("template", [R1, QWEN], ids=["R1", "Qwen"])
def test_a_pair_whose_template_opens_merges_as_if_it_did_not(
    own, plain, mergekit_yaml, template
):
    """To the same bytes; and the model is served without the opening."""
    set_template(own / "long", template)
    process = mergekit_yaml(merge_config(own))
    succeeded(process)
    assert "this is taken out of the output's chat template" in process.stderr
    out = own / "out"
    assert shard_bytes(out) == shard_bytes(plain)
    made_from = [
        CoefficientsFile(folder / COEFFICIENTS).metadata["fingerprint"]["queries"]
        for folder in (out, plain)
    ]
    assert made_from[0] == made_from[1]
    written = (out / "chat_template.jinja").read_text()
    assert written == template.replace("<|assistant|><think>", "<|assistant|>")
    assert prompt_of(out) == prompt_of(plain)
    thinking = record_of(out)
    # Random models: this one has not learnt to open its thinking, and it is said.
    assert 0 < thinking.pop("opens_by_itself") < 0.5
    assert "opens its thinking by itself with a probability of" in process.stderr
    assert thinking == {
        "mode": "model",
        "opening": "<think>",
        "removed_from_template": True,
        "open": "<think>",
        "close": "</think>",
    }
    card = (out / "README.md").read_text()
    assert "the opening was taken out of its chat template" in card
    assert "that of the base ends every prompt with `<think>`" in card


def test_all_but_the_opening_is_as_in_the_bases_files(own):
    out = merge_here(merge_config(own), own / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (own / "long" / name).read_bytes()


def test_a_template_that_is_kept(own, plain, mergekit_yaml):
    config = merge_config(own, parameters={"thinking": "template"})
    process = mergekit_yaml(config)
    succeeded(process)
    assert "The merged model cannot answer at once" in process.stderr
    out = own / "out"
    assert (out / "chat_template.jinja").read_text() == R1
    assert shard_bytes(out) != shard_bytes(plain)
    assert record_of(out)["mode"] == "template"
    assert record_of(out)["removed_from_template"] is False
    assert "(`thinking: template`)" in (out / "README.md").read_text()


def test_what_is_said_where_nothing_opens(pair, plain):
    assert record_of(plain)["opening"] == ""
    card = (plain / "README.md").read_text()
    assert "its chat template opens no thinking" in card
    assert "opens the thinking" not in checked(plain.parent, merge_config(pair))


def test_all_commands_take_it_out(own):
    config = own / "rpam.yml"
    config.write_text(yaml.safe_dump({"name": "merged", **merge_config(own)}))
    last = {
        "merge_method": "linear",
        "models": [{"model": "merged", "parameters": {"weight": 1.0}}],
        "dtype": "float32",
    }
    documents = yaml.safe_dump_all([yaml.safe_load(config.read_text()), last])
    (own / "multi.yml").write_text(documents)
    command = ["mergekit-multi", "multi.yml", "--intermediate-dir", "steps"]
    succeeded(run([*command, "--out-path", "final"], cwd=own))
    config.write_text(yaml.safe_dump(merge_config(own)))
    succeeded(run(["mergekit-rpam", "merge", "rpam.yml", "ours"], cwd=own))
    for out in (own / "steps" / "merged", own / "final", own / "ours"):
        assert prompt_of(out).endswith("<|assistant|>")
    again = run([*command, "--out-path", "other"], cwd=own)
    succeeded(again)  # a finished output is taken as it is ...
    other = {"thinking": "template"}
    document = {"name": "merged", **merge_config(own, parameters=other)}
    (own / "multi.yml").write_text(yaml.safe_dump_all([document, last]))
    again = run([*command, "--out-path", "third"], cwd=own)
    assert again.returncode == 1  # ... unless another setting asks for another one
    assert "changed since: parameters.thinking" in again.stderr


def test_a_template_of_the_config_is_the_one_looked_at(own):
    """One that opens is rid of it; of one that does not, nothing of the base's own."""
    said = checked(own, merge_config(own, chat_template=PLAIN))
    assert "no problems found" in said
    assert "opens the thinking" not in said
    out = merge_here(merge_config(own, chat_template=PLAIN), own / "closed")
    assert prompt_of(out).endswith("<|assistant|>")
    assert record_of(out)["opening"] == ""

    set_template(own / "long", PLAIN)
    said = checked(own, merge_config(own, chat_template=QWEN))
    assert "note: chat_template opens the thinking: it ends prompts with" in said
    opened = merge_here(merge_config(own, chat_template=QWEN), own / "opened")
    assert prompt_of(opened).endswith("<|assistant|>")
    assert record_of(opened)["removed_from_template"] is True
    assert shard_bytes(opened) == shard_bytes(out)


def test_auto_takes_the_template_of_most_models(own):
    shutil.copy(own / "long" / "chat_template.jinja", own / "short")
    out = merge_here(merge_config(own, chat_template="auto"), own / "out")
    assert prompt_of(out).endswith("<|assistant|>")
    assert record_of(out)["removed_from_template"] is True


def test_a_tokenizer_that_is_written_anew_has_it_taken_out_too(own, tokenizer):
    """With rows for all of its tokens, as mergekit wants them."""
    save_pair(own, qwen2_config(tokenizer, vocab_size=32), tokenizer)
    set_template(own / "long", R1)
    out = merge_here(merge_config(own, tokenizer_source="base"), own / "out")
    assert prompt_of(out).endswith("<|assistant|>")


@pytest.mark.parametrize("escaped", [True, False])
def test_templates_within_json_change_in_no_other_byte(own, escaped):
    """One or several, by name; spelt as they were."""
    path = own / "long" / "tokenizer_config.json"
    (own / "long" / "chat_template.jinja").unlink()
    config = json.loads(path.read_text())
    marked = R1 + "{# é 😀 / #}"
    tool_use = QWEN + "{# é 😀 #}"
    config["chat_template"] = [
        {"name": "default", "template": marked},
        {"name": "tool_use", "template": tool_use},
    ]
    text = json.dumps(config, indent=3, ensure_ascii=escaped).replace(" / ", " \\/ ")
    path.write_text(text, encoding="utf-8")
    out = merge_here(merge_config(own), own / "out")
    written = (out / "tokenizer_config.json").read_text(encoding="utf-8")
    assert written == text.replace("<|assistant|><think>", "<|assistant|>")
    assert prompt_of(out).endswith("<|assistant|>")
    assert prompt_of(out, chat_template="tool_use").endswith("<|assistant|>")


def test_a_folder_without_a_template_says_what_to_serve_it_with(own, mergekit_yaml):
    process = mergekit_yaml(merge_config(own), "--no-copy-tokenizer")
    succeeded(process)
    assert "has no chat template: serve it with one that does not end" in process.stderr
    assert record_of(own / "out")["removed_from_template"] is False
    card = (own / "out" / "README.md").read_text()
    assert "if it is served with a chat template that opens no thinking" in card


def test_an_opening_that_cannot_be_taken_out_is_refused(own):
    set_template(own / "long", MARKED)
    said = checked(own, merge_config(own))
    assert "ends prompts with '<think>', and no template can be made of it" in said
    assert "Name one that does not open the thinking in chat_template:" in said
    with pytest.raises(RpamError, match="Name one that does not open the thinking"):
        merge_here(merge_config(own), own / "out")
    assert not (own / "out").exists()
    out = merge_here(merge_config(own, chat_template=PLAIN), own / "out")
    assert prompt_of(out).endswith("<|assistant|>")


def test_coefficients_know_how_they_were_solved(own, plain):
    """Used as they are, the output's template is that of their prompts."""
    out = merge_here(merge_config(own, parameters={"thinking": "template"}), own / "a")
    file = str(out / COEFFICIENTS)
    config = merge_config(own)
    config["parameters"] = {"coefficients": file}
    said = checked(own, config)
    assert "is used as it is: it was made with" in said
    assert "thinking template (the config: model)" in said
    again = merge_here(config, own / "b")
    assert shard_bytes(again) == shard_bytes(out)
    assert prompt_of(again).endswith("<|assistant|><think>")
    config["parameters"] = {"coefficients": str(plain / COEFFICIENTS)}
    assert prompt_of(merge_here(config, own / "c")).endswith("<|assistant|>")


def test_coefficients_of_before_the_setting_are_made_anew(own, tmp_path):
    from rpam_mergekit.formats.coefficients import write_coefficients

    out = merge_here(merge_config(own), own / "out")
    path = out / COEFFICIENTS
    made = CoefficientsFile(path)
    entries = {name: made.parts(name) for name in made.names}
    metadata = json.loads(json.dumps(dict(made.metadata)))
    for name in ("thinking", "think_open", "think_close"):
        del metadata["fingerprint"]["settings"][name]
    whole = path.read_bytes()
    write_coefficients(path, entries, metadata)
    config = merge_config(own, parameters={"coefficients": str(path)})
    assert "will be made anew: it has thinking template" in checked(own, config)
    merge_here(config, own / "out")
    assert path.read_bytes() == whole


def test_a_stock_recipe_names_the_template_without_the_opening(own):
    config = merge_config(own, parameters={"granularity": "tensor"})
    out = merge_here(config, own / "out")
    recipe = yaml.safe_load((out / "rpam_recipe.yml").read_text())
    assert recipe["chat_template"] == PLAIN
    succeeded(run(["mergekit-yaml", str(out / "rpam_recipe.yml"), str(own / "stock")]))
    assert prompt_of(own / "stock") == prompt_of(out)
    assert shard_bytes(own / "stock") == shard_bytes(out)
    (own / "rpam.yml").write_text(yaml.safe_dump(config))
    command = ["mergekit-rpam", "export", str(own / "rpam.yml"), str(out)]
    succeeded(run([*command, "--out", str(own / "exported.yml")]))
    exported = yaml.safe_load((own / "exported.yml").read_text())
    assert exported["chat_template"] == PLAIN


def test_a_sweep_asks_its_mixes_as_the_merged_model_is_asked(own):
    for number, parameters in enumerate(({}, {"thinking": "template"})):
        config = merge_config(own, parameters=parameters)
        model = own / f"mix{number}"
        mix, thinking = interpolation(config, Decimal("0.5")), thinking_settings(config)
        _merge(mix, model, own / "adapters", thinking)
        opening = "<think>" * number
        assert prompt_of(model).endswith(f"<|assistant|>{opening}")


# Responses without the thinking


def stripped(response: str, pattern: str) -> str:
    return response.rpartition("</think>")[2]


def test_thinking_that_was_stripped_is_refused(own):
    """As by lm-eval: Long would be aligned to answer at once."""
    change_responses(own / "calibration.jsonl", stripped)
    message = (
        "parameters.calibration: no response of the pattern 'long' thinks (8 were "
        "read), though its model thinks in <think> and </think>"
    )
    for template in (R1, PLAIN):
        set_template(own / "long", template)
        assert message in checked(own, merge_config(own))
    with pytest.raises(RpamError, match="Sample again with the thinking in the resp"):
        merge_here(merge_config(own), own / "out")
    assert not (own / "out").exists()
    for parameters in ({"tokens": "prompt"}, {"think_open": "none"}):
        said = checked(own, merge_config(own, parameters=parameters))
        assert "no problems found" in said


def test_a_long_of_which_no_brackets_are_known_is_noted(tmp_path):
    """Its model may think without."""
    tokenizer = chains.build_tokenizer()
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str().replace("think", "t"))
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(vocabulary)),
        pad_token="<|pad|>",
        eos_token="<|end|>",
    )
    plain.chat_template = PLAIN
    save_pair(tmp_path, qwen2_config(plain), plain)
    lines = [
        {"prompt": "1+1=", "pattern": pattern, "response": "1+1=2;2"}
        for pattern in ("long", "short")
    ]
    path = tmp_path / "calibration.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = checked(tmp_path, merge_config(tmp_path))
    assert "no problems found" in said
    assert "if its model thinks in brackets, name them in think_open" in said


def test_an_opening_in_other_brackets_than_those_named_is_noted(own):
    parameters = {"think_open": "(", "think_close": ")", "tokens": "prompt"}
    said = checked(own, merge_config(own, parameters=parameters))
    assert "ends prompts with '<think>', which think_open does not name" in said


def test_a_template_in_use_needs_no_tokenizer():
    """As where the base is the output of another merge, yet to come."""
    config = MergeConfiguration.model_validate(
        {
            "merge_method": "rpam",
            "base_model": "a",
            "models": [{"model": "b"}],
            "chat_template": R1,
        }
    )
    base = config.base_model
    assert base is not None
    found = TemplateInUse.of(config, {}, base, (), RpamSettings())
    assert found.findings((), RpamSettings()) == []
    assert found.notes((), RpamSettings(), {}) == []
