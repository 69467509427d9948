"""The values of a LoRA file's tensors as they come, all of them finite."""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from ...errors import LoraError
from ...files import TensorFile
from ...tensors import all_finite, own_vector, to_float
from ..kinds.base import Change
from ..kinds.layers import VectorLayer
from .keys import FileKeys
from .stream import BulkReader


class FiniteValues:
    """Gives values of a file, and refuses those that are no numbers.

    Its methods raise LoraError where a tensor holds NaN or infinity, and what `BulkReader.tensor` raises.
    """

    def __init__(self, file: TensorFile, keys: FileKeys, wanted: Collection[str], reader: BulkReader) -> None:
        """Give values of the wanted keys.

        Args:
            file: its header.
            keys: all of its keys.
            wanted: of these, the ones that the reader expects.
            reader: reads the file.
        """
        self._file = file
        self._wanted = dict.fromkeys(wanted)  # in order, and found at once
        self._ignored = frozenset().union(*(change.ignored for change in keys.changes))
        self._reader = reader
        self._checked = False

    def of(self, change: Change) -> dict[str, Tensor]:
        """Role -> values, of those that are wanted."""
        tensors = {
            role: self._tensor(header.key) for role, header in change.headers.items() if header.key in self._wanted
        }
        self._check()
        return tensors

    def of_norms(self, keys: FileKeys) -> list[VectorLayer]:
        """The changes of norms."""
        layers = []
        for norm in keys.norms:
            value = own_vector(self._tensor(norm.key))
            self._check()
            layers.append(VectorLayer(norm.parameter, value, 1.0, norm.replaces))
        return layers

    def _tensor(self, key: str) -> Tensor:
        tensor = self._reader.tensor(key)
        return to_float(tensor) if tensor.dtype == torch.float64 else tensor

    def _check(self) -> None:
        if self._checked or math.isfinite(self._reader.peak):
            return
        for key in self._wanted:
            tensor = self._tensor(key)
            if tensor.dtype.is_floating_point and key not in self._ignored:
                check_finite(f"LoRA '{self._file.name}': '{key}'", tensor)
        self._checked = True


def check_finite(source: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity, in a message that begins with what holds them.

    Raises:
        LoraError: there is one.
    """
    if not all_finite(tensor):
        raise LoraError(
            f"{source} holds NaN or infinity. Its training diverged or the file is damaged: choose another file or "
            "an earlier checkpoint."
        )
