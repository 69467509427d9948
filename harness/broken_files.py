"""Files that must be refused: each function writes one wrong file to `path` and returns it.

What each file claims to be (a LoRA, a FLUX checkpoint) is in its name; what is wrong with it is its docstring.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .lora_files import lora_state_dict
from .tensor_files import write_tensors
from .tiny_models import TinyFluxConfig, seeded_normal, tiny_flux_state_dict

Writer = Callable[[Path], Path]


def _write_bytes(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _random(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    return {name: seeded_normal(0, name, shape, 0.02).to(dtype) for name, shape in shapes.items()}


def empty(path: Path) -> Path:
    """Zero bytes."""
    return _write_bytes(path, b"")


def truncated(path: Path) -> Path:
    """A whole header, and the first half of the data that it announces: a download that broke off."""
    write_tensors(path, lora_state_dict("kohya"))
    content = path.read_bytes()
    return _write_bytes(path, content[: len(content) // 2])


def truncated_header(path: Path) -> Path:
    """Ends inside the JSON header."""
    write_tensors(path, lora_state_dict("kohya"))
    return _write_bytes(path, path.read_bytes()[:200])


def html_page(path: Path) -> Path:
    """The login page of a download site under the file's name."""
    page = "<!DOCTYPE html>\n<html><head><title>Log in</title></head><body>Please log in to download.</body></html>\n"
    return _write_bytes(path, page.encode())


def giant_header(path: Path) -> Path:
    """The length field announces a header of 2**62 bytes."""
    return _write_bytes(path, (2**62).to_bytes(8, "little") + b"{}")


def garbage_header(path: Path) -> Path:
    """The length field fits the file, but the header is not JSON."""
    header = b'{"double_blocks.0": [not json' + b"\xff\xfe" * 64
    return _write_bytes(path, len(header).to_bytes(8, "little") + header + bytes(256))


def offsets_outside(path: Path) -> Path:
    """Valid JSON whose one tensor lies beyond the end of the file."""
    entry = {"lora_unet_img_in.lora_down.weight": {"dtype": "F32", "shape": [8, 64], "data_offsets": [0, 2048]}}
    header = json.dumps(entry).encode()
    return _write_bytes(path, len(header).to_bytes(8, "little") + header + bytes(16))


def lora_nan(path: Path) -> Path:
    """One NaN in one `lora_up`."""
    tensors = lora_state_dict("kohya")
    tensors["lora_unet_double_blocks_1_img_mlp_0.lora_up.weight"][3, 2] = float("nan")
    return write_tensors(path, tensors)


def lora_wrong_width(path: Path) -> Path:
    """Made for a model of hidden size 384: every in- and out-dimension differs from the tiny model's 256."""
    return write_tensors(path, lora_state_dict("kohya", TinyFluxConfig(hidden=384)))


def lora_rank_mismatch(path: Path) -> Path:
    """One layer's down matrix has rank 8, its up matrix rank 4."""
    tensors = lora_state_dict("native", rank=8)
    name = "diffusion_model.single_blocks.1.linear2.lora_B.weight"
    tensors[name] = tensors[name][:, :4]
    return write_tensors(path, tensors)


def lora_missing_up(path: Path) -> Path:
    """One layer has a down matrix only."""
    tensors = lora_state_dict("kohya")
    del tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"]
    return write_tensors(path, tensors)


def lora_unknown_key(path: Path) -> Path:
    """A good LoRA, and one more layer that no FLUX model has."""
    tensors = lora_state_dict("kohya")
    name = "lora_unet_double_blocks_0_img_attn_gate"
    tensors |= _random({f"{name}.lora_down.weight": (8, 256), f"{name}.lora_up.weight": (256, 8)}, torch.float32)
    return write_tensors(path, tensors)


def lora_no_pairs(path: Path) -> Path:
    """A safetensors file whose only tensor is an embedding (textual inversion)."""
    return write_tensors(path, _random({"emb_params": (4, 768)}))


def sdxl_lora(path: Path) -> Path:
    """A LoRA for SDXL: UNet and text encoder names of sd-scripts."""
    widths = {
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (640, 640),
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048),
        "lora_unet_middle_block_1_transformer_blocks_0_ff_net_0_proj": (10240, 1280),
        "lora_unet_output_blocks_0_1_proj_in": (1280, 1280),
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
        "lora_te2_text_model_encoder_layers_0_mlp_fc1": (5120, 1280),
    }
    tensors: dict[str, Tensor] = {}
    for name, (out_features, in_features) in widths.items():
        tensors |= _random({f"{name}.lora_down.weight": (8, in_features), f"{name}.lora_up.weight": (out_features, 8)})
        tensors[f"{name}.alpha"] = torch.tensor(4.0, dtype=torch.float16)
    return write_tensors(path, tensors)


def sdxl_checkpoint(path: Path) -> Path:
    """Some tensors of an SDXL checkpoint, with their real names and shapes."""
    return write_tensors(path, _random({
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.input_blocks.0.0.bias": (320,),
        "model.diffusion_model.time_embed.0.weight": (1280, 320),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.out.2.weight": (4, 320, 3, 3),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": (768, 768),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_bias": (3840,),
    }))


def flux_vae(path: Path) -> Path:
    """Some tensors of FLUX's autoencoder (`ae.safetensors`), with their real names and shapes."""
    return write_tensors(path, _random({
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.conv_in.bias": (128,),
        "encoder.down.0.block.0.norm1.weight": (128,),
        "encoder.conv_out.weight": (32, 512, 3, 3),
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }, torch.float32))


def flux_missing_block(path: Path) -> Path:
    """A FLUX checkpoint without `single_blocks.0`, though `single_blocks.1` is there."""
    tensors = tiny_flux_state_dict(TinyFluxConfig())
    return write_tensors(path, {name: t for name, t in tensors.items() if not name.startswith("single_blocks.0.")})


def flux_missing_tensor(path: Path) -> Path:
    """A FLUX checkpoint without `double_blocks.1.txt_mlp.2.bias`."""
    tensors = tiny_flux_state_dict(TinyFluxConfig())
    del tensors["double_blocks.1.txt_mlp.2.bias"]
    return write_tensors(path, tensors)


def flux_wrong_shape(path: Path) -> Path:
    """A FLUX checkpoint where `double_blocks.1.img_mlp.0.weight` is (1024, 128) in place of (1024, 256)."""
    tensors = tiny_flux_state_dict(TinyFluxConfig())
    tensors["double_blocks.1.img_mlp.0.weight"] = tensors["double_blocks.1.img_mlp.0.weight"][:, :128]
    return write_tensors(path, tensors)


def flux_nan(path: Path) -> Path:
    """A FLUX checkpoint with one NaN, in `single_blocks.1.linear2.weight`."""
    tensors = tiny_flux_state_dict(TinyFluxConfig())
    tensors["single_blocks.1.linear2.weight"][5, 7] = float("nan")
    return write_tensors(path, tensors)


UNREADABLE: tuple[Writer, ...] = (
    empty, truncated, truncated_header, html_page, giant_header, garbage_header, offsets_outside)
"""Not a whole safetensors file."""

WRONG_LORAS: tuple[Writer, ...] = (
    lora_nan, lora_wrong_width, lora_rank_mismatch, lora_missing_up, lora_unknown_key, lora_no_pairs, sdxl_lora)
"""Whole files that are no LoRA for the tiny model."""

WRONG_CHECKPOINTS: tuple[Writer, ...] = (
    sdxl_checkpoint, flux_vae, flux_missing_block, flux_missing_tensor, flux_wrong_shape, flux_nan)
"""Whole files that are no good FLUX checkpoint."""
