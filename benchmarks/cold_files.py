"""Files that are on the disk but not in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

PROC_IO = Path("/proc/self/io")


class ColdFiles:
    """Files that are written once, and dropped from the page cache before each reading.

    Writing them anew each time would keep the disk busy with that when they are read. `describe` tells afterwards what
    really came from the disk: a RAM disk, or a system without posix_fadvise, keeps the content in memory.

    Attributes:
        path: the file that was dropped last.
    """

    can_drop = hasattr(os, "posix_fadvise")

    def __init__(self, folder: Path) -> None:
        """Write into `folder`, which should not be a RAM disk."""
        self._folder = folder
        self._disk_shares: list[float] = []
        self._start_bytes: int | None = None
        self.path = folder / "none"

    def add(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a file."""
        path = self._path(name)
        save_file(dict(tensors), path)
        with open(path, "rb+") as stream:
            os.fsync(stream.fileno())  # dirty pages cannot be dropped

    def drop(self, name: str) -> Path:
        """Leave a file on the disk alone."""
        self.path = self._path(name)
        if self.can_drop:
            with open(self.path, "rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._start_bytes = _bytes_from_disk()
        return self.path

    def note_read(self) -> None:
        """Call after that file was read: counts how much of it the system fetched from the disk."""
        end = _bytes_from_disk()
        if end is not None and self._start_bytes is not None:
            self._disk_shares.append((end - self._start_bytes) / self.path.stat().st_size)

    def describe(self) -> str:
        """How cold the files were, for the notes."""
        how = "dropped from memory by posix_fadvise(DONTNEED)" if self.can_drop else "NOT dropped from the page cache"
        if not self._disk_shares:
            return f"Before each reading a cold file is {how}; this system does not tell what came from the disk."
        return (
            f"Before each reading a cold file is {how}; at least {min(self._disk_shares):.0%} of it was then fetched "
            "from the block device (a virtual machine's host may still have cached it)."
        )

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"


def read_into(path: Path, target: memoryview) -> int:
    """Read a whole file into memory that is there already; the bytes that were read."""
    done = 0
    with open(path, "rb", buffering=0) as stream:
        while count := stream.readinto(target[done:]):
            done += count
    return done


def _bytes_from_disk() -> int | None:
    """Bytes that this process has had fetched from block devices, page faults included (Linux)."""
    try:
        lines = PROC_IO.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)
