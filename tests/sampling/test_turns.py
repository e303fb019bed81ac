"""Whole turns: the opening that stood in the prompt, found out and known per file."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import chains
import peft
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.commands import run, succeeded
from helpers.models import save_adapter
from helpers.paths import QUICKSTART
from helpers.sampling import refused, sample, serving
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.formats.samples import SampleReader
from rpam_mergekit.grading.brackets import begun_turn, markers_in, opening_of, read_turn
from rpam_mergekit.grading.responses import Markers, final_answers, without_end

TEMPLATE = (QUICKSTART / "long" / "chat_template.jinja").read_text()
OPENING = TEMPLATE.replace("<|assistant|>", "<|assistant|><think>\n")
THINK = Markers()


def templated(folder: Path, template: str, model: str = "long") -> str:
    """Return a copy of one of the quickstart's models with another chat template."""
    shutil.copytree(QUICKSTART / model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return str(folder)


@pytest.fixture
def questions(tmp_path) -> str:
    rows = [
        {"question": "7+5=", "answer": "2"},
        {"question": "7+5*3-2=", "answer": "4"},
        {"question": "9*9=", "answer": "1"},
    ]
    return write(tmp_path / "questions.jsonl", *rows)


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sampled(model: str, questions: str, out: Path, *options: str):
    """Sample two responses a query; return the file's reader and the process."""
    process = sample(model, questions, out, "-k", "2", *options)
    succeeded(process)
    return SampleReader(out), process


def responses_of(reader) -> list:
    return [response for query in reader for response in query.responses]


# Reading one response


@pytest.mark.parametrize(
    ("written", "opening", "turn"),
    [
        ("7</think>2", "<think>\n", "<think>\n7</think>2"),
        ("2", "<think>\n", "<think>\n2"),  # never closed: it was begun all the same
        ("7 and so", "<think>\n", "<think>\n7 and so"),
        ("<think>\n7</think>2", "<think>\n", "<think>\n7</think>2"),  # a server's whole
        ("<think>7</think>2", "<think>\n", "<think>7</think>2"),
        ("2", "", "2"),
        ("7</think>2", "", "7</think>2"),
        ("7</think>2", None, "<think>\n7</think>2"),
        ("2", None, "2"),
        ("<think>7</think>2", None, "<think>7</think>2"),
    ],
)
def test_a_turn_begins_with_what_stood_in_the_prompt(written, opening, turn):
    assert begun_turn(written, opening, THINK) == turn
    assert begun_turn(turn, opening, THINK) == turn


@pytest.mark.parametrize(
    ("turn", "ended", "state", "final"),
    [
        ("<think>\n36", True, "answered", "36"),
        ("<think>\nThe answer is 36.", True, "answered", "The answer is 36."),
        ("<think>\n36", False, "open", None),  # cut off: a thought may have begun so
        ("<think>\n6*6=36\n36\n", True, "answered", "6*6=36\n36\n"),
        (
            "<think>\n" + "so " * 100 + "36",
            True,
            "open",
            None,
        ),  # a thought, by its size
        ("<think>\n", True, "open", None),
        ("<think>\n7</think>36", True, "closed", "36"),
        ("<think>\n<tool_call>\n36", True, "wrong", "\n36"),
    ],
)
def test_an_answer_in_the_block_that_the_prompt_opened(turn, ended, state, final):
    found = read_turn(turn, "<think>\n", THINK, ended)
    assert (found.state, found.final) == (state, final)
    assert found.thinks == (state != "answered")
    # What the model itself has opened and never closed is a thought.
    assert read_turn(turn, "", THINK, ended).state != "answered"


def test_brackets_are_recognised():
    magistral = Markers("[THINK]", "[/THINK]")
    harmony = "<|start|>assistant<|channel|>analysis<|message|>"
    assert markers_in(["a [/THINK] b"]) == magistral
    assert markers_in([harmony]).close == "<|end|>"
    assert markers_in(["<|user|>?<|end|>"]) is None
    assert opening_of("? [THINK]\n", magistral) == "[THINK]\n"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("4<|im_end|>", "4"),
        ("4<|im_end|>\n<|endoftext|>\n", "4"),
        ("4</s>", "4"),
        ("4<|im_end|> 5", "4<|im_end|> 5"),
        ("4", "4"),
        ("4\n", "4\n"),
        ("4[STOP]", "4"),
    ],
)
def test_end_tokens_are_removed(text, clean):
    assert without_end(text, THINK, ["[STOP]"]) == clean


