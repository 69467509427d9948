"""Small, seeded FLUX.1 models, which stock ComfyUI loads. What goes with them is in `tiny_others`.

The weights are random, but shaped so that pictures have structure and depend on the prompt, the noise, the guidance,
every block and every LoRA. Each tensor has its own random stream, named by (seed, tensor name): a tensor does not
change when others are added, and the same seed writes the same bytes.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

# Width of a head of FLUX.1: the rotary axes 16 + 56 + 56 fix it.
HEAD_DIM = 128


@dataclass(frozen=True)
class TinyFluxConfig:
    """Shape of a FLUX.1 transformer; the default is the tiny one, `TinyFluxConfig.full_width()` has FLUX's own widths.

    Args:
        hidden: Model width, a multiple of `HEAD_DIM`.
        depth: Number of double blocks.
        depth_single: Number of single blocks.
        in_channels: Width of an image token, 4 * latent channels.
        out_channels: Width of an output token.
        context: Width of a text token.
        pooled: Width of the pooled text vector.
        mlp_ratio: MLP width / hidden. ComfyUI assumes 4 when it splits the LoRA of a single block.
        guidance: Whether the checkpoint has `guidance_in` (dev) or not (schnell).
    """

    hidden: int = 256
    depth: int = 2
    depth_single: int = 2
    in_channels: int = 64
    out_channels: int = 64
    context: int = 768
    pooled: int = 768
    mlp_ratio: int = 4
    guidance: bool = True

    def __post_init__(self) -> None:
        if self.hidden < HEAD_DIM or self.hidden % HEAD_DIM:
            raise ValueError(f"hidden is {self.hidden}, expected a positive multiple of {HEAD_DIM} (a FLUX.1 head).")

    @property
    def mlp(self) -> int:
        """Width of the MLP's inner layer."""
        return self.hidden * self.mlp_ratio

    @classmethod
    def full_width(cls, depth: int = 1, depth_single: int = 1, guidance: bool = True) -> "TinyFluxConfig":
        """FLUX.1's own widths (hidden 3072, T5 context 4096) with few blocks."""
        return cls(hidden=3072, depth=depth, depth_single=depth_single, context=4096, guidance=guidance)


