"""ComfyUI's own model without data: its names and shapes, by which other nodes match LoRAs and read sizes."""

from __future__ import annotations

import dataclasses
from typing import Any

import comfy.ldm.flux.model
import torch
from torch import nn

from ....accel.families.layout import Layout
from ...operations import EagerOperations


def make_skeleton(sizes: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """ComfyUI's model of these sizes, as its model detection writes them, on the meta device."""
    # Versions of ComfyUI differ in the fields that they know.
    known = {field.name for field in dataclasses.fields(comfy.ldm.flux.model.FluxParams)}
    params = {name: value for name, value in sizes.items() if name in known}
    return comfy.ldm.flux.model.Flux(
        **params, dtype=dtype, device="meta", operations=EagerOperations
    ).requires_grad_(False)


def nameless(sizes: dict[str, Any], layout: Layout) -> list[str]:
    """Weights of a small model's linears that its skeleton lacks: LoRAs for them would find no place."""
    names = make_skeleton(sizes, torch.float32).state_dict()
    return [name for linear in layout.linears if (name := f"{linear.name}.weight") not in names]
