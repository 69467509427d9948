"""What such families tell the rest of `nodes` alike."""

from __future__ import annotations

from ....accel.families.layout import VectorWeight


def scale_names(vector: VectorWeight) -> tuple[str, str]:
    """ComfyUI calls the scale of an RMS norm `scale` up to 0.18 and `weight` later."""
    stem = vector.name.removesuffix("scale")
    return f"{stem}scale", f"{stem}weight"
