"""Is the routing that the pre-pass measures that of the model when it generates?

    python benchmarks/studies/two_patterns/routing.py OUT CALIBRATION [...]

OUT is the folder of a merge, CALIBRATION its calibration file. The pre-pass held some
of its queries out and measured by log-likelihoods which of them the merged model thinks
about. Here the model on disk generates: its responses to those held-out queries begin
by opening their thinking or not, as their labels ask, or do not. With `--others FILE`
(one for every merge), labelled queries that the merge has never seen are asked too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "performance"))

from _machine import describe, table
from transformers import AutoTokenizer

from rpam_mergekit.chat.prompts import encode_calibration
from rpam_mergekit.formats.calibration import CalibrationQuery, read_calibration
from rpam_mergekit.formats.samples import SampleReader
from rpam_mergekit.grading.responses import NONE
from rpam_mergekit.parameters import parse_settings
from rpam_mergekit.routing.holdout import split_queries

TOKENS = 16  # enough to see whether thinking is opened


def held_out(out: Path, calibration: Path) -> list[CalibrationQuery]:
    """Return the queries that the merge in `out` has held out."""
    record = json.loads((out / "rpam.json").read_text(encoding="utf-8"))
    found = record["settings"].items()
    settings = parse_settings({n: v for n, v in found if v is not None})
    queries = read_calibration(calibration)
    tokenizer = AutoTokenizer.from_pretrained(out)
    encoded, _ = encode_calibration(queries, tokenizer, len(tokenizer), settings)
    _, held = split_queries(encoded, settings.held_out, settings.seed)
    wanted = {query.ids[: query.prompt_tokens] for query in held}
    found = []
    for query in queries.queries:
        text = tokenizer.apply_chat_template(
            query.conversation, tokenize=False, add_generation_prompt=True
        )
        if tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) in wanted:
            found.append(query)
    return found


def generated(out: Path, queries: list[CalibrationQuery]) -> dict[str, float]:
    """Return by pattern the share of queries that the model opens as labelled."""
    with tempfile.TemporaryDirectory() as folder:
        questions, samples = (Path(folder) / n for n in ("q.jsonl", "s.jsonl"))
        patterns = {query.prompt: query.pattern for query in queries}
        questions.write_text(
            "".join(
                json.dumps({"question": prompt, "answer": "0"}) + "\n"
                for prompt in patterns
            )
        )
        command = [sys.executable, "-m", "rpam_mergekit.cli", "sample", str(out)]
        command += ["--dataset", str(questions), "--out", str(samples), "-k", "1"]
        command += ["--temperature", "0", "--max-tokens", str(TOKENS)]
        subprocess.run(
            [*command, "--dtype", "float32"], check=True, capture_output=True
        )
        right: dict[str, list[bool]] = {}
        for query in SampleReader(samples):
            pattern = patterns[query.question]
            thinks = query.responses[0].thinking != NONE
            right.setdefault(pattern, []).append(thinks == (pattern == "long"))
    return {pattern: sum(of) / len(of) for pattern, of in right.items()}


def rows_of(
    out: Path, calibration: Path, others: Path | None, most: int
) -> list[list[str]]:
    """Return a row per pattern: measured by the pre-pass, and by generation."""
    record = json.loads((out / "rpam.json").read_text(encoding="utf-8"))
    measured = record["operating_point"]["held_out"]["patterns"]
    same = generated(out, held_out(out, calibration))
    new: dict[str, float] = {}
    if others is not None:
        seen = {query.prompt for query in read_calibration(calibration).queries}
        unseen = [q for q in read_calibration(others).queries if q.prompt not in seen]
        new = generated(out, unseen[:most])
    return [
        [
            out.name,
            pattern,
            str(figures["queries"]),
            f"{100 * figures['routed']:.1f}",
            f"{100 * same[pattern]:.1f}",
            f"{100 * new[pattern]:.1f}" if pattern in new else "-",
        ]
        for pattern, figures in measured.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("merges", nargs="+", type=Path, metavar="OUT CALIBRATION")
    parser.add_argument("--others", nargs="*", type=Path, default=[])
    parser.add_argument("--most", type=int, default=1000)
    args = parser.parse_args()
    pairs = list(zip(args.merges[::2], args.merges[1::2], strict=True))
    others = [*args.others, *[None] * (len(pairs) - len(args.others))]
    rows: list[list[str]] = []
    for (out, calibration), more in zip(pairs, others, strict=True):
        rows += rows_of(out, calibration, more, args.most)
    head = ["merge", "pattern", "held out", "by the pre-pass, %"]
    head += ["generating, the same, %", "generating, unseen, %"]
    print(describe())
    print(table(head, rows))


if __name__ == "__main__":
    main()
