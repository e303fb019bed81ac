"""The part of the Hugging Face Hub that the tests need, on this machine.

A server has what is in a cache of huggingface_hub (a folder of `models--owner--name`
and `datasets--owner--name`); what is uploaded becomes a new snapshot there. It speaks
the protocol without Xet: HF_HUB_DISABLE_XET=1 makes huggingface_hub upload so.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import yaml

REPOSITORY = r"(?P<repository>[^/]+/[^/]+)"
API = rf"/api/(?P<kind>models|datasets)/{REPOSITORY}"
FILE = (
    rf"/(?:(?P<kind>datasets)/)?{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"
)
LARGE = (".safetensors", ".bin", ".png")


class Refused(Exception):
    """An answer that is an error: its status and the Hub's code for it."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status = status
        self.headers = {"X-Error-Code": code} if code else {}
        if message:
            self.headers["X-Error-Message"] = message


@dataclass
class Hub:
    """What a server has and who may see it; `requests` is what it was asked.

    tokens: what `whoami` says, by token. private: repositories that need a token.
    gated: those that no token opens.
    """

    cache: Path
    tokens: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    gated: set[str] = field(default_factory=set)
    requests: list[str] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.Lock)

    def folder(self, kind: str | None, repository: str) -> Path:
        return self.cache / f"{kind or 'models'}--{repository.replace('/', '--')}"

    def snapshot(self, folder: Path, revision: str) -> tuple[str, Path]:
        """Return the commit that a branch, tag or commit names, and its folder."""
        reference = folder / "refs" / revision
        commit = reference.read_text() if reference.exists() else revision
        if not (folder / "snapshots" / commit).is_dir():
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, folder / "snapshots" / commit

    def commit(self, folder: Path, branch: str, changed: Mapping[str, bytes]) -> str:
        """Make a snapshot of a branch with files changed; return its commit."""
        with self.lock:
            _, old = self.snapshot(folder, branch)
            number = len(list((folder / "snapshots").iterdir()))
            commit = hashlib.sha1(f"{branch} {number}".encode()).hexdigest()
            new = folder / "snapshots" / commit
            shutil.copytree(old, new)
            for path, content in changed.items():
                (new / path).parent.mkdir(parents=True, exist_ok=True)
                (new / path).write_bytes(content)
            (folder / "refs" / branch).write_text(commit)
        return commit

    def create(self, folder: Path) -> None:
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)

    def files(self, kind: str, repository: str, revision: str = "main") -> dict:
        """Return the content of every file of a repository, by path."""
        _, folder = self.snapshot(self.folder(kind, repository), revision)
        return {name: (folder / name).read_bytes() for name in listed(folder)}


def add_repository(cache: Path, kind: str, repository: str, source: Path) -> None:
    """Put the files of a folder into a cache as the repository's branch main."""
    folder = cache / f"{kind}--{repository.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / ("c" * 40))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("c" * 40)


@contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Yield the address of a server that has what is in `hub`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler(hub))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def hub_handler(cache: Path) -> type[BaseHTTPRequestHandler]:
    """Return a handler that serves the repositories of a cache to everybody."""
    return handler(Hub(cache))


def handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self.body = self.rfile.read(length)
            path, _, self.query = self.path.partition("?")
            hub.requests.append(f"{self.command} {path}")
            method = "GET" if self.command == "HEAD" else self.command
            try:
                for allowed, pattern, answer in routes:
                    found = re.fullmatch(pattern, path)
                    if allowed == method and found:
                        parts = {
                            k: v and unquote(v) for k, v in found.groupdict().items()
                        }
                        return answer(self, **parts)
                raise Refused(404)
            except Refused as refused:
                self.answer(b'{"error": "refused"}', refused.status, refused.headers)

        do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

        @property
        def user(self) -> dict[str, Any] | None:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            return hub.tokens.get(token)

        def repository(self, kind: str | None, name: str) -> Path:
            """Return a repository's folder if the request may see it."""
            folder = hub.folder(kind, name)
            if self.user is None and "Authorization" in self.headers:
                message = "Invalid credentials in Authorization header"
                raise Refused(401, message=message)
            hidden = name in hub.private and self.user is None
            if hidden or not folder.is_dir():
                # As the Hub: who has no token is not told what exists.
                status = 401 if self.user is None else 404
                raise Refused(status, "RepoNotFound", "Repository not found")
            if name in hub.gated:
                raise Refused(403, "GatedRepo", "Access to this model is restricted")
            return folder

        def writable(self, name: str) -> None:
            user = self.user
            if user is None:
                raise Refused(401, message="Invalid username or password.")
            if user["auth"]["accessToken"]["role"] == "read":
                raise Refused(403, message="Forbidden: your token cannot write")
            if name.partition("/")[0] not in owners(user):
                raise Refused(403, message="You don't have the rights")

        def info(self, kind: str, repository: str, revision: str | None = None) -> None:
            folder = self.repository(kind, repository)
            commit, files = hub.snapshot(folder, revision or "main")
            siblings = [{"rfilename": name} for name in listed(files)]
            found = {"id": repository, "sha": commit, "siblings": siblings}
            self.json({**found, "private": repository in hub.private})

        def tree(self, kind: str, repository: str, revision: str, path: str) -> None:
            _, files = hub.snapshot(self.repository(kind, repository), revision)
            self.json([described(files, name) for name in listed(files)])

        def references(self, kind: str, repository: str) -> None:
            folder = self.repository(kind, repository) / "refs"
            found = [
                {"name": p.name, "ref": f"refs/heads/{p.name}", "targetCommit": "0"}
                for p in sorted(folder.iterdir())
            ]
            self.json({"branches": found, "tags": [], "converts": []})

        def file(self, kind: str | None, repository: str, revision: str, path: str):
            commit, files = hub.snapshot(self.repository(kind, repository), revision)
            headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
            if not (files / path).is_file():
                headers["X-Error-Code"] = "EntryNotFound"
                return self.answer(b"", 404, headers)
            headers["ETag"] = f'"{described(files, path)["etag"]}"'
            content = (files / path).read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked is None:
                return self.answer(content, 200, headers)
            first, last = int(asked[1]), min(int(asked[2] or 1 << 62), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(content[first : last + 1], 206, headers)

        def whoami(self) -> None:
            if self.user is None:
                raise Refused(401, message="Invalid username or password.")
            self.json(self.user)

        def validate(self) -> None:
            matter = re.match(r"---\n(.*?)\n---\n", self.sent()["content"], re.DOTALL)
            try:
                yaml.safe_load(matter[1] if matter else "")
            except yaml.YAMLError as error:
                self.json({"errors": [{"message": str(error)}], "warnings": []}, 400)
            else:
                self.json({"errors": [], "warnings": []})

        def create(self) -> None:
            sent = self.sent()
            name = f"{sent['organization']}/{sent['name']}"
            self.writable(name)
            if hub.folder("models", name).exists():
                return self.json({"url": f"{self.address}/{name}"}, 409)
            hub.create(hub.folder("models", name))
            if sent.get("visibility") == "private" or sent.get("private"):
                hub.private.add(name)
            return self.json({"url": f"{self.address}/{name}", "name": name})

        def branch(self, kind: str, repository: str, branch: str) -> None:
            self.writable(repository)
            reference = self.repository(kind, repository) / "refs" / branch
            if reference.exists():
                raise Refused(409, message="Reference already exists")
            reference.write_text((reference.parent / "main").read_text())
            self.json({})

        def preupload(self, kind: str, repository: str, revision: str) -> None:
            self.writable(repository)
            _, files = hub.snapshot(self.repository(kind, repository), revision)
            answers = []
            for sent in self.sent()["files"]:
                path = sent["path"]
                mode = "lfs" if path.endswith(LARGE) else "regular"
                answers.append(
                    {"path": path, "uploadMode": mode, "shouldIgnore": False}
                )
                if (files / path).is_file():
                    answers[-1]["oid"] = described(files, path)["etag"]
            self.json({"files": answers})

        def batch(self, repository: str) -> None:
            self.writable(repository)
            answers = []
            for sent in self.sent()["objects"]:
                action = {"href": f"{self.address}/lfs/{sent['oid']}"}
                new = sent["oid"] not in hub.objects
                actions = {"actions": {"upload": action}} if new else {}
                answers.append({"oid": sent["oid"], "size": sent["size"], **actions})
            self.json({"transfer": "basic", "objects": answers})

        def put(self, oid: str) -> None:
            if hashlib.sha256(self.body).hexdigest() != oid:
                raise Refused(400, message="the content is not what was announced")
            hub.objects[oid] = self.body
            self.answer(b"")

        def commit(self, kind: str, repository: str, revision: str) -> None:
            self.writable(repository)
            folder = self.repository(kind, repository)
            changed = {}
            for line in self.body.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    changed[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    changed[value["path"]] = hub.objects[value["oid"]]
                elif item["key"] != "header":
                    raise Refused(400, message=f"{item['key']} is not expected")
            commit = hub.commit(folder, revision, changed)
            url = f"{self.address}/{repository}/commit/{commit}"
            self.json({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None})

        @property
        def address(self) -> str:
            return f"http://{self.headers['Host']}"

        def sent(self) -> Any:
            return json.loads(self.body)

        def json(self, value: Any, status: int = 200) -> None:
            headers = {"Content-Type": "application/json"}
            self.answer(json.dumps(value).encode(), status, headers)

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

    routes: list[tuple[str, str, Callable[..., None]]] = [
        ("GET", API, Handler.info),
        ("GET", rf"{API}/revision/(?P<revision>[^/]+)", Handler.info),
        ("GET", rf"{API}/tree/(?P<revision>[^/]+)(?P<path>/.*)?", Handler.tree),
        ("GET", rf"{API}/refs", Handler.references),
        ("GET", FILE, Handler.file),
        ("GET", "/api/whoami-v2", Handler.whoami),
        ("POST", "/api/validate-yaml", Handler.validate),
        ("POST", "/api/repos/create", Handler.create),
        ("POST", rf"{API}/branch/(?P<branch>[^/]+)", Handler.branch),
        ("POST", rf"{API}/preupload/(?P<revision>[^/]+)", Handler.preupload),
        ("POST", rf"/{REPOSITORY}\.git/info/lfs/objects/batch", Handler.batch),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", Handler.put),
        ("POST", rf"{API}/commit/(?P<revision>[^/]+)", Handler.commit),
    ]
    return Handler


def owners(user: Mapping[str, Any]) -> list[str]:
    return [user["name"], *(one["name"] for one in user.get("orgs", []))]


def listed(folder: Path) -> list[str]:
    """Return the paths of all files in a folder, with forward slashes."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return [p.relative_to(folder).as_posix() for p in files]


def described(folder: Path, name: str) -> dict[str, Any]:
    """Return what the Hub says of a file; large files are known by their SHA-256."""
    content = (folder / name).read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found = {"type": "file", "path": name, "size": len(content), "oid": blob}
    if not name.endswith(LARGE):
        return {**found, "etag": blob}
    digest = hashlib.sha256(content).hexdigest()
    lfs = {"oid": digest, "size": len(content), "pointerSize": 130}
    return {**found, "lfs": lfs, "etag": digest}


def user(name: str, role: str = "write", *organisations: str) -> dict[str, Any]:
    """Return what `whoami` says of a token with a role."""
    return {
        "type": "user",
        "name": name,
        "orgs": [{"name": one, "roleInOrg": "write"} for one in organisations],
        "auth": {"type": "access_token", "accessToken": {"role": role}},
    }
