"""Is the sampling client, or grading, ever the bottleneck?

    python benchmarks/performance/sampling_throughput.py [--queries 20000]

Runs `mergekit-rpam sample` against a stub server on loopback that answers at once, and
records requests per second and the client's resident memory. Then grades through the
same code and worker pool, as ratios to that: real responses (those of
../shared/data/outputs/aime24.jsonl, or --responses in the minimal format; answers of
AIME are whole numbers), and MATH-500's answers against each other's golds, which
mostly need computer algebra.
"""

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from _machine import MIB, command_line

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
REAL = DATA / "outputs" / "aime24.jsonl"
MATH500 = DATA / "benchmarks" / "math500.jsonl"


class Stub:
    """The stub server in a process of its own; a context manager."""

    def __enter__(self) -> "Stub":
        script = ROOT / "tests" / "helpers" / "openai_server.py"
        self.process = subprocess.Popen(
            [sys.executable, str(script), "--model", "stub", "--stub", "7"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        port = self.process.stdout.readline().split()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait(10)


def client(url: str, folder: Path, queries: int, samples: int) -> dict:
    """Run the client; return requests per second and resident memory over time."""
    data = folder / f"{queries}.jsonl"
    with open(data, "w") as file:
        for n in range(queries):
            file.write(json.dumps({"question": f"{n} plus 7?", "answer": n + 7}) + "\n")
    out = folder / f"{queries}.samples.jsonl"
    command = [
        str(Path(sys.executable).parent / "mergekit-rpam"),
        *("sample", "stub", "--base-url", url, "--dataset", str(data)),
        *("-k", str(samples), "--out", str(out)),
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    memory: list[tuple[float, int]] = []  # share of the queries done, bytes

    def watch() -> None:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                done = 0
                if out.exists():
                    with open(out, "rb") as file:
                        done = sum(1 for _ in file)
                memory.append((done / queries, watched.memory_info().rss))
            except psutil.Error:
                return
            time.sleep(0.25)

    thread = threading.Thread(target=watch)
    thread.start()
    process.wait()
    thread.join()
    lines = out.read_text().splitlines()
    if len(lines) != queries + 2 or "finished" not in lines[-1]:
        raise SystemExit(f"{out}: {len(lines)} lines for {queries} queries")
    steady = [(t, m) for t, m in memory if 0 < t < 1]
    return {"memory": steady, "file_bytes": out.stat().st_size}


def timed(url: str, folder: Path, queries: int, samples: int) -> tuple[float, dict]:
    start = time.perf_counter()
    figures = client(url, folder, queries, samples)
    return time.perf_counter() - start, figures


def real_responses(path: Path) -> list[tuple]:
    """Return (gold, texts) of every query of a file of real responses."""
    from rpam_mergekit.grading.answers import Gold

    batches = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        texts = row.get("code") or row["responses"]
        batches.append((Gold(values=(str(row.get("gt", row.get("answer"))),)), texts))
    return batches


def swapped_golds(path: Path) -> list[tuple]:
    """Return every gold of MATH-500 with the next one's answer: algebra, mostly."""
    from rpam_mergekit.questions.load import load_questions
    from rpam_mergekit.questions.rows import Dataset

    loaded = load_questions(Dataset(str(path), preset="math500"))
    golds = [question.gold for question in loaded.questions]
    others = [*golds[1:], golds[0]]
    return [
        (gold, [f"It is $\\boxed{{{other.values[0]}}}$."])
        for gold, other in zip(golds, others, strict=True)
    ]


def grading_rates(batches: list[tuple], passes: int) -> list[float]:
    """Return grades per second, once per pass."""
    from rpam_mergekit.grading.responses import Markers
    from rpam_mergekit.grading.workers import Grader

    async def grade_all(grader) -> int:
        done = await asyncio.gather(
            *(
                grader.grade(gold, texts, [None] * len(texts), Markers())
                for gold, texts in batches
            )
        )
        return sum(len(verdicts) for verdicts in done)

    rates = []
    with Grader() as grader:
        asyncio.run(grade_all(grader))  # workers start
        for _ in range(passes):
            start = time.perf_counter()
            count = asyncio.run(grade_all(grader))
            rates.append(count / (time.perf_counter() - start))
    return rates


def main() -> None:
    args = command_line(__doc__, queries=20000, samples=1, responses=Path, passes=7)
    with tempfile.TemporaryDirectory() as name, Stub() as stub:
        folder = Path(name)
        starting, _ = timed(stub.url, folder, 10, args.samples)
        seconds, figures = timed(stub.url, folder, args.queries, args.samples)
    requests = args.queries * args.samples
    rate = requests / (seconds - starting)
    print(f"{os.cpu_count()} cores; start-up {starting:.1f} s")
    print(f"requests        {requests} in {seconds:.1f} s: {rate:.0f} a second")
    early = [m for t, m in figures["memory"] if 0.1 <= t < 0.3]
    late = [m for t, m in figures["memory"] if t >= 0.8]
    if early and late:
        a, b = statistics.median(early) / MIB, statistics.median(late) / MIB
        print(
            f"client memory   {a:.0f} MiB at 10 to 30 % of the queries, {b:.0f} MiB "
            "from 80 % on"
        )
    for name, path, read in (
        ("real responses", args.responses or REAL, real_responses),
        ("MATH-500 answers", MATH500, swapped_golds),
    ):
        if not path.exists():
            print(f"grading         {name}: not measured, no {path}")
            continue
        rates = grading_rates(read(path), args.passes)
        middle = statistics.median(rates)
        print(
            f"grading         {middle:.0f} {name} a second (median of {len(rates)}; "
            f"{min(rates):.0f} to {max(rates):.0f}), {middle / rate:.1f} times the "
            "requests"
        )


if __name__ == "__main__":
    main()
