"""Random FLUX.1 LoRA files in the formats that trainers write.

A LoRA is described by BFL module names (`double_blocks.0.img_attn.qkv`). A format says which parts of each module get
matrices of their own, and how their keys are spelled; to add a format, add one entry to `OTHER_FORMATS`.
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


def _diffusers_parts(module: str, config: TinyFluxConfig, prefix: str = "transformer.") -> tuple[Part, ...]:
    """Split q, k, v and the MLP of single blocks; `norm_out` holds (scale, shift) where BFL holds (shift, scale)."""
    hidden = config.hidden
    if module == "final_layer.adaLN_modulation.1":
        return (Part(f"{prefix}norm_out.linear", ((hidden, 2 * hidden), (0, hidden))),)
    if module in _DIFFUSERS_EMBEDDERS:
        return _whole(f"{prefix}{_DIFFUSERS_EMBEDDERS[module]}", module, config)
    family, index, inner = module.split(".", 2)
    block = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}[family]
    names = [f"{prefix}{block}.{index}.{name}" for name in _DIFFUSERS_BLOCKS[inner]]
    if len(names) == 1:
        return _whole(names[0], module, config)
    stops = [hidden, 2 * hidden, 3 * hidden, 3 * hidden + config.mlp]
    return tuple(Part(name, ((start, stop),)) for name, start, stop in zip(names, [0, *stops], stops, strict=False))


def _underscored(prefix: str) -> Callable[[str, TinyFluxConfig], tuple[Part, ...]]:
    """Diffusers' names with underscores, behind a prefix."""

    def parts(module: str, config: TinyFluxConfig) -> tuple[Part, ...]:
        return tuple(
            Part(prefix + part.prefix.replace(".", "_"), part.rows) for part in _diffusers_parts(module, config, "")
        )

    return parts


def _original(prefix: str) -> Callable[[str, TinyFluxConfig], tuple[Part, ...]]:
    return lambda module, config: _whole(prefix + module, module, config)


_XLABS = {
    "img_attn.qkv": "processor.qkv_lora1",
    "txt_attn.qkv": "processor.qkv_lora2",
    "img_attn.proj": "processor.proj_lora1",
    "txt_attn.proj": "processor.proj_lora2",
    "linear2": "processor.proj_lora",
}


def _xlabs_parts(module: str, config: TinyFluxConfig) -> tuple[Part, ...]:
    """Attention only; of a single block's first linear the q, k and v rows."""
    for suffix, name in _XLABS.items():
        if module.endswith(f".{suffix}"):
            return _whole(module.removesuffix(suffix) + name, module, config)
    if module.endswith(".linear1"):
        return (Part(module.removesuffix("linear1") + "processor.qkv_lora", ((0, 3 * config.hidden),)),)
    return ()


def _omi_parts(module: str, config: TinyFluxConfig) -> tuple[Part, ...]:
    """BFL's names, behind which fused linears are numbered parts; rows stand in BFL's order."""
    parts = _diffusers_parts(module, config)
    if len(parts) == 1:
        return _whole("transformer.img_in.proj" if module == "img_in" else f"transformer.{module}", module, config)
    return tuple(Part(f"transformer.{module}.{number}", part.rows) for number, part in enumerate(parts))


_FUSED = {
    "img_attn.qkv": "attn.to_qkv",
    "txt_attn.qkv": "attn.to_added_qkv",
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
}


def _fused_parts(module: str, config: TinyFluxConfig) -> tuple[Part, ...]:
    """Names of diffusers where q, k and v stay fused."""
    for suffix, name in _FUSED.items():
        if module.endswith(f".{suffix}"):
            kind, index = module.split(".")[:2]
            block = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}[kind]
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

UNKNOWN_TO_STOCK = ("bfl", "fal", "omi", "diffusers_fused", "simpletuner", "xlabs")
ALL_FORMATS = {**FORMATS, **OTHER_FORMATS}
STOCK_FORMATS = tuple(name for name in ALL_FORMATS if name not in UNKNOWN_TO_STOCK)
"""Those that stock ComfyUI reads too, in models of every size (it knows XLabs' names by the last block's)."""


def in_blocks(module: str) -> bool:
    """Target predicate: everything inside the blocks, sd-scripts' default."""
    return module.startswith(("double_blocks.", "single_blocks."))


def in_attention(module: str) -> bool:
    """Target predicate: attention, and the fused linears of single blocks that hold theirs."""
    return "_attn." in module or module.endswith((".linear1", ".linear2"))


