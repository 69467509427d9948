"""The same FLUX transformer in every kind of file that users have, by the writers that make those files.

Each function takes the tensors in the original layout (`tiny_models.tiny_flux_state_dict`, or
`tiny_flux2.tiny_flux2_state_dict`), writes them to `path`, and
returns what `inspect_checkpoint` is given. What the file's rounding leaves of each tensor is in `Written.tensors`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from accel.hardware import dtype_name

from .lora_formats import TinyConfig
from .tensor_files import json_tensor, write_tensors
from .tiny_flux2 import CHANNELS, MLP_RATIO, TinyFlux2Config
from .tiny_models import HEAD_DIM, TinyFluxConfig

FP8_MAX = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
# What ComfyUI's scaled files leave in a higher precision.
LEFT_ALONE = ("img_in", "txt_in", "time_in", "vector_in", "guidance_in", "final_layer")


@dataclass(frozen=True)
class Written:
    """A file and the values that it means.

    Args:
        path: What to load.
        tensors: Float32, by the original names, as exact as the file has them.
    """

    path: Path
    tensors: dict[str, Tensor]


def plain(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, prefix: str = "") -> Written:
    """The original layout in one dtype, fp8 without scales too."""
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    write_tensors(path, {prefix + name: tensor for name, tensor in stored.items()})
    return Written(path, {name: tensor.float() for name, tensor in stored.items()})


def quantize_fp8(weight: Tensor, dtype: torch.dtype, per_row: bool = False) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns) and its scale, float32, () or (rows, 1)."""
    largest = weight.abs().amax(dim=1, keepdim=True) if per_row else weight.abs().amax()
    scale = largest.float() / FP8_MAX[dtype]
    return (weight / scale).to(dtype), scale


def scaled_fp8(path: Path, tensors: Mapping[str, Tensor], form: str, dtype: torch.dtype = torch.float8_e4m3fn,
               per_row: bool = False, prefix: str = "") -> Written:
    """ComfyUI's scaled fp8.

    Args:
        path: The file.
        tensors: The original layout.
        form: "marker" (`scaled_fp8`, `scale_weight`, `scale_input`), "tensors" (`comfy_quant`, `weight_scale`,
            `input_scale`) or "metadata" (`_quantization_metadata`, `weight_scale`).
        dtype: float8_e4m3fn or float8_e5m2.
        per_row: One scale for each row.
        prefix: Stands before each name.
    """
    stored: dict[str, Tensor] = {}
    exact: dict[str, Tensor] = {}
    layers: dict[str, dict[str, str]] = {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if tensor.dim() != 2 or layer.startswith(LEFT_ALONE):
            stored[name] = tensor.bfloat16()
            exact[name] = stored[name].float()
            continue
        values, scale = quantize_fp8(tensor, dtype, per_row)
        stored[name], exact[name] = values, values.float() * scale
        layers[prefix + layer] = {"format": dtype_name(dtype)}
        if form == "marker":
            stored |= {f"{layer}.scale_weight": scale, f"{layer}.scale_input": torch.tensor(0.02)}
        else:
            stored[f"{layer}.weight_scale"] = scale
        if form == "tensors":
            stored |= {f"{layer}.comfy_quant": json_tensor(layers[prefix + layer]),
                       f"{layer}.input_scale": torch.tensor(1.0)}
    if form == "marker":
        # Two values: ComfyUI then multiplies in full precision, as this pack does.
        stored["scaled_fp8"] = torch.zeros(2, dtype=dtype)
    metadata = {"format_version": "1.0", "layers": layers} if form == "metadata" else None
    save_file({prefix + name: tensor.contiguous() for name, tensor in stored.items()}, path,
              metadata={"_quantization_metadata": json.dumps(metadata)} if metadata else None)
    return Written(path, exact)


def all_in_one(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.bfloat16,
               others: Mapping[str, Tensor] | None = None) -> Written:
    """A checkpoint as ComfyUI's CheckpointSave writes it: the transformer, an autoencoder and text encoders.

    The scales of RMS norms are then called `.weight`.
    """
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    others = others or {
        "vae.decoder.conv_in.weight": torch.zeros(512, 16, 3, 3),
        "text_encoders.clip_l.transformer.text_model.final_layer_norm.weight": torch.ones(768),
        "text_encoders.t5xxl.transformer.shared.weight": torch.zeros(16, 64),
        "text_encoders.t5xxl.transformer.scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn),
    }
    renamed = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in stored.items()}
    write_tensors(path, {f"model.diffusion_model.{name}": tensor for name, tensor in renamed.items()} | dict(others))
    return Written(path, {name: tensor.float() for name, tensor in stored.items()})


def diffusers_model(tensors: Mapping[str, Tensor], config: TinyConfig, dtype: torch.dtype):
    """A `FluxTransformer2DModel` or `Flux2Transformer2DModel` with these weights, converted by diffusers' own code."""
    if isinstance(config, TinyFlux2Config):
        return _diffusers_flux2(tensors, config).to(dtype)
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=config.in_channels, out_channels=config.out_channels, num_layers=config.depth,
        num_single_layers=config.depth_single, attention_head_dim=HEAD_DIM,
        num_attention_heads=config.hidden // HEAD_DIM, joint_attention_dim=config.context,
        pooled_projection_dim=config.pooled, guidance_embeds=config.guidance)
    converted = _cut(convert_flux_transformer_checkpoint_to_diffusers(_padded(tensors, config)), config)
    model.load_state_dict(converted, strict=True)
    return model.to(dtype)


