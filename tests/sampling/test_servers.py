"""Servers that answer otherwise: every form gives the turn that was written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

from helpers.engines import FORMS, Engine, serving
from helpers.paths import QUICKSTART
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.samples import Response, SampleReader
from rpam_mergekit.sampling.request import SampleRequest
from rpam_mergekit.sampling.run import Tally
from rpam_mergekit.sampling.sample import sample

LONG = QUICKSTART / "long"
THOUGHT, ANSWERED = "<think>\n6*6=36\n</think>\n\n36", "36"


class Run:
    """What a run on a server gave: responses in order, notes, figures."""

    def __init__(self, path: Path, tally: Tally, notes: list[str]) -> None:
        self.header = SampleReader(path).header
        queries = sorted(SampleReader(path), key=lambda query: query.index)
        self.responses: list[Response] = [r for q in queries for r in q.responses]
        self.tally, self.notes = tally, "\n".join(notes)

    @property
    def texts(self) -> list[str]:
        return [response.text for response in self.responses]


@pytest.fixture
def ask(tmp_path):
    """Return a function that samples an engine; one query and response by default."""

    def call(engine: Engine, queries: int = 1, question: str = "6*6", **options) -> Run:
        data, out = tmp_path / "q.jsonl", tmp_path / "s.jsonl"
        rows = [{"question": f"{question}+{n}-{n}=", "answer": "36"} for n in range(9)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows[:queries]))
        out.unlink(missing_ok=True)
        notes: list[str] = []
        defaults = {"samples": 1, "graders": 1, "concurrency": 1, "retries": 0}
        with serving(engine):
            options = {"model": "m", "base_url": (engine.url,), **options}
            request = SampleRequest(
                dataset=str(data), out=out, **{**defaults, **options}
            )
            tally = sample(request, notes.append)
        return Run(out, tally, notes)

    return call


@pytest.mark.parametrize("name", FORMS)
def test_a_split_turn_becomes_the_canonical_turn_again(ask, name):
    found = ask(Engine(texts=[THOUGHT], form=FORMS[name]), opened_by_prompt=False)
    (response,) = found.responses
    assert response.text == THOUGHT
    assert (response.thinking, response.correct) == ("closed", True)
    assert "1 responses it was put back between the thinking markers" in found.notes


@pytest.mark.parametrize("name", FORMS)
def test_an_answer_given_at_once_stays_one(ask, name):
    """Also where a parser has taken it for thinking (vllm-project/vllm#13125)."""
    found = ask(
        Engine(
            texts=[ANSWERED],
            form=FORMS[name],
            prompt=lambda question: f"<|user|>{question}<|end|><|assistant|>",
        ),
        tokenizer=str(LONG),
    )
    (response,) = found.responses
    assert response.text == ANSWERED
    assert (response.thinking, response.correct) == ("none", True)
    parser = name in ("vLLM", "vLLM 0.11", "SGLang")
    assert ("1 responses came as reasoning without content" in found.notes) == parser
    assert ("they are taken for answers given at once" in found.notes) == parser


def answered(message: dict, **known) -> Engine:
    return Engine(message=message, **known)


@pytest.mark.parametrize(
    ("message", "turn", "thinking"),
    [
        # The opening, or both markers, or the whole turn are still in the field.
        (
            {"reasoning_content": "<think>\n6*6=36\n", "content": "36"},
            THOUGHT,
            "closed",
        ),
        ({"reasoning": "<think>6*6=36</think>", "content": "36"}, THOUGHT, "closed"),
        ({"reasoning": THOUGHT, "content": "36"}, THOUGHT, "closed"),
        ({"reasoning_content": THOUGHT, "content": ""}, THOUGHT, "closed"),
        # The content still has them.
        ({"reasoning": "6*6=36", "content": "</think>\n\n36"}, THOUGHT, "closed"),
        ({"reasoning": "6*6=36", "content": THOUGHT}, THOUGHT, "closed"),
        # Ends of turns stand in either part.
        ({"reasoning": "6*6=36", "content": "36<|im_end|>"}, THOUGHT, "closed"),
        ({"reasoning": "36<|im_end|>\n", "content": None}, "36", "none"),
        # The same thought under two names.
        (
            {"reasoning": "6*6=36", "reasoning_content": "6*6=36", "content": "36"},
            THOUGHT,
            "closed",
        ),
        # An empty block of thinking.
        ({"reasoning": "\n\n", "content": "36"}, "<think>\n\n</think>\n\n36", "closed"),
        # Parts of a content.
        ({"content": [{"type": "text", "text": "36"}]}, "36", "none"),
        ({"content": [{"type": "output_text", "text": "36"}, "\n"]}, "36\n", "none"),
        ({"content": ["36"]}, "36", "none"),
        (
            {
                "content": [
                    {"type": "reasoning", "reasoning": "6*6"},
                    {"type": "reasoning", "text": "=36"},
                    {"type": "text", "text": "3"},
                    {"type": "text", "text": "6<|im_end|>"},
                ]
            },
            "<think>\n6*6\n=36\n</think>\n\n36",
            "closed",
        ),
        (
            {"content": [{"type": "thinking", "thinking": "36"}]},
            "36",
            "none",
        ),
        # A field that is no text: nothing that could be read.
        ({"reasoning": {"effort": 3}, "content": "36"}, "36", "none"),
        (
            {"reasoning_details": [{"type": "reasoning.summary", "summary": "6*6=36"}]}
            | {"content": "36"},
            THOUGHT,
            "closed",
        ),
    ],
)
def test_messages_of_every_kind_are_read(ask, message, turn, thinking):
    (response,) = ask(answered(message), opened_by_prompt=False).responses
    assert (response.text, response.thinking) == (turn, thinking)
    assert response.correct


def test_the_models_own_markers_are_put_back(ask, tmp_path):
    """Recognised from its chat template, or named."""
    model = tmp_path / "model"
    shutil.copytree(LONG, model)
    template = (model / "chat_template.jinja").read_text()
    (model / "chat_template.jinja").write_text(template + "{# [THINK] [/THINK] #}")
    message = {"reasoning_content": "[THINK]6*6=36", "content": "36"}
    found = ask(answered(message), tokenizer=str(model))
    assert found.texts == ["[THINK]\n6*6=36\n[/THINK]\n\n36"]
    found = ask(answered(message), think_open="(", think_close=")")
    assert found.texts == ["(\n6*6=36\n)\n\n36"]
    assert found.responses[0].thinking == "closed"


def test_a_prompt_that_opened_the_thinking_is_restored(ask, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(LONG, model)
    template = (model / "chat_template.jinja").read_text()
    opens = template.replace("<|assistant|>", "<|assistant|><think>\n")
    (model / "chat_template.jinja").write_text(opens)
    message = {"reasoning": "6*6=36", "content": "36"}
    assert ask(answered(message), tokenizer=str(model)).texts == [THOUGHT]
    found = ask(answered({"reasoning": "36", "content": None}), tokenizer=str(model))
    assert found.texts == ["<think>\n36"]
    assert found.responses[0].thinking == "answered"
    assert found.responses[0].correct


@pytest.mark.parametrize(
    ("tokens", "turn", "thinking"),
    [
        (3, "36", "none"),  # 3, 6, the end token
        (4, "<think>\n36", "open"),  # and the opening marker
        (5, "<think>\n36\n</think>", "closed"),  # and the closing one
        (99, "36", "none"),  # none of these
    ],
)
def test_token_counts_tell_what_a_parser_took_away(ask, tokens, turn, thinking):
    engine = answered({"reasoning": "36", "content": None}, tokens=tokens)
    (response,) = ask(engine, tokenizer=str(LONG)).responses
    assert (response.text, response.thinking) == (turn, thinking)
    assert response.correct == (thinking == "none")


@pytest.mark.parametrize(("tokens", "state"), [(2, "none"), (3, "open"), (9, "open")])
def test_what_was_cut_off_is_a_thought_unless_the_count_says_no(ask, tokens, state):
    engine = answered({"reasoning": "36", "content": None}, tokens=tokens)
    engine.finish = "length"
    (response,) = ask(engine, tokenizer=str(LONG)).responses
    assert (response.thinking, response.correct) == (state, False)


@pytest.mark.parametrize(
    ("reason", "recorded"),
    [
        ("abort", "abort"),
        ("content_filter", "content_filter"),
        ("tool_calls", "tool_calls"),
        ("function_call", "function_call"),
        ("error", "error"),
        (None, "null"),
        ("", "null"),
    ],
)
def test_what_did_not_end_is_no_answer(ask, reason, recorded):
    found = ask(answered({"content": "36"}, finish=reason), opened_by_prompt=False)
    (response,) = found.responses
    assert (response.finish, response.correct) == (recorded, False)
    figures = "\n".join(found.tally.lines())
    assert f"stopped otherwise 100.0% ({recorded} 1): no answers" in figures
    assert found.tally.cut_off == 0


@pytest.mark.parametrize("reason", ["stop", "STOP", "eos_token", "end_turn"])
def test_other_words_for_an_end(ask, reason):
    found = ask(answered({"content": "36"}, finish=reason), opened_by_prompt=False)
    assert [(r.finish, r.correct) for r in found.responses] == [("stop", True)]


def test_the_models_own_end_tokens_are_removed(ask, tmp_path):
    """That of the tokenizer, and all of the generation config or of the config."""
    model = tmp_path / "model"
    shutil.copytree(LONG, model)
    path = model / "generation_config.json"
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "eos_token_id": [3, 9]})
    )
    (end,) = AutoTokenizer.from_pretrained(model).convert_ids_to_tokens([9])
    assert ask(Engine(texts=[f"36{end}"]), tokenizer=str(model)).texts == ["36"]
    assert ask(Engine(texts=[f"36{end}"]), tokenizer=str(LONG)).texts == [f"36{end}"]
    path.unlink()
    config = model / "config.json"
    values = {**json.loads(config.read_text()), "eos_token_id": [3, 9]}
    config.write_text(json.dumps(values))
    assert ask(Engine(texts=[f"36{end}"]), tokenizer=str(model)).texts == ["36"]


