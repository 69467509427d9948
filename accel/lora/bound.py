"""What a LoRA binds to one linear, and the empty Parameter through which compiled code is told of it.

The operators of `layers` look at the bound tensors when they run; the compiled code around them needs to know nothing
of these, and each tensor that it does know costs guards and sizes at every call: 19 ms instead of 48 for a forward of
FLUX.1's depth on one core. So a linear's slot is an empty Parameter of constant shape, whose attribute is what is
bound. PyTorch hands an operator the very object that the model has, compiled or not, see also `packed`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .kronecker import Term

_BOUND = "bound_lora"


@dataclass(frozen=True, slots=True)
class Bound:
    """What one linear computes beside its weight; nothing by default. All tensors are on the linear's device.

    Attributes:
        lora_A: (rank, in_features), contiguous, with a rank above 0.
        lora_B: (out_features, rank), contiguous; there if lora_A is.
        mixing: (blocks · b · b,), the blocks of a block-diagonal matrix that the linear's output, without its bias, is
            multiplied with.
        buffer: (elements,): where the matrices of the Kronecker products lie, among other things.
        terms: the Kronecker products.
    """

    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    mixing: Tensor | None = None
    buffer: Tensor | None = None
    terms: Sequence[Term] = ()


NOTHING = Bound()


def make_slot(device: torch.device) -> nn.Parameter:
    """A slot for one linear. Dynamo guards on two inputs being the same object, so each linear has its own."""
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(torch.empty(0, device=device), requires_grad=False)


def bind(slot: Tensor, bound: Bound | None) -> None:
    """Put something into a slot; None empties it, so that nothing can run."""
    setattr(slot, _BOUND, bound)


def bound_to(slot: Tensor) -> Bound:
    """What is in a slot.

    Raises:
        RuntimeError: nothing is, not even `NOTHING`.
    """
    bound = getattr(slot, _BOUND, None)
    if bound is None:
        raise RuntimeError(
            f"the LoRA slot of a linear is a {type(slot).__name__} of shape {tuple(slot.shape)} to which nothing is "
            "bound, expected the Parameter that `LoraSlots` made: either `LoraSlots.bind` was not called (bind `empty` "
            "to run without a LoRA), or the Parameter was replaced by a copy, which has not its attributes."
        )
    return bound
