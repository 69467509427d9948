"""Files that are on the disk but not in memory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

PROC_IO = Path("/proc/self/io")


class ColdFiles:
    """Writes each file anew, under a new name, and drops it from the page cache.

    `come_from_disk` tells afterwards what really happened: a RAM disk, or a system without posix_fadvise, keeps the
    content in memory.
    """

    can_drop = hasattr(os, "posix_fadvise")

    def __init__(self, folder: Path) -> None:
        """Write into `folder`, which should not be a RAM disk."""
        self._folder = folder
        self._number = itertools.count()
        self._disk_shares: list[float] = []
        self._start_bytes: int | None = None
        self.path = folder / "none"

    def write(self, tensors: Mapping[str, Tensor]) -> Path:
        """Replace the last file by a new one that is on the disk alone."""
        self.path.unlink(missing_ok=True)
        self.path = self._folder / f"lora-{next(self._number)}.safetensors"
        save_file(dict(tensors), self.path)
        self._drop()
        self._start_bytes = _bytes_from_disk()
        return self.path

    def note_read(self) -> None:
        """Call after a file was read: counts how much of it the system fetched from the disk."""
        end = _bytes_from_disk()
        if end is not None and self._start_bytes is not None:
            self._disk_shares.append((end - self._start_bytes) / self.path.stat().st_size)

    def describe(self) -> str:
        """How cold the files were, for the notes."""
        how = "dropped from memory by posix_fadvise(DONTNEED)" if self.can_drop else "NOT dropped from the page cache"
        if not self._disk_shares:
            return f"Each cold file is new, fsynced and {how}; this system does not tell what came from the disk."
        return (
            f"Each cold file is new, fsynced and {how}; at least {min(self._disk_shares):.0%} of each was then fetched "
            "from the block device (a virtual machine's host may still have cached it)."
        )

    def _drop(self) -> None:
        descriptor = os.open(self.path, os.O_RDWR)
        try:
            os.fsync(descriptor)  # dirty pages cannot be dropped
            if self.can_drop:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


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
