"""What a LoRA binds to one linear, and the empty Parameter through which it comes to the `operators`.

The operators look at the bound tensors when they run; compiled code around them has no use for these, and each tensor
that it takes costs guards and symbolic sizes at every call. So a linear's slot is an empty Parameter of constant shape,
whose attribute is what is bound. PyTorch hands an operator the very object that the model has, compiled or not, as it
does with the weights of `packed`. A forward of 57 narrow blocks took 11 ms more of one core when compiled code saw five
tensors for each linear: 48 ms with nothing bound and 67 with rank 16, now 37 and 57 (AMD EPYC, torch 2.14.1,
2026-11-25).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .kronecker import Term


@dataclass(frozen=True, slots=True)
class Bound:
    """What one linear computes beside its weight; nothing by default. All tensors are on the linear's device.

    Attributes:
        lora_A: ``rank in_features``, contiguous, with a rank above 0.
        lora_B: ``out_features rank``, contiguous; there if lora_A is.
        mixing: ``(blocks w w)``, the blocks of a block-diagonal matrix that the linear's output, without its bias, is
            multiplied with.
        buffer: one-dimensional: where the matrices of the Kronecker products lie, among other things.
        terms: the Kronecker products.
    """

    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    mixing: Tensor | None = None
    buffer: Tensor | None = None
    terms: tuple[Term, ...] = ()


NOTHING = Bound()


def make_slot(device: torch.device) -> nn.Parameter:
    """A slot for one linear; set its `bound_lora` to a `Bound` before it runs.

    Dynamo guards on two inputs being the same object, so each linear has its own.
    """
    with torch.inference_mode(False), torch.no_grad():
        return nn.Parameter(torch.empty(0, device=device), requires_grad=False)


def bound_to(slot: Tensor) -> Bound:
    """What is in a slot.

    Raises:
        RuntimeError: nothing is, not even `NOTHING`.
    """
    bound: Bound | None = getattr(slot, "bound_lora", None)
    if bound is None:
        raise RuntimeError(
            f"the LoRA slot of a linear is a {type(slot).__name__} of shape {tuple(slot.shape)} to which nothing is "
            "bound, expected the Parameter that `LoraSlots` made: either `LoraSlots.bind` was not called (bind `empty` "
            "to run without a LoRA), or the Parameter was replaced by a copy, which lacks its attributes."
        )
    return bound
