"""Sample files: appended to, gone on with, never mixed, never taken for whole."""

from __future__ import annotations

import json
import resource

import pytest

from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.samples import (
    Response,
    SampledQuery,
    SampleReader,
    SampleWriter,
)
from rpam_mergekit.grading.answers import Gold

HEADER = {"model": "m", "sampling": {"seed": 0, "temperature": 1.0}}


def query(index: int, *correct: bool | None) -> SampledQuery:
    return SampledQuery(
        index=index,
        question=f"{index}?",
        messages=({"role": "user", "content": f"{index}?"},),
        gold=Gold(values=("7",)),
        source={"row": index},
        responses=tuple(
            Response(text="sieben \u2028 7", tokens=3, finish="stop", correct=c)
            for c in correct or (True, False)
        ),
    )


def write(path, *queries, header=HEADER, finish=True):
    with SampleWriter(path, header) as writer:
        for one in queries:
            writer.append(one)
        if finish:
            writer.finish()


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "s.jsonl"
    write(path, query(0), query(1, None, True))
    reader = SampleReader(path)
    assert list(reader) == [query(0), query(1, None, True)]
    assert reader.finished
    assert reader.header["model"] == "m"


def test_an_unfinished_file_says_so(tmp_path):
    path = tmp_path / "s.jsonl"
    write(path, query(0), finish=False)
    reader = SampleReader(path)
    assert len(list(reader)) == 1
    assert not reader.finished


def test_a_run_goes_on_where_it_stopped(tmp_path):
    path = tmp_path / "s.jsonl"
    write(path, query(0), query(4), finish=False)
    with SampleWriter(path, HEADER) as writer:
        assert writer.done == {0, 4}
        assert not writer.finished
        writer.append(query(1))
        writer.finish()
    assert [q.index for q in SampleReader(path)] == [0, 4, 1]


@pytest.mark.parametrize("lost", [1, 5, 60])
def test_a_torn_last_line_is_cut_off(tmp_path, lost):
    path = tmp_path / "s.jsonl"
    write(path, query(0), query(1), finish=False)
    path.write_bytes(path.read_bytes()[:-lost])
    assert [q.index for q in SampleReader(path)] == [0]
    with SampleWriter(path, HEADER) as writer:
        assert writer.done == {0}
        writer.append(query(1))
        writer.finish()
    assert [q.index for q in SampleReader(path)] == [0, 1]


def test_a_file_that_was_torn_in_its_header_starts_anew(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"rpam_sam')
    write(path, query(0))
    assert len(list(SampleReader(path))) == 1


def test_more_queries_can_follow_a_finished_run(tmp_path):
    path = tmp_path / "s.jsonl"
    write(path, query(0))
    with SampleWriter(path, HEADER) as writer:
        assert writer.finished
        writer.append(query(1))
        assert not SampleReader(path).finished
    reader = SampleReader(path)
    assert [q.index for q in reader] == [0, 1]
    assert not reader.finished
    write(path)
    assert list(reader)
    assert reader.finished


def test_every_changed_setting_is_refused_by_name(tmp_path):
    path = tmp_path / "s.jsonl"
    write(path, query(0))
    before = path.read_bytes()
    changed = {"model": "n", "sampling": {"seed": 1, "temperature": 1.0, "top_k": 5}}
    with pytest.raises(RpamError) as error, SampleWriter(path, changed):
        pass
    message = str(error.value)
    assert "s.jsonl:1: model: the file was made with 'm', this run has 'n'." in message
    assert "sampling.seed: the file was made with 0, this run has 1." in message
    assert "sampling.top_k: the file was made with None, this run has 5." in message
    assert "temperature" not in message
    assert "give --out another file" in message
    assert path.read_bytes() == before


def test_other_software_may_go_on(tmp_path):
    path = tmp_path / "s.jsonl"
    write(path, query(0), header={**HEADER, "software": {"python": "3.10"}})
    write(path, query(1), header={**HEADER, "software": {"python": "3.13"}})
    assert len(list(SampleReader(path))) == 2


@pytest.mark.parametrize("content", ['{"question": "A?"}\n', "[1]\n", "3\n"])
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "s.jsonl"
    path.write_text(content)
    with pytest.raises(RpamError, match="is not a sample file"):
        SampleWriter(path, HEADER)
    assert path.read_text() == content
    with pytest.raises(RpamError, match="not a sample file"):
        SampleReader(path)


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "s.jsonl"
    write(path, query(0), query(1))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]) + "\n")
    with pytest.raises(RpamError, match=r"s\.jsonl:2: not JSON"):
        list(SampleReader(path))
    with pytest.raises(RpamError, match=r"s\.jsonl:2: not JSON"):
        SampleWriter(path, HEADER)


def test_a_record_without_responses_is_named(tmp_path):
    path = tmp_path / "s.jsonl"
    write(path)
    with open(path, "a") as file:
        file.write(json.dumps({"index": 1, "question": "A?", "messages": []}) + "\n")
    with pytest.raises(RpamError, match=r"s\.jsonl:3: responses: "):
        list(SampleReader(path))


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "s.jsonl"
    path.write_text('{"rpam_samples": 99}\n')
    with pytest.raises(RpamError, match="format 99, this version reads 1"):
        SampleReader(path)


def test_two_runs_do_not_write_one_file(tmp_path):
    path = tmp_path / "s.jsonl"
    with SampleWriter(path, HEADER) as writer:
        with pytest.raises(RpamError, match="another run is writing"):
            SampleWriter(path, HEADER)
        writer.append(query(0))
    write(path, query(1))
    assert len(list(SampleReader(path))) == 2


def test_a_full_disk_stops_cleanly_and_loses_nothing(tmp_path):
    path = tmp_path / "s.jsonl"
    write(path, query(0), finish=False)
    size = path.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, hard))
    try:
        with (
            pytest.raises(RpamError, match=r"s\.jsonl: File too large"),
            SampleWriter(path, HEADER) as writer,
        ):
            writer.append(query(1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [q.index for q in SampleReader(path)] == [0]
    write(path, query(1))
    assert [q.index for q in SampleReader(path)] == [0, 1]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RpamError, match="--out: no folder"):
        SampleWriter(tmp_path / "nowhere" / "s.jsonl", HEADER)
    with pytest.raises(RpamError, match="No such file or directory"):
        SampleReader(tmp_path / "s.jsonl")


def test_accuracy_and_tokens_of_a_query():
    assert query(0, True, False, None, True).accuracy == 0.5
    assert query(0).tokens == 3
    unknown = Response(text="", tokens=None)
    both = (*query(0).responses, unknown)
    assert query(0).model_copy(update={"responses": both}).tokens is None
