"""The repository that a merge is published in: what it holds, and the upload.

All files go up in one commit: readers see the whole merge or nothing of it. What was
sent before an upload broke off is not sent again. Nothing is ever deleted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors

from rpam_mergekit.errors import RpamError, first_line, refuse
from rpam_mergekit.folder.contents import RECORD
from rpam_mergekit.formats.hub_path import LOG_IN
from rpam_mergekit.outputs.publish import Plan, Request
from rpam_mergekit.text import listed

WEIGHTS = ("model", "pytorch_model")
NAMED = 8


@dataclass
class Target:
    """What is known of a repository; `objections` keep an upload from being tried."""

    exists: bool | None = None
    private: bool = False
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    objections: list[str] = field(default_factory=list)


def look(request: Request, plan: Plan, private: bool) -> Target:
    """Return what the Hub says of the target and of the user's token.

    Raises nothing: what cannot be asked is an objection.
    """
    target = Target()
    try:
        _look_at_token(request, target)
        _look_at_files(request, plan, target)
    except Exception as error:  # of huggingface_hub, or of its HTTP client
        target.objections.append(
            f"{constants.ENDPOINT} cannot be asked: {first_line(error)}"
        )
        return target
    if target.exists and private and not target.private:
        target.objections.append(
            f"--private: {request.repository} exists and is public. Make it private on "
            "its page, or name another repository."
        )
    return target


def _look_at_token(request: Request, target: Target) -> None:
    if huggingface_hub.get_token() is None:
        target.objections.append(f"no token was found. {LOG_IN}")
        return
    try:
        user = huggingface_hub.whoami()
    except errors.HfHubHTTPError as error:
        if error.response.status_code != 401:
            raise
        target.objections.append(f"the Hub does not accept your token. {LOG_IN}")
        return
    role = user.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        target.objections.append(
            f"your token can only read. Make one that can write to "
            f"{request.repository} ({constants.ENDPOINT}/settings/tokens) and log in "
            "with it."
        )
    owner = request.repository.partition("/")[0]
    owners = [user["name"], *(one["name"] for one in user.get("orgs") or [])]
    if owner not in owners:
        target.objections.append(
            f"REPO: your account cannot write to '{owner}', only to "
            f"{', '.join(owners)}. Name a repository of these."
        )


def _look_at_files(request: Request, plan: Plan, target: Target) -> None:
    name = request.repository
    try:
        info = huggingface_hub.model_info(name, revision=request.revision)
    except errors.GatedRepoError:
        raise
    except errors.RepositoryNotFoundError:
        target.exists = False
        return
    except errors.RevisionNotFoundError:
        info = huggingface_hub.model_info(name)
        target.notes.append(f"the branch '{request.revision}' is new, made from main")
    target.exists, target.private = True, bool(info.private)
    target.files = [one.rfilename for one in info.siblings or []]
    there = sorted(set(target.files) - {".gitattributes"})
    if not there:
        return
    target.notes.append(_what_it_holds(request, plan, there, str(info.sha)))
    replaced = [file for file in there if file in plan.files]
    stay = [file for file in there if file not in plan.files]
    if replaced:
        target.notes.append(f"replaced there: {listed(replaced, NAMED)}")
    if stay:
        target.notes.append(f"stay there as they are: {listed(stay, NAMED)}")
    stale = [file for file in stay if _is_weights(file)]
    if stale and any(_is_weights(file) for file in plan.files):
        target.objections.append(
            f"REPO: {name} has weights that this model has not and that may be loaded "
            f"in their place: {listed(stale, NAMED)}. Delete them on its page, or name "
            "another repository or --revision."
        )


def _what_it_holds(request: Request, plan: Plan, there: list[str], commit: str) -> str:
    name = request.repository
    if RECORD not in there:
        return f"{name} holds something that is not a merge by rpam"
    found = huggingface_hub.hf_hub_download(name, RECORD, revision=commit)
    try:
        record: Mapping[str, Any] = json.loads(Path(found).read_text("utf-8"))
        same = record["coefficients"]["sha256"] == plan.record["coefficients"]["sha256"]
    except (ValueError, KeyError, TypeError):
        same = False
    return f"{name} holds {'this' if same else 'another'} merge by rpam"


def _is_weights(path: str) -> bool:
    named = path.startswith(WEIGHTS) and "/" not in path
    return named and path.endswith((".safetensors", ".bin", ".index.json"))


def upload(request: Request, plan: Plan, private: bool, message: str) -> str:
    """Publish the plan's files in one commit; return its address.

    Raises `RpamError` if the Hub refuses, or cannot be reached.
    """
    name, branch = request.repository, request.revision
    operations = [
        huggingface_hub.CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(file))
        for path, file in plan.files.items()
    ]
    try:
        # None leaves it to the account's own default.
        huggingface_hub.create_repo(name, private=private or None, exist_ok=True)
        if branch is not None and branch != constants.DEFAULT_REVISION:
            huggingface_hub.create_branch(name, branch=branch, exist_ok=True)
        commit = huggingface_hub.create_commit(
            name, operations, commit_message=message, revision=branch
        )
    except Exception as error:  # of huggingface_hub, its HTTP client, or the disk
        reason = first_line(error).rstrip(".")
        if _forbidden(error):
            raise RpamError(
                f"REPO: the Hub does not let your token write to {name}: "
                f"{reason}. Make a token that can, and log in with it."
            ) from error
        raise RpamError(
            f"the upload to {name} did not end: {reason}. Nothing of it is "
            "visible there. Run the same command again: what was sent is not sent "
            "again."
        ) from error
    return str(commit.commit_url)


def _forbidden(error: Exception) -> bool:
    if not isinstance(error, errors.HfHubHTTPError):
        return False
    return error.response.status_code in (401, 403)


def refuse_objections(target: Target) -> None:
    """Raise `RpamError` with everything that keeps an upload from being tried."""
    refuse(target.objections)
