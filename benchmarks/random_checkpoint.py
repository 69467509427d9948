"""A checkpoint of any size with random weights: made on a device while it is read, or written into a file."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from accel.files import FileIdentity, TensorInfo
from accel.spec import ModelSpec, StoredTensor

from .families.base import Config
from .families.registry import of

DTYPE = torch.bfloat16
CPU = torch.device("cpu")
# Random numbers are made once; each tensor is a stretch of them from a random place, which is as fast as a disk.
POOL = 2**25
BIAS_STD = 0.02


class RandomCheckpoint:
    """A checkpoint without a file, see `accel.checkpoint.source.Checkpoint`; the same values whenever it is read.

    Weights have the standard deviation in_features^-0.5, so that a linear's output is as large as its input; scales of
    norms are about 1.
    """

    def __init__(self, config: Config, device: torch.device = CPU, seed: int = 0) -> None:
        """Make nothing yet.

        Args:
            config: the model's sizes.
            device: where the weights are made; another one gives other values.
            seed: gives other values, too.
        """
        shapes = of(config).family.layout(config).expected_shapes()
        self.name = "random weights"
        self.identity = FileIdentity(f"random weights {seed} for {config}", 0, 0)
        self.tensors = {name: TensorInfo(shape, DTYPE) for name, shape in shapes.items()}
        self.metadata: dict[str, str] = {}
        self.device = device
        self._seed = seed

    @contextmanager
    def open(self) -> Iterator[Callable[[str], Tensor]]:
        """Make random numbers for as long as tensors are read: a function from a name to its tensor, on the device."""
        generator = torch.Generator(self.device).manual_seed(self._seed)
        pool = torch.empty(POOL, dtype=DTYPE, device=self.device).normal_(generator=generator)
        last: tuple[str, Tensor] = "", pool  # q, k and v are rows of one tensor

        def tensor(name: str) -> Tensor:
            nonlocal last
            if last[0] != name:
                last = name, self._make(name, pool)
            return last[1]

        yield tensor

    def _make(self, name: str, pool: Tensor) -> Tensor:
        shape = torch.Size(self.tensors[name].shape)
        start = zlib.crc32(f"{self._seed} {name}".encode()) % POOL
        flat = torch.empty(shape.numel(), dtype=DTYPE, device=self.device)
        done = 0
        while done < len(flat):
            count = min(POOL - start, len(flat) - done)
            torch.mul(pool[start : start + count], self._std(shape), out=flat[done : done + count])
            done, start = done + count, 0
        return flat.add_(1).view(shape) if name.endswith("norm.scale") else flat.view(shape)

    @staticmethod
    def _std(shape: torch.Size) -> float:
        return shape[1] ** -0.5 if len(shape) == 2 else BIAS_STD


def random_spec(config: Config, device: torch.device = CPU) -> ModelSpec:
    """What `inspect_checkpoint` would say of a random checkpoint."""
    file, family = RandomCheckpoint(config, device), of(config).family
    stored = {name: StoredTensor(name, info) for name, info in file.tensors.items()}
    return ModelSpec(file, family, config, DTYPE, family.layout(config), stored)


def write_checkpoint(path: Path, config: Config, seed: int = 0) -> int:
    """Write a bf16 checkpoint in the original layout; holds one tensor's worth of memory.

    Returns:
        Bytes of the file.
    """
    file = RandomCheckpoint(config, CPU, seed)
    entries, offset = {}, 0
    for name, info in file.tensors.items():
        entries[name] = {"dtype": "BF16", "shape": list(info.shape), "data_offsets": [offset, offset + info.bytes]}
        offset += info.bytes
    header = json.dumps(entries).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    with open(path, "wb") as stream, file.open() as tensor:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name in file.tensors:
            stream.write(memoryview(tensor(name).flatten().view(torch.uint8).numpy()))
    return path.stat().st_size
