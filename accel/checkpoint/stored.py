"""The tensors of an open checkpoint, one by one: whether they are what they should be, and their values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..files import FLOAT_DTYPES
from ..hardware import dtype_name
from ..spec import StoredTensor
from ..tensors import all_finite
from .decode import decode
from .scales import STORED_AS
from .source import Checkpoint, Rows

# Values that are converted, scaled and checked at a time: few enough for a CPU's caches and for little memory, enough
# that starting threads costs nothing.
CPU_CHUNK = 2**22
DEVICE_CHUNK = 2**24
WITH_SCALE = (*FLOAT_DTYPES, *STORED_AS.values())


def check_stored(file: Checkpoint, stored: StoredTensor, shape: tuple[int, ...]) -> None:
    """Make sure that a tensor can be read as what a model has in its place.

    Raises:
        CheckpointError: another shape, or a dtype that no weights have.
    """
    if stored.shape != shape:
        raise CheckpointError(
            f"'{file.name}': '{stored.key}' has shape {stored.shape}, expected {shape} from the file's other tensors. "
            "The file is damaged, or mixed from two models."
        )
    allowed = FLOAT_DTYPES if stored.scale is None else WITH_SCALE
    if stored.info.dtype not in allowed:
        names = ", ".join(dtype_name(dtype) for dtype in allowed)
        raise CheckpointError(
            f"'{file.name}': '{stored.key}' is stored as {stored.info.dtype}, expected one of: {names}. Choose the "
            "bf16, fp8 or GGUF file."
        )


class StoredReader:
    """Copies tensors out of an open checkpoint in runs of rows: converted, scaled, and checked.

    Args:
        name: what messages call the file.
        rows: what `Checkpoint.open` gave.
        device: where the copies go.
    """

    def __init__(self, name: str, rows: Callable[[str], Rows], device: torch.device) -> None:
        self._name = name
        self._rows = rows
        self._device = device

    def read(
        self, stored: StoredTensor, dtype: torch.dtype, runs: tuple[tuple[int, int], ...] | None = None
    ) -> Tensor:
        """The values that a tensor stands for, as a tensor of its own.

        Args:
            stored: a matrix or a vector.
            dtype: what it is converted to; scaled and block-quantized ones are computed in float32, and rounded once.
            runs: (start, end) of the rows that are wanted, one run after another; without, all.

        Raises:
            CheckpointError: NaN or infinity, or a scale that is not positive.
        """
        scale = None if stored.scale is None else self._scale(stored.scale)
        return self._copy(stored, scale, dtype, runs or ((0, stored.shape[0]),))

    def read_as_stored(self, stored: StoredTensor) -> tuple[Tensor, Tensor | None]:
        """The values as the file has them, not multiplied by their scale, and the scale.

        Args:
            stored: a matrix or a vector that is not packed in blocks.

        Returns:
            The values, and None or the scale: float32, (1, 1) or (rows, 1).

        Raises:
            CheckpointError: see `read`.
        """
        values = self._copy(stored, None, stored.info.dtype, ((0, stored.shape[0]),))
        return values, None if stored.scale is None else self._scale(stored.scale).reshape(-1, 1)

    def _copy(
        self, stored: StoredTensor, scale: Tensor | None, dtype: torch.dtype, runs: tuple[tuple[int, int], ...]
    ) -> Tensor:
        source, columns = self._rows(stored.key), stored.shape[1:]
        out = torch.empty((sum(end - start for start, end in runs), *columns), dtype=dtype, device=self._device)
        step = max(1, (CPU_CHUNK if self._device.type == "cpu" else DEVICE_CHUNK) // max(1, *columns, 1))
        done = 0
        for begin, end in runs:
            for start in range(begin, end, step):
                stop = min(start + step, end)
                part = out[done : done + stop - start]
                factor = scale if scale is None or not scale.dim() else scale[start:stop]
                decode(source[start:stop].to(self._device), factor, part)
                # A chunk is still in a CPU's cache; on a device every check waits for it.
                if self._device.type == "cpu":
                    self._check(part, stored)
                done += stop - start
        if self._device.type != "cpu":
            self._check(out, stored)
        return out

    def _scale(self, key: str) -> Tensor:
        """One scale, (), or one for each row, (rows, 1); float32."""
        stored = self._rows(key)
        # A scalar cannot be sliced, and a tensor of the file is one already.
        scale = (stored if isinstance(stored, Tensor) else stored[:]).to(torch.float32, copy=True).flatten()
        if not all_finite(scale) or not bool((scale > 0).all()):
            raise CheckpointError(
                f"'{self._name}': the scale '{key}' holds zero, NaN, infinity or a negative number, expected positive "
                "ones. The file is damaged: get it again."
            )
        return scale.reshape(() if scale.numel() == 1 else (-1, 1)).to(self._device)

    def _check(self, values: Tensor, stored: StoredTensor) -> None:
        if not all_finite(values):
            rounded = values.dtype not in (torch.float32, stored.info.dtype)
            maybe = f", or its values do not fit {values.dtype}" if rounded else ""
            instead = ", or choose another dtype" if rounded else ""
            raise CheckpointError(
                f"'{self._name}': '{stored.key}' holds NaN or infinity. The file is damaged{maybe}: get it "
                f"again{instead}."
            )
