"""A FLUX.1 checkpoint of any size with random weights, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from accel.families.flux1 import Flux1, Flux1Config

# Random numbers are made once; each tensor is a stretch of them from a random place, which is as fast as the disk.
POOL = 2**25
WEIGHT_STD = 0.02


def write_checkpoint(path: Path, config: Flux1Config, seed: int = 0, std: float = WEIGHT_STD) -> int:
    """Write a bf16 checkpoint in the original layout; holds one tensor's worth of memory.

    Returns:
        Bytes of the file.
    """
    shapes = Flux1().layout(config).expected_shapes()
    entries, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    header = header.ljust(-(-len(header) // 8) * 8)
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(POOL).normal_(0.0, std, generator=generator).bfloat16()
    with open(path, "wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name, shape in shapes.items():
            for part in _stretches(pool, torch.Size(shape).numel(), generator):
                values = part + 1 if name.endswith("norm.scale") else part
                stream.write(memoryview(values.contiguous().view(torch.uint8).numpy()))
    return path.stat().st_size


def _stretches(pool: torch.Tensor, count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    start = int(torch.randint(POOL, (1,), generator=generator))
    while count:
        part = pool[start : start + count]
        yield part
        count -= len(part)
        start = 0
