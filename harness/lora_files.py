"""Random FLUX.1 LoRA files in the formats that trainers write.

A LoRA is described by BFL module names (`double_blocks.0.img_attn.qkv`). A format says which parts of each module get
matrices of their own, and how their keys are spelled; to add a format, add one entry to `FORMATS`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .tensor_files import write_tensors
from .tiny_models import TinyFluxConfig, flux_linears, linear_gain, seeded_normal

Rank = int | Mapping[str, int] | Callable[[str], int]


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

    parts: Callable[[str, TinyFluxConfig], tuple[Part, ...]]
    down: str
    up: str
    clip_prefix: str
    clip_separator: str


def _whole(prefix: str, module: str, config: TinyFluxConfig) -> tuple[Part, ...]:
    return (Part(prefix, ((0, flux_linears(config)[module][0]),)),)


def _kohya_parts(module: str, config: TinyFluxConfig) -> tuple[Part, ...]:
    return _whole(f"lora_unet_{module.replace('.', '_')}", module, config)


def _native_parts(module: str, config: TinyFluxConfig) -> tuple[Part, ...]:
    return _whole(f"diffusion_model.{module}", module, config)


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


def _diffusers_parts(module: str, config: TinyFluxConfig) -> tuple[Part, ...]:
    """Split q, k, v and the MLP of single blocks; `norm_out` holds (scale, shift) where BFL holds (shift, scale)."""
    hidden = config.hidden
    if module == "final_layer.adaLN_modulation.1":
        return (Part("transformer.norm_out.linear", ((hidden, 2 * hidden), (0, hidden))),)
    if module in _DIFFUSERS_EMBEDDERS:
        return _whole(f"transformer.{_DIFFUSERS_EMBEDDERS[module]}", module, config)
    family, index, inner = module.split(".", 2)
    block = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}[family]
    names = [f"transformer.{block}.{index}.{name}" for name in _DIFFUSERS_BLOCKS[inner]]
    if len(names) == 1:
        return _whole(names[0], module, config)
    stops = [hidden, 2 * hidden, 3 * hidden, 3 * hidden + config.mlp]
    return tuple(Part(name, ((start, stop),)) for name, start, stop in zip(names, [0, *stops], stops, strict=False))


FORMATS: dict[str, LoraFormat] = {
    "kohya": LoraFormat(
        _kohya_parts, "lora_down.weight", "lora_up.weight", "lora_te1_text_model_encoder_layers_{layer}_", "_"),
    "diffusers": LoraFormat(
        _diffusers_parts, "lora_A.weight", "lora_B.weight", "text_encoder.text_model.encoder.layers.{layer}.", "."),
    "native": LoraFormat(
        _native_parts, "lora_A.weight", "lora_B.weight",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.{layer}.", "."),
}
"""`kohya`: kohya-ss/sd-scripts; `diffusers`: diffusers and PEFT; `native`: BFL names under ComfyUI's prefix."""


def in_blocks(module: str) -> bool:
    """Target predicate: everything inside the blocks, sd-scripts' default."""
    return module.startswith(("double_blocks.", "single_blocks."))


def in_attention(module: str) -> bool:
    """Target predicate: attention, and the fused linears of single blocks that hold theirs."""
    return "_attn." in module or module.endswith((".linear1", ".linear2"))


def _format(name: str) -> LoraFormat:
    if name not in FORMATS:
        raise ValueError(f"LoRA format {name!r} is not known; expected one of {', '.join(FORMATS)}.")
    return FORMATS[name]


def _rank_of(rank: Rank, module: str) -> int:
    value = rank if isinstance(rank, int) else rank[module] if isinstance(rank, Mapping) else rank(module)
    if value < 1:
        raise ValueError(f"The rank of {module} is {value}, expected 1 or more.")
    return value


def _matrices(name: str, shape: tuple[int, int], rank: int, alpha: float | None, rms: float,
              seed: int) -> tuple[Tensor, Tensor]:
    """Float32 (rank, in) and (out, rank), so that alpha / rank times their product has `rms` per entry."""
    out_features, in_features = shape
    down = seeded_normal(seed, f"{name}.down", (rank, in_features), 1.0 / math.sqrt(in_features))
    scaling = (rank if alpha is None else alpha) / rank
    up_std = rms * math.sqrt(in_features / rank) / scaling
    return down, seeded_normal(seed, f"{name}.up", (out_features, rank), up_std)


