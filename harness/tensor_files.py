"""Write safetensors files whole or not at all, and tell whether one is there already."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

STAMP_KEY = "flux_hotswap_asset"


def write_tensors(path: Path, tensors: Mapping[str, Tensor], stamp: str | None = None) -> Path:
    """Write a safetensors file by way of a temporary name beside it, so that no half-written file stands at `path`.

    The stamp is the only metadata entry: safetensors 0.8.0 orders several of them at random, and the same content
    must give the same bytes.

    Args:
        path: The file to write or replace; its folder is made.
        tensors: Any dtypes, CPU.
        stamp: What the content was made from; `is_current` compares it.
    Returns:
        `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary,
                  metadata={STAMP_KEY: stamp} if stamp is not None else None)
        temporary.chmod(0o644)  # safetensors 0.8.0 makes files that only their owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def json_tensor(content: Any) -> Tensor:
    """JSON as ComfyUI writes it into a tensor: its UTF-8 bytes, uint8."""
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def is_current(path: Path, stamp: str) -> bool:
    """Whether a whole file with this stamp stands at `path`; reads the header only."""
    if not path.is_file():
        return False
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        content = file.read(length) if length < size else b""
    try:
        header = json.loads(content)
        if header.pop("__metadata__")[STAMP_KEY] != stamp:
            return False
        return size == 8 + length + max(entry["data_offsets"][1] for entry in header.values())
    except (ValueError, KeyError, TypeError, AttributeError):  # not a file of this module
        return False
