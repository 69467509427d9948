"""Small, seeded models: FLUX.1, a 16-channel autoencoder and CLIP-L, which stock ComfyUI loads, and T5.

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

LATENT_CHANNELS = 16
LATENT_SCALE = 0.3611
"""FLUX latent scale and shift, as ComfyUI's `taef1` writes them into the autoencoder (nodes.py, load_taesd)."""
LATENT_SHIFT = 0.1159


@dataclass(frozen=True)
class TinyFluxConfig:
    """Shape of a FLUX.1 transformer; the default is the tiny one, `TinyFluxConfig.full_width()` has FLUX's own widths.

    Args:
        hidden: Model width, a multiple of 128 (the head size that the rotary axes 16 + 56 + 56 fix).
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
        if self.hidden < 128 or self.hidden % 128:
            raise ValueError(f"hidden is {self.hidden}, expected a positive multiple of 128 (a FLUX.1 head).")

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


def _orthonormal(seed: int, name: str, rows: int, columns: int) -> Tensor:
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
    embed = _orthonormal(seed, "img_in.orthonormal", config.hidden, config.in_channels)
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
            tensors[name] = sharpness + seeded_normal(seed, name, (128,), 0.1)
    return tensors


def _taesd_convs(part: str) -> list[tuple[str, int, int, bool]]:
    """Convolutions of one half of TAESD as (index, out, in, has_bias); blocks are ("3", 0, 0, False)."""
    block = (0, 0, False)
    if part == "taesd_encoder":
        layers = [(64, 3, True), block]
        for _ in range(3):
            layers += [(64, 64, False), block, block, block]
        layers += [(LATENT_CHANNELS, 64, True)]
        return [(str(index), *layer) for index, layer in enumerate(layers)]
    layers, index = [("1", 64, LATENT_CHANNELS, True)], 3
    for blocks in (3, 3, 3):
        layers += [(str(index + i), *block) for i in range(blocks)]
        layers += [(str(index + blocks + 1), 64, 64, False)]
        index += blocks + 2
    return [*layers, (str(index), *block), (str(index + 1), 3, 64, True)]


def _smooth(mix: Tensor) -> Tensor:
    """3x3 convolution (out, in, 3, 3) that mixes channels by `mix` (out, in) and blurs with a binomial kernel."""
    line = torch.tensor([0.25, 0.5, 0.25])
    return mix[:, :, None, None] * torch.outer(line, line)


def _pairs(basis: Tensor) -> Tensor:
    """Rows of `basis` (n, m), each with its negative: (2n, m). ReLU of both keeps the whole signal."""
    return torch.stack((basis, -basis), dim=1).flatten(0, 1)


def tiny_taesd_state_dict(seed: int = 0) -> dict[str, Tensor]:
    """Random 16-channel autoencoder with the keys of `comfy.taesd.taesd.TAESD(latent_channels=16)`.

    Both halves carry their input through the 64 channels as positive and negative parts. The decoder projects a latent
    to colours around mid-grey (standard deviation 0.26 for unit latents), the encoder inverts that projection, and
    random residual branches add texture. Nothing is calibrated on data, so the values depend on the seed alone.

    Args:
        seed: Same seed, same values.
    Returns:
        Float32 CPU tensors, with `vae_scale` and `vae_shift` of FLUX.1.
    """
    tensors: dict[str, Tensor] = {
        "vae_scale": torch.tensor(LATENT_SCALE),
        "vae_shift": torch.tensor(LATENT_SHIFT),
    }
    to_rgb = _orthonormal(seed, "to_rgb", 3, LATENT_CHANNELS)
    carried = torch.eye(64)
    contrast = 0.26
    ends = {
        "taesd_decoder": (_pairs(torch.eye(LATENT_CHANNELS)), _pairs(to_rgb.T).T * contrast),
        "taesd_encoder": (_pairs(torch.eye(3)), _pairs(to_rgb).T / contrast),
    }
    for part, (first, last) in ends.items():
        for index, out_channels, in_channels, has_bias in _taesd_convs(part):
            name = f"{part}.{index}"
            if not out_channels:
                tensors |= _taesd_block(seed, name)
                continue
            mix = seeded_normal(seed, f"{name}.mix", (out_channels, in_channels))
            if in_channels == 64 and out_channels == 64:
                mix = carried + mix * 0.01
            elif out_channels == 64:
                mix *= 0.5 / math.sqrt(in_channels)
                mix[: len(first)] = first
            else:
                mix *= 0.02 * float(last.norm()) / math.sqrt(in_channels)
                mix[:, : last.shape[1]] = last
            tensors[f"{name}.weight"] = _smooth(mix)
            if has_bias:
                tensors[f"{name}.bias"] = torch.zeros(out_channels)
    tensors["taesd_decoder.19.bias"] += 0.5
    tensors["taesd_encoder.0.bias"][:6] = _pairs(torch.full((3, 1), -0.5)).flatten()
    return tensors


def _taesd_block(seed: int, name: str) -> dict[str, Tensor]:
    """Three 3x3 convolutions (64, 64, 3, 3) with biases; the last is small, so that the skip path dominates."""
    tensors = {}
    for conv, gain in (("0", math.sqrt(2.0)), ("2", math.sqrt(2.0)), ("4", 0.12)):
        weight = f"{name}.conv.{conv}.weight"
        tensors[weight] = seeded_normal(seed, weight, (64, 64, 3, 3), gain / math.sqrt(64 * 9))
        bias = f"{name}.conv.{conv}.bias"
        tensors[bias] = seeded_normal(seed, bias, (64,), 0.01)
    return tensors


def tiny_clip_l_state_dict(seed: int = 0, hidden: int = 768, layers: int = 12) -> dict[str, Tensor]:
    """Random CLIP-L text encoder in the key layout of OpenAI's file.

    Stock ComfyUI fixes its sizes (comfy/sd1_clip_config.json): hidden 768, 12 layers, vocabulary 49408, 77 positions;
    `FluxTextEncoderLoader` takes others. The token embedding outweighs the position embedding, so that prompts differ
    clearly.

    Args:
        seed: Same seed, same values.
        hidden: Width; heads are 64 wide.
        layers: Number of layers.
    Returns:
        Float16 CPU tensors, 246 MB in all by default.
    """
    tensors: dict[str, Tensor] = {}
    mlp = 4 * hidden

    def add(name: str, shape: tuple[int, ...], std: float, mean: float = 0.0) -> None:
        tensors[name] = (seeded_normal(seed, name, shape, std) + mean).half()

    add("text_model.embeddings.token_embedding.weight", (49408, hidden), 1.0)
    add("text_model.embeddings.position_embedding.weight", (77, hidden), 0.3)
    for index in range(layers):
        layer = f"text_model.encoder.layers.{index}"
        for norm in ("layer_norm1", "layer_norm2"):
            add(f"{layer}.{norm}.weight", (hidden,), 0.05, mean=1.0)
            add(f"{layer}.{norm}.bias", (hidden,), 0.05)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            add(f"{layer}.self_attn.{projection}.weight", (hidden, hidden), 1.0 / math.sqrt(hidden))
            add(f"{layer}.self_attn.{projection}.bias", (hidden,), 0.05)
        add(f"{layer}.mlp.fc1.weight", (mlp, hidden), 1.0 / math.sqrt(hidden))
        add(f"{layer}.mlp.fc1.bias", (mlp,), 0.05)
        add(f"{layer}.mlp.fc2.weight", (hidden, mlp), 0.7 / math.sqrt(mlp))
        add(f"{layer}.mlp.fc2.bias", (hidden,), 0.05)
    add("text_model.final_layer_norm.weight", (hidden,), 0.05, mean=1.0)
    add("text_model.final_layer_norm.bias", (hidden,), 0.05)
    add("text_projection.weight", (hidden, hidden), 1.0 / math.sqrt(hidden))
    return tensors


@dataclass(frozen=True)
class TinyT5Config:
    """Shape of a T5 v1.1 encoder; T5-XXL has 24 layers of d_model 4096, d_ff 10240, 64 heads of 64."""

    layers: int = 2
    d_model: int = 128
    d_ff: int = 256
    heads: int = 4
    d_kv: int = 32
    vocab: int = 32128


def t5_shapes(config: TinyT5Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of a T5 v1.1 encoder in Hugging Face's layout."""
    inner = config.heads * config.d_kv
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (config.vocab, config.d_model)}
    for index in range(config.layers):
        attention, dense = f"encoder.block.{index}.layer.0", f"encoder.block.{index}.layer.1"
        shapes |= {f"{attention}.SelfAttention.{name}.weight": (inner, config.d_model) for name in "qkv"}
        shapes[f"{attention}.SelfAttention.o.weight"] = (config.d_model, inner)
        if not index:
            shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (32, config.heads)
        shapes[f"{attention}.layer_norm.weight"] = (config.d_model,)
        shapes |= {f"{dense}.DenseReluDense.wi_{gate}.weight": (config.d_ff, config.d_model) for gate in (0, 1)}
        shapes[f"{dense}.DenseReluDense.wo.weight"] = (config.d_model, config.d_ff)
        shapes[f"{dense}.layer_norm.weight"] = (config.d_model,)
    return {**shapes, "encoder.final_layer_norm.weight": (config.d_model,)}


def tiny_t5_state_dict(config: TinyT5Config = TinyT5Config(), seed: int = 0) -> dict[str, Tensor]:
    """Random T5 v1.1 encoder in Hugging Face's layout, whose attention is neither uniform nor stuck on one token.

    T5 does not divide attention scores by the width of a head, so the query's weights are that much smaller.

    Args:
        config: Sizes.
        seed: Same seed, same values.
    Returns:
        Float32 CPU tensors.
    """
    tensors = {}
    for name, shape in t5_shapes(config).items():
        gain = 1.0 / math.sqrt(shape[-1])
        if "norm" in name:
            tensors[name] = 1.0 + seeded_normal(seed, name, shape, 0.1)
            continue
        if name.endswith(".q.weight"):
            gain *= config.d_kv**-0.5 * 1.5
        elif name.startswith("shared") or "relative" in name:
            gain = 1.0
        tensors[name] = seeded_normal(seed, name, shape, gain)
    return tensors
