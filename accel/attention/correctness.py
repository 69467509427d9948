"""Whether a backend computes attention: it is compared with SDPA in float32 before it draws anything.

A kernel that was built for another card, another torch, or is simply broken, may run and give wrong numbers.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..compile.tracing import SHAPE_OPTIONS, mark_batch
from ..hardware import dtype_name
from ..prove import Proof, Verdict, proofs
from .backend import Attention, Backend, Target
from .backends import BACKENDS

# Two pictures, and no multiple of any kernel's tile: what is wrong is often wrong in the last tile.
BATCH = 2
TOKENS = 1_173
TEXT_TOKENS = 333
# Scores of standard deviation 2, as a trained model's have: the weights of some twenty tokens count then. Flat weights
# would hide what a few wrong tokens do.
SHARPNESS = 2.0


def verify(name: str, target: Target) -> Proof:
    """Run a backend once on inputs of a model's shapes. Once per process, backend and target.

    Args:
        name: a backend in which nothing is missing on the target.
        target: where; its `heads` and `head_dim` make the shapes.

    Raises:
        torch.OutOfMemoryError: there is no room for 0.3 GB: says nothing of the backend.
    """
    subject = f"attention {name}, {target.heads} heads of {target.head_dim}, {dtype_name(target.dtype)}"
    return proofs().of(subject, target.device, functools.partial(_compare, name, target))


def _compare(name: str, target: Target) -> Verdict:
    backend = BACKENDS[name]
    query, key, value = make_inputs(target, BATCH, TOKENS)
    output = _as_in_a_block(backend, backend.make())(query, key, value)
    return judge(backend, target, output, _reference(query, key, value))


def judge(backend: Backend, target: Target, output: Tensor, reference: Tensor) -> Verdict:
    """Compare a result with the right one.

    Args:
        backend: says how far it may be.
        target: says the dtype.
        output: (B, heads, N, head_dim), of the target's dtype.
        reference: likewise, float32.
    """
    if output.shape != reference.shape or output.dtype != target.dtype:
        found, expected = (f"{tuple(shape)} of {dtype}" for shape, dtype in (
            (output.shape, output.dtype), (reference.shape, target.dtype)))  # fmt: skip
        return Verdict(f"returns {found}, expected {expected}")
    allowed = backend.max_deviation[target.dtype]
    difference = output.float() - reference
    overall = float(difference.norm() / reference.norm())
    worst = float((difference.norm(dim=-1) / reference.norm(dim=-1)).max())
    if overall <= allowed.overall and worst <= allowed.worst:  # NaN is neither
        return Verdict(None, overall)
    return Verdict(
        f"computes wrong numbers here: {overall:.2g} from SDPA in float32 (relative L2), {worst:.2g} at the worst "
        f"token; allowed are {allowed.overall:g} and {allowed.worst:g}",
        overall,
    )


def make_inputs(target: Target, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value as a block hands them over: (B, heads, N, head_dim), views of (B, N, heads, …)."""
    generator = torch.Generator(target.device).manual_seed(0)

    def normal(scale: float) -> Tensor:
        shape = (batch, tokens, target.heads, target.head_dim)
        tensor = torch.randn(shape, generator=generator, device=target.device, dtype=torch.float32)
        return tensor.mul_(scale).to(target.dtype).transpose(1, 2)

    return normal(SHARPNESS), normal(1.0), normal(1.0)


def _reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query.float(), key.float(), value.float())


def _as_in_a_block(backend: Backend, attention: Attention) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention is nothing until it is compiled; the others are the same compiled or not.

    It is compiled as in a region, with the sizes and views that a double block has: on a CPU torch 2.11 compiles it for
    other ones, and fails for these.
    """
    if backend.name != "flex":
        return functools.partial(_alone, attention)
    # A code object of its own: dynamo keeps compiled code with it, and would call the next target's a recompile.
    own = types.FunctionType(_joined.__code__.replace(), _joined.__globals__, _joined.__name__)
    compiled = torch.compile(own, fullgraph=True, dynamic=True)

    def run(*inputs: Tensor) -> Tensor:
        _, _, tokens, head_dim = inputs[0].shape
        joint = [heads.transpose(1, 2).flatten(2) for heads in inputs]
        parts = [part.contiguous() for each in joint for part in each.tensor_split([TEXT_TOKENS], dim=1)]
        ones = inputs[0].new_ones(1, tokens, 1, head_dim)
        for tensor in (ones, *parts):  # a model's widths are constant
            torch._dynamo.mark_static(tensor, tensor.ndim - 1)
        mark_batch(parts)
        with torch.fx.experimental._config.patch(**SHAPE_OPTIONS):
            return compiled(attention, ones, *parts)

    return run


def _alone(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value, None)


def _joined(attention: Attention, ones: Tensor, *parts: Tensor) -> Tensor:
    """Join text's and image's (B, tokens, heads · head_dim) query, key and value, multiply two by ones, attend."""
    joint = (torch.cat(parts[first : first + 2], dim=1) for first in (0, 2, 4))
    query, key, value = (x.view(*x.shape[:-1], -1, ones.shape[-1]) for x in joint)
    query, key, value = (heads.transpose(1, 2) for heads in (query * ones, key * ones, value))
    return attention(query, key, value, None)