def test_a_marker_that_closes_thinking_is_no_end_token():
    harmony = Markers("<|channel|>analysis<|message|>", "<|end|>")
    assert without_end("so 4<|end|>", harmony) == "so 4<|end|>"


def test_an_answer_in_a_channel_of_its_own():
    harmony = Markers("<|channel|>analysis<|message|>", "<|end|>")
    turn = "<|channel|>analysis<|message|>6*6<|end|><|start|>assistant<|channel|>final"
    found = read_turn(f"{turn}<|message|>36", None, harmony)
    assert found.state == "closed"
    assert final_answers(found, turn) == ["36"]


# Sampling finds the opening out


def test_a_model_here_whose_template_opens_the_thinking(tmp_path, questions):
    model = templated(tmp_path / "opens", OPENING.replace("<think>\n", "<think>"))
    reader, process = sampled(model, questions, tmp_path / "s.jsonl")
    assert reader.header["thinking"] == {
        "open": "<think>",
        "close": "</think>",
        "opening": "<think>",
        "opened_by_prompt": True,
    }
    plain, _ = sampled(
        str(QUICKSTART / "long"), questions, tmp_path / "plain.jsonl", "--seed", "1"
    )
    assert plain.header["thinking"]["opening"] == ""
    easy = next(query for query in reader if query.index == 0)
    assert easy.responses[0].text == "<think>7+5=2</think>2"
    assert easy.responses[0].tokens == 8  # the opening was not generated
    assert next(q for q in plain if q.index == 0).responses[0].tokens == 9
    for response in responses_of(reader):
        assert response.text.startswith("<think>")
        assert response.text.count("<think>") == 1
        assert response.thinking == "closed"
    assert "note" not in process.stderr


def test_an_exact_opening_is_restored_also_where_nothing_is_closed(tmp_path, questions):
    model = templated(tmp_path / "opens", OPENING)
    options = ["--max-tokens", "2"]
    reader, _ = sampled(model, questions, tmp_path / "s.jsonl", *options)
    assert reader.header["thinking"]["opening"] == "<think>\n"
    for response in responses_of(reader):
        assert response.text.startswith("<think>\n")
        assert (response.tokens, response.thinking) == (2, "open")


def test_other_brackets_are_recognised_from_the_template(tmp_path, questions):
    template = OPENING.replace("<think>\n", "[THINK]")
    model = templated(tmp_path / "opens", template)
    reader, _ = sampled(model, questions, tmp_path / "s.jsonl", "--max-tokens", "2")
    known = reader.header["thinking"]
    assert (known["open"], known["close"]) == ("[THINK]", "[/THINK]")
    assert known["opening"] == "[THINK]"
    named = ["--think-open", "<think>", "--max-tokens", "2"]
    reader, _ = sampled(model, questions, tmp_path / "named.jsonl", *named)
    assert reader.header["thinking"]["close"] == "</think>"
    assert reader.header["thinking"]["opening"] == ""


def test_a_flag_that_contradicts_the_template_here_is_not_heeded(tmp_path, questions):
    model = str(QUICKSTART / "long")
    reader, process = sampled(
        model, questions, tmp_path / "s.jsonl", "--opened-by-prompt"
    )
    assert reader.header["thinking"]["opening"] == ""
    assert "--opened-by-prompt is not heeded" in process.stderr
    assert {r.thinking for r in responses_of(reader)} == {"closed"}


def stub(tmp_path, questions, text, model, *options):
    """Sample a server that always answers `text`; its tokens are 9."""
    with serving("--model", f"{model}=", "--stub", text) as server:
        url = ["--base-url", server.url]
        return sampled(model, questions, tmp_path / "s.jsonl", *url, *options)


def test_a_servers_template_is_asked_of_the_models_tokenizer(tmp_path, questions):
    model = templated(tmp_path / "opens", OPENING)
    reader, process = stub(tmp_path, questions, "7+5=2</think>2", model)
    assert reader.header["thinking"]["opening"] == "<think>\n"
    response = responses_of(reader)[0]
    assert response.text == "<think>\n7+5=2</think>2"
    assert (response.tokens, response.thinking) == (9, "closed")
    assert "note" not in process.stderr


def test_a_servers_content_may_hold_the_opening_and_the_end(tmp_path, questions):
    model = templated(tmp_path / "opens", OPENING)
    text = "<think>\n7+5=2</think>2<|end|>"
    reader, _ = stub(tmp_path, questions, text, model)
    response = responses_of(reader)[0]
    assert (response.text, response.correct) == ("<think>\n7+5=2</think>2", True)


