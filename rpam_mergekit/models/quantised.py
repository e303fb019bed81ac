"""Quantised checkpoints: recognised by config, dtypes and names, and refused.

A merge adds weights. A quantised weight is a number of a few bits beside scales in
other tensors: mergekit would add the numbers, drop the scales, and end with status 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit.common import ModelReference
from transformers import PretrainedConfig

from rpam_mergekit.models.headers import Header, Tensor, read_header

PAGE = "docs/quantised.md"
CLAIMS = ("quantization_config", "compression_config", "quantization")


# transformers 5 would otherwise quantise again what it has dequantised.
SAVED = "save_pretrained(NEW, save_original_format=False)"
LOADED = f"in transformers, from_pretrained(OLD), dequantize(), {SAVED}"


def _loaded_with(config: str, more: str = "") -> str:
    how = f"{more}quantization_config={config}(dequantize=True)"
    return f"in transformers, from_pretrained(OLD, {how}), {SAVED}"


GPTQMODEL = "gptqmodel.utils.model_dequant.dequantize_model"
# The formats by the `quant_method` of configs, with - for _: the name of each, and how
# plain weights are made of it; '' where no common tool does.
FORMATS = {
    "aqlm": ("AQLM", ""),
    "auto-round": ("AutoRound", GPTQMODEL),
    "awq": ("AWQ", GPTQMODEL),
    "bitnet": ("BitNet", ""),
    "bitsandbytes": ("bitsandbytes", LOADED),
    "compressed-tensors": (
        "compressed-tensors",
        _loaded_with("CompressedTensorsConfig"),
    ),
    "eetq": ("EETQ", ""),
    "exl2": ("EXL2", ""),
    "exl3": ("EXL3", ""),
    "fbgemm-fp8": ("FP8 of FBGEMM", ""),
    "fp8": ("FP8", _loaded_with("FineGrainedFP8Config")),
    "gguf": ("GGUF", _loaded_with("GgufConfig")),
    "gptq": ("GPTQ", GPTQMODEL),
    "higgs": ("HIGGS", LOADED),
    "hqq": ("HQQ", ""),
    "mlx": ("MLX", "mlx_lm.convert --dequantize"),
    "modelopt": ("ModelOpt", GPTQMODEL),
    "mxfp4": ("MXFP4", _loaded_with("Mxfp4Config")),
    "mxfp8": ("MXFP8", _loaded_with("FineGrainedFP8Config")),
    "quanto": ("Quanto", ""),
    "quark": ("Quark", ""),
    "quip": ("QuIP#", ""),
    "spqr": ("SpQR", ""),
    "torchao": ("torchao", ""),
    "vptq": ("VPTQ", ""),
}
# The formats by the tensors' names, of which all patterns must be found; the first
# that fits.
NAMES = (
    ("bitsandbytes", (r"\.quant_state\.bitsandbytes__",)),
    ("bitsandbytes", (r"\.(nested_)?absmax$",)),
    ("bitsandbytes", (r"\.SCB$",)),
    ("gptq", (r"\.qweight$", r"\.g_idx$")),
    ("awq", (r"\.qweight$", r"\.qzeros$")),
    ("gptq", (r"\.qweight$",)),
    ("compressed-tensors", (r"\.weight_packed$",)),
    ("compressed-tensors", (r"\.bitmask$", r"\.compressed$")),
    ("mxfp4", (r"[._]blocks$", r"[._]scales$")),
    ("modelopt", (r"\.weight_scale_2$",)),
    ("hqq", (r"\.W_q$",)),
    ("quanto", (r"\._data$", r"\._scale$")),
    ("torchao", (r"_weight_qdata$",)),
    ("exl2", (r"\.q_weight$", r"\.q_scale$")),
    ("exl3", (r"\.trellis$",)),
    ("aqlm", (r"\.codebooks$", r"\.codes$")),
    ("quip", (r"\.Qidxs$",)),
    ("vptq", (r"\.centroids", r"\.indices$")),
    ("mlx", (r"\.scales$", r"\.biases$")),
)
# Beside a weight they say that it is to be multiplied by them, whatever its dtype.
SCALES = re.compile(r"[._](weight_scale(_inv|_2)?|weight_global_scale|SCB|absmax)$")
# Tensors of small whole numbers that plain checkpoints have.
MASKS = ("bias", "masked_bias", "mask", "attn_mask", "causal_mask")
SMALL = ("I8", "U8", "I16", "U16", "I32", "U32")
# Where the name of the quantised model goes on behind that of the plain one.
SUFFIX = re.compile(
    r"[-_.](unsloth-bnb|bnb|fp8|nvfp4|mxfp[48]|gptq|awq|gguf|hqq|quanto|torchao|exl[23]"
    r"|aqlm|vptq|mlx|autoround|quantized|qat|ao|dynamic|int[2348]|[2-8]bits?|w\d+a\d+"
    r"|q[2-8](_\w+)?)(?=$|[-_.])",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Evidence:
    """What says that a checkpoint is quantised: of which method, None if unknown."""

    method: str | None
    text: str


def quantised_finding(
    model: ModelReference, config: PretrainedConfig, header: Header | None
) -> str | None:
    """Return why a model cannot be merged as it is quantised, None if it is not.

    header: None or unknown where the tensors cannot be read; the config decides then.
    """
    claim = _claim(config)
    known = header is not None and not header.unknown
    seen = _seen(header) if header is not None else None
    if known and seen is None:
        return None if claim is None else _trap(model, config, claim)
    found = [evidence for evidence in (claim, seen) if evidence is not None]
    if not found:
        return None
    method = next((one.method for one in found if one.method), "")
    key = str(method).lower().replace("_", "-").rpartition("/")[2]
    name, way = FORMATS.get(key, (method or "in an unknown format", ""))
    return (
        f"{model}: its weights are quantised: {name} "
        f"({'; '.join(one.text for one in found)}). A merge would add the packed "
        f"numbers and drop their scales. {advice(model, way)}"
    )


def claim_note(model: ModelReference, config: PretrainedConfig) -> str | None:
    """Return a note on a model that is not quantised, but whose config says so."""
    claim = _claim(config)
    if claim is None:
        return None
    return (
        f"{model}: {claim.text}, but its tensors are plain, as of a model that was "
        "dequantised. They are merged as they are; the merged model's config.json "
        "will not say that it is quantised"
    )


def gguf_finding(model: ModelReference) -> str | None:
    """Return a finding on a folder or file of GGUF, which mergekit cannot read."""
    path = Path(model.model.path)
    files = [path] if path.suffix.lower() == ".gguf" else sorted(path.glob("*.gguf"))
    if not files or not path.exists() or any(path.glob("*.safetensors")):
        return None
    way = _loaded_with("GgufConfig", f"gguf_file='{files[0].name}', ")
    return (
        f"{model}: its weights are in GGUF, the format of llama.cpp ({files[0].name}), "
        f"which mergekit cannot read. {advice(model, way)}"
    )


def advice(model: ModelReference, way: str) -> str:
    """Return what to do about a quantised model, `way` being how to dequantise it."""
    plain = plain_name(model.model.path)
    named = f" (by its name, {plain})" if plain else ""
    return (
        f"Name the unquantised model that it was made from{named}, or dequantise it: "
        f"{way or 'by the library that made it'}. {PAGE} has more."
    )


def plain_name(name: str) -> str | None:
    """Return the name of the model that one was quantised from, None if unknown."""
    folder, slash, last = name.rstrip("/").rpartition("/")
    cut = SUFFIX.search(last)
    return f"{folder}{slash}{last[: cut.start()]}" if cut and cut.start() else None


def quantised_among(names: Iterable[str]) -> list[str]:
    """Return a finding for every quantised model of these names.

    What cannot be read is passed over: the merge says what is wrong with it.
    """
    findings = []
    for name in names:
        try:
            model = ModelReference.parse(name)
            config, header = model.config(), read_header(model)
        except Exception:  # of mergekit, transformers or huggingface_hub
            continue
        findings.append(quantised_finding(model, config, header))
    return [finding for finding in findings if finding is not None]


def without_claim(config: PretrainedConfig) -> PretrainedConfig:
    """Return a config that does not say that the model is quantised."""
    content = config.to_dict()
    if not _drop(content):
        return config
    return type(config).from_dict(content)


def drop_claim(folder: Path) -> None:
    """Let a merged model's config.json not say that it is quantised."""
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    if _drop(content):
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _trap(
    model: ModelReference, config: PretrainedConfig, claim: Evidence
) -> str | None:
    """Return a finding where the config of a plain model would yet be heeded."""
    if model.lora is not None:
        return (
            f"{model}: {claim.text}, but its tensors are plain. transformers would "
            "quantise them before the adapter is merged into them. Delete that key "
            "from its config.json."
        )
    if any(one.get("quantization_mode") == "online" for _, one in _claims(config)):
        return (
            f"{model}: {claim.text}: its code quantises the weights in every call, "
            "which the pre-pass does not. Such models cannot be merged."
        )
    return None


