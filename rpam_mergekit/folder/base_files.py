"""The small files of a merged model: the base's own, byte for byte.

mergekit copies some of them, from the folder that an adapter was merged into none, and
writes the tokenizer anew by the installed version of transformers where a config names
a chat template or a tokenizer. By `rpam` the vocabulary is always the base's, so that
the base's files are right.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import snapshot_download
from mergekit.common import ModelReference
from transformers.dynamic_module_utils import get_relative_import_files

from rpam_mergekit.errors import RpamError
from rpam_mergekit.folder.json_text import with_value
from rpam_mergekit.formats.files import digest_of_file
from rpam_mergekit.models.headers import cached_folder

MODEL = (
    "config.json",
    "generation_config.json",
    "*processor_config.json",
)
TOKENIZER = (
    "tokenizer.*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "tekken.json",
    "*.tiktoken",
    "*.model",
    "chat_template.*",
    "additional_chat_templates/*.jinja",
)
TEMPLATE = "chat_template.jinja"
KEY = "chat_template"
_IN_JSON = ("tokenizer_config.json", "chat_template.json")


def base_folder(base: ModelReference) -> Path:
    """Return the folder that a model's own files lie in, an adapter's model's.

    Of a model on the Hub, the small files are downloaded. Raises `RpamError` if they
    cannot be had.
    """
    folder: Path | None = Path(base.model.path)
    if folder is not None and folder.is_dir():
        return folder
    try:
        patterns = [*MODEL, *TOKENIZER, "*.py"]
        return Path(
            snapshot_download(
                base.model.path, revision=base.model.revision, allow_patterns=patterns
            )
        )
    except Exception as error:  # of huggingface_hub, or of its HTTP client
        folder = cached_folder(base)
        if folder is None:
            raise RpamError(f"{base}: its files cannot be had: {error}") from error
        return folder


def copy_base_files(
    source: Path, folder: Path, template: str | None, tokenizer: bool = True
) -> None:
    """Put the base's own files, from `source`, into a merged model's folder.

    All but `config.json`. `template`: the chat template that the merge config names, to
    be the default one; the base's others stay. `tokenizer`: whether it is wanted.
    """
    names = names_in(source, MODEL[1:])
    own = names_in(source, TOKENIZER) if tokenizer else []
    if any(not name.startswith(KEY) for name in own):
        for name in names_in(folder, TOKENIZER):  # of which the base may have others
            (folder / name).unlink()
    for name in [*names, *own, *code_in(source)]:
        (folder / name).parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):
            (folder / name).unlink()  # it may be a link
        shutil.copyfile(source / name, folder / name)
    if template is not None and names_in(folder, TOKENIZER):
        _set_template(folder, template)


def file_digests(source: Path) -> dict[str, str]:
    """Return the SHA-256 of all files that a merged model has of its base, by name."""
    names = {*names_in(source, (*MODEL, *TOKENIZER)), *code_in(source)}
    return {name: digest_of_file(source / name) for name in sorted(names)}


def names_in(folder: Path, patterns: Iterable[str]) -> list[str]:
    """Return the files of a folder that have one of these names, links too."""
    there = [*folder.iterdir(), *folder.glob("*/*")] if folder.is_dir() else []
    names = {
        path.relative_to(folder).as_posix()
        for path in there
        if path.is_file() or path.is_symlink()
    }
    return sorted(
        name
        for name in names
        for pattern in patterns
        if fnmatchcase(name, pattern) and name.count("/") == pattern.count("/")
    )


def code_in(folder: Path) -> list[str]:
    """Return the modules that a model's JSON files name, and those they import."""
    found: set[str] = set()
    for name in ("config.json", "tokenizer_config.json"):
        with suppress(OSError, ValueError, AttributeError):
            content = json.loads((folder / name).read_text("utf-8"))
            for named in content.get("auto_map", {}).values():
                several = [named] if isinstance(named, str) else named
                # With "--" they lie in a repository.
                found |= {c.partition(".")[0] for c in several if c and "--" not in c}
    modules = [folder / f"{name}.py" for name in sorted(found)]
    modules = [module for module in modules if module.is_file()]
    imported = [
        Path(one) for path in modules for one in get_relative_import_files(path)
    ]
    return sorted({p.relative_to(folder).as_posix() for p in (*modules, *imported)})


def _set_template(folder: Path, template: str) -> None:
    """Make a template the default one of a folder, wherever a default stands."""
    written = False
    for name in _IN_JSON:
        path = folder / name
        if not path.exists():
            continue
        text = path.read_bytes().decode("utf-8")
        found = json.loads(text).get(KEY)
        place: tuple[str | int, ...] | None = None
        value: object = template
        if isinstance(found, str):
            place = (KEY,)
        elif isinstance(found, dict):
            place = (KEY, "default")
        elif isinstance(found, list):
            names = [one.get("name") for one in found]
            if "default" in names:
                place = (KEY, names.index("default"), "template")
            else:
                place = (KEY, len(found))
                value = {"name": "default", "template": template}
        if place is not None:
            path.write_bytes(with_value(text, place, value).encode("utf-8"))
            written = True
    if (folder / TEMPLATE).exists() or not written:
        (folder / TEMPLATE).write_bytes(template.encode("utf-8"))