def test_an_answer_of_a_model_whose_prompt_opened_the_thinking(tmp_path, questions):
    """What such a merged model says where it does not think (vllm #12999)."""
    model = templated(tmp_path / "opens", OPENING)
    reader, process = stub(tmp_path, questions, "2", model)
    responses = responses_of(reader)
    assert {r.thinking for r in responses} == {"answered"}
    assert {r.text for r in responses} == {"<think>\n2"}
    assert [r.correct for r in responses].count(True) == 2
    assert "thinking          0.0%" in process.stdout
    assert "answered in the opened block 100.0%" in process.stdout
    report = str(tmp_path / "report")
    process = run(
        ["mergekit-rpam", "compare", str(tmp_path / "s.jsonl"), "--out", report]
    )
    succeeded(process)
    assert " 33.3 % (" in process.stdout


def test_the_tokenizer_of_another_name_tells(tmp_path, questions):
    model = templated(tmp_path / "opens", OPENING)
    text = "7+5=2</think>2"
    reader, _ = stub(tmp_path, questions, text, "alias", "--tokenizer", model)
    assert reader.header["thinking"]["opening"] == "<think>\n"


def test_the_model_that_a_server_says_it_has_loaded_tells(tmp_path, questions):
    model = templated(tmp_path / "opens", OPENING)
    out = tmp_path / "s.jsonl"
    with serving("--model", f"alias={model}", "--stub", "7+5=2</think>2") as server:
        reader, process = sampled(
            "alias", questions, out, "--base-url", server.url, "--limit", "1"
        )
    assert reader.header["thinking"]["opening"] == "<think>\n"
    assert "note" not in process.stderr


def test_what_cannot_be_asked_is_said_and_may_be_told(tmp_path, questions):
    reader, process = stub(tmp_path, questions, "7+5=2</think>2", "alias")
    assert reader.header["thinking"]["opening"] is None
    assert "the chat template of alias cannot be asked" in process.stderr
    assert "--opened-by-prompt" in process.stderr
    response = responses_of(reader)[0]
    assert (response.text, response.thinking) == ("<think>\n7+5=2</think>2", "closed")
    (tmp_path / "s.jsonl").unlink()
    reader, process = stub(tmp_path, questions, "2", "alias", "--opened-by-prompt")
    assert reader.header["thinking"]["opening"] == "<think>\n"
    assert "--opened-by-prompt is believed" in process.stderr
    assert responses_of(reader)[0].text == "<think>\n2"


def test_a_request_that_renders_the_template_otherwise_is_heeded(tmp_path, questions):
    template = TEMPLATE.replace(
        "<|assistant|>", "<|assistant|>{% if thinking %}<think>\n{% endif %}"
    )
    model = templated(tmp_path / "switch", template)
    body = json.dumps({"chat_template_kwargs": {"thinking": True}})
    text = "7+5=2</think>2"
    reader, _ = stub(tmp_path, questions, text, model, "--extra-body", body)
    assert reader.header["thinking"]["opening"] == "<think>\n"
    (tmp_path / "s.jsonl").unlink()
    reader, _ = stub(tmp_path, questions, text, model)
    assert reader.header["thinking"]["opening"] == ""


def test_a_run_goes_on_when_the_template_cannot_be_asked_any_more(tmp_path, questions):
    model = templated(tmp_path / "opens", OPENING)
    text = "7+5=2</think>2"
    stub(tmp_path, questions, text, "alias", "--tokenizer", model, "--limit", "1")
    reader, process = stub(tmp_path, questions, text, "alias")
    assert {r.text for r in responses_of(reader)} == {"<think>\n7+5=2</think>2"}
    assert len(responses_of(reader)) == 6
    assert "cannot be asked" not in process.stderr
    out = str(tmp_path / "s.jsonl")
    with serving("--model", "alias=", "--stub", "2") as server:
        url = ["--base-url", server.url, "--not-opened-by-prompt", "-k", "2"]
        process = sample("alias", questions, Path(out), *url)
    refused(process, "thinking.opening: the file was made with '<think>\\n'")


# What a template does not take


