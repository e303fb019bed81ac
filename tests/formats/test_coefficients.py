"""The merge formula, the fields, and a file that is whole or not there."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import save_file

from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats import coefficients as module
from rpam_mergekit.formats.coefficients import (
    CoefficientsFile,
    coefficient,
    merge,
    open_coefficients,
    write_coefficients,
    written,
)
from rpam_mergekit.prepass.fields import LayerCoefficients

SHAPES = {
    "self_attn.q_proj.weight": torch.Size([6, 4]),
    "self_attn.k_proj.weight": torch.Size([6, 4]),
    "mlp.experts.down_proj": torch.Size([3, 4, 5]),
    "norm.weight": torch.Size([4]),
}
GRANULARITIES = ("low_rank", "element", "row", "tensor", "module", "layer")


def build(granularity: str, **changes) -> LayerCoefficients:
    arguments = {"rank": 2, "initial": 0.3, "generator": torch.Generator(), **changes}
    arguments["module"] = lambda name: name.split(".")[0]
    return LayerCoefficients(SHAPES, granularity=granularity, **arguments)


def test_the_formula_is_base_plus_share_of_the_difference():
    base, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.5])
    merged = merge(base, [(torch.tensor([0.25, 1.0]), other)])
    assert torch.equal(merged, torch.tensor([1.5, 2.5]))


def test_the_formula_computes_in_float32_whatever_the_checkpoint():
    base = torch.tensor([1.0], dtype=torch.bfloat16)
    other = torch.tensor([1.0078125], dtype=torch.bfloat16)
    merged = merge(base, [(torch.tensor(0.5), other)])
    assert merged.dtype == torch.float32
    assert merged.item() == 1.00390625  # between two neighbours of bfloat16


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("block", [1, 13, 1 << 17])
def test_a_weight_written_in_blocks_is_the_formula_rounded_once(
    granularity, block, monkeypatch
):
    monkeypatch.setattr(module, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    for name, parts in build(granularity).parts.items():
        shape = SHAPES[name]
        parts = {p: torch.randn(v.shape, generator=generator) for p, v in parts.items()}
        base, other = (torch.randn(shape, generator=generator).bfloat16() for _ in "ab")
        whole = merge(base, [(coefficient(parts), other)])
        assert torch.equal(written(base, [other], [parts]), whole.bfloat16())
        exact = written(base, [other], [parts], torch.float32)
        torch.testing.assert_close(exact, whole, rtol=1e-6, atol=1e-6)


def test_a_number_is_merged_too():
    base, other = torch.tensor(1.0), torch.tensor(3.0)
    assert written(base, [other], [{"scalar": torch.tensor(0.25)}]) == 1.5


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_granularity_starts_at_the_initial_weight(granularity):
    coefficients = build(granularity)
    for name, shape in SHAPES.items():
        field = coefficient(coefficients.parts[name]).expand(shape)
        torch.testing.assert_close(field, torch.full(shape, 0.3))


@pytest.mark.parametrize(
    ("granularity", "leaves", "numbers"),
    [
        ("layer", 1, 1),
        ("module", 3, 3),
        ("tensor", 4, 4),
        ("row", 4, 6 + 6 + 12 + 4),
        ("element", 4, 24 + 24 + 60 + 4),
        ("low_rank", 13, 2 * (10 + 20) + 3 * (9 + 18) + 4),
    ],
)
def test_how_many_coefficients_a_granularity_has(granularity, leaves, numbers):
    coefficients = build(granularity)
    assert len(coefficients.leaves) == leaves
    assert sum(leaf.numel() for leaf in coefficients.leaves) == numbers


def test_low_rank_fields_are_row_plus_column_plus_product_for_each_expert():
    parts = {
        "row": torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
        "column": torch.tensor([[10.0, 20.0, 30.0], [1.0, 1.0, 1.0]]),
        "left": torch.tensor([[[1.0], [0.0]], [[2.0], [3.0]]]),
        "right": torch.tensor([[[100.0, 0.0, 0.0]], [[1.0, 0.0, 1.0]]]),
    }
    expected = [
        [[111.0, 21.0, 31.0], [12.0, 22.0, 32.0]],
        [[3.0, 1.0, 3.0], [4.0, 1.0, 4.0]],
    ]
    assert torch.equal(coefficient(parts), torch.tensor(expected))


def test_rank_0_leaves_row_plus_column():
    parts = build("low_rank", rank=0).parts["self_attn.q_proj.weight"]
    assert set(parts) == {"row", "column"}


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_fixed_weight_has_no_leaf(granularity):
    coefficients = build(granularity, fixed={"norm.weight": 0.75})
    assert coefficient(coefficients.parts["norm.weight"]).item() == 0.75
    assert not coefficients.parts["norm.weight"]["scalar"].requires_grad


def test_the_penalty_is_the_mean_squared_departure():
    coefficients = build("tensor", fixed={"norm.weight": 9.0})
    with torch.no_grad():
        coefficients.leaves[0].add_(0.6)
    torch.testing.assert_close(coefficients.penalty(), torch.tensor(0.36 / 3))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_file_gives_back_every_coefficient(granularity, tmp_path):
    solved = build(granularity).solved()
    write_coefficients(tmp_path / "c.safetensors", solved, {"fingerprint": {}})
    file = CoefficientsFile(tmp_path / "c.safetensors")
    assert file.names == sorted(SHAPES)
    for name in SHAPES:
        assert torch.equal(file.coefficient(name, "cpu"), coefficient(solved[name]))


def test_the_same_coefficients_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        solved = build("low_rank", generator=torch.Generator()).solved()
        metadata = {"layers": [1], "fingerprint": {"x": 1, "a": 2}}
        write_coefficients(tmp_path / name, solved, metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = tmp_path / "c.safetensors"
    write_coefficients(path, build("layer").solved(), {})
    before = path.read_bytes()

    def full_disk(*_args, **_kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_coefficients(path, build("tensor").solved(), {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


def test_what_is_not_a_coefficients_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(RpamError, match="no coefficients file"):
        CoefficientsFile(path)
    path.write_text("not safetensors")
    with pytest.raises(RpamError, match="not a safetensors file"):
        CoefficientsFile(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(RpamError, match="not a coefficients file of rpam-mergekit"):
        CoefficientsFile(path)


def test_a_later_format_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    write_coefficients(path, build("layer").solved(), {"format": 99})
    with pytest.raises(RpamError, match=r"format 99.*Upgrade"):
        CoefficientsFile(path)


def test_a_replaced_file_is_read_anew(tmp_path):
    path = tmp_path / "c.safetensors"
    for value in (0.25, 0.75):
        write_coefficients(path, {"x": {"scalar": torch.tensor(value)}}, {"v": value})
        assert open_coefficients(path).coefficient("x", "cpu").item() == value


def test_a_file_is_read_from_many_threads(tmp_path):
    path = tmp_path / "c.safetensors"
    solved = {f"t{i}": {"element": torch.full((50, 50), float(i))} for i in range(40)}
    write_coefficients(path, solved, {})
    wrong = []

    def read(start: int) -> None:
        for i in range(40):
            number = (start + i) % 40
            value = open_coefficients(path).coefficient(f"t{number}", "cpu")
            if not bool((value == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
