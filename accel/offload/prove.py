"""Whether page-locking and copies beside the computation work on a device, before weights and LoRAs depend on them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..memory.base import DeviceMemory
from ..memory.gpu import LOCKS_PAGES, CudaMemory
from ..prove import Verdict, proofs

BYTES = 2**20


def restrict(memory: DeviceMemory) -> tuple[str, ...]:
    """Try what a GPU's memory is about to use, once per process, and have it do without what fails.

    Args:
        memory: of a device; it is changed. Nothing was allocated from it.

    Returns:
        A sentence for a user on each thing that it does without.
    """
    if not isinstance(memory, CudaMemory):
        return ()
    sentences = []
    if memory.pin and (refusal := _refusal("page-locked host memory", memory, _pinned)):
        memory.without_pinning()
        sentences.append(f"page-locked host memory {refusal}: copies to the GPU take about twice as long.")
    if memory.beside and (refusal := _refusal("copying beside the computation", memory, _copied)):
        memory.without_stream()
        sentences.append(f"copying beside the computation {refusal}: the two take turns.")
    return tuple(sentences)


def _refusal(name: str, memory: CudaMemory, compare: Callable[[CudaMemory], Verdict]) -> str | None:
    return proofs().of(name, memory.device, functools.partial(compare, memory)).refusal


def _pinned(memory: CudaMemory) -> Verdict:
    before = memory.pinned_bytes
    pages = memory.host(BYTES).copy_(_random_bytes())
    if memory.device.type in LOCKS_PAGES and memory.pinned_bytes == before:
        return Verdict("was refused by the driver")
    ours = torch.empty(BYTES, dtype=torch.uint8, pin_memory=True).copy_(_random_bytes())
    return _same(memory.upload(pages), pages) or _same(memory.upload(ours), ours) or Verdict(None)


def _copied(memory: CudaMemory) -> Verdict:
    source, target = memory.host(BYTES).copy_(_random_bytes()), memory.empty(BYTES)
    half = BYTES // 2
    # Computed before and after: an event that does not hold up its stream leaves zeros, or too few bytes.
    target.zero_()
    done = memory.copy(target, [(0, source[:half]), (half, source[half:])], after=memory.mark())
    memory.wait(done)
    arrived = target.clone()
    memory.finish()
    return _same(arrived, source) or Verdict(None)


def _same(arrived: Tensor, source: Tensor) -> Verdict | None:
    wrong = int((arrived.cpu() != source).sum())
    return Verdict(f"gives wrong data here: {wrong:,} of {BYTES:,} bytes") if wrong else None


def _random_bytes() -> Tensor:
    return torch.randint(0, 256, (BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