REFUSING = (
    "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}" + TEMPLATE
)
DROPPING = TEMPLATE.replace(
    "{% for m in messages %}",
    "{% for m in messages if m['role'] == 'assistant' %}",
)
IGNORING = TEMPLATE.replace("in messages %}", "in messages if m['role'] == 'user' %}")


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        (
            REFUSING,
            ["--system", "Think."],
            ("--system: the chat template of", "System role not supported"),
        ),
        (
            IGNORING,
            ["--system", "Think."],
            ("--system: the chat template of", "leaves system messages out"),
        ),
        (
            DROPPING,
            [],
            ("query 0: the chat template of", "leaves the message of the role 'user'"),
        ),
        (
            "{{ messages[5]['content'] }}" + TEMPLATE,
            [],
            ("query 0: the chat template of", "refuses this query"),
        ),
    ],
)
def test_what_a_template_does_not_take_is_one_message(
    tmp_path, questions, template, options, expected
):
    model = templated(tmp_path / "model", template)
    out = tmp_path / "s.jsonl"
    refused(sample(model, questions, out, *options), *expected)
    assert not out.exists()


def test_a_system_message_that_a_template_takes(tmp_path, questions):
    model = str(QUICKSTART / "long")
    reader, _ = sampled(model, questions, tmp_path / "s.jsonl", "--system", "7")
    assert next(iter(reader)).messages[0] == {"role": "system", "content": "7"}


# Models as mergekit's configs name them


def test_a_model_with_an_adapter(tmp_path, questions):
    model = str(QUICKSTART / "short")
    adapter = save_adapter(QUICKSTART / "short", tmp_path / "lora")
    merged = tmp_path / "merged"
    plain = AutoModelForCausalLM.from_pretrained(model)
    peft.PeftModel.from_pretrained(plain, adapter).merge_and_unload().save_pretrained(
        merged
    )
    AutoTokenizer.from_pretrained(model).save_pretrained(merged)
    named, folder, alone = (
        sampled(name, questions, tmp_path / f"{n}.jsonl", "--max-tokens", "8")[0]
        for n, name in enumerate((f"{model}+{adapter}", str(merged), model))
    )
    assert responses_of(named) == responses_of(folder) != responses_of(alone)
    digests = {r.header["weights"]["digest"] for r in (named, folder, alone)}
    assert len(digests) == 3
    assert all(len(digest) == 64 for digest in digests)
    save_adapter(QUICKSTART / "short", adapter, seed=1)
    process = sample(
        f"{model}+{adapter}", questions, tmp_path / "0.jsonl", "-k", "2", "--seed", "0"
    )
    refused(process, "weights.digest: the file was made with")


def test_a_revision_from_the_cache(tmp_path, questions):
    repository = tmp_path / "cache" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    for name, reference in (("long", "v1"), ("short", "main")):
        commit = name[0].replace("l", "a").replace("s", "b") * 40
        shutil.copytree(QUICKSTART / name, repository / "snapshots" / commit)
        (repository / "refs" / reference).write_text(commit)
    cache = {"HF_HUB_CACHE": str(repository.parent)}
    out = tmp_path / "s.jsonl"
    succeeded(sample("org/name@v1", questions, out, "-k", "1", **cache))
    assert {r.thinking for r in responses_of(SampleReader(out))} == {"closed"}
    assert SampleReader(out).header["model"] == "org/name@v1"
    out = tmp_path / "main.jsonl"
    succeeded(sample("org/name", questions, out, "-k", "1", **cache))
    assert {r.thinking for r in responses_of(SampleReader(out))} == {"none"}
    options = ["--revision", "main"]
    process = sample("org/name@v1", questions, out, *options, **cache)
    refused(process, "--revision: found 'main', but MODEL names 'v1'")


def test_references_that_are_none(tmp_path, questions):
    model, out = str(QUICKSTART / "long"), tmp_path / "s.jsonl"
    process = sample(f"{model}+{tmp_path / 'no'}", questions, out)
    refused(process, "the adapter", "is no folder")
    process = sample("a@b@c", questions, out)
    refused(process, "MODEL: found 'a@b@c'", "NAME@REVISION")
    process = sample("a+b+c", questions, out)
    refused(process, "MODEL: found 'a+b+c'")
    assert not out.exists()


def test_a_folder_may_have_any_name(tmp_path, questions):
    model = templated(tmp_path / "a+b@c", TEMPLATE)
    reader, _ = sampled(model, questions, tmp_path / "s.jsonl")
    assert {r.thinking for r in responses_of(reader)} == {"closed"}


# Files that were written before


