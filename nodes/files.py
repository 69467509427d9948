"""Find the files that a user chose in a node."""

from __future__ import annotations

import folder_paths

from ..accel.errors import FileError
from ..accel.files import FileIdentity

CATEGORY = "Flux Hotswap"


def find_file(folder: str, name: str) -> str:
    """The path of a file in one of ComfyUI's model folders.

    Raises:
        FileError: it is not there (any more).
    """
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        searched = ", ".join(folder_paths.get_folder_paths(folder))
        raise FileError(
            f"'{name}' is not in the folder '{folder}' (any more); searched {searched}. Put it back, or press R to "
            "refresh the lists and choose another file."
        )
    return path


def fingerprint(folder: str, name: str) -> tuple[int, int]:
    """What makes ComfyUI run a node again: the file's mtime in nanoseconds and its size in bytes."""
    identity = FileIdentity.of(find_file(folder, name))
    return identity.mtime_ns, identity.size_bytes
