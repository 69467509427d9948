"""How regions are traced: with which options, and with which sizes open.

Dynamo's and the shape environment's options are in force only around an engine's own calls.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import Tensor

# Private names, all checked by tests/test_engine.py:
# One region serves every block of its type and every variant of its inputs, so the default limit of 8 is near. Floats
# (a norm's epsilon) are constants: as inputs they are traced, found to be of no use, and everything is traced a second
# time. With duck shapes, a prompt length that equals another size (3072 tokens, hidden 3072) would become it.
DYNAMO_OPTIONS = {
    "recompile_limit": 64,
    "specialize_float": True,
}
SHAPE_OPTIONS = {"use_duck_shape": False}
# Tensors whose first dimension is the batch: (B, N, channels) and (B, channels). Others, such as rotary tables and
# masks, have their batch elsewhere or none, and keep what dynamo makes of their sizes.
BATCH_FIRST_DIMS = (2, 3)


@contextmanager
def tracing_options() -> Iterator[None]:
    """Put the options in force for the calls inside."""
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(DYNAMO_OPTIONS))
        stack.enter_context(torch.fx.experimental._config.patch(SHAPE_OPTIONS))
        yield


@functools.cache
def batch_can_be_unbacked() -> bool:
    """Whether one graph serves batch 1 and larger ones."""
    # Sharing one unbacked symbol among several inputs came with torch 2.11; without it, batch 1 and larger batches
    # compile one graph each.
    return "shape_id" in inspect.signature(torch._dynamo.decorators.mark_unbacked).parameters


def mark_batch(args: Sequence[Any]) -> None:
    """Let one graph serve batch 1 and every other: ComfyUI's batch flips when conditions are joined or not."""
    if not batch_can_be_unbacked():
        return
    for tensor in args:
        if is_batch_first(tensor):
            torch._dynamo.decorators.mark_unbacked(tensor, 0, shape_id="batch")


def contiguous(arg: Any) -> Any:
    """A block's input with the strides that compiled code is bound to: a patch between blocks may hand on a slice."""
    return arg.contiguous() if is_batch_first(arg) else arg


def is_batch_first(arg: Any) -> bool:
    """Whether an input of a block is a tensor whose first dimension is the batch."""
    return isinstance(arg, Tensor) and arg.ndim in BATCH_FIRST_DIMS
