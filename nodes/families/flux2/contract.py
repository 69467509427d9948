"""What FLUX.2 needs of ComfyUI, beside what every family does. Nothing of ComfyUI is imported before it is checked."""

from __future__ import annotations

from ...reliance import MODEL, READ, Reliance, each


def nameless_weights() -> list[str]:
    """See `skeleton.nameless_weights`."""
    from . import skeleton

    return skeleton.nameless_weights()


RELIANCES: tuple[Reliance, ...] = (
    *each("comfy.model_base:", "Flux2", (MODEL,), READ),
    *each("comfy.supported_models:", "Flux2.set_inference_dtype", (MODEL,), READ),
    Reliance("comfy.ldm.flux.layers:ModulationOut", (MODEL,), ("shift", "scale", "gate"), READ),
)
