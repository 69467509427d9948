"""What FLUX.1 needs of ComfyUI, beside what every family does. Nothing of ComfyUI is imported before it is checked."""

from __future__ import annotations

from ...reliance import MODEL, RAN, READ, TEXT_ENCODERS, Reliance, each


def nameless_weights() -> list[str]:
    """See `skeleton.nameless_weights`."""
    from . import skeleton

    return skeleton.nameless_weights()


RELIANCES: tuple[Reliance, ...] = (
    Reliance("comfy.model_base:Flux", (MODEL,), ("model_config", "model_type")),
    Reliance("comfy.model_base:Flux.memory_required", (MODEL,), ("input_shape", "cond_shapes")),
    Reliance(
        "comfy.model_base:Flux._apply_model",
        (MODEL,),
        ("x", "t", "c_concat", "c_crossattn", "control", "transformer_options"),
    ),
    *each("comfy.model_base:ModelType.", "FLUX FLOW", (MODEL,)),
    *each("comfy.supported_models:", "Flux.set_inference_dtype FluxSchnell.set_inference_dtype", (MODEL,)),
    Reliance("comfy.ldm.flux.model:Flux", (MODEL,), ("dtype", "device", "operations"), READ),
    Reliance("comfy.ldm.flux.model:FluxParams", (MODEL,), seen=READ),
    Reliance(
        "comfy.sd1_clip:SDClipModel",
        (TEXT_ENCODERS,),
        ("device", "dtype", "max_length", "textmodel_json_config", "special_tokens", "model_class",
         "return_projected_pooled", "model_options"),
    ),
    *each("comfy.text_encoders.t5:", "T5", (TEXT_ENCODERS,), RAN),
    *each("comfy.clip_model:", "CLIPTextModel", (TEXT_ENCODERS,), RAN),
    Reliance("comfy.text_encoders.flux:FluxTokenizer", (TEXT_ENCODERS,), ("embedding_directory", "tokenizer_data")),
)