def older(tmp_path, name: str, opened: bool | None, *texts: str, finished=True) -> str:
    """Write a sample file as versions before whole turns did."""
    header = {
        "rpam_samples": 1,
        "model": "m",
        "thinking": {
            "open": "<think>",
            "close": "</think>",
            "opened_by_prompt": opened,
        },
    }
    states = {"7</think>2": "closed", "7 and so": "open" if opened else "none"}
    query = {
        "index": 0,
        "question": "7+5=",
        "messages": [{"role": "user", "content": "7+5="}],
        "gold": {"values": ["2"]},
        "responses": [
            {
                "text": text,
                "tokens": 5,
                "finish": "stop",
                "thinking": states.get(text, "none"),
                "correct": text.endswith("2"),
            }
            for text in texts
        ],
    }
    end = [{"finished": {"queries": 1}}] if finished else []
    return write(tmp_path / name, header, query, *end)


def read(path: str) -> list:
    """Return the responses of a file as `label` and `compare` have them."""
    import asyncio

    from rpam_mergekit.sampling.read_samples import GradedSamples
    from rpam_mergekit.sampling.request import GradingOptions

    async def collect():
        return [
            query
            async for query in GradedSamples(Path(path), GradingOptions()).queries()
        ]

    return [
        response for query in asyncio.run(collect()) for response in query.responses
    ]


def test_older_files_are_read_as_before_with_whole_turns(tmp_path):
    texts = ("7</think>2", "7 and so")
    opened = read(older(tmp_path, "a.jsonl", True, *texts))
    assert [r.text for r in opened] == [f"<think>\n{text}" for text in texts]
    assert [(r.thinking, r.correct) for r in opened] == [
        ("closed", True),
        ("open", False),
    ]
    unknown = read(older(tmp_path, "b.jsonl", None, *texts))
    assert [r.text for r in unknown] == ["<think>\n7</think>2", "7 and so"]
    assert [r.thinking for r in unknown] == ["closed", "none"]
    plain = read(older(tmp_path, "c.jsonl", False, "2", "<think>7</think>2"))
    assert [r.text for r in plain] == ["2", "<think>7</think>2"]


def test_an_older_file_is_graded_anew_by_its_header(tmp_path):
    source = older(tmp_path, "old.jsonl", True, "7</think>2", "7 and so")
    out = tmp_path / "new.jsonl"
    succeeded(run(["mergekit-rpam", "grade", source, "--out", str(out)]))
    reader = SampleReader(out)
    assert reader.header["thinking"]["opening"] == "<think>\n"
    assert [r.text for r in responses_of(reader)] == [
        "<think>\n7</think>2",
        "<think>\n7 and so",
    ]
    assert [r.correct for r in responses_of(reader)] == [True, False]


@pytest.mark.parametrize("opened", [True, None])
def test_an_older_unfinished_file_is_refused_clearly(tmp_path, opened):
    source = older(tmp_path, "old.jsonl", opened, "7</think>2")
    out = older(tmp_path, "new.jsonl", opened, "7</think>2", finished=False)
    before = Path(out).read_bytes()
    process = run(["mergekit-rpam", "grade", source, "--out", out])
    refused(process, "new.jsonl:1: thinking: the file is of a version", "--out")
    assert Path(out).read_bytes() == before


def test_an_older_file_whose_prompts_opened_nothing_is_gone_on_with(
    tmp_path, questions
):
    out = tmp_path / "s.jsonl"
    model = str(QUICKSTART / "long")
    sampled(model, questions, out)
    whole = out.read_text().splitlines(keepends=True)
    header = json.loads(whole[0])
    del header["thinking"]["opening"]
    out.write_text(json.dumps(header) + "\n" + "".join(whole[1:3]))
    sampled(model, questions, out)
    assert sorted(out.read_text().splitlines()[1:]) == sorted(
        line.rstrip("\n") for line in whole[1:]
    )


# From sampling to labels, without a flag


@pytest.mark.parametrize("opening", ["<think>", "<think>\n"])
def test_labels_of_a_pair_whose_longs_template_opens_the_thinking(tmp_path, opening):
    rows = [
        {"question": query, "answer": chains.answer(query)}
        for seed in range(16)
        for query in [chains.draw(1 + seed % 8, random.Random(seed))]
    ]
    data = write(tmp_path / "q.jsonl", *rows)
    long = templated(tmp_path / "long", OPENING.replace("<think>\n", opening))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("l", "s")]
    for model, out in zip((long, str(QUICKSTART / "short")), files, strict=True):
        sampled(model, data, Path(out))
    out = tmp_path / "c.jsonl"
    succeeded(run(["mergekit-rpam", "label", *files, "--out", str(out)]))
    queries = read_calibration(out).queries
    assert {q.pattern for q in queries} == {"long", "short"}
    for query in queries:
        begun = query.response.startswith(opening)
        assert begun == (query.pattern == "long")
        assert query.response.count("<think>") == (query.pattern == "long")


