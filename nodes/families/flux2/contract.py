"""What FLUX.2 needs of ComfyUI, beside what every family does. Nothing of ComfyUI is imported before it is checked."""

from __future__ import annotations

from ...reliance import MODEL, READ, TAESD, Part, Reliance, each

TEXT_ENCODERS = Part("Flux Text Encoder Loader loads no text encoder of FLUX.2")


def nameless_weights() -> list[str]:
    """See `skeleton.nameless_weights`."""
    from . import skeleton

    return skeleton.nameless_weights()


TEXT_ENCODER_RELIANCES: tuple[Reliance, ...] = (
    Reliance(
        "comfy.sd1_clip:SDClipModel",
        (TEXT_ENCODERS,),
        ("device", "dtype", "layer", "textmodel_json_config", "special_tokens", "layer_norm_hidden_state",
         "model_class", "enable_attention_masks", "return_attention_masks", "model_options"),
    ),
    Reliance(
        "comfy.sd1_clip:SDTokenizer",
        (TEXT_ENCODERS,),
        ("tokenizer_path", "max_length", "pad_with_end", "embedding_directory", "embedding_size", "embedding_key",
         "tokenizer_class", "has_end_token", "pad_to_max_length", "min_length", "pad_token", "start_token", "pad_left",
         "disable_weights", "tokenizer_data"),
    ),
    Reliance("comfy.text_encoders.llama:Llama2_", (TEXT_ENCODERS,), ("config", "device", "dtype", "ops"), READ),
    *each("comfy.text_encoders.llama:", "BaseLlama.forward BaseLlama.get_input_embeddings", (TEXT_ENCODERS,), READ),
    *(
        Reliance(
            f"comfy.text_encoders.llama:{config}",
            (TEXT_ENCODERS,),
            ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "final_norm"),
            READ,
        )
        for config in ("Qwen3_4BConfig", "Mistral3Small24BConfig")
    ),
    *(
        Reliance(f"comfy.text_encoders.flux:{name}", (TEXT_ENCODERS,), ("embedding_directory", "tokenizer_data"))
        for name in ("KleinTokenizer", "KleinTokenizer8B", "Flux2Tokenizer")
    ),
)  # fmt: skip
RELIANCES: tuple[Reliance, ...] = (
    *each("comfy.model_base:", "Flux2", (MODEL,), READ),
    *each("comfy.supported_models:", "Flux2.set_inference_dtype", (MODEL,), READ),
    Reliance("comfy.ldm.flux.layers:ModulationOut", (MODEL,), ("shift", "scale", "gate"), READ),
    # Before 0.24 there is no TAESD for FLUX.2, and no such file loads: the node is there, and says so.
    Reliance("comfy.sd:VAE", (TAESD,), ("sd", "metadata"), READ),
    Reliance("comfy.sd:VAE.throw_exception_if_invalid", (TAESD,), seen=READ),
    Reliance("comfy.utils:load_torch_file", (TAESD,), ("ckpt",), READ),
    Reliance("comfy.taesd.taesd:TAESD", (TAESD,), seen=READ),
    *TEXT_ENCODER_RELIANCES,
)
