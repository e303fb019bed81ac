"""Is a merged model whole: the tensors its own code needs against those written.

mergekit leaves out, with status 0, what its definition of an architecture does not
list or takes for optional, such as the routed experts of deepseek_v3.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from rpam_mergekit.errors import RpamError
from rpam_mergekit.models.quantised import without_claim
from rpam_mergekit.text import listed

WEIGHT_FILES = (
    "*.safetensors",
    "*.bin",
    "*.safetensors.index.json",
    "*.bin.index.json",
)


def check_complete(
    out_path: str | Path, base: ModelReference, trust_remote_code: bool = False
) -> None:
    """Raise `RpamError` if the model in `out_path` lacks tensors that its base has.

    Nothing is read but names and shapes. The weight files of a model that is not whole
    are deleted: it would load, with random weights in the place of what it lacks.
    """
    folder = Path(out_path)
    lacking = _lacking(folder, trust_remote_code)
    if lacking:
        base_folder = Path(LoaderCache().get(base).index.base_path)
        lacking -= _lacking(base_folder, trust_remote_code)
    if not lacking:
        return
    for pattern in WEIGHT_FILES:
        for path in folder.glob(pattern):
            path.unlink()
    model_type = base.config(trust_remote_code=trust_remote_code).model_type
    raise RpamError(
        f"{folder}: the merged model would lack {len(lacking)} tensors that its code "
        f"needs and {base} has: {listed(sorted(lacking))}. mergekit's "
        f"definition of the architecture '{model_type}' leaves them out. "
        "The weight files were deleted; the coefficients are kept. Such models cannot "
        "be merged by this version of mergekit."
    )


def _lacking(folder: Path, trust_remote_code: bool) -> set[str]:
    """Return the parameters that a checkpoint lacks or has in another shape."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with _silent_transformers():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=without_claim(config),
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
        )
    _, info = loaded
    return {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """Keep transformers from reporting what `check_complete` reports."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