def _format(name: str) -> LoraFormat:
    if name not in ALL_FORMATS:
        raise ValueError(f"LoRA format {name!r} is not known; expected one of {', '.join(ALL_FORMATS)}.")
    return ALL_FORMATS[name]


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
        format: A name in `ALL_FORMATS`.
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
        format: A name in `ALL_FORMATS`.
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


def _split_size(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a size, the first the largest one up to `factor`: what LyCORIS calls factorization."""
    first = next(number for number in range(factor, 0, -1) if size % number == 0)
    return first, size // first


def kind_tensors(kind: str, shape: tuple[int, int], *, rank: int = 4, alpha: float | None = None, rms: float = 0.05,
                 seed: int = 0, name: str = "") -> dict[str, Tensor]:
    """Random tensors of one kind of change of a linear, by the ends of their keys.

    Args:
        kind: a name in `KINDS`.
        shape: (out_features, in_features).
        rank: of every low-rank part.
        alpha: written as `alpha`; for OFT the constraint on the rotation.
        rms: rough size of the change per entry, so that no kind vanishes or explodes.
        seed: same arguments, same values.
        name: of the linear; names the random stream.
    Returns:
        Float32 CPU tensors, named as LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS) and PEFT name them.
    """
    (rows, columns), counter = shape, 0

    def normal(*size: int, std: float = 1.0) -> Tensor:
        nonlocal counter
        counter += 1
        return seeded_normal(seed, f"{name}.{kind}.{counter}", size, std)

    def pair(rows: int, columns: int, down: str = "lora_down.weight", up: str = "lora_up.weight") -> dict[str, Tensor]:
        return {down: normal(rank, columns), up: normal(rows, rank, std=rms / math.sqrt(rank))}

    lengths = 1.0 + 0.2 * normal(rows, 1).clamp(-2.0, 2.0)
    (rows1, rows2), (columns1, columns2) = _split_size(rows, 8), _split_size(columns, 8)
    tensors: dict[str, Tensor]
    if kind in ("LoRA", "LoRA 1x1", "LoCon", "DoRA", "PEFT DoRA", "PEFT bias"):
        tensors = pair(rows, columns)
        if kind == "LoRA 1x1":
            tensors = {key: value[:, :, None, None] for key, value in tensors.items()}
        if kind == "LoCon":
            tensors = {key: value[:, :, None, None] for key, value in tensors.items()}
            tensors["lora_mid.weight"] = normal(rank, rank, 1, 1, std=1.0 / math.sqrt(rank))
        if kind == "DoRA":
            tensors["dora_scale"] = lengths
        if kind.startswith("PEFT"):
            tensors = {"lora_A.weight": tensors["lora_down.weight"], "lora_B.weight": tensors["lora_up.weight"]}
            if kind == "PEFT DoRA":
                tensors["lora_magnitude_vector"] = lengths.flatten()
            else:
                tensors["lora_B.bias"] = normal(rows, std=0.1)
    elif kind in ("LoHa", "LoHa DoRA"):
        tensors = {
            "hada_w1_a": normal(rows, rank, std=rms / rank), "hada_w1_b": normal(rank, columns),
            "hada_w2_a": normal(rows, rank), "hada_w2_b": normal(rank, columns),
        }
    elif kind == "LoHa Tucker":
        tensors = {
            "hada_w1_a": normal(rank, rows, std=rms / rank), "hada_w1_b": normal(rank, columns),
            "hada_w2_a": normal(rank, rows), "hada_w2_b": normal(rank, columns),
            "hada_t1": normal(rank, rank, 1, 1, std=1.0 / math.sqrt(rank)),
            "hada_t2": normal(rank, rank, 1, 1, std=1.0 / math.sqrt(rank)),
        }
    elif kind in ("LoKr", "LoKr DoRA"):
        tensors = {
            "lokr_w1": normal(rows1, columns1), "lokr_w2_a": normal(rows2, rank, std=rms / math.sqrt(rank)),
            "lokr_w2_b": normal(rank, columns2),
        }
    elif kind == "LoKr products":
        tensors = {
            "lokr_w1_a": normal(rows1, rank), "lokr_w1_b": normal(rank, columns1),
            "lokr_w2_a": normal(rows2, rank, std=rms / rank), "lokr_w2_b": normal(rank, columns2),
        }
    elif kind in ("LoKr full", "LoKr full DoRA"):
        tensors = {"lokr_w1": normal(rows1, columns1), "lokr_w2": normal(rows2, columns2, std=rms)}
    elif kind == "LoKr Tucker":
        tensors = {
            "lokr_w1": normal(rows1, columns1), "lokr_w2_a": normal(rank, rows2, std=rms / math.sqrt(rank)),
            "lokr_w2_b": normal(rank, columns2), "lokr_t2": normal(rank, rank, 1, 1, std=1.0 / math.sqrt(rank)),
        }
    elif kind in ("GLoRA", "GLoRA old"):
        a, b = normal(columns, rank, std=0.3 / math.sqrt(columns)), normal(rank, columns, std=1.0 / math.sqrt(rank))
        up, down = normal(rows, rank, std=rms / math.sqrt(rank)), normal(rank, columns)
        order = (a, b, up, down) if kind == "GLoRA" else (b, a, down, up)
        tensors = {f"{name}.weight": value for name, value in zip(("a1", "a2", "b1", "b2"), order, strict=True)}
    elif kind == "difference":
        tensors = {"diff": normal(rows, rank, std=rms / math.sqrt(rank)) @ normal(rank, columns)}
    elif kind == "OFT":
        tensors = {"oft_blocks": normal(rows // 16, 16, 16, std=0.05)}
    elif kind == "bias":
        tensors = {"diff_b": normal(rows, std=0.1)}
    else:
        raise ValueError(f"The kind of change {kind!r} is not known; expected one of {', '.join(KINDS)}.")
    if kind.endswith(" DoRA") and not kind.startswith("PEFT"):
        tensors["dora_scale"] = lengths
    if alpha is not None and kind not in ("bias", "difference"):
        tensors["alpha"] = torch.tensor(alpha)
    return tensors


KINDS = (
    "LoRA", "LoRA 1x1", "LoCon", "DoRA", "PEFT DoRA", "PEFT bias", "LoHa", "LoHa DoRA", "LoHa Tucker", "LoKr",
    "LoKr DoRA", "LoKr products", "LoKr full", "LoKr full DoRA", "LoKr Tucker", "GLoRA", "GLoRA old", "difference",
    "OFT", "bias",
)
"""Kinds of change of a linear. The names of PEFT's own are read by PEFT and diffusers, not by ComfyUI."""


