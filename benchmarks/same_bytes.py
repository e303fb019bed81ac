"""Do two versions of this project write the same bytes?

    python benchmarks/same_bytes.py OTHER [--cases low_rank slices ...]

OTHER is a checkout of another version. Both merge the quickstart's pair, with few
steps, in every way there is: each granularity, fixed weights, slices, three models, an
adapter, mergekit-multi, each a second time with its coefficients reused. Shards,
coefficients, recipes, cards and records are compared by their digests. Bytes depend on
machine and libraries, which is why digests are not kept in the repository: run it
before and after a change that is to change nothing. Ends with status 1 where a file
differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "examples" / "quickstart"
GRANULARITIES = ("low_rank", "element", "row", "tensor", "module", "layer")
# Of a record, what changes from run to run.
CHANGES = re.compile(r'"(seconds|created|time|date|peak_memory)[^"]*": [^,\n]*')
Config = dict[str, Any]


def config(**parameters: Any) -> Config:
    """Return the quickstart's config with few steps and further parameters."""
    calibration = str(QUICKSTART / "calibration.jsonl")
    if "epochs" not in parameters:
        parameters = {"steps": 6, **parameters}
    return {
        "merge_method": "rpam",
        "base_model": str(QUICKSTART / "long"),
        "models": [{"model": str(QUICKSTART / "short")}],
        "parameters": {"calibration": calibration, **parameters},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def slices(_: Path) -> list[Config]:
    """Return a merge of the layers in two slices."""
    whole = config()
    names = (whole["base_model"], whole.pop("models")[0]["model"])
    count = json.loads((QUICKSTART / "long" / "config.json").read_text())
    layers = count["num_hidden_layers"]
    parts = ([0, layers // 2], [layers // 2, layers])
    whole["slices"] = [
        {"sources": [{"model": name, "layer_range": part} for name in names]}
        for part in parts
    ]
    return [whole]


def three(folder: Path) -> list[Config]:
    """Return a merge of Long, Short and a third model between them."""
    between = {
        "merge_method": "linear",
        "models": [
            {"model": str(QUICKSTART / name), "parameters": {"weight": 0.5}}
            for name in ("long", "short")
        ],
        "dtype": "float32",
    }
    merge(ROOT, between, folder / "third", folder)
    calibration = folder / "three.jsonl"
    rows = [
        json.loads(line)
        for line in (QUICKSTART / "calibration.jsonl").read_text().splitlines()
    ]
    for number, row in enumerate(rows):
        row["pattern"] = "medium" if number % 3 == 0 else row["pattern"]
    calibration.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = config(calibration=str(calibration))
    whole["models"][0]["parameters"] = {"pattern": "short"}
    third = {"model": str(folder / "third"), "parameters": {"pattern": "medium"}}
    whole["models"].append(third)
    return [whole]


def adapter(folder: Path) -> list[Config]:
    """Return a merge with Short plus a LoRA adapter of random numbers."""
    folder = folder / "adapter"
    weights = load_file(QUICKSTART / "short" / "model.safetensors")
    name = next(n for n in weights if n.endswith("q_proj.weight"))
    rows, columns = weights[name].shape
    generator = torch.Generator().manual_seed(0)
    plain = f"base_model.model.{name.removesuffix('.weight')}"
    folder.mkdir(exist_ok=True)
    save_file(
        {
            f"{plain}.lora_A.weight": torch.randn(2, columns, generator=generator) / 9,
            f"{plain}.lora_B.weight": torch.randn(rows, 2, generator=generator) / 9,
        },
        folder / "adapter_model.safetensors",
    )
    of_peft = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": str(QUICKSTART / "short"),
    }
    (folder / "adapter_config.json").write_text(json.dumps(of_peft))
    whole = config()
    whole["models"][0]["model"] += f"+{folder}"
    return [whole]


def multi(_: Path) -> list[Config]:
    """Return two merges for mergekit-multi, the second on the first."""
    behind = config()
    behind["base_model"] = "first"
    return [{**config(), "name": "first"}, behind]


CASES: dict[str, Callable[[Path], list[Config]]] = {
    **{name: lambda _, n=name: [config(granularity=n)] for name in GRANULARITIES},
    "lbfgs": lambda _: [config(granularity="tensor", solver="lbfgs", epochs=2)],
    "paper": lambda _: [config(preset="paper")],
    "fixed": lambda _: [
        {**config(), "parameters": {**config()["parameters"], "weight": FIXED}}
    ],
    "slices": slices,
    "three": three,
    "adapter": adapter,
    "multi": multi,
}
FIXED = [{"filter": "mlp", "value": 0.25}]


def merge(tree: Path, merged: Config | list[Config], out: Path, folder: Path) -> None:
    """Run a merge by the package in `tree`, or by mergekit-multi if it is several."""
    several = isinstance(merged, list) and len(merged) > 1
    documents = merged if isinstance(merged, list) else [merged]
    path = folder / f"{out.name}.yml"
    path.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    script = "mergekit-multi" if several else "mergekit-yaml"
    command = [str(Path(sys.executable).parent / script), path.name]
    several_to = ["--intermediate-dir", "between", "--out-path", out.name]
    command += several_to if several else [out.name]
    command += ["--lora-merge-cache", "adapters", "--quiet"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{tree}: {' '.join(command)} failed:\n{done.stderr[-3000:]}")


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file that a merge has written, by its name."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".lock":
            content = path.read_bytes()
            if path.name == "rpam.json":
                content = CHANGES.sub("", content.decode()).encode()
            name = path.relative_to(folder).as_posix()
            found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("other", type=Path)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=[*CASES])
    args = parser.parse_args()
    failed = False
    for case in args.cases:
        found = []
        with tempfile.TemporaryDirectory() as common:
            configs = CASES[case](Path(common))
            for tree in (args.other.resolve(), ROOT):
                with tempfile.TemporaryDirectory() as folder:
                    merge(tree, configs, Path(folder) / "out", Path(folder))
                    merge(tree, configs, Path(folder) / "out", Path(folder))  # reuses
                    found.append(digests(Path(folder)))
        before, after = found
        differ = [n for n in {**before, **after} if before.get(n) != after.get(n)]
        failed |= bool(differ)
        what = f"differ: {', '.join(sorted(differ))}" if differ else "the same"
        print(f"{case}: {len(before)} files, {what}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
