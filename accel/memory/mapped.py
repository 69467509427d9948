"""Tensors of a safetensors file that holds more than its header names, which the safetensors library refuses.

Downloads and tools append bytes; what the header names is whole. ComfyUI's own parser reads such files, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import FileError


class MappedTensors:
    """The data of a file, as `safetensors.safe_open` gives it."""

    def __init__(
        self, path: str, data_start: int, header: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]
    ) -> None:
        """Map a file whose entries `check_entries` has checked.

        Args:
            path: of the file.
            data_start: its first byte of data.
            header: what it says of its tensors.
            dtypes: names of dtypes in it.
        """
        # Copies of pages that someone writes to are private, as in safetensors: torch wants memory that can be written.
        self._bytes = np.memmap(path, mode="c")
        self._start, self._header, self._dtypes = data_start, header, dtypes

    def get_tensor(self, key: str) -> Tensor:
        """A tensor that maps the file: copy it."""
        entry = self._header[key]
        start, end = (self._start + offset for offset in entry["data_offsets"])
        values = torch.from_numpy(self._bytes[start:end])
        return values.view(self._dtypes[entry["dtype"]]).view(entry["shape"])


def check_entries(name: str, header: Mapping[str, Any], dtypes: Mapping[str, torch.dtype]) -> None:
    """Make sure that every tensor is as large as its shape says, and that they adjoin, as safetensors does.

    Raises:
        FileError: they do not, or the header is no header.
    """
    spans = []
    for key, entry in header.items():
        if key == "__metadata__":
            good = isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())
        else:
            good = _is_whole(entry, dtypes)
        if not good:
            raise FileError(
                f"'{name}' is damaged: its header says of '{key}' {json.dumps(entry)[:200]}, which no tensor can be. "
                "Get it again."
            )
        if key != "__metadata__":
            spans.append(tuple(entry["data_offsets"]))
    spans.sort()
    if spans[0][0] != 0 or any(end != start for (_, end), (start, _) in pairwise(spans)):
        raise FileError(f"'{name}' is damaged: its tensors overlap, or leave gaps. Get it again.")


def _is_whole(entry: Any, dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether an entry gives a tensor as many bytes as its shape takes."""
    places, shape, dtype = (entry.get(part) for part in ("data_offsets", "shape", "dtype"))
    if not (isinstance(places, list) and len(places) == 2 and isinstance(shape, list) and isinstance(dtype, str)):
        return False
    if any(type(size) is not int or size < 0 for size in (*places, *shape)):
        return False
    return dtype not in dtypes or prod(shape) * dtypes[dtype].itemsize == places[1] - places[0]
