"""Files that are made once and used by every later start: whole, checked, and bounded in size.

A store is a folder of entries, one file each (see `entry`): tensors, JSON beside them, and what they were made from.

- An entry is written under a temporary name of its own and gets its name when it is whole. Files are replaced and
  deleted, never changed in place: of two processes that make the same entry the last one's stays, a killed one leaves
  nothing that counts, and what another process has mapped stays whole for it.
- An entry that was made from something else, is cut off, or has a flipped bit is deleted when it is opened, and its
  reader is told to make it anew.
- What was not used for longest makes room. Only files with the store's suffix, and its own `.tmp` files, are ever
  deleted, because a user may point it at a folder that holds others.
- Windows neither replaces nor deletes a file that is open or mapped: eviction passes over it, and writing it anew fails
  as on a full disk. So whoever will write an entry again copies what it keeps of it.

Why no library: diskcache (Apache-2.0) keeps its index in SQLite, which network folders lock badly, and hands out bytes
or pickles, not maps of gigabytes; `torch.compiler.save_cache_artifacts` makes one value of a process's caches, and
leaves it to its caller to store it. With either, the names, checks and limits of this module would still be needed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from .entry import Entry, EntryWriter, Key, Progress, read_entry

# For each tensor, in the header that stands first but is written last.
HEADER_BYTES_PER_TENSOR = 1024
# After so long a temporary file is nobody's.
ABANDONED_S = 3600


class DamagedError(Exception):
    """An entry is not what was once written; it was deleted.

    Attributes:
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"'{name}' is damaged ({reason})")
        self.reason = reason


@dataclass(frozen=True)
class DiskStore:
    """A folder of entries.

    Attributes:
        folder: made when it is first written to.
        suffix: of its files' names.
        limit_bytes: what they may take together.
    """

    folder: str
    suffix: str
    limit_bytes: int

    def path(self, key: Key) -> Path:
        """Where the entry of a key is, or would be."""
        digest = hashlib.sha256(key.text.encode()).hexdigest()[:16]
        return Path(self.folder) / ("-".join(filter(None, (key.label, digest))) + self.suffix)

    def open(self, key: Key, on_progress: Progress = lambda done, total: None) -> Entry | None:
        """Check and map an entry, and count it as used now.

        Args:
            key: what it must have been made from.
            on_progress: called with (runs checked, runs in all).

        Returns:
            None when there is none.

        Raises:
            DamagedError: there is one, but it is damaged.
        """
        path = self.path(key)
        try:
            stream = open(path, "rb")  # noqa: SIM115 - closed below, whatever is in it
        except OSError:  # none, or out of reach: then writing will say so
            return None
        with stream:
            try:
                entry = read_entry(stream, key, on_progress)
            except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as exc:
                entry, damage, replaced = None, exc, not _is_at(stream, path)
        if entry is not None:
            with suppress(OSError):
                os.utime(path)
            return entry
        if replaced:  # by another process, meanwhile: theirs is whole
            return self.open(key, on_progress)
        self.remove(key)
        raise DamagedError(path.name, str(damage)) from damage

    def writer(self, key: Key, expected_bytes: int, tensors: int, content_bytes: int = 0) -> EntryWriter:
        """Make room for an entry, and begin it.

        Args:
            key: what it is made from.
            expected_bytes: what its tensors will take.
            tensors: about how many there will be.
            content_bytes: what its JSON will take beyond a few hundred bytes for each tensor.

        Raises:
            OSError: there is no room, or the folder cannot be written to.
        """
        header_bytes = content_bytes + HEADER_BYTES_PER_TENSOR * (tensors + 16)
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._make_room(expected_bytes + header_bytes, path)
        return EntryWriter(path, key, header_bytes)

    def put(self, key: Key, tensors: Mapping[str, Tensor], content: Any = None) -> None:
        """Store an entry in place of the one that is there.

        Raises:
            OSError: as `writer`, or the disk is full.
        """
        size = sum(tensor.nbytes for tensor in tensors.values())
        writer = self.writer(key, size, len(tensors), len(json.dumps(content)))
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish(content)

    def remove(self, key: Key) -> None:
        """Delete an entry, if it is there and Windows lets it go."""
        _delete(self.path(key))

    def _make_room(self, needed: int, replaced: Path) -> None:
        """Delete what was not used for longest, and what broken-off writers left behind."""
        folder = Path(self.folder)
        for temporary in folder.glob(f".*{self.suffix}.*.tmp"):
            _delete(temporary, older_than_s=ABANDONED_S)
        if needed > self.limit_bytes:
            raise OSError(f"{_gb(needed)} are needed, and the limit of the cache is {_gb(self.limit_bytes)}")
        files = sorted(item for item in self._files() if item[2] != replaced)
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total + needed <= self.limit_bytes and needed < shutil.disk_usage(folder).free:
                break
            _delete(path)
            total -= size
        free = shutil.disk_usage(folder).free
        if needed >= free:
            raise OSError(f"{_gb(needed)} are needed, and {_gb(free)} are free")

    def _files(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every entry."""
        for path in Path(self.folder).glob(f"*{self.suffix}"):
            with suppress(OSError):  # another process deleted it
                stat = path.stat()
                yield stat.st_mtime_ns, stat.st_size, path


def _is_at(stream: BinaryIO, path: Path) -> bool:
    """Whether a path still names the file that is open."""
    with suppress(OSError):
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    return False


def _delete(path: Path, older_than_s: float = 0.0) -> None:
    with suppress(OSError):  # gone already, or in use on Windows
        if time.time() - path.stat().st_mtime >= older_than_s:
            path.unlink()


def _gb(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB"
