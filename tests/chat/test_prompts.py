"""Queries become token ids with one template, true spans and no needless padding."""

from __future__ import annotations

import copy
import json

import chains
import pytest

from rpam_mergekit.chat.prompts import (
    PADDING,
    EncodedQuery,
    encode_calibration,
    make_batches,
)
from rpam_mergekit.chat.rendering import end_token
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.settings import RpamSettings

LONG = {"prompt": "1+1*3=", "pattern": "long", "response": "<think>1+1=2</think>6"}
SHORT = {"prompt": "1+1=", "pattern": "short", "response": "2"}


@pytest.fixture
def encode(tmp_path, tokenizer):
    def call(*records: dict, vocabulary=None, tokenizer=tokenizer, **settings):
        path = tmp_path / "c.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return encode_calibration(
            read_calibration(path),
            tokenizer,
            vocabulary or len(tokenizer),
            RpamSettings(**settings),
        )

    return call


def test_prompt_and_response_stand_as_the_model_sees_them(encode, tokenizer):
    (long, _short), _ = encode(LONG, SHORT)
    text = "".join(tokenizer.convert_ids_to_tokens(long.ids))
    assert text == "<|user|>1+1*3=<|end|><|assistant|><think>1+1=2</think>6"
    prompt = "".join(tokenizer.convert_ids_to_tokens(long.ids[: long.prompt_tokens]))
    assert prompt == "<|user|>1+1*3=<|end|><|assistant|>"


def test_the_label_never_changes_the_prompt(encode):
    other = {**LONG, "pattern": "short"}
    (first, second), _ = encode(LONG, other, tokens="prompt")
    assert first.ids == second.ids


def test_prompts_alone_leave_responses_out(encode):
    (long, _), _ = encode(LONG, SHORT, tokens="prompt")
    assert len(long.ids) == long.prompt_tokens


def test_a_query_without_response_is_reported(encode):
    (_, short), notes = encode(LONG, {**SHORT, "response": None})
    assert len(short.ids) == short.prompt_tokens
    assert any("1 of 2 queries have no response" in note for note in notes)


def test_a_tokenizer_without_chat_template_is_reported(encode):
    plain = chains.build_tokenizer()
    plain.chat_template = None
    (_, short), notes = encode(LONG, SHORT, tokenizer=plain)
    assert plain.decode(short.ids).replace(" ", "") == "1+1=2"
    assert any("no chat template" in note for note in notes)


def test_long_prompts_are_left_out_and_reported(encode):
    encoded, notes = encode(LONG, SHORT, {**LONG, "prompt": "1+1+1+1="}, max_tokens=9)
    assert [query.prompt_tokens for query in encoded] == [9, 7]
    assert any("1 of 3 prompts are empty or longer than max_tokens" in n for n in notes)


def test_a_pattern_of_which_nothing_fits_is_refused(encode):
    with pytest.raises(RpamError, match=r"every 'long' prompt .* is longer than 8"):
        encode(LONG, SHORT, max_tokens=8)


def test_cut_responses_are_reported(encode):
    (long, _), notes = encode(LONG, SHORT, max_tokens=11)
    assert len(long.ids) == 11
    assert any("1 responses were cut" in note for note in notes)


STEPS = ";".join(f"{n % 10}+1={(n + 1) % 10}" for n in range(30))  # 179 tokens
THINKS = {**LONG, "response": f"<think>{STEPS}</think>0"}


def said(query: EncodedQuery, tokenizer) -> str:
    return "".join(tokenizer.convert_ids_to_tokens(query.ids[query.prompt_tokens :]))


def test_a_long_response_keeps_its_ends(encode, tokenizer):
    whole, _ = encode(THINKS, SHORT)
    assert len(whole[0].ids) - whole[0].prompt_tokens == 182
    (long, short), notes = encode(THINKS, SHORT, max_response_tokens=32)
    assert short == whole[1]
    assert long.ids[: long.prompt_tokens] == whole[0].ids[: whole[0].prompt_tokens]
    text = said(long, tokenizer)
    assert text == f"<think>{STEPS[:20]}{STEPS[-9:]}</think>0"
    assert len(long.ids) - long.prompt_tokens == 32
    assert long.ended
    assert long.opening == 1
    assert tokenizer.convert_ids_to_tokens(long.ids[long.closing]) == "</think>"
    assert long.jumps == (long.prompt_tokens + 21,)
    assert long.decisions == (
        long.prompt_tokens - 1,
        long.closing - 1,
        len(long.ids) - 1,
    )
    assert [note for note in notes if "left out" in note] == [
        "1 of 2 responses are longer than max_response_tokens (32): the middle of "
        "their thinking was left out"
    ]