def lora_state_dict(format: str, config: TinyFluxConfig = TinyFluxConfig(), *, rank: Rank = 8,
                    alpha: float | None = None, targets: Callable[[str], bool] | None = None, seed: int = 0,
                    scale: float = 0.3, dtype: torch.dtype = torch.float32, tied: bool = False) -> dict[str, Tensor]:
    """Random LoRA for a FLUX.1 transformer; both matrices of every layer are non-zero.

    Args:
        format: A name in `FORMATS`.
        config: The model that it fits.
        rank: One rank, or one per BFL module name, as a mapping or a function.
        alpha: Written as `.alpha` keys; None writes none, which readers take as alpha = rank.
        targets: Which BFL modules get a LoRA; all linears by default.
        seed: Same arguments and seed give the same values.
        scale: Size of the change at strength 1, relative to the weights (Frobenius); it does not depend on rank, alpha.
        dtype: Of every tensor in the file.
        tied: With the same seed and rank, change the weights by the same amount in every format: the parts of a fused
            layer then share its down matrix. Otherwise each part has its own, as trained files do.
    Returns:
        CPU tensors by key: (rank, in_features) down, (out_features, rank) up, and scalar alpha.
    Raises:
        ValueError: Unknown format, a rank below 1, or no module left by `targets`.
        KeyError: A rank mapping lacks a targeted module.
    """
    spelling = _format(format)
    tensors: dict[str, Tensor] = {}
    for module, (out_features, in_features) in flux_linears(config).items():
        if targets is not None and not targets(module):
            continue
        module_rank = _rank_of(rank, module)
        rms = scale * linear_gain(module) / math.sqrt(in_features)
        fused = _matrices(module, (out_features, in_features), module_rank, alpha, rms, seed) if tied else None
        for part in spelling.parts(module, config):
            if fused is not None:
                down, up = fused[0], torch.cat([fused[1][start:stop] for start, stop in part.rows])
            else:
                down, up = _matrices(part.prefix, (part.out_features, in_features), module_rank, alpha, rms, seed)
            tensors |= _layer(spelling, part.prefix, down, up, alpha, dtype)
    if not tensors:
        raise ValueError("The LoRA would be empty: `targets` accepts no BFL module name of this model.")
    return tensors


def _layer(spelling: LoraFormat, prefix: str, down: Tensor, up: Tensor, alpha: float | None,
           dtype: torch.dtype) -> dict[str, Tensor]:
    """Keys of one layer; copies, so that no two tensors of a file share memory (safetensors refuses that)."""
    tensors = {
        f"{prefix}.{spelling.down}": down.to(dtype, copy=True),
        f"{prefix}.{spelling.up}": up.to(dtype, copy=True),
    }
    if alpha is not None:
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return tensors


def clip_l_lora_state_dict(format: str, *, rank: int = 4, alpha: float | None = None, layers: Iterable[int] = range(12),
                           seed: int = 0, scale: float = 0.3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random LoRA for CLIP-L, to be merged into a FLUX LoRA's dict: files that train the text encoder hold both.

    Args:
        format: A name in `FORMATS`.
        rank: Of every layer.
        alpha: As in `lora_state_dict`.
        layers: Which of the 12 encoder layers.
        seed: As in `lora_state_dict`.
        scale: As in `lora_state_dict`.
        dtype: Of every tensor.
    Returns:
        CPU tensors by key.
    """
    spelling = _format(format)
    shapes = {f"self_attn.{name}_proj": (768, 768) for name in ("q", "k", "v", "out")}
    shapes |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        for module, shape in shapes.items():
            prefix = spelling.clip_prefix.format(layer=layer) + module.replace(".", spelling.clip_separator)
            down, up = _matrices(prefix, shape, rank, alpha, scale / math.sqrt(shape[1]), seed)
            tensors |= _layer(spelling, prefix, down, up, alpha, dtype)
    return tensors


def write_lora(path: Path | str, format: str, config: TinyFluxConfig = TinyFluxConfig(), **arguments: object) -> Path:
    """Write `lora_state_dict(format, config, **arguments)` to a safetensors file and return its path."""
    return write_tensors(Path(path), lora_state_dict(format, config, **arguments))


def demo_a() -> dict[str, Tensor]:
    """The demo's first LoRA: sd-scripts format, rank 8, alpha 4, bf16, all block layers."""
    return lora_state_dict("kohya", rank=8, alpha=4.0, targets=in_blocks, seed=11, scale=0.5, dtype=torch.bfloat16)


def demo_b() -> dict[str, Tensor]:
    """The demo's second LoRA: PEFT format, rank 16, bf16, attention only."""
    return lora_state_dict("diffusers", rank=16, targets=in_attention, seed=29, scale=0.6, dtype=torch.bfloat16)
