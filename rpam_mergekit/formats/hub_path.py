"""Files of the Hub by reference: ``hf://[datasets/]owner/name[@revision]/path``.

huggingface_hub downloads them into its cache and finds them there: its tokens,
`HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_HUB_CACHE` count, and so does mergekit's
`--transformers-cache` while a merge runs.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import validate_repo_id

from rpam_mergekit.errors import RpamError, first_line, suggestion
from rpam_mergekit.text import listed

SCHEME = "hf://"
FORM = f"{SCHEME}[datasets/]owner/name[@revision]/path"
TYPES = {"datasets": "dataset", "models": "model"}
NO_TYPES = ("dataset", "model", "spaces", "buckets", "kernels")
# Revisions with a slash; others write it %2F.
REFERENCES = re.compile(r"refs/(?:pr/\d+|convert/[\w.-]+)(?=/|$)")
LOG_IN = "Log in: hf auth login, or HF_TOKEN in the environment."
NAMED = 12  # of a repository's files, where none has a near name


@dataclass(frozen=True)
class HubPath:
    """A file of a repository; `revision` is a branch, tag or commit, None is main."""

    repository: str
    path: str
    revision: str | None = None
    repo_type: str = "model"

    @classmethod
    def parse(cls, text: str, key: str) -> HubPath:
        """Return what `text` names. Raises `RpamError`, naming the config key `key`."""
        if not text.startswith(SCHEME):
            raise _malformed(text, key, f"it does not start with {SCHEME}")
        kind, _, rest = text.removeprefix(SCHEME).partition("/")
        if kind in NO_TYPES:
            problem = f"'{kind}' is neither 'datasets' nor the owner of a model"
            raise _malformed(text, key, problem)
        if kind not in TYPES:
            kind, rest = "models", text.removeprefix(SCHEME)
        owner, _, rest = rest.partition("/")
        name, revision, path = _split(rest)
        if not owner or not name or "@" in owner:
            raise _malformed(text, key, "the repository has no owner or no name")
        try:
            validate_repo_id(f"{owner}/{name}")
        except errors.HFValidationError as error:
            raise _malformed(text, key, first_line(error).rstrip(".")) from None
        if revision == "":
            raise _malformed(text, key, "the revision after @ is empty")
        if not path:
            problem = f"no path of a file follows the repository '{owner}/{name}'"
            raise _malformed(text, key, problem)
        if {"", ".", ".."} & set(path.split("/")):
            raise _malformed(text, key, f"'{path}' is no path of a file")
        return cls(f"{owner}/{name}", path, revision, TYPES[kind])

    def __str__(self) -> str:
        kind = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        revision = self.revision or ""
        if not REFERENCES.fullmatch(revision):
            revision = revision.replace("/", "%2F")
        at = f"@{revision}" if revision else ""
        return f"{SCHEME}{kind}{self.repository}{at}/{self.path}"


def is_hub_path(text: str) -> bool:
    """Tell whether a config's value means a file of the Hub, well-formed or not."""
    return text.lower().startswith("hf:")


def local_path(text: str, key: str) -> Path:
    """Return the local file that a config's value names; downloads one of the Hub.

    What is in huggingface_hub's cache is not downloaded again, and is used where the
    Hub cannot be asked. A revision that is no full commit hash is looked up at every
    call. Raises `RpamError`, naming `key` and the value, for malformed references and
    for files that cannot be had; nothing is checked of ordinary paths.
    """
    if not is_hub_path(text):
        return Path(text)
    file = HubPath.parse(text, key)
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                file.repository,
                file.path,
                repo_type=file.repo_type,
                revision=file.revision,
                cache_dir=constants.HF_HUB_CACHE,  # as it is now
            )
        )
    except Exception as error:  # of huggingface_hub, its HTTP client, or the disk
        # huggingface_hub turns to its cache for some failures of the network only.
        cached = None if _denied(error) else _cached(file)
        if cached is None:
            reason = _reason(file, error)
            raise RpamError(f"{key}: {text}: {reason}") from error
        return cached


def _malformed(text: str, key: str, problem: str) -> RpamError:
    return RpamError(f"{key}: found '{text}': {problem}. Expected {FORM}.")


def _split(text: str) -> tuple[str, str | None, str]:
    """Return name, revision and path of ``name[@revision]/path``."""
    head, _, path = text.partition("/")
    name, at, _ = head.partition("@")
    if not at:
        return name, None, path
    rest = text[len(name) + 1 :]
    if found := REFERENCES.match(rest):
        return name, found[0], rest[found.end() + 1 :]
    revision, _, path = rest.partition("/")
    return name, unquote(revision), path


def _denied(error: Exception) -> bool:
    """Tell whether the Hub has answered that there is no such file."""
    absent = (errors.EntryNotFoundError, errors.RevisionNotFoundError)
    return isinstance(error, absent) and not isinstance(
        error, errors.LocalEntryNotFoundError
    )


def _cached(file: HubPath) -> Path | None:
    found = huggingface_hub.try_to_load_from_cache(
        file.repository,
        file.path,
        cache_dir=constants.HF_HUB_CACHE,
        revision=file.revision,
        repo_type=file.repo_type,
    )
    return Path(found) if isinstance(found, str) else None


def _reason(file: HubPath, error: Exception) -> str:
    """Return why a file cannot be had, and the next step."""
    name, kind = file.repository, file.repo_type
    where = f"{kind} repository {name}"
    cache, hub = constants.HF_HUB_CACHE, constants.ENDPOINT
    if isinstance(error, errors.GatedRepoError):
        return f"the {where} is gated. Ask for access on its page at {hub}. {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        if huggingface_hub.get_token() is None:
            return f"{hub} has no {where}, or it is private. {LOG_IN}"
        return (
            f"{hub} has no {where}, or it is private and the account of your token "
            "has no access. Correct the name, or ask its owner for access."
        )
    names: list[str] = []
    if isinstance(error, errors.RevisionNotFoundError):
        with suppress(Exception):
            found = huggingface_hub.list_repo_refs(name, repo_type=kind)
            names = [r.name for r in (*found.branches, *found.tags)]
        hint = _near(str(file.revision), names)
        return f"the {where} has no revision '{file.revision}'.{hint}"
    if _denied(error):
        at = f"at revision '{file.revision or constants.DEFAULT_REVISION}'"
        with suppress(Exception):
            names = huggingface_hub.list_repo_files(
                name, repo_type=kind, revision=file.revision
            )
        return f"the {where} has no file '{file.path}' {at}.{_near(file.path, names)}"
    if isinstance(error, errors.LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        return (
            f"it is not in the cache {cache}, and HF_HUB_OFFLINE forbids to download "
            "it. Unset HF_HUB_OFFLINE, or run once with a network."
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return f"{hub} does not accept your token: {first_line(error)} {LOG_IN}"
    cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
    if isinstance(error, OSError) and error.errno and not _of_network(error):
        return (
            f"it cannot be written into the cache {cache}: {error}. Make room, or name "
            "another cache in HF_HUB_CACHE."
        )
    return (
        f"it is not in the cache {cache}, and {hub} did not give it: "
        f"{first_line(cause).rstrip('.')}. Try again, or give a local file."
    )


def _of_network(error: OSError) -> bool:
    return isinstance(error, (errors.HfHubHTTPError, ConnectionError, TimeoutError))


def _near(wanted: str, names: list[str]) -> str:
    """Return the nearest of `names` as a suggestion, or the first of them."""
    hint = suggestion(wanted, names) if names else ""
    if "Did you mean" in hint or len(names) <= NAMED:
        return hint
    return f" Known: {listed(sorted(names), NAMED)}."
