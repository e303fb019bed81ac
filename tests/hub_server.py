"""The part of the Hugging Face Hub's API by which models are downloaded, for tests."""

from __future__ import annotations

import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler
from pathlib import Path

REVISION = r"/api/models/([^/]+/[^/]+)/revision/([^/]+)"
TREE = r"/api/models/([^/]+/[^/]+)/tree/([^/]+)"
FILE = r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"


def hub_handler(cache: Path) -> type[BaseHTTPRequestHandler]:
    """Return a handler that serves the models of a cache of huggingface_hub."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if found := re.fullmatch(REVISION, path):
                commit, _ = snapshot(cache, *found.groups())
                self.answer(json.dumps({"id": found[1], "sha": commit}).encode())
            elif found := re.fullmatch(TREE, path):
                _, folder = snapshot(cache, *found.groups())
                self.answer(
                    json.dumps([described(p) for p in folder.iterdir()]).encode()
                )
            elif found := re.fullmatch(FILE, path):
                commit, folder = snapshot(cache, found[1], found[2])
                self.answer_file(folder / found[3], commit)
            else:
                self.answer(b"", 404)

        do_HEAD = do_GET  # noqa: N815

        def answer_file(self, path: Path, commit: str) -> None:
            headers = {"X-Repo-Commit": commit}
            if not path.exists():
                headers["X-Error-Code"] = "EntryNotFound"
                return self.answer(b"", 404, headers)
            headers["ETag"] = described(path)["oid"]
            return self.answer(path.read_bytes(), 200, headers)

        def answer(
            self, body: bytes, status: int = 200, headers: dict[str, str] | None = None
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    return Handler


def snapshot(cache: Path, repository: str, revision: str) -> tuple[str, Path]:
    """Return the commit that a branch, tag or commit names, and its folder."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    reference = folder / "refs" / revision
    commit = reference.read_text() if reference.exists() else revision
    return commit, folder / "snapshots" / commit


def described(path: Path) -> dict:
    digest = hashlib.sha1(path.read_bytes()).hexdigest()
    size = path.stat().st_size
    return {"type": "file", "path": path.name, "size": size, "oid": digest}
