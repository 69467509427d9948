"""Small, seeded models that go with FLUX.1: a 16-channel autoencoder and CLIP-L, which stock ComfyUI loads, and T5.

See `tiny_models` for what all of them have in common.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .tiny_models import orthonormal, seeded_normal

LATENT_CHANNELS = 16
LATENT_SCALE = 0.3611
"""FLUX latent scale and shift, as ComfyUI's `taef1` writes them into the autoencoder (nodes.py, load_taesd)."""
LATENT_SHIFT = 0.1159


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
    to_rgb = orthonormal(seed, "to_rgb", 3, LATENT_CHANNELS)
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
