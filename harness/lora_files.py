"""Random FLUX LoRA files: in each format that trainers write (`lora_formats`), of each kind (`lora_kinds`)."""

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from .lora_formats import LoraFormat, TinyConfig, format_named, linears_of
from .lora_kinds import kind_tensors
from .tensor_files import write_tensors
from .tiny_models import HEAD_DIM, TinyFluxConfig, linear_gain, seeded_normal

Rank = int | Mapping[str, int] | Callable[[str], int]


def in_blocks(module: str) -> bool:
    """Target predicate: everything inside the blocks, sd-scripts' default."""
    return module.startswith(("double_blocks.", "single_blocks."))


def in_attention(module: str) -> bool:
    """Target predicate: attention, and the fused linears of single blocks that hold theirs."""
    return "_attn." in module or module.endswith((".linear1", ".linear2"))


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


def lora_state_dict(format: str, config: TinyConfig = TinyFluxConfig(), *, rank: Rank = 8,
                    alpha: float | None = None, targets: Callable[[str], bool] | None = None, seed: int = 0,
                    scale: float = 0.3, dtype: torch.dtype = torch.float32, tied: bool = False) -> dict[str, Tensor]:
    """Random LoRA for a FLUX transformer; both matrices of every layer are non-zero.

    Args:
        format: A name in `lora_formats.ALL_FORMATS`, or `FLUX2_FORMATS` with a FLUX.2 model.
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
    spelling = format_named(format)
    tensors: dict[str, Tensor] = {}
    for module, (out_features, in_features) in linears_of(config).items():
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
        format: A name in `lora_formats.ALL_FORMATS`.
        rank: Of every layer.
        alpha: As in `lora_state_dict`.
        layers: Which of the 12 encoder layers.
        seed: As in `lora_state_dict`.
        scale: As in `lora_state_dict`.
        dtype: Of every tensor.
    Returns:
        CPU tensors by key.
    """
    spelling = format_named(format)
    shapes = {f"self_attn.{name}_proj": (768, 768) for name in ("q", "k", "v", "out")}
    shapes |= {"mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        for module, shape in shapes.items():
            prefix = spelling.clip_prefix.format(layer=layer) + module.replace(".", spelling.clip_separator)
            down, up = _matrices(prefix, shape, rank, alpha, scale / math.sqrt(shape[1]), seed)
            tensors |= _layer(spelling, prefix, down, up, alpha, dtype)
    return tensors


def write_lora(path: Path | str, format: str, config: TinyConfig = TinyFluxConfig(), **arguments: object) -> Path:
    """Write `lora_state_dict(format, config, **arguments)` to a safetensors file and return its path."""
    return write_tensors(Path(path), lora_state_dict(format, config, **arguments))


def demo_a() -> dict[str, Tensor]:
    """The demo's first LoRA: sd-scripts format, rank 8, alpha 4, bf16, all block layers."""
    return lora_state_dict("kohya", rank=8, alpha=4.0, targets=in_blocks, seed=11, scale=0.5, dtype=torch.bfloat16)


def demo_b() -> dict[str, Tensor]:
    """The demo's second LoRA: PEFT format, rank 16, bf16, attention only."""
    return lora_state_dict("diffusers", rank=16, targets=in_attention, seed=29, scale=0.6, dtype=torch.bfloat16)


def kind_state_dict(kind: str, format: str = "native", config: TinyConfig = TinyFluxConfig(), *,
                    targets: Callable[[str], bool] | None = None, rank: int = 4, alpha: float | None = None,
                    seed: int = 0, rms: float = 0.02, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A file with one kind of change on every targeted linear, in the names of a format.

    Args:
        kind: A name in `lora_kinds.KINDS`.
        format: A name in `lora_formats.ALL_FORMATS`; only its module names are used.
        config: The model that it fits.
        targets: Which BFL modules change; all linears by default.
        rank: See `kind_tensors`.
        alpha: See `kind_tensors`.
        seed: See `kind_tensors`.
        rms: See `kind_tensors`.
        dtype: Of every tensor.
    """
    tensors: dict[str, Tensor] = {}
    for module, (_, in_features) in linears_of(config).items():
        if targets is None or targets(module):
            for part in format_named(format).parts(module, config):
                shape = (part.out_features, in_features)
                values = kind_tensors(kind, shape, rank=rank, alpha=alpha, rms=rms, seed=seed, name=part.prefix)
                tensors |= {f"{part.prefix}.{end}": value.to(dtype) for end, value in values.items()}
    return tensors


def norm_state_dict(config: TinyConfig = TinyFluxConfig(), format: str = "native", seed: int = 0,
                    std: float = 0.2) -> dict[str, Tensor]:
    """Differences of every RMS norm's scale, `.diff` behind the norm's name, in BFL's or diffusers' names."""
    tensors = {}
    for index in range(config.depth):
        for stream, added in (("img", ""), ("txt", "added_")):
            for kind, short in (("query", "q"), ("key", "k")):
                native = f"diffusion_model.double_blocks.{index}.{stream}_attn.norm.{kind}_norm"
                diffusers = f"transformer.transformer_blocks.{index}.attn.norm_{added}{short}"
                name = native if format == "native" else diffusers
                tensors[f"{name}.diff"] = seeded_normal(seed, name, (HEAD_DIM,), std)
    for index in range(config.depth_single):
        for kind, short in (("query", "q"), ("key", "k")):
            native = f"diffusion_model.single_blocks.{index}.norm.{kind}_norm"
            name = native if format == "native" else f"transformer.single_transformer_blocks.{index}.attn.norm_{short}"
            tensors[f"{name}.diff"] = seeded_normal(seed, name, (HEAD_DIM,), std)
    return tensors
