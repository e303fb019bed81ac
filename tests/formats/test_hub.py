"""Calibration files of the Hub: by real requests to a server on this machine."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from helpers.commands import run, succeeded
from helpers.hub_server import Hub, add_repository, serving, user
from helpers.merged import COEFFICIENTS, shard_bytes
from helpers.models import merge_config
from rpam_mergekit.errors import RpamError
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.formats.hub_path import FORM, HubPath, is_hub_path, local_path

KEY = "parameters.calibration"
FILE = "hf://datasets/org/data/calibration.jsonl"
READ = """
import sys
from rpam_mergekit.formats.calibration import read_calibration
from rpam_mergekit.errors import RpamError
for name in sys.argv[1:]:
    try:
        print(read_calibration(name).digest)
    except RpamError as error:
        print(str(error))
"""


@pytest.fixture
def hub(pair, tmp_path) -> Hub:
    """A server's content: the data set org/data with the pair's calibration file."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(pair / "calibration.jsonl", data)
    (data / "bad.jsonl").write_text('{"prompt": "1+1", "pattern": "lang"}\n')
    (tmp_path / "hub").mkdir()
    add_repository(tmp_path / "hub", "datasets", "org/data", data)
    return Hub(tmp_path / "hub", {"secret": user("me")})


@pytest.fixture
def address(hub) -> Iterator[str]:
    with serving(hub) as address:
        yield address


@pytest.fixture
def read(tmp_path) -> Callable[..., list[str]]:
    """Read calibration files in a new process: digests, or why they are refused."""

    def call(endpoint: str, *names: str, home: str = "home", **environment: str):
        settings = {
            "HF_ENDPOINT": endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / home),
            **environment,
        }
        process = run(["python", "-c", READ, *names], **settings)
        succeeded(process)
        return process.stdout.splitlines()

    return call


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_of_the_hub_is_read_byte_by_byte(pair, address, read):
    expected = digest(pair / "calibration.jsonl")
    assert read(address, FILE, f"{FILE[:22]}@main/calibration.jsonl") == [expected] * 2


def test_findings_show_the_name_of_the_hub_and_the_line(address, read):
    (message,) = read(address, "hf://datasets/org/data/bad.jsonl")
    assert message == (
        "rpam: hf://datasets/org/data/bad.jsonl:1: pattern: found 'lang'. Did you mean "
        "'long'?"
    )


def test_what_the_hub_does_not_have_is_said(address, read):
    messages = read(
        address,
        "hf://datasets/org/data/calibratoin.jsonl",
        "hf://datasets/org/data@mian/calibration.jsonl",
        "hf://org/data/calibration.jsonl",
    )
    assert messages == [
        f"rpam: {KEY}: hf://datasets/org/data/calibratoin.jsonl: the dataset "
        "repository org/data has no file 'calibratoin.jsonl' at revision 'main'. Did "
        "you mean 'calibration.jsonl'?",
        f"rpam: {KEY}: hf://datasets/org/data@mian/calibration.jsonl: the dataset "
        "repository org/data has no revision 'mian'. Did you mean 'main'?",
        f"rpam: {KEY}: hf://org/data/calibration.jsonl: {address} has no model "
        "repository org/data, or it is private. Log in: hf auth login, or HF_TOKEN in "
        "the environment.",
    ]


def test_private_and_gated_repositories(pair, hub, address, read):
    hub.private.add("org/data")
    (message,) = read(address, FILE)
    assert "or it is private. Log in: hf auth login, or HF_TOKEN" in message
    (message,) = read(address, FILE, HF_TOKEN="wrong")
    assert f"{FILE}: {address} does not accept your token: " in message
    expected = digest(pair / "calibration.jsonl")
    assert read(address, FILE, HF_TOKEN="secret") == [expected]
    hub.gated.add("org/data")
    (message,) = read(address, FILE, HF_TOKEN="secret", home="other")
    assert "the dataset repository org/data is gated. Ask for access" in message


def test_the_cache_is_used_where_the_hub_cannot_be_asked(pair, hub, read):
    """Offline, no server there, or one that breaks connections or does not answer."""
    with serving(hub) as address:
        (expected,) = read(address, FILE)
    assert expected == digest(pair / "calibration.jsonl")
    assert read(address, FILE) == [expected]
    assert read(address, FILE, HF_HUB_OFFLINE="1") == [expected]
    for broken in (_Silent, _OutOfOrder):
        with _served(broken) as address:
            assert read(address, FILE) == [expected]
            (message,) = read(address, FILE, home="cold")
        assert f"{FILE}: it is not in the cache" in message
        assert f"{address} did not give it: " in message
        assert message.endswith("Try again, or give a local file.")