def _claim(config: PretrainedConfig) -> Evidence | None:
    """Return what a config says of its weights, wherever it says it."""
    for place, found in _claims(config):
        method = _method(place, found)
        said = f"{place}.quant_method is '{method}'" if method else f"it has {place}"
        return Evidence(method, f"config.json: {said}")
    return None


def _method(place: str, found: Mapping[str, Any]) -> str | None:
    """Return the method of a quantisation config, which older ones do not name."""
    method = found.get("quant_method")
    if method:
        return str(getattr(method, "value", method))
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return "bitsandbytes"
    if "config_groups" in found:
        return "compressed-tensors"
    if "quant_algo" in found:
        return "modelopt"
    return "mlx" if place.endswith("quantization") else None


def _claims(config: PretrainedConfig) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from _inside(config.to_dict(), "")


def _inside(
    content: Mapping[str, Any], where: str
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            if key in CLAIMS:
                yield f"{where}{key}", value
            else:
                yield from _inside(value, f"{where}{key}.")


def _drop(content: dict[str, Any]) -> bool:
    """Take out of a config what says that it is quantised; tell whether anything."""
    dropped = False
    for key, value in list(content.items()):
        if isinstance(value, Mapping) and key in CLAIMS:
            del content[key]
            dropped = True
        elif isinstance(value, dict):
            dropped |= _drop(value)
    return dropped


def _seen(header: Header) -> Evidence | None:
    """Return what names and dtypes say; the tensors whose dtype tells come first."""
    tensors = header.tensors
    packed = [name for name, tensor in tensors.items() if _is_packed(name, tensor)]
    scales = [name for name in tensors if SCALES.search(name)]
    if not packed and not scales:
        return None
    name = min(packed or scales)
    others = len(packed or scales) - 1
    text = f"{header.files.get(name, 'its weights')}: {name} is {tensors[name].dtype}"
    more = f", and {others} more such tensors" if others else ""
    return Evidence(_by_names(tensors), text + more)


def _is_packed(name: str, tensor: Tensor) -> bool:
    dtype, last = tensor.dtype, name.rpartition(".")[2]
    if dtype.startswith(("F4", "F6", "F8")):
        return True
    return dtype in SMALL and len(tensor.shape) > 1 and last not in MASKS


def _by_names(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the method that a checkpoint's names and dtypes tell."""
    for method, patterns in NAMES:
        if all(any(re.search(p, name) for name in tensors) for p in patterns):
            return method
    if any(tensor.dtype.startswith("F8_E") for tensor in tensors.values()):
        return "fp8"
    return None
