"""Responses from a model in this process, by transformers; on any device.

For small models and machines without a server; an engine (vLLM, SGLang) is many times
faster. Prompts of similar length share a batch, longest first, so that a batch that
does not fit in memory shows early; it is then split in halves.

Every response draws from a random generator of its own, whatever shares its batch. The
batches are planned from all queries, also when a run goes on: the same command gives
the same bytes on the same machine, killed or not. Another batch size (or a batch that
had to be split) computes with other roundings and may change a response.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelPath, ModelReference
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rpam_mergekit.chat.rendering import prompt_ids
from rpam_mergekit.errors import RpamError, first_line
from rpam_mergekit.grading.responses import Markers
from rpam_mergekit.questions.load import Question
from rpam_mergekit.sampling.run import Generated, SamplingSettings


@dataclass(frozen=True)
class ModelOptions:
    """How to load the model, and how many responses to generate at once."""

    revision: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch_size: int = 32
    trust_remote_code: bool = False


class SeededSampling(LogitsProcessor):
    """Turns arg-max decoding into sampling, each row by its own generator.

    Adds Gumbel noise to the warped logits: the arg-max of their sum is distributed as
    the softmax of the logits.
    """

    def __init__(
        self, settings: SamplingSettings, seeds: Sequence[int], device: torch.device
    ) -> None:
        self._generators = [
            torch.Generator(device=device).manual_seed(seed) for seed in seeds
        ]
        self._warpers = LogitsProcessorList()
        if settings.temperature != 1:
            self._warpers.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k is not None:
            self._warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            self._warpers.append(TopPLogitsWarper(settings.top_p))

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor
    ) -> torch.FloatTensor:
        """Return the noisy logits (rows, vocabulary), float32."""
        warped = self._warpers(input_ids, scores.float())
        noise = torch.stack(
            [
                torch.empty(warped.shape[1], device=warped.device)
                .exponential_(generator=generator)
                .clamp_min_(1e-30)
                for generator in self._generators
            ]
        )
        return warped - noise.log()  # type: ignore[return-value]


class _Stop(StoppingCriteria):
    """Ends a generation whose run was stopped; nothing of it is used."""

    def __init__(self, stopping: threading.Event) -> None:
        self._stopping = stopping

    def __call__(
        self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **_: Any
    ) -> torch.BoolTensor:
        stop = self._stopping.is_set()
        return torch.full((len(input_ids),), stop, device=input_ids.device)  # type: ignore[return-value]


class TransformersBackend:
    """The backend of a model in this process; see `run.Backend`.

    Raises `RpamError` if the model cannot be loaded.
    """

    def __init__(
        self,
        model: str,
        settings: SamplingSettings,
        options: ModelOptions,
        markers: Markers,
        opening: str | None = "",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.settings = settings
        self.options = options
        self.markers, self.opening = markers, opening
        self.notes: dict[str, None] = {}
        self.retries = 0
        self.device = _device(options.device)
        self.tokenizer = (
            read_tokenizer(model, options) if tokenizer is None else tokenizer
        )
        self.model = _read_model(model, options)
        if options.device != "auto-map":
            self.model.to(self.device)
        self._ends = self._end_tokens()
        self._stopping = threading.Event()

    async def sample(
        self, questions: Sequence[Question], done: set[int]
    ) -> AsyncGenerator[tuple[Question, list[Generated]], None]:
        prompts = [prompt_ids(q.messages, self.tokenizer) for q in questions]
        self._check_lengths(questions, prompts)
        order = sorted(range(len(questions)), key=lambda i: (-len(prompts[i]), i))
        rows = [(i, n) for i in order for n in range(self.settings.samples)]
        try:
            async for finished in self._batches(questions, prompts, rows, done):
                yield finished
        finally:
            self._stopping.set()  # a batch under way ends with its next token

    async def _batches(
        self,
        questions: Sequence[Question],
        prompts: Sequence[Sequence[int]],
        rows: Sequence[tuple[int, int]],
        done: set[int],
    ) -> AsyncGenerator[tuple[Question, list[Generated]], None]:
        collected: dict[int, list[Generated]] = {}
        size = self.options.batch_size
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            if all(questions[i].index in done for i, _ in batch):
                continue
            seeds = [self.settings.seed_of(questions[i].index, n) for i, n in batch]
            generated = await asyncio.to_thread(
                self._generate, [prompts[i] for i, _ in batch], seeds
            )
            for (i, _), response in zip(batch, generated, strict=True):
                found = collected.setdefault(i, [])
                found.append(response)
                if len(found) == self.settings.samples:
                    del collected[i]
                    if questions[i].index not in done:
                        yield questions[i], found

    def _generate(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[Generated]:
        try:
            return self._batch(prompts, seeds)
        except torch.OutOfMemoryError:
            if len(prompts) == 1:
                raise RpamError(
                    f"--max-tokens: one response of {self.settings.max_tokens} tokens "
                    f"does not fit in the memory of {self.device}. Lower it, or use a "
                    "server (--base-url)."
                ) from None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        half = len(prompts) // 2
        self.notes[
            f"a batch of {len(prompts)} responses did not fit in memory and was split: "
            f"--batch-size {half} is safe"
        ] = None
        return self._generate(prompts[:half], seeds[:half]) + self._generate(
            prompts[half:], seeds[half:]
        )

    @torch.inference_mode()
    def _batch(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]
    ) -> list[Generated]:
        width = max(len(prompt) for prompt in prompts)
        pad = self._pad_token()
        ids = torch.full((len(prompts), width), pad)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for row, prompt in enumerate(prompts):  # on the left: responses start together
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.model.device
        processors = LogitsProcessorList()
        if self.settings.temperature > 0:
            processors.append(SeededSampling(self.settings, seeds, device))
        output = self.model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_Stop(self._stopping)]),
            generation_config=GenerationConfig(
                do_sample=False,
                max_new_tokens=self.settings.max_tokens,
                eos_token_id=self._ends or None,
                pad_token_id=pad,
            ),
        )[:, width:]
        return [
            self._response(row, seed)
            for row, seed in zip(output.tolist(), seeds, strict=True)
        ]

    def _response(self, tokens: list[int], seed: int) -> Generated:
        end = next((n for n, token in enumerate(tokens) if token in self._ends), None)
        finish = "length" if end is None else "stop"
        kept = tokens if end is None else tokens[:end]
        text = self.tokenizer.decode(
            kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        return Generated(str(text), len(kept) + (end is not None), finish, seed)

    def _end_tokens(self) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        ends.append(self.tokenizer.eos_token_id)
        return sorted({end for end in ends if end is not None})

    def _pad_token(self) -> int:
        pad: int | None = self.tokenizer.pad_token_id
        if pad is not None:
            return pad
        return self._ends[0] if self._ends else 0

    def _check_lengths(
        self, questions: Sequence[Question], prompts: Sequence[Sequence[int]]
    ) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is None or not prompts:
            return
        longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
        if len(prompts[longest]) >= limit:
            raise RpamError(
                f"--dataset: the prompt of query {questions[longest].index} has "
                f"{len(prompts[longest])} tokens, the model takes {limit}."
            )
        if len(prompts[longest]) + self.settings.max_tokens > limit:
            self.notes[
                f"the model takes {limit} tokens: the longest prompt "
                f"({len(prompts[longest])}) and --max-tokens "
                f"({self.settings.max_tokens}) may go beyond it"
            ] = None


def _device(name: str) -> torch.device:
    if name in ("auto", "auto-map"):
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RpamError(f"--device: '{name}' cannot be used: {error}") from None
    return device


def reference_of(model: str, revision: str | None = None) -> ModelReference:
    """Return the model that a name means, as in mergekit's configs.

    A folder, or ``NAME[@REVISION][+ADAPTER[@REVISION]]``. Raises `RpamError` if it is
    none, or if `revision`, of --revision, is another.
    """
    if Path(model).is_dir():
        return ModelReference(model=ModelPath(path=model, revision=revision))
    try:
        found = ModelReference.parse(model)
    except (RuntimeError, ValueError) as error:
        raise RpamError(
            f"MODEL: found '{model}': {first_line(error)}. Expected a folder or a name "
            "of the Hub, or NAME@REVISION, NAME+ADAPTER as in mergekit's configs."
        ) from None
    named = found.model.revision
    if revision and named and revision != named:
        raise RpamError(
            f"--revision: found '{revision}', but MODEL names '{named}'. Leave one out."
        )
    path = ModelPath(path=found.model.path, revision=named or revision)
    return ModelReference(model=path, lora=found.lora)


def read_tokenizer(model: str, options: ModelOptions) -> PreTrainedTokenizerBase:
    """Return a model's tokenizer, when its config is there too."""
    where = _where(reference_of(model, options.revision).model, options)
    try:
        AutoConfig.from_pretrained(**where)
        return AutoTokenizer.from_pretrained(**where)
    except (OSError, ValueError) as error:
        raise RpamError(f"MODEL: cannot load {model}: {error}") from None


