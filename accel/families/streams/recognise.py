"""Read the sizes of a model off the header of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import CheckpointError
from ...files import TensorInfo
from .layout import HEAD_DIM


@dataclass(frozen=True)
class Header:
    """A checkpoint's header, and what messages call the file and its family.

    Attributes:
        tensors: every tensor by its name.
        file_name: for messages.
        family: as a person knows it.
    """

    tensors: Mapping[str, TensorInfo]
    file_name: str
    family: str

    def count(self, block: str) -> int:
        """How many blocks there are with this name before their number.

        Raises:
            CheckpointError: one between others is missing.
        """
        pattern = re.compile(rf"{block}\.(\d+)\.")
        found = {int(match.group(1)) for key in self.tensors if (match := pattern.match(key))}
        last = max(found, default=-1)
        # Not a range up to `last`: a damaged name may hold a number of any size.
        missing = next((index for index in range(len(found)) if index not in found), None)
        if missing is not None:
            raise CheckpointError(
                f"'{self.file_name}': {block}.{missing} is missing, though {block}.{last} is there. The file is "
                "incomplete: get it again."
            )
        return len(found)

    def matrix(self, linear: str) -> tuple[int, int]:
        """Rows and columns of a linear's weight.

        Raises:
            CheckpointError: it is missing, or no matrix.
        """
        key = f"{linear}.weight"
        info = self.tensors.get(key)
        if info is None:
            raise CheckpointError(
                f"'{self.file_name}': looks like {self.family}, but '{key}' is missing. The file is incomplete, or "
                "another model's: get the complete transformer."
            )
        if len(info.shape) != 2:
            raise CheckpointError(
                f"'{self.file_name}': '{key}' has shape {info.shape}, expected a matrix. It is damaged, or packed in a "
                "format that the file does not name: choose the bf16, fp8 or GGUF file."
            )
        return info.shape[0], info.shape[1]

    def hidden_size(self, image: str) -> int:
        """The model's width, by the linear that embeds the image.

        Raises:
            CheckpointError: it is no whole number of heads.
        """
        hidden_size, _ = self.matrix(image)
        if hidden_size % HEAD_DIM:
            raise CheckpointError(
                f"'{self.file_name}': {image}.weight has {hidden_size} rows, expected a multiple of {HEAD_DIM} "
                f"({self.family} heads are {HEAD_DIM} wide). This is not a {self.family} checkpoint: choose another "
                "file."
            )
        return hidden_size
