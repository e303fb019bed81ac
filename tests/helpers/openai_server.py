"""An HTTP server that speaks the OpenAI chat protocol, for tests and benchmarks.

    python openai_server.py --model long=examples/quickstart/long [--faults 0.2]

serves real checkpoints: requests that come together are generated together, every
response with its own seed. `--stub TEXT` answers every request at once with that text.
`--faults SHARE` makes that share of the requests fail: 429 with Retry-After, 500, cut
connections, malformed JSON, stalls. Prints `port N` when it is up; `GET /counts` tells
what it did.
"""

import argparse
import asyncio
import random
import sys
from collections import Counter

from aiohttp import web

COUNTS = web.AppKey("counts", Counter)
FAULTS = ("limited", "error", "cut", "torn", "stalled")


def completion(name: str, text: str, tokens: int, finish: str) -> dict:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": name,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": finish,
            }
        ],
        "usage": {
            "prompt_tokens": 1,
            "completion_tokens": tokens,
            "total_tokens": tokens + 1,
        },
    }


class Engine:
    """One checkpoint; collects requests for a moment and generates them together."""

    def __init__(self, folder: str) -> None:
        import torch

        from rpam_mergekit.grading.responses import Markers
        from rpam_mergekit.sampling.local import ModelOptions, TransformersBackend
        from rpam_mergekit.sampling.run import SamplingSettings

        torch.set_num_threads(1)
        self.settings = SamplingSettings
        self.backend = TransformersBackend(
            folder,
            SamplingSettings(),
            ModelOptions(dtype="float32", device="cpu"),
            Markers(),
        )
        self.queue: asyncio.Queue = asyncio.Queue()

    async def serve(self) -> None:
        while True:
            batch = [await self.queue.get()]
            await asyncio.sleep(0.01)
            while not self.queue.empty() and len(batch) < 64:
                batch.append(self.queue.get_nowait())
            by_settings: dict = {}
            for body, future in batch:
                settings = self.settings(
                    temperature=body["temperature"],
                    top_p=body["top_p"],
                    max_tokens=body["max_tokens"],
                )
                by_settings.setdefault(settings, []).append((body, future))
            for settings, group in by_settings.items():
                await asyncio.to_thread(self.generate, settings, group)

    def generate(self, settings, group) -> None:
        from rpam_mergekit.chat.rendering import prompt_ids

        self.backend.settings = settings
        prompts = [prompt_ids(b["messages"], self.backend.tokenizer) for b, _ in group]
        responses = self.backend._batch(prompts, [b["seed"] for b, _ in group])
        for (_, future), response in zip(group, responses, strict=True):
            future.get_loop().call_soon_threadsafe(_settle, future, response)


def _settle(future: asyncio.Future, response) -> None:
    if not future.done():
        future.set_result(response)


def build(args: argparse.Namespace) -> web.Application:
    app = web.Application()
    app[COUNTS] = Counter()
    names = dict(model.partition("=")[::2] for model in args.model)
    engines = {} if args.stub else {n: Engine(path) for n, path in names.items()}
    rng = random.Random(args.seed)

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        app[COUNTS]["requests"] += 1
        if rng.random() < args.faults:
            fault = rng.choice(FAULTS)
            app[COUNTS][fault] += 1
            return await fail(request, fault)
        if args.key and request.headers.get("Authorization") != f"Bearer {args.key}":
            error = {"error": {"message": "Incorrect API key provided"}}
            return web.json_response(error, status=401)
        if args.refuse and args.refuse in body["messages"][-1]["content"]:
            error = {"error": {"message": "This model's maximum context is 8 tokens"}}
            return web.json_response(error, status=400)
        if args.stub:
            return web.json_response(completion(body["model"], args.stub, 9, "stop"))
        future = asyncio.get_running_loop().create_future()
        await engines[body["model"]].queue.put((body, future))
        response = await future
        await asyncio.sleep(args.delay)
        app[COUNTS]["answered"] += 1
        return web.json_response(
            completion(body["model"], response.text, response.tokens, response.finish)
        )

    async def fail(request: web.Request, fault: str) -> web.StreamResponse:
        if fault == "limited":
            headers = {"Retry-After": "0.2"}
            return web.json_response({"error": {}}, status=429, headers=headers)
        if fault == "error":
            return web.Response(text="internal error", status=500)
        if fault == "torn":
            return web.Response(
                text='{"id": "x", "cho', content_type="application/json"
            )
        if fault == "stalled":
            await asyncio.sleep(args.stall)
            return web.json_response(completion("late", "late", 1, "stop"))
        response = web.StreamResponse(headers={"Content-Length": "5000"})
        await response.prepare(request)
        await response.write(b'{"id": "x", ')
        request.transport.abort()
        return response

    async def models(request: web.Request) -> web.Response:
        card = {"object": "model", "created": 1, "owned_by": ""}
        data = [{"id": n, **card, "root": path or n} for n, path in names.items()]
        return web.json_response({"object": "list", "data": data})

    async def counts(request: web.Request) -> web.Response:
        return web.json_response(dict(app[COUNTS]))

    async def start(app: web.Application) -> None:
        app["tasks"] = [asyncio.create_task(e.serve()) for e in engines.values()]

    app.on_startup.append(start)
    app.router.add_post("/v1/chat/completions", chat)
    app.router.add_get("/v1/models", models)
    app.router.add_get("/counts", counts)
    return app


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER")
    parser.add_argument("--stub", help="answer at once with this text")
    parser.add_argument("--faults", type=float, default=0.0)
    parser.add_argument("--stall", type=float, default=30.0, help="seconds")
    parser.add_argument("--delay", type=float, default=0.0, help="seconds per answer")
    parser.add_argument("--refuse", help="400 for prompts that hold this text")
    parser.add_argument("--key", help="the only API key that is accepted")
    parser.add_argument("--seed", type=int, default=0, help="of the faults")
    args = parser.parse_args()
    runner = web.AppRunner(build(args), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    print(f"port {port}", flush=True)
    await asyncio.to_thread(sys.stdin.read)  # until the parent closes it, or dies


if __name__ == "__main__":
    asyncio.run(main())
