"""What identifies a model's weights: the bytes of its files, wherever they lie."""

from __future__ import annotations

import hashlib

from rpam_mergekit.formats.files import digest


def test_the_digest_is_that_of_the_files_in_order_of_their_names(tmp_path):
    files = [tmp_path / name for name in ("b", "a")]
    for path in files:
        path.write_bytes(path.name.encode() * 1000)
    hashes = [hashlib.sha256(n.encode() * 1000).hexdigest() for n in "ab"]
    expected = hashlib.sha256("".join(f"{h}\n" for h in hashes).encode()).hexdigest()
    assert digest(files) == digest(reversed(files)) == expected
    files[0].write_bytes(b"other")
    assert digest(files) != expected


def test_a_model_in_the_hubs_cache_is_the_same_as_its_copy(tmp_path):
    """The cache names a large file by its SHA-256, which need not be made again."""
    content = b"weights" * 1000
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    blob.parent.mkdir()
    blob.write_bytes(content)
    cached = tmp_path / "snapshots" / "model.safetensors"
    cached.parent.mkdir()
    cached.symlink_to(blob)
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(content)
    assert digest([cached]) == digest([copy])
    small = tmp_path / "blobs" / hashlib.sha1(content).hexdigest()  # a file in git
    small.write_bytes(content)
    link = tmp_path / "snapshots" / "small.safetensors"
    link.symlink_to(small)
    assert digest([link]) == digest([copy])