# One flag, several files


def minimal(question: str, answer: str, *responses) -> dict:
    return {"question": question, "answer": answer, "responses": responses}


@pytest.fixture
def foreign(tmp_path) -> list[str]:
    """Files of a Long whose prompts opened the thinking, and of a plain Short."""
    long = [minimal(f"{n}?", str(n), f"so {n}\n</think>\n{n}") for n in range(4)]
    short = [minimal(f"{n}?", str(n), str(n if n else 9)) for n in range(4)]
    return [write(tmp_path / f"{n}.jsonl", *r) for n, r in (("l", long), ("s", short))]


def test_the_flag_is_for_the_files_that_need_it(tmp_path, foreign):
    report = tmp_path / "report"
    command = ["mergekit-rpam", "compare", *foreign, "--opened-by-prompt"]
    process = run([*command, "--out", str(report)])
    succeeded(process)
    rows = {row[0]: row for row in map(str.split, process.stdout.splitlines()) if row}
    assert rows["l"][1:3] == ["100.0", "%"]
    assert rows["s"][1:3] == ["75.0", "%"]


def test_labels_with_the_flag_for_long_only(tmp_path, foreign):
    out = tmp_path / "c.jsonl"
    command = ["mergekit-rpam", "label", *foreign, "--opened-by-prompt"]
    succeeded(run([*command, "--out", str(out)]))
    found = [(q.pattern, q.response) for q in read_calibration(out).queries]
    assert found == [
        ("long", "<think>\nso 0\n</think>\n0"),
        *(("short", str(n)) for n in (1, 2, 3)),
    ]


def test_the_header_wins_over_the_flag(tmp_path, questions):
    out = tmp_path / "s.jsonl"
    sampled(str(QUICKSTART / "short"), questions, out)
    new = tmp_path / "new.jsonl"
    command = ["mergekit-rpam", "grade", str(out), "--opened-by-prompt"]
    process = run([*command, "--out", str(new)])
    succeeded(process)
    reader = SampleReader(new)
    assert {r.thinking for r in responses_of(reader)} == {"none"}
    assert reader.header["thinking"]["opening"] == ""
    assert "--opened-by-prompt is not heeded" in process.stderr


def test_an_answer_in_a_foreign_file_that_was_opened(tmp_path):
    source = write(
        tmp_path / "in.jsonl",
        minimal(
            "6*6?",
            "36",
            "36",
            "6*6=36\n</think>\n36",
            {"text": "so", "finish": "length"},
        ),
    )
    out = tmp_path / "out.jsonl"
    command = ["mergekit-rpam", "grade", source, "--opened-by-prompt"]
    succeeded(run([*command, "--out", str(out)]))
    reader = SampleReader(out)
    assert reader.header["thinking"]["opening"] == "<think>\n"
    assert [(r.thinking, r.correct) for r in responses_of(reader)] == [
        ("answered", True),
        ("closed", True),
        ("open", False),
    ]


def test_brackets_of_a_foreign_file_are_recognised(tmp_path):
    source = write(
        tmp_path / "in.jsonl", minimal("6*6?", "36", "[THINK]6*6[/THINK]36<|im_end|>")
    )
    out = tmp_path / "out.jsonl"
    succeeded(run(["mergekit-rpam", "grade", source, "--out", str(out)]))
    response = responses_of(SampleReader(out))[0]
    assert (response.thinking, response.correct) == ("closed", True)
    assert response.text == "[THINK]6*6[/THINK]36"


def test_stripped_responses_of_long_are_refused(tmp_path, foreign):
    """As lm-eval writes them where it is told the end of the thinking (#3196)."""
    stripped = tmp_path / "stripped.jsonl"
    rows = [
        {
            "doc_id": n,
            "doc": {"question": f"{n}?"},
            "target": str(n),
            "resps": [[f"The answer is {n}."]],
        }
        for n in range(4)
    ]
    write(stripped, *rows)
    out = tmp_path / "c.jsonl"
    command = ["mergekit-rpam", "label", str(stripped), foreign[1], "--out", str(out)]
    refused(run(command), "none of Long's right responses", "think_end_token")
    assert not out.exists()
    succeeded(run([*command, "--prompts-only"]))
    assert [q.response for q in read_calibration(out).queries] == [None] * 4
