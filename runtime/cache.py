"""What was compiled, kept on disk: JSON by key, safe to share between processes of one user.

An entry is written beside its place and renamed into it, so a reader sees all of it or nothing. Its first line is the
digest of the rest: what does not match is as good as not there, and gets written anew. Entries hold programs that will
be run, so a folder or file that belongs to somebody else, or that others may write to, is neither read nor written.

A key holds everything that decides what is compiled: see `key`.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

log = logging.getLogger("terrazzo")

# Group or others may write.
_FOREIGN = stat.S_IWGRP | stat.S_IWOTH


class Shelf:
    """Entries of one folder, which is made when the first is written.

    Args:
        folder: where; on a filesystem on which a rename is atomic.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the entry is or would be."""
        return self.folder / f"{key}.json"

    def read(self, key: str) -> Any:
        """The entry; None where there is none that can be trusted."""
        try:
            self._trust(self.folder)
            with open(os.open(self.path(key), os.O_RDONLY | os.O_NOFOLLOW), encoding="utf-8") as file:
                self._trust(file.fileno(), self.path(key))
                digest, _, text = file.read().partition("\n")
        except (OSError, UnicodeDecodeError) as cause:
            if not isinstance(cause, FileNotFoundError):
                log.warning("the cache entry %s is not read: %s", self.path(key), cause)
            return None
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            log.warning("the cache entry %s is damaged and is made anew", self.path(key))
            return None
        return json.loads(text)

    def write(self, key: str, value: Any) -> bool:
        """Keep a value of dicts, lists, strings, numbers and None; False, with one line, where that cannot be done."""
        text = json.dumps(value, separators=(",", ":"))
        part = None
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._trust(self.folder)
            # Only its owner may read or write what mkstemp makes.
            handle, part = tempfile.mkstemp(dir=self.folder, suffix=".part")
            with open(handle, "w", encoding="utf-8") as file:
                file.write(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}")
            os.replace(part, self.path(key))
        except OSError as cause:
            log.warning("the cache entry %s is not written: %s", self.path(key), cause)
            if part is not None:
                Path(part).unlink(missing_ok=True)
            return False
        return True

    @staticmethod
    def _trust(where: Path | int, name: Path | None = None) -> None:
        """Raise PermissionError unless this is ours and nobody else may write to it."""
        found = os.stat(where)
        if found.st_uid != os.geteuid():
            raise PermissionError(f"{name or where} belongs to user {found.st_uid}")
        if found.st_mode & _FOREIGN:
            raise PermissionError(f"{name or where} may be written by others (mode {stat.S_IMODE(found.st_mode):o})")


def key(*parts: Any) -> str:
    """A key for these parts, this terrazzo and the compilers below it.

    Args:
        parts: with reprs that say all that matters, the same in every process: digests, sizes, frozen options.
    """
    text = "\n".join([*versions(), *map(repr, parts)])
    return hashlib.sha256(text.encode()).hexdigest()


@functools.cache
def versions() -> tuple[str, ...]:
    """What entries of another time may have been made by: versions, and terrazzo's own source."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "triton")]
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.read_bytes())
    return (*found, f"terrazzo {digest.hexdigest()}")


def _sources() -> Iterator[Path]:
    """terrazzo's modules that decide what is compiled, in a fixed order."""
    here = Path(__file__).parent
    for folder in (here, here.parent / "lowering", here.parent / "kernels"):
        yield from sorted(folder.glob("*.py"))