def test_a_limit_that_no_response_reaches_changes_nothing(encode):
    whole = encode(THINKS, SHORT)
    assert encode(THINKS, SHORT, max_response_tokens=182) == whole
    assert encode(THINKS, SHORT, max_response_tokens=181)[0] != whole[0]


def test_the_closing_stays_before_a_long_answer(encode, tokenizer):
    record = {**LONG, "response": f"<think>{STEPS}</think>{STEPS}"}
    (long, _), _ = encode(record, SHORT, max_response_tokens=50)
    text = said(long, tokenizer)
    thinking, answer = STEPS[:20] + STEPS[-9:], STEPS[:9] + STEPS[-10:]
    assert text == f"<think>{thinking}</think>{answer}"
    assert tokenizer.convert_ids_to_tokens(long.ids[long.closing]) == "</think>"
    assert len(long.jumps) == 2


def test_a_long_direct_answer_is_shortened_too(encode, tokenizer):
    (_, short), _ = encode(LONG, {**SHORT, "response": STEPS}, max_response_tokens=30)
    assert said(short, tokenizer) == STEPS[:20] + STEPS[-10:]
    assert short.closing is None
    assert short.ended


def test_what_is_left_of_a_response_fits_max_tokens(encode, tokenizer):
    (long, _), notes = encode(THINKS, SHORT, max_tokens=29, max_response_tokens=32)
    assert len(long.ids) == 29
    assert said(long, tokenizer).startswith("<think>")
    assert said(long, tokenizer).endswith("</think>0")
    assert not any("max_tokens (29)" in note for note in notes)
    # Where the limit is not reached, as without one.
    cut, notes = encode(THINKS, SHORT, max_tokens=100, max_response_tokens=182)
    assert cut == encode(THINKS, SHORT, max_tokens=100)[0]
    assert any("1 responses were cut to fit max_tokens (100)" in n for n in notes)


def test_ids_outside_the_vocabulary_are_refused(encode, tokenizer):
    top = len(tokenizer) - 1
    with pytest.raises(RpamError, match=f"token id {top} .* vocabulary of {top}"):
        encode({**LONG, "response": ";"}, SHORT, vocabulary=top)


def test_fewer_queries_than_asked_for_is_reported(encode):
    _, notes = encode(LONG, SHORT)
    assert any("1 usable 'long' queries, fewer than" in note for note in notes)


def test_a_query_that_the_template_refuses_is_named(encode):
    strict = chains.build_tokenizer()
    strict.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(RpamError, match=r"c\.jsonl:1: the chat template refuses"):
        encode(LONG, SHORT, tokenizer=strict)


@pytest.mark.parametrize("template", ["{{ bos_token }}", "<|user|>7<|assistant|>"])
def test_a_template_that_drops_the_message_is_named(encode, template):
    deaf = chains.build_tokenizer()
    deaf.chat_template = template
    with pytest.raises(RpamError, match=r"c\.jsonl:1: .* leaves the message") as error:
        encode(LONG, SHORT, tokenizer=deaf)
    assert "whatever it says" in str(error.value)
    assert "longer than" not in str(error.value)


def test_batches_are_padded_to_their_own_longest_only(encode):
    records = [
        {**SHORT, "prompt": "1" + "+1" * n + "=", "pattern": ("long", "short")[n % 2]}
        for n in (8, 1, 7, 2, 6, 3)
    ]
    encoded, _ = encode(*records)
    batches = make_batches(encoded, RpamSettings(batch_size=2))
    lengths = [batch.input_ids.shape[1] for batch in batches]
    assert lengths == sorted(lengths)
    for batch in batches:
        real = batch.attention_mask.sum(dim=1)
        assert real.max() == batch.input_ids.shape[1]
    padding = sum(int((b.attention_mask == 0).sum()) for b in batches)
    assert padding == 2 * ((2 - 1) + (6 - 3) + (8 - 7))  # an operation is two tokens


