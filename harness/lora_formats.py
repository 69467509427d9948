"""How trainers spell a FLUX LoRA: which parts of each module get matrices of their own, and under which keys.

A LoRA is described by BFL module names (`double_blocks.0.img_attn.qkv`). To add a format, add one entry to
`OTHER_FORMATS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .tiny_flux2 import TinyFlux2Config, flux2_linears
from .tiny_models import TinyFluxConfig, flux_linears

TinyConfig = TinyFluxConfig | TinyFlux2Config


def linears_of(config: TinyConfig) -> dict[str, tuple[int, int]]:
    """Every linear of a model under its BFL module name, as (out_features, in_features)."""
    return flux2_linears(config) if isinstance(config, TinyFlux2Config) else flux_linears(config)


@dataclass(frozen=True)
class Part:
    """Output rows of one BFL linear that have a LoRA of their own.

    Args:
        prefix: Key up to the matrix name.
        rows: (start, stop) ranges of the BFL weight's rows, in the order of this part's rows.
    """

    prefix: str
    rows: tuple[tuple[int, int], ...]

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return sum(stop - start for start, stop in self.rows)


@dataclass(frozen=True)
class LoraFormat:
    """How one family of trainers spells a LoRA.

    Args:
        parts: (BFL module name, config) to the parts that the format gives it.
        down: Suffix of the (rank, in_features) matrix.
        up: Suffix of the (out_features, rank) matrix.
        clip_prefix: Key prefix of CLIP-L's layer {layer}; `clip_separator` joins the module path after it.
        clip_separator: "_" or ".".
    """

    parts: Callable[[str, TinyConfig], tuple[Part, ...]]
    down: str
    up: str
    clip_prefix: str
    clip_separator: str


def _whole(prefix: str, module: str, config: TinyConfig) -> tuple[Part, ...]:
    return (Part(prefix, ((0, linears_of(config)[module][0]),)),)


def _kohya_parts(module: str, config: TinyConfig) -> tuple[Part, ...]:
    return _whole(f"lora_unet_{module.replace('.', '_')}", module, config)


def _native_parts(module: str, config: TinyConfig) -> tuple[Part, ...]:
    return _whole(f"diffusion_model.{module}", module, config)


# BFL's list of blocks -> diffusers'.
DIFFUSERS_LISTS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_DIFFUSERS_EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}

_DIFFUSERS_BLOCKS = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
# Where diffusers calls a part of FLUX.2 otherwise than the same part of FLUX.1.
_DIFFUSERS_EMBEDDERS_2 = {
    name: module.replace("time_text_embed", "time_guidance_embed") for name, module in _DIFFUSERS_EMBEDDERS.items()
} | {
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
}
_DIFFUSERS_BLOCKS_2 = _DIFFUSERS_BLOCKS | {
    "img_mlp.0": ("ff.linear_in",),
    "img_mlp.2": ("ff.linear_out",),
    "txt_mlp.0": ("ff_context.linear_in",),
    "txt_mlp.2": ("ff_context.linear_out",),
    "linear1": ("attn.to_qkv_mlp_proj",),
    "linear2": ("attn.to_out",),
}


def _diffusers_parts(module: str, config: TinyConfig, prefix: str = "transformer.") -> tuple[Part, ...]:
    """Split q, k, v and FLUX.1's MLP of single blocks; `norm_out` holds (scale, shift), BFL (shift, scale)."""
    if isinstance(config, TinyFlux2Config):
        return _renamed_parts(module, config, prefix, _DIFFUSERS_EMBEDDERS_2, _DIFFUSERS_BLOCKS_2)
    return _renamed_parts(module, config, prefix, _DIFFUSERS_EMBEDDERS, _DIFFUSERS_BLOCKS)


