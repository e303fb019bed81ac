"""From two models to a merged one by `transformers serve`, and the same in the process.

    python benchmarks/studies/served.py [--serve PATH] [--queries N] [--samples K] ...

Takes the quickstart's pair as it is, and with its tokens and template renamed to
ChatML's form, and with each: samples both models, labels, merges, samples the merged
model. Once every model is asked over HTTP, once in this process. Prints accuracy with
its standard error, mean tokens, the share that thinks, and every note.

transformers serve samples only where generation_config.json says so: the copies do.
The last line shows what is said of one that does not.

`--serve` is the command `transformers` of an environment with `transformers[serving]`.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import yaml

from rpam_mergekit import LabelRequest, SampleRequest, label, sample
from rpam_mergekit.errors import RpamError

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "examples" / "quickstart"
CHATML = {
    "<|user|>": "<|im_start|>user\n",
    "<|assistant|>": "<|im_start|>assistant\n",
    "<|end|>": "<|im_end|>",
}
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COMMANDS = Path(sys.executable).parent
PORT = 8431


def copied(name: str, folder: Path, chatml: bool, samples: bool = True) -> Path:
    """Return a copy of one of the quickstart's models, which a server samples from."""
    shutil.copytree(QUICKSTART / name, folder, dirs_exist_ok=True)
    path = folder / "generation_config.json"
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "do_sample": samples}))
    if chatml:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            text = (folder / file).read_text()
            for old, new in CHATML.items():
                text = text.replace(json.dumps(old), json.dumps(new))
            (folder / file).write_text(text)
        (folder / "chat_template.jinja").write_text(CHATML_TEMPLATE)
    return folder


@contextmanager
def served(command: str, model: Path):
    """Serve a model; the value is the URL."""
    arguments = ["serve", str(model), "--port", str(PORT), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [command, *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(600):
            time.sleep(0.5)
            assert process.poll() is None, "the server has ended"
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health")
                break
            except OSError:
                continue
        yield f"http://127.0.0.1:{PORT}/v1"
    finally:
        process.terminate()
        process.wait()


class Study:
    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.options = {
            "samples": args.samples,
            "temperature": 1.0,
            "top_p": 1.0,
            "max_tokens": 72,
            "graders": 1,
        }

    def sampled(self, model: Path, data: Path, out: Path, over_http: bool) -> None:
        """Sample a model into `out`, and print what came of it."""
        notes: list[str] = []
        options = {**self.options, "model": str(model), "dataset": str(data)}
        start = time.monotonic()
        if over_http:
            with served(self.args.serve, model) as url:
                request = SampleRequest(
                    out=out, base_url=(url,), concurrency=2, **options
                )
                tally = sample(request, notes.append)
        else:
            request = SampleRequest(out=out, device="cpu", dtype="float32", **options)
            tally = sample(request, notes.append)
        seconds = time.monotonic() - start
        error = math.sqrt(tally.accuracy * (1 - tally.accuracy) / tally.responses)
        thinks = 1 - tally.thinking["none"] / tally.responses
        print(
            f"| {out.stem} | {tally.accuracy:.1%} ± {error:.1%} | "
            f"{tally.mean_tokens:.1f} | {thinks:.1%} | {seconds:.0f} s |",
            *notes,
            sep="\n    ",
            flush=True,
        )

    def run(self, folder: Path, chatml: bool, over_http: bool) -> None:
        """Sample, label, merge and sample again; the merged model also here."""
        kind = "chatml" if chatml else "quickstart"
        way = "served" if over_http else "here"
        folder = folder / kind / way
        folder.mkdir(parents=True)
        train, test = folder / "train.jsonl", folder / "test.jsonl"
        for path, split in ((train, "train"), (test, "test")):
            script = [sys.executable, str(QUICKSTART / "questions.py"), str(path)]
            script += ["--split", split, "--queries", str(self.args.queries)]
            subprocess.run(script, check=True, stdout=subprocess.DEVNULL)
        files = {}
        for name in ("long", "short"):
            model = copied(name, folder / name, chatml)
            files[name] = folder / f"{kind}, {way}: {name}.jsonl"
            self.sampled(model, train, files[name], over_http)
        calibration, out = folder / "calibration.jsonl", folder / "out"
        labels = label(LabelRequest(**files, out=calibration, graders=1))
        counts = {kind: len(labels.of(kind)) for kind in ("long", "short")}
        print(f"labels: {counts}", flush=True)
        config = {
            "merge_method": "rpam",
            "base_model": str(folder / "long"),
            "models": [{"model": str(folder / "short")}],
            "parameters": {
                "calibration": str(calibration),
                "held_out": 0,
                "steps": self.args.steps,
            },
            "dtype": "float32",
            "out_dtype": "bfloat16",
        }
        (folder / "rpam.yml").write_text(yaml.safe_dump(config))
        command = [COMMANDS / "mergekit-yaml", folder / "rpam.yml", out, "--quiet"]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        shutil.copy(folder / "long" / "generation_config.json", out)
        self.sampled(out, test, folder / f"{kind}, {way}: merged.jsonl", over_http)
        if over_http:
            path = folder / f"{kind}, merged by served, sampled here.jsonl"
            self.sampled(out, test, path, False)

    def greedy(self, folder: Path) -> None:
        """Show what is said of a server that ignores the temperature."""
        folder.mkdir()
        data = folder / "few.jsonl"
        script = [sys.executable, str(QUICKSTART / "questions.py"), str(data)]
        subprocess.run([*script, "--queries", "16"], check=True)
        model = copied("short", folder / "model", False, samples=False)
        self.sampled(model, data, folder / "do_sample false.jsonl", True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--serve", default="transformers", help="its path")
    parser.add_argument("--queries", type=int, default=160)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=800, help="of the pre-pass")
    parser.add_argument("--out", type=Path, default=Path("build/served"))
    args = parser.parse_args()
    if args.out.exists():
        raise SystemExit(f"{args.out} is there already: delete it")
    study = Study(args)
    print("| | accuracy | tokens | thinks | time |\n|---|---|---|---|---|")
    try:
        for chatml in (True, False):
            for over_http in (True, False):
                study.run(args.out, chatml, over_http)
        study.greedy(args.out / "greedy")
    except RpamError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