def test_a_prompt_before_the_text_is_cut_where_it_is_just_that(ask):
    def prompt(question: str) -> str:
        return f"<|user|>{question}<|end|><|assistant|>"

    engine = Engine(texts=["36"], form=lambda text, asked: {"content": asked + text})
    engine.prompt = prompt
    found = ask(engine, tokenizer=str(LONG))
    assert found.texts == ["36"]
    assert "1 responses begin with the prompt itself: it was cut off" in found.notes
    engine.prompt = lambda question: f"user\n{question}\nassistant\n"
    found = ask(engine, tokenizer=str(LONG))
    assert found.texts == ["user\n6*6+0-0=\nassistant\n36"]
    assert "1 responses repeat their prompt" in found.notes
    engine.prompt = lambda question: f"{question}\n"
    found = ask(engine, question="What is 6*6? ", tokenizer=str(LONG))
    assert "1 responses repeat their prompt" in found.notes
    engine.prompt = lambda question: question  # as the quickstart's Long thinks
    found = ask(engine, tokenizer=str(LONG))
    assert found.texts == ["6*6+0-0=36"]
    assert not found.notes


def test_a_server_that_ignores_the_temperature_is_noted(ask):
    options = {"queries": 4, "samples": 3, "opened_by_prompt": False}
    said = "none of the 4 queries has two different responses"
    assert said in ask(Engine(), **options, temperature=1.0).notes
    assert said not in ask(Engine(), **options, temperature=0.0).notes
    assert said not in ask(Engine(texts=["36", "36", "3", "6"]), **options).notes
    few = {**options, "queries": 2}
    assert "two different" not in ask(Engine(), **few).notes


