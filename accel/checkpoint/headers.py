"""From a checkpoint's files to what their headers say, whatever model they hold."""

from __future__ import annotations

import os
from pathlib import Path

from ..files import FileIdentity
from .gguf_file import read_gguf
from .locate import GGUF_SUFFIX, Located
from .safetensors_file import read_safetensors
from .source import Checkpoint


def read_headers(located: Located) -> Checkpoint:
    """Read the headers of a checkpoint in GGUF, told by its first bytes, or in safetensors.

    Raises:
        FileError, CheckpointError: see `gguf_file.read_gguf` and `safetensors_file.read_safetensors`.
    """
    if located.path.suffix.lower() == GGUF_SUFFIX or _is_gguf(located.files[0]):
        return read_gguf(located)
    return read_safetensors(located)


def read_file(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the header of one file, which is a whole model, or several.

    Raises:
        FileError: it is missing, damaged, neither safetensors nor GGUF, or the package `gguf` is missing.
        CheckpointError: a GGUF file in a quantization that the package cannot read.
    """
    path = Path(path)
    FileIdentity.of(path)  # says what is wrong when nothing is there
    return read_headers(Located(path, (path,)))


def _is_gguf(path: Path) -> bool:
    with open(path, "rb") as stream:
        return stream.read(4) == b"GGUF"