def _diffusers_flux2(tensors: Mapping[str, Tensor], config: TinyFlux2Config):
    from diffusers import Flux2Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers

    model = Flux2Transformer2DModel(
        patch_size=1, in_channels=CHANNELS, num_layers=config.depth, num_single_layers=config.depth_single,
        attention_head_dim=HEAD_DIM, num_attention_heads=config.hidden // HEAD_DIM,
        joint_attention_dim=config.context, mlp_ratio=float(MLP_RATIO), guidance_embeds=config.guidance)
    model.load_state_dict(convert_flux2_transformer_checkpoint_to_diffusers(dict(tensors)), strict=True)
    return model


FLUX_WIDTHS = (3072, 3072, 3072, 12288)
"""Rows of q, k, v and the MLP in `linear1`: diffusers 0.42 splits it there, whatever the model's own width."""


def _padded(tensors: Mapping[str, Tensor], config: TinyFluxConfig) -> dict[str, Tensor]:
    padded = dict(tensors)
    for name, tensor in tensors.items():
        if ".linear1." in name:
            parts = tensor.split((config.hidden,) * 3 + (config.mlp,))
            padded[name] = torch.cat([
                torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])
                for part, rows in zip(parts, FLUX_WIDTHS, strict=True)
            ])
    return padded


def _cut(converted: Mapping[str, Tensor], config: TinyFluxConfig) -> dict[str, Tensor]:
    cut = dict(converted)
    for name, tensor in converted.items():
        if name.startswith("single_") and any(part in name for part in (".to_q.", ".to_k.", ".to_v.")):
            cut[name] = tensor[: config.hidden]
        elif ".proj_mlp." in name:
            cut[name] = tensor[: config.mlp]
    return cut


def diffusers_folder(path: Path, tensors: Mapping[str, Tensor], config: TinyConfig,
                     dtype: torch.dtype = torch.bfloat16, shard_bytes: int | None = None,
                     pipeline: bool = False) -> Written:
    """A folder by `save_pretrained`.

    Args:
        path: The folder.
        tensors: The original layout.
        config: Its sizes.
        dtype: Stored so.
        shard_bytes: The largest size of a shard; None: one file.
        pipeline: Put it into `transformer/` under a `model_index.json`.
    """
    model = diffusers_model(tensors, config, dtype)
    folder = path / "transformer" if pipeline else path
    arguments = {"max_shard_size": shard_bytes} if shard_bytes else {}
    model.save_pretrained(folder, safe_serialization=True, **arguments)
    if pipeline:
        index = {"_class_name": "DiffusionPipeline", "transformer": ["diffusers", type(model).__name__]}
        (path / "model_index.json").write_text(json.dumps(index))
    return Written(path, {name: tensor.to(dtype).float() for name, tensor in tensors.items()})


def gguf(path: Path, tensors: Mapping[str, Tensor], kind: str = "Q8_0", architecture: str | None = "flux",
         reshaped: str | None = None) -> Written:
    """A GGUF file with the names and types of city96's: matrices in `kind`, vectors in F32.

    Args:
        path: The file.
        tensors: The original layout.
        kind: A GGML type that the `gguf` package writes, or one of the K types, which get random blocks.
        architecture: `general.architecture`; None writes another writer's file, without one.
        reshaped: A matrix that is stored in rows of 256, with its shape in the metadata.
    """
    import gguf as package

    writer = package.GGUFWriter(path, architecture or "unused", endianess=package.GGUFEndian.LITTLE)
    if architecture is None:
        writer.kv_data[0].pop("general.architecture")
    quant = package.GGMLQuantizationType[kind]
    exact: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        values = tensor.float().contiguous().numpy()
        # As city96's converter: vectors, and rows that are no whole number of blocks, stay in float32.
        if values.ndim < 2 or values.shape[-1] % package.GGML_QUANT_SIZES[quant][0]:
            writer.add_tensor(name, values)
            exact[name] = tensor.float()
            continue
        if name == reshaped:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
            values = values.reshape(-1, 256)
        data = quantize_gguf(values, kind)
        writer.add_tensor(name, data, raw_dtype=quant)
        exact[name] = dequantize_gguf(data, kind).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Written(path, exact)


def quantize_gguf(values: np.ndarray, kind: str) -> np.ndarray:
    """Blocks of one GGML type; of K types, which the package cannot write, random ones of the weights' magnitude."""
    import gguf as package

    quant = package.GGMLQuantizationType[kind]
    if kind == "BF16" or not kind.endswith("_K"):
        return package.quants.quantize(values, quant)
    block, size = package.GGML_QUANT_SIZES[quant]
    count = values.size // block
    random = np.random.default_rng(values.size)
    blocks = random.integers(0, 256, (count, size), dtype=np.uint8)
    # Where each type keeps its scales in float16: ggml-common.h.
    for offset in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]:
        scales = (np.abs(values).mean() * random.uniform(1e-4, 1e-3, count)).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(count, 2)
    return blocks.reshape(*values.shape[:-1], values.shape[-1] // block * size)


def dequantize_gguf(data: np.ndarray, kind: str) -> Tensor:
    """Float32 values of blocks, by diffusers' implementation where it has one, else by the package's."""
    import gguf as package

    quant = package.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        return torch.from_numpy(data.astype(np.float32))
    from diffusers.quantizers.gguf.utils import dequantize_functions

    function = dequantize_functions.get(quant)
    if function is None:
        return torch.from_numpy(package.quants.dequantize(data, quant))
    block, size = package.GGML_QUANT_SIZES[quant]
    values = function(torch.from_numpy(data).reshape(-1, size), block, size, dtype=torch.float32)
    return values.float().reshape(*data.shape[:-1], -1)