def test_offline_without_a_cache(read, tmp_path):
    (message,) = read("http://127.0.0.1:9", FILE, HF_HUB_OFFLINE="1")
    assert message == (
        f"rpam: {KEY}: {FILE}: it is not in the cache {tmp_path / 'home' / 'hub'}, and "
        "HF_HUB_OFFLINE forbids to download it. Unset HF_HUB_OFFLINE, or run once with "
        "a network."
    )


def test_a_cache_that_cannot_be_written(address, read, tmp_path):
    (tmp_path / "file").write_text("no folder")
    (message,) = read(address, FILE, HF_HUB_CACHE=str(tmp_path / "file"))
    assert "cannot be written into the cache" in message
    assert "or name another cache in HF_HUB_CACHE." in message


def test_a_merge_calibrates_on_a_file_of_the_hub(pair, hub, address, tmp_path):
    """The same bytes as on the local file; --transformers-cache holds the download."""
    outs = []
    for name in (FILE, str(pair / "calibration.jsonl")):
        out = tmp_path / f"out-{len(outs)}"
        config = merge_config(pair, parameters={"calibration": name, "epochs": 1})
        path = tmp_path / "rpam.yml"
        path.write_text(yaml.safe_dump(config))
        cache = ("--transformers-cache", str(tmp_path / "cache"))
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home")}
        command = ["mergekit-yaml", str(path), str(out), *cache]
        succeeded(run(command, HF_HUB_OFFLINE="0", **environment))
        outs.append(out)
    assert shard_bytes(outs[0]) == shard_bytes(outs[1])
    one, other = ((out / COEFFICIENTS).read_bytes() for out in outs)
    assert one == other
    assert list((tmp_path / "cache").glob("datasets--org--data/snapshots/*/*.jsonl"))
    assert not (tmp_path / "home" / "hub").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("hf:/org/name/file", "it does not start with hf://"),
        ("HF://org/name/file", "it does not start with hf://"),
        ("hf://", "the repository has no owner or no name"),
        ("hf://name", "the repository has no owner or no name"),
        ("hf://name@v1/file", "the repository has no owner or no name"),
        ("hf://org/name", "no path of a file follows the repository 'org/name'"),
        ("hf://datasets/org/name@v1", "no path of a file follows the repository"),
        ("hf://org/name@/file", "the revision after @ is empty"),
        ("hf://org/name/folder/", "'folder/' is no path of a file"),
        ("hf://org/name/../file", "'../file' is no path of a file"),
        ("hf://org/na me/file", "Repo id must use alphanumeric chars"),
        ("hf://dataset/org/name/file", "'dataset' is neither 'datasets' nor the owner"),
        ("hf://spaces/org/name/file", "'spaces' is neither 'datasets' nor the owner"),
    ],
)
def test_malformed_references_are_refused(text, problem):
    assert is_hub_path(text)
    with pytest.raises(RpamError) as error:
        local_path(text, "parameters.coefficients")
    message = str(error.value)
    assert f"parameters.coefficients: found '{text}': {problem}" in message
    assert message.endswith(f"Expected {FORM}.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://o/n/f.jsonl", HubPath("o/n", "f.jsonl")),
        ("hf://models/o/n/f", HubPath("o/n", "f")),
        ("hf://datasets/o/n@v1/a/f", HubPath("o/n", "a/f", "v1", "dataset")),
        ("hf://o/n@refs/pr/3/a/f", HubPath("o/n", "a/f", "refs/pr/3")),
        ("hf://o/n@feature%2Fx/f", HubPath("o/n", "f", "feature/x")),
        ("hf://o/n/a@b/f", HubPath("o/n", "a@b/f")),
    ],
)
def test_references_are_read_as_huggingface_hub_reads_them(text, expected):
    found = HubPath.parse(text, KEY)
    assert found == expected
    assert HubPath.parse(str(found), KEY) == found


def test_ordinary_paths_are_left_alone(tmp_path):
    assert local_path("data/x.jsonl", KEY) == Path("data/x.jsonl")
    assert not is_hub_path(str(tmp_path))
    with pytest.raises(RpamError, match=f"{KEY}: no file nowhere"):
        read_calibration("nowhere.jsonl")


def test_naming_files_of_the_hub_does_not_load_torch():
    code = (
        "import sys, rpam_mergekit.formats.hub_path as h; print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@contextmanager
def _served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Silent(BaseHTTPRequestHandler):
    """Closes every connection without an answer."""

    def handle(self) -> None:
        self.rfile.readline()


class _OutOfOrder(BaseHTTPRequestHandler):
    """Answers everything with an error that is not worth another try."""

    def do_HEAD(self) -> None:
        self.send_response(501)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""
