"""What a config without problems asks for, and what its merge will take, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mergekit.options import MergeOptions

from rpam_mergekit.chat.prompts import Batch, make_batches
from rpam_mergekit.checks.estimate import (
    Work,
    count_work,
    measure,
    peak_bytes,
)
from rpam_mergekit.checks.examine import Examination
from rpam_mergekit.checks.examine_document import writes_to
from rpam_mergekit.checks.models import Replayable
from rpam_mergekit.checks.request import MergeRequest
from rpam_mergekit.models.headers import BITS, Header, Tensor, promoted
from rpam_mergekit.prepass.memory import (
    activation_bytes,
    check_disk,
    choose_store,
    coefficient_bytes,
    free_host_memory,
    readable,
)
from rpam_mergekit.replay.precision import precision_on
from rpam_mergekit.routing.figures import SCALES
from rpam_mergekit.routing.holdout import split_queries
from rpam_mergekit.settings import PRESETS, RpamSettings
from rpam_mergekit.text import aligned

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
WORDS = {short: long for long, short in DTYPES.items()}


def summary_lines(examination: Examination) -> Iterator[str]:
    """Yield what a config asks for, one thing a line."""
    request, document = examination.request, examination.document
    if request is None or document is None or document.config is None:
        return
    headers = examination.matched.headers
    rows = [
        [f"{role}, {pattern}", str(model), *_described(headers.get(model))]
        for role, pattern, model in zip(
            ("base", *["other"] * len(request.models.others)),
            request.models.patterns,
            request.models.every,
            strict=True,
        )
    ]
    yield from aligned(rows, len(rows[0]))
    if examination.replayable is not None:
        decoder = examination.replayable.decoder
        yield f"{type(decoder.model).__name__}, {len(decoder.layers)} decoder layers"
    config = document.config
    dtype = config.dtype or "the checkpoints' dtype"
    yield f"computed in float32 from {dtype}, written in {config.out_dtype or dtype}"
    if examination.queries:
        patterns = Counter(query.pattern for query in examination.queries)
        counts = ", ".join(f"{n} {pattern}" for pattern, n in patterns.items())
        tokens = sum(len(query.ids) for query in examination.queries)
        yield f"{counts} queries, {tokens} tokens"
    changed = ", ".join(_changed(request.settings))
    yield f"settings other than the defaults: {changed or 'none'}"


def _described(header: Header | None) -> list[str]:
    if header is None or header.unknown:
        return ["", "", ""]
    numbers = sum(torch.Size(t.shape).numel() for t in header.tensors.values())
    dtypes = Counter(tensor.dtype for tensor in header.tensors.values())
    named = "/".join(WORDS.get(d, d) for d, _ in dtypes.most_common())
    where = "to download" if header.to_download else "on this disk"
    return [
        f"{_short(numbers)} parameters",
        named,
        f"{readable(header.bytes)} {where}",
    ]


def _short(number: float) -> str:
    for unit in ("", "k", "M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}G"


def _changed(settings: RpamSettings) -> Iterator[str]:
    fields, preset = RpamSettings.model_fields, PRESETS[settings.preset]
    for name, value in settings.model_dump().items():
        if name in ("calibration", "coefficients"):
            continue
        if value != preset.get(name, fields[name].default):
            yield f"{name} {value}"


def estimate_lines(examination: Examination, options: MergeOptions) -> Iterator[str]:
    """Yield what the merge will take, measuring this device for a second.

    Raises `RpamError` if the disk is too small. Adds a note if memory seems to be.
    """
    request, seen = examination.request, examination.replayable
    document = examination.document
    if request is None or seen is None or document is None:
        return
    headers = examination.matched.headers
    download = sum(h.bytes for h in headers.values() if h.to_download)
    folder, others = writes_to(request), len(request.models.others)
    kept = coefficient_bytes(seen.decoder, request.settings, others)
    rows = [["download", readable(download)]] if download else []
    model = _model_bytes(seen, headers, document.config)
    rows.append(["disk, merged model", readable(model)])
    if examination.queries:
        rows.append(["disk, coefficients", f"{readable(kept)}, twice while it runs"])
        check_disk(folder, 2 * kept, "the coefficients, by layer and as a whole,")
        rows += _of_prepass(examination, request, seen, folder, options)
    yield "estimate:"
    yield from (f"  {line}" for line in aligned(rows, len(rows[0])))


def _of_prepass(
    examination: Examination,
    request: MergeRequest,
    seen: Replayable,
    folder: Path,
    options: MergeOptions,
) -> Iterator[list[str]]:
    settings, experts = request.settings, len(request.models.every)
    solving, held_out = split_queries(
        examination.queries, settings.held_out, settings.seed
    )
    batches = make_batches(solving, settings)
    probes = make_batches(held_out, settings) * 2  # as many that are solved on
    width = seen.decoder.model.config.get_text_config().hidden_size
    device = torch.device(options.device or "cpu")
    size = activation_bytes(batches, width, experts)
    size += activation_bytes(probes, width, experts + len(SCALES))
    place = choose_store(settings.activations, size, device, folder).place
    shown = {"device": device.type, "host": "host memory", "disk": "disk"}[place]
    yield ["activations", f"{readable(size)} on {shown}"]
    own = dict(seen.decoder.model.named_parameters(remove_duplicate=False))
    outside = [
        own[name].shape
        for info in seen.layout.outside
        for name in own
        if name == info.name or name.endswith(f".{info.name}")
    ]
    peak = peak_bytes(seen.decoder, outside, batches, settings, experts)
    on_device = place == "device" or (place == "host" and device.type == "cpu")
    peak += size if on_device else 0
    yield ["peak memory", f"about {readable(peak)} on {device.type} besides libraries"]
    free = (
        torch.cuda.mem_get_info(device)[0]
        if device.type == "cuda"
        else free_host_memory()
    )
    if peak > free:
        examination.notes.append(
            f"the pre-pass needs about {readable(peak)} of memory, {readable(free)} "
            "are free: lower parameters.max_tokens or parameters.batch_tokens, or set "
            "parameters.activations to disk"
        )
    work = count_work(seen.decoder, batches, settings, experts, probes)
    yield ["pre-pass", _time(seen, batches, settings, work, device)]


def _time(
    seen: Replayable,
    batches: Sequence[Batch],
    settings: RpamSettings,
    work: Work,
    device: torch.device,
) -> str:
    shapes = [p.shape for p in seen.decoder.layers[0].parameters() if p.dim() > 1]
    rows, columns = max(shapes, key=lambda shape: shape.numel())[-2:]
    tokens = max(batch.input_ids.numel() for batch in batches)
    dtype = precision_on(settings.compute_dtype, device)
    rates = measure(device, tokens, columns, rows, dtype)
    giga = rates.operations / 1e9
    return (
        f"about {_duration(rates.seconds(work))} at {giga:.0f} GFLOP/s in {dtype}, "
        "measured here"
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def _model_bytes(seen: Replayable, headers: Mapping[Any, Header], config: Any) -> int:
    """Return what the merged model's weights take on disk."""
    base = next(iter(headers.values()))
    dtype = DTYPES.get(config.out_dtype or config.dtype or "")
    known = [header.tensors for header in headers.values()]
    own = dict(seen.decoder.model.named_parameters(remove_duplicate=False))
    total = 0
    for info in seen.layout.weights:
        found = base.tensors.get(info.name)
        if found is None:
            shapes = [p.shape for n, p in own.items() if n.endswith(info.name)]
            found = Tensor(tuple(shapes[0]) if shapes else (), "F32")
        there = [tensors[info.name].dtype for tensors in known if info.name in tensors]
        bits = BITS.get(dtype or promoted(there or [found.dtype]), 32)
        total += torch.Size(found.shape).numel() * bits // 8
    return total
