"""Stand-ins for inference engines: each answers as its documentation and code say.

`Engine` serves on loopback what a model "wrote", in one engine's form: which fields a
message has, and what its reasoning parser makes of a text. Where the forms are from:

* vLLM 0.11 to 0.26: docs.vllm.ai/en/v0.26.0/features/reasoning_outputs/, and
  `vllm/reasoning/basic_parsers.py` (`extract_reasoning`: a text without the end token
  is all reasoning, and the content null)
* SGLang 0.5.23: `sglang/srt/parser/reasoning_parser.py` (`_detect_and_parse_impl`) and
  `sglang/srt/entrypoints/openai/serving_chat.py`
* llama.cpp: `tools/server/README.md` (--reasoning-format)
* Ollama 0.33: `openai/openai.go` (`ToChatCompletion`), `thinking/parser.go`
* LM Studio: lmstudio.ai/docs/api/openai-api; 200 for a path that it does not know:
  github.com/lmstudio-ai/lmstudio-bug-tracker/issues/618
* transformers 5.23 serve: `transformers/cli/serving/utils.py`
  (`parse_assistant_message`); contents as recorded from it
* OpenRouter: openrouter.ai/docs/use-cases/reasoning-tokens
* LiteLLM: docs.litellm.ai/docs/reasoning_content
* Mistral: docs.mistral.ai/studio-api/conversations/reasoning (content in parts)
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Form = Callable[[str, str], dict[str, Any]]


def split(text: str, forced: bool) -> tuple[str | None, str | None]:
    """Return reasoning and content as parsers for `<think>` split them.

    One that is `forced` takes a text without the end of thinking for reasoning.
    """
    opened = "<think>" in text
    left = text.partition("<think>")[2] if opened else text
    if "</think>" in left and (opened or forced):
        reasoning, _, content = left.partition("</think>")
        return reasoning, content or None
    return (left, None) if opened or forced else (None, text)


def vllm(text: str, prompt: str) -> dict[str, Any]:
    reasoning, content = split(text, forced=True)
    empty = dict.fromkeys(["refusal", "annotations", "audio", "function_call"])
    return {"content": content, **empty, "tool_calls": [], "reasoning": reasoning}


def vllm_before_0_12(text: str, prompt: str) -> dict[str, Any]:
    message = vllm(text, prompt)
    return {**message, "reasoning_content": message["reasoning"]}


def sglang(text: str, prompt: str) -> dict[str, Any]:
    reasoning, content = split(text, forced=True)
    return {"content": content, "reasoning_content": reasoning, "tool_calls": None}


def llama_cpp(text: str, prompt: str) -> dict[str, Any]:
    reasoning, content = split(text, forced=False)
    found = {"reasoning_content": reasoning.strip()} if reasoning else {}
    return {**found, "content": (content or "").strip()}


def ollama(text: str, prompt: str) -> dict[str, Any]:
    reasoning, content = split(text, forced=False)
    found = {"reasoning": reasoning.strip()} if reasoning else {}
    return {"content": (content or "").lstrip(), **found}


def lm_studio(text: str, prompt: str) -> dict[str, Any]:
    reasoning, content = split(text, forced=False)
    found = {"reasoning_content": reasoning} if reasoning else {}
    return {"content": content or "", **found, "tool_calls": []}


def transformers_serve(text: str, prompt: str) -> dict[str, Any]:
    """As for a Qwen2 whose template is not ChatML: the prompt stays in the content."""
    reasoning, content = split(text, forced=False)
    if reasoning is None:
        return {"content": f"{prompt}{text}<|end|>"}
    return {"content": f"{content or ''}<|end|>", "reasoning_content": reasoning}


def openrouter(text: str, prompt: str) -> dict[str, Any]:
    reasoning, content = split(text, forced=False)
    details = {"type": "reasoning.text", "text": reasoning, "index": 0}
    return {
        "content": content or "",
        "refusal": None,
        "reasoning": reasoning,
        "reasoning_details": [details] if reasoning else [],
    }


def litellm(text: str, prompt: str) -> dict[str, Any]:
    reasoning, content = split(text, forced=False)
    blocks = [{"type": "thinking", "thinking": reasoning, "signature": "x"}]
    return {
        "content": content,
        "tool_calls": None,
        "provider_specific_fields": {"refusal": None},
        **({"thinking_blocks": blocks} if reasoning else {}),
    }


def mistral(text: str, prompt: str) -> dict[str, Any]:
    reasoning, content = split(text, forced=False)
    if reasoning is None:
        return {"content": content}
    inner = [{"type": "text", "text": reasoning}]
    parts: list[dict[str, Any]] = [{"type": "thinking", "thinking": inner}]
    if content:
        parts.append({"type": "text", "text": content})
    return {"content": parts}


def plain(text: str, prompt: str) -> dict[str, Any]:
    """A server without a reasoning parser."""
    return {"content": text}


FORMS: dict[str, Form] = {
    "vLLM": vllm,
    "vLLM 0.11": vllm_before_0_12,
    "SGLang": sglang,
    "llama.cpp": llama_cpp,
    "Ollama": ollama,
    "LM Studio": lm_studio,
    "transformers serve": transformers_serve,
    "OpenRouter": openrouter,
    "LiteLLM": litellm,
    "Mistral": mistral,
}


@dataclass
class Engine:
    """What to serve.

    texts: what the model writes to the first, second, ... request, over and over.
    message: replaces the form's messages. models: of the list, None for a 404. base:
    where the API is. refuses: answers every request with this status and text.
    """

    texts: list[str] = field(default_factory=lambda: ["36"])
    form: Form = plain
    message: dict[str, Any] | None = None
    finish: str | None = "stop"
    tokens: int | None = None
    models: list[str] | None = field(default_factory=lambda: ["m"])
    base: str = "/v1"
    elsewhere: tuple[int, str] = (404, '{"detail":"Not Found"}')
    refuses: tuple[int, str] | None = None
    prompt: Callable[[str], str] = lambda question: question
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def completion(self, body: dict[str, Any]) -> dict[str, Any]:
        text = self.texts[len(self.asked) % len(self.texts)]
        self.asked.append(body)
        prompt = self.prompt(body["messages"][-1]["content"])
        message = self.message or self.form(text, prompt)
        tokens = self.tokens
        usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 9}
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", **message},
                    "logprobs": None,
                    "finish_reason": self.finish,
                }
            ],
            **({"usage": usage} if tokens is not None else {}),
        }


def _handler(engine: Engine) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self, status: int, body: str, kind: str = "application/json"):
            data = body.replace(
                "{authorization}", self.headers.get("Authorization", "")
            ).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            if self.path != f"{engine.base}/models" or engine.models is None:
                return self._answer(*engine.elsewhere)
            data = [{"id": name, "object": "model"} for name in engine.models]
            return self._answer(200, json.dumps({"object": "list", "data": data}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != f"{engine.base}/chat/completions":
                return self._answer(*engine.elsewhere)
            if engine.refuses:
                return self._answer(*engine.refuses)
            return self._answer(200, json.dumps(engine.completion(body)))

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serving(engine: Engine) -> Iterator[Engine]:
    """Serve on loopback; `engine.url` is the server's address with the base."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(engine))
    engine.url = f"http://127.0.0.1:{server.server_port}{engine.base}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield engine
    finally:
        server.shutdown()
        server.server_close()