def test_the_tokens_that_decide_are_the_prompts_last_and_the_responses(encode):
    encoded, _ = encode(LONG, SHORT)
    batches = make_batches(encoded, RpamSettings(batch_size=2))
    short, long = (
        row for b in batches for row in b.predicts_response
    )  # ordered by length
    assert short.tolist() == [False] * 6 + [True] * 2 + [False] * (len(short) - 8)
    assert long.tolist() == [False] * 8 + [True] * (len(long) - 8)


def test_a_batch_is_never_mostly_padding():
    lengths = [10] * 3 + [12] * 4 + [30, 31, 100, 101]
    queries = [EncodedQuery((5,) * n, 3, "long") for n in reversed(lengths)]
    batches = make_batches(queries, RpamSettings(batch_size=5))
    assert [batch.attention_mask.sum(dim=1).tolist() for batch in batches] == [
        [10, 10, 10, 12, 12],
        [12, 12],
        [30, 31],
        [100, 101],
    ]
    for batch in batches:
        assert batch.attention_mask.float().mean() >= 1 - PADDING


OPENING = chains.CHAT_TEMPLATE.replace("<|assistant|>", "<|assistant|><think>")


@pytest.fixture
def opening():
    """The tokenizer, with a template that opens the thinking."""
    tokenizer = chains.build_tokenizer()
    tokenizer.chat_template = OPENING
    return tokenizer


def test_prompts_end_where_the_model_begins_to_decide(encode, tokenizer, opening):
    """With a template that opens as with one that does not, to the last token."""
    lacks = {**LONG, "response": LONG["response"].removeprefix("<think>")}
    closes = {**SHORT, "response": "</think>2"}
    right, _ = encode(LONG, SHORT)
    for long, short in ((LONG, SHORT), (lacks, SHORT), (lacks, closes)):
        assert encode(long, short, tokenizer=opening)[0] == right


def test_a_template_that_is_kept_opens_prompts_and_no_response(encode, opening):
    (long, short), _ = encode(LONG, SHORT, tokenizer=opening, thinking="template")
    for query, response in ((long, "1+1=2</think>6"), (short, "2")):
        ids = query.ids[: query.prompt_tokens]
        prompt = "".join(opening.convert_ids_to_tokens(ids))
        assert prompt.endswith("<|assistant|><think>")
        rest = opening.convert_ids_to_tokens(query.ids[query.prompt_tokens :])
        assert "".join(rest) == response


def test_the_opening_is_encoded_by_itself(encode):
    """As it was when Long wrote what follows: its line break is in no longer token."""
    tokenizer = chains.build_tokenizer("0123456789+-*=;\n")
    tokenizer.add_tokens(["\n\n"])
    tokenizer.chat_template = OPENING.replace("<think>", "{{ '<think>\n' }}")
    response = "\n1+1=2</think>6"
    (long, _), _ = encode({**LONG, "response": response}, SHORT, tokenizer=tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(long.ids[long.prompt_tokens :])
    assert tokens[:4] == ["<think>", "\n", "\n", "1"]


USER = "{{ '<|user|>' + messages[0]['content'] + '<|end|>' }}"


@pytest.mark.parametrize(
    ("template", "token"),
    [
        # As Gemma, Phi-3: the turn's own end token, which is not the tokenizer's.
        (
            USER + "{{ '<|assistant|>' + messages[1]['content'] + '<|end|>' }}",
            "<|end|>",
        ),
        (USER + "{{ messages[1]['content'] + '\n<|end|>\n' }}", "<|end|>"),
        # As Llama 2: the tokenizer's.
        (USER + "{{ messages[1]['content'] + eos_token }}", None),
        # Says nothing of it: no special token behind the turn, no turn, no answer.
        (USER + "{{ messages[1]['content'] + '1<|end|>' }}", None),
        (USER, None),
        ("{{ raise_exception('one turn only') }}", None),
        (None, None),
    ],
)
def test_the_end_token_is_the_one_that_ends_the_turn(tokenizer, template, token):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    tokenizer.eos_token = "<|user|>"
    wanted = tokenizer.eos_token if token is None else token
    assert end_token(tokenizer) == tokenizer.convert_tokens_to_ids(wanted)
