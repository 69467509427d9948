"""A checkpoint in one safetensors file, or in several with an index."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError, FileError
from ..files import FileIdentity, TensorFile, TensorInfo, open_tensors, read_header
from .locate import Located


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """One model in one or several files, of which only the headers were read.

    Attributes:
        name: what messages call it.
        located: its files.
        identity: the state of all of them.
        tensors: every tensor by its name in the files.
        metadata: what the files say about themselves.
        shards: the file that holds each tensor.
    """

    name: str
    located: Located
    identity: FileIdentity
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    shards: Mapping[str, TensorFile]

    device: ClassVar[torch.device] = torch.device("cpu")

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """Open the data; see `source.Checkpoint.open`. What the function gives maps the file: slice it, then copy."""
        if self.located.identity() != self.identity:
            raise FileError(f"'{self.name}' was changed after it was read. Queue the prompt again to use the new file.")
        with ExitStack() as stack:
            files = {file.identity.path: file for file in self.shards.values()}
            handles = {path: stack.enter_context(open_tensors(file)) for path, file in files.items()}
            yield lambda key: handles[self.shards[key].identity.path].get_tensor(key)


def read_safetensors(located: Located) -> SafetensorsCheckpoint:
    """Read the headers of a checkpoint.

    Raises:
        FileError: see `files.read_header`.
        CheckpointError: the index and the shards do not agree.
    """
    identity = located.identity()
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    shards: dict[str, TensorFile] = {}
    for path in located.files:
        file = read_header(path)
        if located.weight_map is not None:
            _check_shard(located, path.name, file)
        tensors |= file.tensors
        metadata |= file.metadata
        shards |= dict.fromkeys(file.tensors, file)
    return SafetensorsCheckpoint(located.name, located, identity, tensors, metadata, shards)


def _check_shard(located: Located, name: str, file: TensorFile) -> None:
    index = located.index.name
    missing = [key for key, shard in located.weight_map.items() if shard == name and key not in file.tensors]
    if missing:
        raise CheckpointError(
            f"'{index}': '{missing[0]}' should be in '{name}', and is not ({len(missing)} in all). The index and the "
            "shards are of different models: get all of them again."
        )
    foreign = [key for key in file.tensors if located.weight_map.get(key) != name]
    if foreign:
        raise CheckpointError(
            f"'{index}': '{name}' holds '{foreign[0]}', which the index does not place there ({len(foreign)} in all). "
            "The index and the shards are of different models: get all of them again."
        )