def _renamed_parts(module: str, config: TinyConfig, prefix: str, embedders: Mapping[str, str],
                   blocks: Mapping[str, tuple[str, ...]]) -> tuple[Part, ...]:
    hidden = config.hidden
    if module == "final_layer.adaLN_modulation.1":
        return (Part(f"{prefix}norm_out.linear", ((hidden, 2 * hidden), (0, hidden))),)
    if module in embedders:
        return _whole(f"{prefix}{embedders[module]}", module, config)
    family, index, inner = module.split(".", 2)
    block = DIFFUSERS_LISTS[family]
    names = [f"{prefix}{block}.{index}.{name}" for name in blocks[inner]]
    if len(names) == 1:
        return _whole(names[0], module, config)
    stops = [hidden, 2 * hidden, 3 * hidden, linears_of(config)[module][0]]
    return tuple(Part(name, ((start, stop),)) for name, start, stop in zip(names, [0, *stops], stops, strict=False))


def _underscored(prefix: str) -> Callable[[str, TinyConfig], tuple[Part, ...]]:
    """Diffusers' names with underscores, behind a prefix."""

    def parts(module: str, config: TinyConfig) -> tuple[Part, ...]:
        return tuple(
            Part(prefix + part.prefix.replace(".", "_"), part.rows) for part in _diffusers_parts(module, config, "")
        )

    return parts


def _original(prefix: str) -> Callable[[str, TinyConfig], tuple[Part, ...]]:
    return lambda module, config: _whole(prefix + module, module, config)


_XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear2": "processor.proj_lora",
}


def _xlabs_parts(module: str, config: TinyConfig) -> tuple[Part, ...]:
    """Attention only; of a single block's first linear the q, k and v rows."""
    for suffix, name in _XLABS.items():
        if module.endswith(f".{suffix}"):
            return _whole(module.removesuffix(suffix) + name, module, config)
    if module.endswith(".linear1"):
        return (Part(module.removesuffix("linear1") + "processor.qkv_lora", ((0, 3 * config.hidden),)),)
    return ()


def _omi_parts(module: str, config: TinyConfig) -> tuple[Part, ...]:
    """BFL's names, behind which fused linears are numbered parts; rows stand in BFL's order."""
    parts = _diffusers_parts(module, config)
    if len(parts) == 1:
        embedder = module == "img_in" and isinstance(config, TinyFluxConfig)
        return _whole("transformer.img_in.proj" if embedder else f"transformer.{module}", module, config)
    return tuple(Part(f"transformer.{module}.{number}", part.rows) for number, part in enumerate(parts))


def _single_parts(module: str, config: TinyConfig) -> tuple[Part, ...]:
    """FLUX.2 in the names of FLUX.1 that ComfyUI's map has for it, with every part of a single block by itself."""
    blocks = _DIFFUSERS_BLOCKS_2 | {name: _DIFFUSERS_BLOCKS[name] for name in ("linear1", "linear2")}
    return _renamed_parts(module, config, "transformer.", _DIFFUSERS_EMBEDDERS_2 | _DIFFUSERS_EMBEDDERS, blocks)


_FUSED = {
    "img_attn.qkv": "attn.to_qkv",
    "txt_attn.qkv": "attn.to_added_qkv",
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
}


def _fused_parts(module: str, config: TinyConfig) -> tuple[Part, ...]:
    """Names of diffusers where q, k and v stay fused."""
    for suffix, name in _FUSED.items():
        if module.endswith(f".{suffix}"):
            kind, index = module.split(".")[:2]
            block = DIFFUSERS_LISTS[kind]
            return _whole(f"transformer.{block}.{index}.{name}", module, config)
    return _diffusers_parts(module, config)


_CLIP_KOHYA = "lora_te1_text_model_encoder_layers_{layer}_"
_CLIP_DIFFUSERS = "text_encoder.text_model.encoder.layers.{layer}."
_PEFT = ("lora_A.weight", "lora_B.weight")
_LYCORIS = ("lora_down.weight", "lora_up.weight")

