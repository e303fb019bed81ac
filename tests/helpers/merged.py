"""What a merge has written: its shards, its coefficients, its layers so far."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from rpam_mergekit.formats.coefficients import CoefficientsFile, merge

COEFFICIENTS = Path("rpam") / "coefficients.safetensors"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of the safetensors shards of a model folder."""
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})
    return found


def shard_bytes(folder: Path) -> list[bytes]:
    return [shard.read_bytes() for shard in sorted(folder.glob("*.safetensors"))]


def assert_merged_by_formula(out: Path, pair: Path, coefficients: Path) -> None:
    """Every tensor on disk equals the formula with the coefficients of the file."""
    file = CoefficientsFile(coefficients)
    merged, long, short = (tensors(f) for f in (out, pair / "long", pair / "short"))
    assert merged.keys() == long.keys()
    for name, value in merged.items():
        expected = merge(long[name], [(file.coefficient(name, "cpu"), short[name])])
        assert torch.equal(value, expected.to(value.dtype)), name


def solved(folder: Path) -> list[str]:
    """Return the names of the layers that lie in the folder of an unfinished run."""
    return sorted(
        path.name.partition(".")[0]
        for path in (folder / "out" / "rpam").glob("*.unfinished/*/layer-*.safetensors")
    )
