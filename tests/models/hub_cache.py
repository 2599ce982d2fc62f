"""A cache of huggingface_hub as a download leaves it, made by hand."""

from __future__ import annotations

import shutil
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_in_cache(cache: Path, name: str, source: Path, ref: str = "main") -> Path:
    """What a download leaves: files by their hash, a snapshot of links to them, and the commit of the branch."""
    place = cache / f"models--{name.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for folder in (place / "blobs", snapshot, place / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(file for file in sorted(source.iterdir()) if file.is_file()):
        shutil.copy(file, place / "blobs" / str(number))
        (snapshot / file.name).symlink_to(place / "blobs" / str(number))
    (place / "refs" / ref).write_text(COMMIT)
    return snapshot
