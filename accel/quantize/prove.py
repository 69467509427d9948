"""Whether a mode computes on a device: one small linear, converted and run as a block runs it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..hardware import dtype_name
from ..linear.layers import LoraLinear
from ..linear.slot import NOTHING, Bound, make_slot
from ..prove import Proof, Verdict, judge, proofs, random
from .mode import Mode

# Tokens of no kernel's tile, and sizes that every mode takes, of whole tiles as a transformer's are.
TOKENS, IN_FEATURES, OUT_FEATURES, RANK = (2, 67), 512, 384, 16
SCALE = IN_FEATURES**-0.5


def prove(mode: Mode, device: torch.device, dtype: torch.dtype) -> Proof:
    """Convert a linear there and compare it with the unquantized one: many rows, one row, a LoRA, and no bias.

    Args:
        mode: one in which nothing is missing on the device.
        device: where.
        dtype: of activations.

    Raises:
        torch.OutOfMemoryError: there is no room for a few megabytes: says nothing of the mode.
    """
    subject = f"quantization {mode.name}, {dtype_name(dtype)}"
    return proofs().of(subject, device, functools.partial(_compare, mode, device, dtype))


def _compare(mode: Mode, device: torch.device, dtype: torch.dtype) -> Verdict:
    deviation = 0.0
    for output, reference in _results(mode, device, dtype):
        verdict = judge(output, reference, mode.error)
        if verdict.refusal is not None:
            return verdict
        deviation = max(deviation, verdict.deviation)
    return Verdict(None, deviation)


def _results(mode: Mode, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and what they should be, ``(b n) out_features`` each."""
    x = random((*TOKENS, IN_FEATURES), device, 0).to(dtype)
    weight = random((OUT_FEATURES, IN_FEATURES), device, 1, SCALE).to(dtype)
    bias = random((OUT_FEATURES,), device, 2, 0.1).to(dtype)
    lora = Bound(
        random((RANK, IN_FEATURES), device, 3, SCALE).to(dtype),
        random((OUT_FEATURES, RANK), device, 4, RANK**-0.5).to(dtype),
    )
    reference = _reference(x, weight, bias)
    added = x.flatten(0, -2).float() @ lora.lora_A.float().t() @ lora.lora_B.float().t()
    layer = _layer(mode.convert(weight, bias, False), device)
    yield layer(x).flatten(0, -2), reference
    layer.lora.bound_lora = lora
    yield layer(x).flatten(0, -2), reference + added
    # Modulations see one row per picture.
    row = x[:, 0].contiguous()
    yield _layer(mode.convert(weight, bias, True), device)(row), _reference(row, weight, bias)
    unbiased = _layer(mode.convert(weight, None, False), device)
    yield unbiased(x).flatten(0, -2), reference - bias.float()


def _layer(base: nn.Module, device: torch.device) -> LoraLinear:
    """Wrap a linear, with nothing bound."""
    layer = LoraLinear(base)
    layer.lora = make_slot(device)
    layer.lora.bound_lora = NOTHING
    return layer


def _reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.addmm(bias.float(), x.flatten(0, -2).float(), weight.float().t())
