"""Layers for a model of ComfyUI's that is made for its names and shapes alone."""

from __future__ import annotations

from typing import Any

import comfy.ops


class EagerOperations(comfy.ops.disable_weight_init):
    """ComfyUI's layers, with their parameters from the beginning.

    With dynamic VRAM a `disable_weight_init.Linear` has none until a state dict is loaded, and no state dict ever is:
    the model would have no names. ComfyUI leaves subclasses alone that load state dicts by themselves
    (comfy/ops.py, 0.18.2 to 0.46).
    """

    class Linear(comfy.ops.disable_weight_init.Linear):
        """A linear that ComfyUI does not make empty."""

        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            super()._load_from_state_dict(*args, **kwargs)