def kind_state_dict(kind: str, format: str = "native", config: TinyFluxConfig = TinyFluxConfig(), *,
                    targets: Callable[[str], bool] | None = None, rank: int = 4, alpha: float | None = None,
                    seed: int = 0, rms: float = 0.02, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A file with one kind of change on every targeted linear, in the names of a format.

    Args:
        kind: A name in `KINDS`.
        format: A name in `ALL_FORMATS`; only its module names are used.
        config: The model that it fits.
        targets: Which BFL modules change; all linears by default.
        rank: See `kind_tensors`.
        alpha: See `kind_tensors`.
        seed: See `kind_tensors`.
        rms: See `kind_tensors`.
        dtype: Of every tensor.
    """
    tensors: dict[str, Tensor] = {}
    for module, (_, in_features) in flux_linears(config).items():
        if targets is None or targets(module):
            for part in _format(format).parts(module, config):
                shape = (part.out_features, in_features)
                values = kind_tensors(kind, shape, rank=rank, alpha=alpha, rms=rms, seed=seed, name=part.prefix)
                tensors |= {f"{part.prefix}.{end}": value.to(dtype) for end, value in values.items()}
    return tensors


def norm_state_dict(config: TinyFluxConfig = TinyFluxConfig(), format: str = "native", seed: int = 0,
                    std: float = 0.2) -> dict[str, Tensor]:
    """Differences of every RMS norm's scale, `.diff` behind the norm's name, in BFL's or diffusers' names."""
    tensors = {}
    for index in range(config.depth):
        for stream, added in (("img", ""), ("txt", "added_")):
            for kind, short in (("query", "q"), ("key", "k")):
                native = f"diffusion_model.double_blocks.{index}.{stream}_attn.norm.{kind}_norm"
                diffusers = f"transformer.transformer_blocks.{index}.attn.norm_{added}{short}"
                name = native if format == "native" else diffusers
                tensors[f"{name}.diff"] = seeded_normal(seed, name, (128,), std)
    for index in range(config.depth_single):
        for kind, short in (("query", "q"), ("key", "k")):
            native = f"diffusion_model.single_blocks.{index}.norm.{kind}_norm"
            name = native if format == "native" else f"transformer.single_transformer_blocks.{index}.attn.norm_{short}"
            tensors[f"{name}.diff"] = seeded_normal(seed, name, (128,), std)
    return tensors