def test_at_nothing_right_a_response_is_shown_beside_its_gold(ask):
    text = "\x1b[31m" + "no\n" * 99 + "\u202e37"
    found = ask(Engine(texts=[text]), opened_by_prompt=False)
    (line,) = [x for x in found.tally.lines() if "none is right" in x]
    assert "'\\x1b[31mno\\nno" in line
    assert line.endswith("37', right is '36'")
    assert line.isprintable()
    assert len(line) < 140
    found = ask(Engine(texts=["36"]), opened_by_prompt=False)
    assert "none is right" not in "\n".join(found.tally.lines())


def test_a_run_closes_its_connections_also_a_refused_one(ask, monkeypatch):
    """Else a later run's event loop would find them, and fail to close them."""
    made: list[openai.AsyncOpenAI] = []

    class Remembered(openai.AsyncOpenAI):
        def __init__(self, **options) -> None:
            super().__init__(**options)
            made.append(self)

    monkeypatch.setattr(openai, "AsyncOpenAI", Remembered)
    ask(Engine(), opened_by_prompt=False)
    with pytest.raises(RpamError, match="does not serve"):
        ask(Engine(models=["other"]))
    assert [client.is_closed() for client in made] == [True, True]


# What is refused


@pytest.mark.parametrize(
    "elsewhere",
    [
        (404, '{"detail":"Not Found"}'),  # vLLM, SGLang, Ollama
        (200, '{"error":"Unexpected endpoint or method. (GET /models)"}'),  # LM Studio
        (200, "<html>a page for people</html>"),
    ],
)
def test_a_url_without_v1_is_told_what_is_missing(ask, elsewhere):
    engine = Engine(elsewhere=elsewhere)
    with serving(engine):
        root = engine.url.removesuffix("/v1")
        with pytest.raises(RpamError) as refusal:
            ask(engine, base_url=(root,))
    assert "/v1 is missing: give http://127.0.0.1:" in str(refusal.value)