def seeded_normal(seed: int, name: str, shape: Iterable[int], std: float = 1.0) -> Tensor:
    """Draw one tensor from its own stream.

    Args:
        seed: Any integer.
        name: Names the stream; another name gives independent values.
        shape: Shape of the result.
        std: Standard deviation.
    Returns:
        Float32 CPU tensor, normal with mean 0.
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(tuple(shape), generator=generator) * std


def flux_linears(config: TinyFluxConfig) -> dict[str, tuple[int, int]]:
    """Every linear of a FLUX.1 transformer under its BFL module name, as (out_features, in_features)."""
    hidden, mlp = config.hidden, config.mlp
    linears = {
        "img_in": (hidden, config.in_channels),
        "txt_in": (hidden, config.context),
        "time_in.in_layer": (hidden, 256),
        "time_in.out_layer": (hidden, hidden),
        "vector_in.in_layer": (hidden, config.pooled),
        "vector_in.out_layer": (hidden, hidden),
    }
    if config.guidance:
        linears |= {"guidance_in.in_layer": (hidden, 256), "guidance_in.out_layer": (hidden, hidden)}
    for index in range(config.depth):
        for stream in ("img", "txt"):
            block = f"double_blocks.{index}.{stream}"
            linears |= {
                f"{block}_mod.lin": (6 * hidden, hidden),
                f"{block}_attn.qkv": (3 * hidden, hidden),
                f"{block}_attn.proj": (hidden, hidden),
                f"{block}_mlp.0": (mlp, hidden),
                f"{block}_mlp.2": (hidden, mlp),
            }
    for index in range(config.depth_single):
        block = f"single_blocks.{index}"
        linears |= {
            f"{block}.linear1": (3 * hidden + mlp, hidden),
            f"{block}.linear2": (hidden, hidden + mlp),
            f"{block}.modulation.lin": (3 * hidden, hidden),
        }
    linears |= {
        "final_layer.linear": (config.out_channels, hidden),
        "final_layer.adaLN_modulation.1": (2 * hidden, hidden),
    }
    return linears


def linear_gain(module: str) -> float:
    """Gain of a FLUX linear: its weights have the standard deviation gain / sqrt(in_features).

    The gains undo what the activation before the layer takes away (SiLU and GELU leave 0.6 of a unit normal, attention
    averages values) and keep modulation moderate, so that the residual stream stays near unit scale.
    """
    gains = {
        "_mod.lin": 0.5, "modulation.lin": 0.5, "adaLN_modulation.1": 0.4, "attn.proj": 2.5,
        "mlp.2": 1.4, "linear2": 1.6, "in_layer": 1.4, "out_layer": 1.2,
    }
    return next((gain for suffix, gain in gains.items() if module.endswith(suffix)), 1.0)


def orthonormal(seed: int, name: str, rows: int, columns: int) -> Tensor:
    """Matrix (rows, columns), float32, with orthonormal columns (or rows, when there are fewer of them)."""
    normal = seeded_normal(seed, name, (max(rows, columns), min(rows, columns))).double()
    basis = torch.linalg.qr(normal).Q.float()
    return (basis if rows >= columns else basis.T).contiguous()


def _flux_bias(module: str, out_features: int, config: TinyFluxConfig, seed: int) -> Tensor:
    """Bias (out_features,) of one FLUX linear: gates stand near 0.6, queries are mostly constant.

    Constant queries meet the text's keys through rotary positions, so that attention to the prompt, and with it the
    picture, varies smoothly over space instead of following the noise in each token.
    """
    hidden = config.hidden
    bias = seeded_normal(seed, f"{module}.bias", (out_features,), 0.1)
    if module.endswith((".modulation.lin", "_mod.lin")):
        for gate in range(2, out_features // hidden, 3):
            bias[gate * hidden : (gate + 1) * hidden] += 0.6
    if module.endswith(("attn.qkv", ".linear1")):
        bias[:hidden] *= 30.0
        bias[hidden : 2 * hidden] *= 5.0
    return bias


def tiny_flux_state_dict(config: TinyFluxConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random FLUX.1 transformer in the original (BFL) key layout.

    The final layer reads back what `img_in` embedded, and adds the blocks' features to it: the velocity then removes
    most of the noise, and pictures show smooth fields that depend on the prompt instead of the noise itself.

    Args:
        config: Sizes.
        seed: Same config and seed give the same values.
    Returns:
        Float32 CPU tensors; norm weights end in `_norm.scale` as in the published files.
    """
    tensors: dict[str, Tensor] = {}
    for module, (out_features, in_features) in flux_linears(config).items():
        std = linear_gain(module) / math.sqrt(in_features)
        tensors[f"{module}.weight"] = seeded_normal(seed, f"{module}.weight", (out_features, in_features), std)
        tensors[f"{module}.bias"] = _flux_bias(module, out_features, config, seed)
    embed = orthonormal(seed, "img_in.orthonormal", config.hidden, config.in_channels)
    tensors["img_in.weight"] = embed * math.sqrt(config.hidden / config.in_channels)
    read_back = embed[:, : config.out_channels].T / math.sqrt(config.hidden / config.in_channels)
    patch = config.out_channels // 4
    features = seeded_normal(seed, "final_layer.features", (patch, config.hidden), 1.0 / math.sqrt(config.hidden))
    tensors["final_layer.linear.weight"] = (
        4.0 * read_back + 0.8 * features.repeat_interleave(4, dim=0) + 0.3 * tensors["final_layer.linear.weight"]
    )
    norms = [f"double_blocks.{i}.{stream}_attn.norm" for i in range(config.depth) for stream in ("img", "txt")]
    norms += [f"single_blocks.{i}.norm" for i in range(config.depth_single)]
    for norm in norms:
        for part in ("query_norm", "key_norm"):
            name = f"{norm}.{part}.scale"
            sharpness = 3.5 if ".txt_attn." in norm and part == "key_norm" else 1.8
            tensors[name] = sharpness + seeded_normal(seed, name, (HEAD_DIM,), 0.1)
    return tensors