def _read_model(name: str, options: ModelOptions) -> Any:
    """Return a model, with its adapter merged into it in memory."""
    reference = reference_of(name, options.revision)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            dtype=options.dtype,
            device_map="auto" if options.device == "auto-map" else None,
            **_where(reference.model, options),
        )
    except (OSError, ValueError) as error:
        raise RpamError(f"MODEL: cannot load {name}: {error}") from None
    if reference.lora is not None:
        model = _adapted(model, reference)
    return model.eval()


def _adapted(model: Any, reference: ModelReference) -> Any:
    """Return a model with a LoRA adapter merged into it, as mergekit does it."""
    from peft import PeftModel

    from rpam_mergekit.models.adapters import adapter_files

    assert reference.lora is not None
    folder = adapter_files(reference.lora)[0].parent
    try:
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=False)
        return adapted.merge_and_unload()
    except Exception as error:  # of peft, which checks little before it computes
        raise RpamError(
            f"MODEL: the adapter {reference.lora} cannot be merged into "
            f"{reference.model}: {first_line(error)}"
        ) from error


def _where(path: ModelPath, options: ModelOptions) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": path.path,
        "revision": path.revision,
        "trust_remote_code": options.trust_remote_code,
    }


def local_digest(model: str) -> str | None:
    """Return the digest of a local checkpoint's weights, None for a name on the Hub.

    Of a model with an adapter, it is one of both, wherever they lie.
    """
    reference = reference_of(model)
    base = None
    if Path(reference.model.path).is_dir():
        from rpam_mergekit.models.weights import content_digest

        base = content_digest(ModelReference(model=reference.model))
    if reference.lora is None:
        return base
    from rpam_mergekit.formats.files import digest
    from rpam_mergekit.models.adapters import adapter_files

    both = f"{base or reference.model}\n{digest(adapter_files(reference.lora))}\n"
    return hashlib.sha256(both.encode()).hexdigest()
