"""By which names LoRA files call the linears and norms of FLUX.1."""

from __future__ import annotations

from collections.abc import Iterator

from ...layout import FusedLinear, Layout, LinearPart, LoraTarget, VectorWeight

# XLabs-AI/x-flux names a LoRA by its place in the attention processor: 1 is the image stream, 2 the text stream.
XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear2": "processor.proj_lora",
}
# Other names for diffusers' modules that LyCORIS files have (ComfyUI, comfy/utils.py, flux_to_diffusers).
LYCORIS = {
    ".ff.net.0.proj": ".ff.linear_in",
    ".ff.net.2": ".ff.linear_out",
    ".ff_context.net.0.proj": ".ff_context.linear_in",
    ".ff_context.net.2": ".ff_context.linear_out",
}
# Ends of fused linears -> what they are called in diffusers' blocks where they stay fused.
FUSED_DIFFUSERS = {
    ".img_attn.qkv": ".attn.to_qkv",
    ".txt_attn.qkv": ".attn.to_added_qkv",
    ".linear1": ".attn.to_qkv_mlp_proj",
    ".linear2": ".attn.to_out",
}


def lora_aliases(layout: Layout) -> dict[str, LoraTarget]:
    """Module name as written in LoRA files -> the linears that it means.

    Original names, where a fused linear is one module:
        `lora_unet_double_blocks_0_img_attn_qkv` kohya-ss/sd-scripts,
        `diffusion_model.double_blocks.0.img_attn.qkv` ComfyUI, ai-toolkit,
        `double_blocks.0.img_attn.qkv` black-forest-labs,
        `base_model.model.double_blocks.0.img_attn.qkv` fal's Kontext trainer,
        `double_blocks.0.processor.qkv_lora1` XLabs, also under `diffusion_model.`.
    Original names with q, k, v and the MLP apart:
        `transformer.double_blocks.0.img_attn.qkv.0` OneTrainer (OMI).
    diffusers' names, where it is split:
        `transformer.transformer_blocks.0.attn.to_q` diffusers, PEFT, ai-toolkit, SimpleTuner,
        `base_model.model.transformer_blocks.0.attn.to_q` PEFT's own save_pretrained,
        `transformer_blocks.0.attn.to_q` DiffSynth,
        `lora_transformer_transformer_blocks_0_attn_to_q` OneTrainer,
        `lycoris_transformer_blocks_0_attn_to_q` LyCORIS in SimpleTuner,
        `diffusion_model.transformer_blocks.0.attn.to_q` SimpleTuner for ComfyUI.
    diffusers' names of layers that stay fused:
        `transformer.transformer_blocks.0.attn.to_qkv` SimpleTuner,
        `transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj` as FLUX.2's are called.
    """
    aliases: dict[str, LoraTarget] = {}
    for linear in layout.linears:
        fused = LoraTarget.whole(linear)
        for name in _original_names(linear.name):
            aliases[name] = fused
        for name in _fused_diffusers_names(linear):
            aliases[name] = fused
        for index, (part, alone) in enumerate(_split(linear)):
            if len(linear.parts) > 1:
                aliases[f"transformer.{linear.name}.{index}"] = alone
            for name in _diffusers_names(part.module):
                aliases[name] = alone
            for end, other in LYCORIS.items():
                if part.module.endswith(end):
                    for name in _diffusers_names(part.module.removesuffix(end) + other):
                        aliases[name] = alone
        if linear.name.endswith(".linear1"):
            block = linear.name.removesuffix("linear1")
            qkv = _attention(linear)
            for name in (f"{block}processor.qkv_lora", f"{block}linear1_qkv"):
                aliases[name] = aliases[f"diffusion_model.{name}"] = qkv
            for name in _diffusers_names(f"{_diffusers_block(block)}attn.to_qkv"):
                aliases[name] = qkv
    return aliases


def lora_norms(layout: Layout) -> dict[str, VectorWeight]:
    """Name of a norm as written in LoRA files -> its scale.

    The names are those of `lora_aliases`; the original ones without the `.scale` at their end.
    """
    norms: dict[str, VectorWeight] = {}
    for vector in layout.vectors:
        original = vector.name.removesuffix(".scale")
        for name in (*_prefixed(original), *_diffusers_names(vector.parameter.removesuffix(".weight"))):
            norms[name] = vector
    return norms


def _original_names(name: str) -> Iterator[str]:
    yield from _prefixed(name)
    # OneTrainer's OMI format calls the image embedder by its place in a module.
    yield f"transformer.{name}.proj" if name == "img_in" else f"transformer.{name}"
    for suffix, xlabs in XLABS.items():
        if name.endswith(f".{suffix}"):
            other = name.removesuffix(suffix) + xlabs
            yield from (other, f"diffusion_model.{other}")


def _prefixed(name: str) -> tuple[str, ...]:
    underscored = name.replace(".", "_")
    return f"lora_unet_{underscored}", f"diffusion_model.{name}", name, f"base_model.model.{name}"


def _diffusers_names(module: str) -> tuple[str, ...]:
    underscored = module.replace(".", "_")
    return (
        f"transformer.{module}",
        module,
        f"base_model.model.{module}",
        f"lora_transformer_{underscored}",
        f"lycoris_{underscored}",
        f"diffusion_model.{module}",
    )


def _fused_diffusers_names(linear: FusedLinear) -> Iterator[str]:
    """A block's linears as diffusers names them where q, k and v are one, in single blocks with the MLP (FLUX.2)."""
    for suffix, other in FUSED_DIFFUSERS.items():
        if linear.name.endswith(suffix):
            yield from _diffusers_names(_diffusers_block(linear.name.removesuffix(suffix)) + other)


def _diffusers_block(name: str) -> str:
    return name.replace("single_blocks", "single_transformer_blocks").replace("double_blocks", "transformer_blocks")


def _split(linear: FusedLinear) -> Iterator[tuple[LinearPart, LoraTarget]]:
    # A LoRA in diffusers' names already stands in diffusers' row order: nothing to swap.
    for part in linear.parts:
        alone = (LinearPart(part.module, 0, part.rows),)
        yield part, LoraTarget(alone, linear.in_features, part.rows, False, linear.narrow)


def _attention(linear1: FusedLinear) -> LoraTarget:
    """The q, k and v rows of a single block's first linear, without its MLP."""
    parts = linear1.parts[:3]
    return LoraTarget(parts, linear1.in_features, sum(part.rows for part in parts), False)
