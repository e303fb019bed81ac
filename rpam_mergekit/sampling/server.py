"""Responses from any server that speaks the OpenAI chat protocol.

One request per response: an engine with prefix caching computes the prompt once, a
failed request costs one response, and not every server takes `n`. The seed is sent
along; vLLM and SGLang keep to it up to the numerics of their batches, other servers as
they document.

Requests that fail in passing (no connection, a time-out, 408, 409, 425, 429, 5xx, a
body that is no answer) are repeated, after what Retry-After says or with exponential
back-off. The client library's own retries are off: they know neither torn bodies nor
an outage of minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import os
import random
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rpam_mergekit.errors import RpamError, first_line, masked, suggestion
from rpam_mergekit.extras import needs
from rpam_mergekit.grading.responses import Markers, finish_of
from rpam_mergekit.questions.load import Question
from rpam_mergekit.sampling.request import secrets_of
from rpam_mergekit.sampling.run import Generated, SamplingSettings, Tasks
from rpam_mergekit.sampling.turns import MessageReader, Turns

if TYPE_CHECKING:
    from openai import AsyncOpenAI
    from transformers import PreTrainedTokenizerBase

_PASSING = (408, 409, 425, 429)
_REFUSED = (400, 413, 422)
_MOST_REFUSED = 8
_LONGEST_DELAY = 60.0  # seconds, where the server names none
_NO_COUNT_NOTE = (
    "the server sends no token counts: give --tokenizer to count them, or tokens stay "
    "unknown."
)

_Finished = tuple[Question, list[Generated]]


@dataclass
class ServerOptions:
    """How to reach the servers; nothing here changes what is sampled.

    base_urls: queries are shared out among them. timeout: seconds of one request.
    retries: how often one request is repeated before the run stops.
    requests_per_minute: over all servers, None for no limit.
    """

    base_urls: Sequence[str]
    concurrency: int = 64
    timeout: float = 1800.0
    retries: int = 12
    requests_per_minute: float | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    api_key: str = field(
        default_factory=lambda: os.environ.get("OPENAI_API_KEY") or "none"
    )


class _Unusable(Exception):
    """A 200 whose body is no answer."""


class ServerBackend:
    """The backend of OpenAI-compatible servers; see `run.Backend`."""

    def __init__(
        self,
        model: str,
        settings: SamplingSettings,
        options: ServerOptions,
        extra_body: Mapping[str, Any] | None = None,
    ) -> None:
        with needs("sample"):
            import openai
        self._openai = openai
        self._secrets = secrets_of(options.base_urls, options.api_key, extra_body or {})
        self._clients = [self._client(url, options) for url in options.base_urls]
        self.model = model
        self.settings = settings
        self.options = options
        self.extra_body = dict(extra_body or {})
        if settings.top_k is not None:
            self.extra_body["top_k"] = settings.top_k
        self.heed(Turns(Markers(), None))
        self.roots: dict[str, None] = {}  # models that servers say they have loaded
        self.notes: dict[str, None] = {}
        self.retries = 0
        self._refused: dict[int, str] = {}
        self._answered = False
        self._next_request = 0.0
        self._slots = asyncio.Semaphore(options.concurrency)
        self._waiting = 0  # requests that are under way or wait for a slot

    def _client(self, url: str, options: ServerOptions) -> AsyncOpenAI:
        try:
            return self._openai.AsyncOpenAI(
                base_url=url,
                api_key=options.api_key,
                timeout=options.timeout,
                max_retries=0,
            )
        except Exception as error:  # of httpx, which takes the URL to pieces
            raise RpamError(
                f"--base-url: {self._shown(url)} is no URL: "
                f"{self._shown(first_line(error))}"
            ) from None

    def _shown(self, text: object) -> str:
        return masked(str(text), self._secrets)

    def heed(self, turns: Turns) -> None:
        """Take what is known of the model's turns; before anything is sampled."""
        self.markers, self.opening = turns.markers, turns.opening
        self._reader = MessageReader(turns)

    async def close(self) -> None:
        """Close the connections; left open they are lost with the event loop."""
        for client in self._clients:
            await client.close()

    async def check(self) -> None:
        """Raise `RpamError` if a server is not there or does not serve the model."""
        for client in self._clients:
            try:
                models = [model async for model in client.models.list()]
            except self._openai.APIConnectionError as error:
                raise RpamError(
                    f"--base-url: cannot reach {self._shown(client.base_url)}: "
                    f"{self._shown(error.__cause__ or error)}. Is the server up? The "
                    "URL usually ends in /v1."
                ) from None
            except self._openai.AuthenticationError as error:
                raise RpamError(self._fatal(error)) from None
            except Exception:  # lists no models, or sends a page of another kind
                models = []
            served = [m.id for m in models if isinstance(getattr(m, "id", None), str)]
            roots = [getattr(m, "root", None) for m in models if m.id == self.model]
            self.roots |= {root: None for root in roots if isinstance(root, str)}
            if not served:
                await self._refuse_without_v1(client)
            elif self.model not in served and not await self._takes(client):
                raise RpamError(
                    f"MODEL: {self._shown(client.base_url)} does not serve "
                    f"'{self.model}'.{suggestion(self.model, served)}"
                )

    async def _refuse_without_v1(self, client: AsyncOpenAI) -> None:
        """Raise `RpamError` if not this URL, but the one with /v1 behind it answers."""
        url = str(client.base_url).rstrip("/")
        if url.endswith("/v1"):
            return
        try:
            further = client.with_options(base_url=f"{url}/v1")
            found = [model async for model in further.models.list()]
        except Exception:  # it is not there either: the first request will tell
            return
        if found:
            raise RpamError(
                f"--base-url: {self._shown(url)} does not speak the OpenAI protocol, "
                f"/v1 is missing: give {self._shown(url)}/v1."
            )

    async def _takes(self, client: AsyncOpenAI) -> bool:
        """Tell whether a server takes a model that is not in its list.

        transformers serves a folder, but lists the cache.
        """
        if not Path(self.model).is_dir():
            return False
        try:
            answer = await client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": "1"}],
                max_tokens=1,
            )
        except Exception:
            return False
        return bool(getattr(answer, "choices", None))

    async def sample(
        self, questions: Sequence[Question], done: set[int]
    ) -> AsyncGenerator[_Finished, None]:
        finished: asyncio.Queue[_Finished] = asyncio.Queue()
        pending = iter([q for q in questions if q.index not in done])
        open_queries = 0
        exhausted = False

        async def one(question: Question) -> None:
            generated = await asyncio.gather(
                *(self._response(question, n) for n in range(self.settings.samples))
            )
            finished.put_nowait((question, [g for g in generated if g is not None]))

        async with Tasks() as tasks:
            while True:
                # Enough requests wait to fill every slot, no more than that, and none
                # while what came back is not fetched.
                most = self.options.concurrency
                while not exhausted and self._waiting + finished.qsize() < most:
                    question = next(pending, None)
                    if question is None:
                        exhausted = True
                        break
                    self._waiting += self.settings.samples
                    open_queries += 1
                    tasks.start(one(question))
                if not open_queries:
                    break
                question, generated = await self._next(finished, tasks)
                open_queries -= 1
                if len(generated) == self.settings.samples:
                    self._answered = True
                    yield question, generated
                self._too_many_refused()
        self.notes |= dict.fromkeys(self._reader.notes())
        if self._refused:
            raise RpamError(*self._refusals())

    async def _next(
        self, finished: asyncio.Queue[_Finished], tasks: Tasks
    ) -> _Finished:
        """Return the next finished query, or raise what made a task fail."""
        while True:
            tasks.check()
            try:
                return finished.get_nowait()
            except asyncio.QueueEmpty:
                await tasks.wait_one()

    async def _response(self, question: Question, sample: int) -> Generated | None:
        """Return one response; None if the server refuses this query for good."""
        try:
            async with self._slots:
                if question.index in self._refused:
                    return None
                return await self._repeated(question, sample)
        finally:
            self._waiting -= 1

    async def _repeated(self, question: Question, sample: int) -> Generated | None:
        openai = self._openai
        for attempt in range(self.options.retries + 1):
            await self._pace()
            try:
                return await self._request(question, sample)
            except openai.APIStatusError as error:
                status = error.status_code
                if status in _REFUSED:
                    self._refused.setdefault(question.index, self._said(error))
                    return None
                passing = status in _PASSING or status >= 500
                if not passing or getattr(error, "code", "") == "insufficient_quota":
                    raise RpamError(self._fatal(error)) from None
                failure: Exception = error
            except (openai.APIError, ValueError, _Unusable) as error:
                failure = error
            if attempt < self.options.retries:
                self.retries += 1
                await asyncio.sleep(_delay(failure, attempt))
        raise RpamError(
            f"the server failed {self.options.retries + 1} times in a row on query "
            f"{question.index}; the last time: {self._said(failure)}. Nothing that was "
            "finished is lost: run the same command to go on."
        ) from None

    async def _request(self, question: Question, sample: int) -> Generated:
        settings = self.settings
        seed = settings.seed_of(question.index, sample)
        client = self._clients[question.index % len(self._clients)]
        completion = await client.chat.completions.create(
            model=self.model,
            messages=list(question.messages),  # type: ignore[arg-type]
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_tokens=settings.max_tokens,
            seed=seed,
            extra_body=self.extra_body or None,
        )
        choices = getattr(completion, "choices", None) or []
        message = getattr(choices[0], "message", None) if choices else None
        if message is None:
            raise _Unusable(f"the body is no chat completion: {str(completion)[:200]}")
        finish = getattr(choices[0], "finish_reason", None)
        finish = finish_of(finish) if isinstance(finish, str) and finish else "null"
        tokens = getattr(getattr(completion, "usage", None), "completion_tokens", None)
        tokens = tokens if isinstance(tokens, int) else None
        text = self._reader.read(dict(message), finish, tokens, question.messages)
        return Generated(text, self._tokens(tokens, text), finish, seed)

    def _tokens(self, tokens: int | None, text: str) -> int | None:
        if tokens is not None and (tokens or not text):
            return tokens
        if self.options.tokenizer is None:
            self.notes[_NO_COUNT_NOTE] = None
            return None
        ids = self.options.tokenizer(text, add_special_tokens=False)["input_ids"]
        return len(ids) + 1  # the end token

    async def _pace(self) -> None:
        """Wait for this request's turn under `requests_per_minute`."""
        limit = self.options.requests_per_minute
        if limit:
            now = time.monotonic()
            turn = max(now, self._next_request)
            self._next_request = turn + 60 / limit
            await asyncio.sleep(turn - now)

    def _fatal(self, error: Any) -> str:
        hint = ""
        if error.status_code in (401, 403):
            hint = " The key is read from the environment variable OPENAI_API_KEY."
        if error.status_code in (404, 405) and not all(
            str(client.base_url).rstrip("/").endswith("/v1") for client in self._clients
        ):
            hint = " Is /v1 missing at the end of --base-url?"
        return f"the server refuses the request: {self._said(error)}.{hint}"

    def _refusals(self) -> list[str]:
        shown = list(self._refused.items())[:_MOST_REFUSED]
        return [
            *(f"query {index}: the server refuses it: {why}" for index, why in shown),
            f"{len(self._refused)} queries were refused and are not in the file; all "
            "others are. Run the same command to ask for them again.",
        ]

    def _too_many_refused(self) -> None:
        if not self._answered and len(self._refused) >= _MOST_REFUSED:
            raise RpamError(
                f"the server refused the first {len(self._refused)} queries; the last "
                f"time: {list(self._refused.values())[-1]}"
            )

    def _said(self, error: Exception) -> str:
        """Return what a server said, shortened: status and message."""
        status = getattr(error, "status_code", None)
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        text = str(error)
        if status is None:
            text = f"{type(error).__name__}: {error}{cause}"
        return " ".join(self._shown(text).split())[:400]


def _delay(error: Exception, attempt: int) -> float:
    """Return how many seconds to wait: Retry-After, else exponential with jitter."""
    response = getattr(error, "response", None)
    named = response.headers.get("retry-after") if response is not None else None
    with contextlib.suppress(TypeError, ValueError):  # neither seconds nor a date
        if named and named.replace(".", "", 1).isdigit():
            return float(named)
        if named:
            when = email.utils.parsedate_to_datetime(named)
            return max(0.0, when.timestamp() - time.time())
    return min(_LONGEST_DELAY, 0.5 * 2.0**attempt) * random.uniform(0.5, 1.0)