FORMATS: dict[str, LoraFormat] = {
    "kohya": LoraFormat(_kohya_parts, *_LYCORIS, _CLIP_KOHYA, "_"),
    "diffusers": LoraFormat(_diffusers_parts, *_PEFT, _CLIP_DIFFUSERS, "."),
    "native": LoraFormat(
        _native_parts, *_PEFT, "text_encoders.clip_l.transformer.text_model.encoder.layers.{layer}.", "."),
}
"""The formats that cover every way to split and name a model: `kohya` kohya-ss/sd-scripts; `diffusers` diffusers, PEFT,
ai-toolkit, SimpleTuner; `native` BFL names under ComfyUI's prefix."""

OTHER_FORMATS: dict[str, LoraFormat] = {
    "diffusers_old": LoraFormat(_diffusers_parts, "lora.down.weight", "lora.up.weight", _CLIP_DIFFUSERS, "."),
    "onetrainer": LoraFormat(_underscored("lora_transformer_"), *_LYCORIS, _CLIP_KOHYA, "_"),
    "lycoris": LoraFormat(_underscored("lycoris_"), *_LYCORIS, _CLIP_KOHYA, "_"),
    "diffsynth": LoraFormat(
        lambda module, config: _diffusers_parts(module, config, ""),
        "lora_A.default.weight", "lora_B.default.weight", _CLIP_DIFFUSERS, "."),
    "bfl": LoraFormat(_original(""), *_PEFT, _CLIP_DIFFUSERS, "."),
    "fal": LoraFormat(_original("base_model.model."), *_PEFT, _CLIP_DIFFUSERS, "."),
    "omi": LoraFormat(_omi_parts, *_LYCORIS, _CLIP_DIFFUSERS, "."),
    "diffusers_fused": LoraFormat(_fused_parts, *_PEFT, _CLIP_DIFFUSERS, "."),
    "simpletuner": LoraFormat(
        lambda module, config: _diffusers_parts(module, config, "diffusion_model."), *_PEFT, _CLIP_DIFFUSERS, "."),
    "xlabs": LoraFormat(_xlabs_parts, "down.weight", "up.weight", _CLIP_DIFFUSERS, "."),
}
"""Others' names for the same parts, by the sources that read them (comfy/lora.py, diffusers' lora_conversion_utils.py):
`diffusers_old` diffusers before PEFT; `onetrainer` OneTrainer; `lycoris` LyCORIS in SimpleTuner; `diffsynth` DiffSynth;
`bfl` Black Forest Labs; `fal` fal's Kontext trainer; `omi` OneTrainer's newer files; `diffusers_fused` SimpleTuner with
fused projections; `simpletuner` SimpleTuner for ComfyUI; `xlabs` XLabs' x-flux."""

FLUX2_FORMATS: dict[str, LoraFormat] = {
    **FORMATS,
    **{name: spelling for name, spelling in OTHER_FORMATS.items() if name != "xlabs"},
    "single_parts": LoraFormat(_single_parts, *_PEFT, _CLIP_DIFFUSERS, "."),
}
"""Those of a FLUX.2 LoRA."""

UNKNOWN_TO_STOCK = ("bfl", "fal", "omi", "diffusers_fused", "simpletuner", "xlabs")
ALL_FORMATS = {**FORMATS, **OTHER_FORMATS}
STOCK_FORMATS = tuple(name for name in ALL_FORMATS if name not in UNKNOWN_TO_STOCK)
"""Those of FLUX.1 that stock ComfyUI reads too, in models of every size (it knows XLabs' names by the last block's)."""
FLUX2_STOCK_FORMATS = ("kohya", "native")
"""Of diffusers' names stock ComfyUI lacks those of FLUX.2's modulations and embedders."""


def format_named(name: str) -> LoraFormat:
    """The format of a name in `ALL_FORMATS` or `FLUX2_FORMATS`.

    Raises:
        ValueError: There is none.
    """
    known = ALL_FORMATS | FLUX2_FORMATS
    if name not in known:
        raise ValueError(f"LoRA format {name!r} is not known; expected one of {', '.join(known)}.")
    return known[name]