def test_a_404_of_a_server_without_a_list_asks_for_v1(ask):
    engine = Engine(models=None)
    with serving(engine):
        root = engine.url.removesuffix("/v1")
        with pytest.raises(RpamError, match="Is /v1 missing at the end of --base-url"):
            ask(engine, base_url=(root,))
    assert ask(Engine(models=None), opened_by_prompt=False).texts == ["36"]


def test_a_folder_that_is_served_but_not_listed(ask):
    """As transformers serve does: its list is the cache."""
    found = ask(Engine(models=["org/cached"]), model=str(LONG))
    assert found.texts == ["36"]
    with pytest.raises(RpamError, match="does not serve 'n'"):
        ask(Engine(models=["org/cached"]), model="n")
    broken = Engine(models=["org/cached"], refuses=(404, '{"error": {}}'))
    with pytest.raises(RpamError, match="does not serve '/"):
        ask(broken, model=str(LONG))


@pytest.mark.parametrize("status", [400, 401, 403, 404, 500])
def test_no_message_shows_a_secret(ask, monkeypatch, status):
    """Also where the server gives the Authorization header back."""
    monkeypatch.setenv("OPENAI_API_KEY", "topsecretkey")
    told = '{"error": {"message": "bad {authorization} sk-abcdefghijk pa%20ss"}}'
    engine = Engine(refuses=(status, told))
    with serving(engine):
        url = engine.url.replace("//", "//user:pa%20ss@")
        with pytest.raises(RpamError) as refusal:
            ask(engine, base_url=(url,), extra_body={"api_key": "anotherkey"})
    message = str(refusal.value)
    assert "***" in message
    for secret in ("topsecretkey", "pa%20ss", "pa ss", "sk-abcdefghijk", "dXNlcjpw"):
        assert secret not in message


@pytest.mark.parametrize(
    "url",
    ["http://user:pass@127.0.0.1:9/v1", "http://user:pass@127.0.0.1:9x/v1"],
)
def test_a_url_that_leads_nowhere_is_shown_without_its_password(ask, url):
    with pytest.raises(RpamError) as refusal:
        ask(Engine(), base_url=(url,))
    assert "http://***@127.0.0.1:9" in str(refusal.value)
    assert "pass" not in str(refusal.value)


def test_a_key_among_the_further_fields_is_not_written_down(ask):
    body = {"api_key": "anotherkey", "min_p": 0.1}
    engine = Engine()
    found = ask(engine, extra_body=body, opened_by_prompt=False)
    assert engine.asked[0]["api_key"] == "anotherkey"
    assert found.header["sampling"]["extra_body"] == {"api_key": "***", "min_p": 0.1}
