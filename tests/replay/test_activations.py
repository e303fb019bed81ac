"""Activations lie on the device, the host or the disk, and the result is the same."""

from __future__ import annotations

from collections import namedtuple

import psutil
import pytest
import torch

from helpers.commands import succeeded
from helpers.merged import COEFFICIENTS, shard_bytes
from helpers.models import merge_config
from helpers.prepass import build
from rpam_mergekit.errors import RpamError
from rpam_mergekit.prepass import memory
from rpam_mergekit.prepass.memory import (
    activation_bytes,
    check_disk,
    choose_store,
    coefficient_bytes,
    explain_out_of_memory,
    readable,
)
from rpam_mergekit.replay.activations import WORTH_MOVING, StoredCalls, TensorStore
from rpam_mergekit.replay.calls import Call
from rpam_mergekit.settings import RpamSettings

LARGE = torch.arange(WORTH_MOVING // 4 + 4, dtype=torch.float32).reshape(2, -1)


@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_what_is_kept_comes_back(tmp_path, place):
    store = TensorStore(place, "cpu", tmp_path / "activations")
    one, two = store.store(LARGE), store.store(LARGE > 7)
    assert torch.equal(one.get(), LARGE)
    assert torch.equal(two.get(), LARGE > 7)
    one.put(LARGE + 1)
    assert torch.equal(one.get(), LARGE + 1)
    files = list(tmp_path.glob("activations/*"))
    assert len(files) == (2 if place == "disk" else 0)


def test_on_disk_a_tensor_is_the_bytes_of_its_file(tmp_path):
    kept = TensorStore("disk", "cpu", tmp_path).store(LARGE)
    kept.put(LARGE * 2)
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == (LARGE * 2).numpy().tobytes()


def test_calls_share_what_they_shared_and_keep_small_things(tmp_path):
    mask = (LARGE > 0).repeat(4, 1)
    expanded = torch.ones(1).expand(WORTH_MOVING)
    calls = [Call((mask,), {"pair": (mask, expanded), "use": True}) for _ in range(3)]
    placed = StoredCalls(calls, TensorStore("disk", "cpu", tmp_path))
    assert len(placed) == 3
    assert len(list(tmp_path.iterdir())) == 1
    call = placed[1]
    assert torch.equal(call.args[0], mask)
    assert call.args[0].data_ptr() == call.kwargs["pair"][0].data_ptr()
    assert call.kwargs["pair"][1] is expanded
    assert call.kwargs["use"] is True


@pytest.mark.parametrize("granularity", ["low_rank", "tensor"])
def test_the_place_changes_no_bit(pair, tmp_path, granularity):
    plain = build(pair, granularity=granularity).run().entries
    prepass = build(pair, granularity=granularity)
    prepass.store = TensorStore("disk", "cpu", tmp_path)
    on_disk = prepass.run().entries
    assert list(tmp_path.iterdir())
    for name, parts in plain.items():
        for part, value in parts.items():
            assert torch.equal(value, on_disk[name][part])


def test_a_merge_with_activations_on_disk(pair, tmp_path, mergekit_yaml):
    succeeded(mergekit_yaml(merge_config(pair)))
    expected = shard_bytes(tmp_path / "out")
    (tmp_path / "out" / COEFFICIENTS).unlink()
    process = mergekit_yaml(merge_config(pair, parameters={"activations": "disk"}))
    succeeded(process)
    assert "on disk" in process.stderr
    assert shard_bytes(tmp_path / "out") == expected
    left = {path.name for path in (tmp_path / "out" / "rpam").iterdir()}
    assert left == {COEFFICIENTS.name, f".{COEFFICIENTS.name}.lock"}


def test_the_place_is_no_reason_to_solve_again(pair, tmp_path, mergekit_yaml):
    succeeded(mergekit_yaml(merge_config(pair)))
    process = mergekit_yaml(merge_config(pair, parameters={"activations": "disk"}))
    assert "coefficients reused" in process.stderr


def test_the_bytes_of_the_activations_are_known_before(pair):
    prepass = build(pair)
    prepass.run()
    streams = prepass.streams
    hidden = sum(
        t.nbytes for s in streams for t in (*s.experts, s.merged) if t is not None
    )
    masks = sum(
        b.input_ids.shape[0] * b.input_ids.shape[1] ** 2 for b in prepass.batches
    )
    assert activation_bytes(prepass.batches, 32) == hidden + masks


@pytest.mark.parametrize("granularity", ["low_rank", "element", "row"])
def test_the_bytes_of_the_coefficients_are_known_before(pair, granularity):
    prepass = build(pair, granularity=granularity, epochs=1)
    entries = prepass.run().entries
    outside = {w.name for w in prepass.experts.layout.outside}
    found = sum(
        value.nbytes
        for name, parts in entries.items()
        if name not in outside
        for value in parts.values()
    )
    assert coefficient_bytes(prepass.decoder, prepass.settings) == found


def test_auto_takes_the_host_while_it_has_room(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_host_memory", lambda: 1000)
    assert choose_store("auto", 500, "cpu", tmp_path).place == "host"
    assert choose_store("auto", 501, "cpu", tmp_path).place == "disk"
    assert choose_store("host", 501, "cpu", tmp_path).place == "host"


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    limit, used = tmp_path / "max", tmp_path / "current"
    used.write_text("600\n")
    monkeypatch.setattr(memory, "CGROUPS", ((str(limit), str(used)),))
    free = memory.free_host_memory()
    assert 0 < free <= psutil.virtual_memory().total
    limit.write_text("1000\n")
    assert memory.free_host_memory() == 400
    limit.write_text("max\n")
    assert memory.free_host_memory() > 400


def test_a_disk_without_room_is_refused_before_the_work(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: usage(9, 8, 1 << 20))
    check_disk(tmp_path / "not" / "yet", 1 << 20, "the coefficients")
    with pytest.raises(RpamError, match=r"1\.0 MiB free, but .* need 3\.0 MiB"):
        check_disk(tmp_path / "not" / "yet", 3 << 20, "the coefficients")
    with pytest.raises(RpamError, match="activations: disk"):
        choose_store("disk", 3 << 20, "cpu", tmp_path)


def test_running_out_of_memory_names_the_knobs(pair):
    """A real allocation that no machine can make."""
    prepass = build(pair, epochs=1)
    replay = prepass.decoder.replay

    def greedy(*arguments):
        torch.empty(1 << 50)
        return replay(*arguments)

    prepass.decoder.replay = greedy
    with pytest.raises(RpamError) as caught:
        prepass.run()
    said = str(caught.value)
    assert "out of memory on cpu" in said
    assert "parameters.activations: disk" in said
    assert "parameters.batch_size: 4 (now 8)" in said
    assert "parameters.max_tokens: 1024 (now 2048)" in said


def test_the_knobs_depend_on_what_is_turned_already(tmp_path):
    settings = RpamSettings(batch_size=1, granularity="element")
    store = TensorStore("disk", "cpu", tmp_path)
    with pytest.raises(RpamError) as caught, explain_out_of_memory(settings, store):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
    said = str(caught.value)
    assert "parameters.activations: " not in said.split("Try")[1].split("Solved")[0]
    assert "batch_size" not in said
    assert "parameters.granularity: low_rank (now element)" in said


def test_other_errors_pass(tmp_path):
    with (
        pytest.raises(RuntimeError, match="something else"),
        explain_out_of_memory(RpamSettings(), TensorStore()),
    ):
        raise RuntimeError("something else")


def test_sizes_are_readable():
    assert [readable(n) for n in (10, 2048, 3 << 20, 5 << 30, 3 << 40)] == [
        "10 B",
        "2.0 KiB",
        "3.0 MiB",
        "5.0 GiB",
        "3072.0 GiB",
    ]
