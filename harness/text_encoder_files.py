"""Text encoders in the formats that users have: dtypes, fp8 with and without scales, GGUF, names with prefixes."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .tensor_files import json_tensor, write_tensors

PREFIX = "text_encoders.t5xxl.transformer."
GGUF_NAMES = {
    "SelfAttention.q": "attn_q", "SelfAttention.k": "attn_k", "SelfAttention.v": "attn_v", "SelfAttention.o": "attn_o",
    "SelfAttention.relative_attention_bias": "attn_rel_b", "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up", "DenseReluDense.wo": "ffn_down",
}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """All tensors in one dtype."""
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def prefixed(tensors: dict[str, Tensor], prefix: str = PREFIX) -> dict[str, Tensor]:
    """Names as in an all-in-one checkpoint."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def tied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The token embedding under its other name in Hugging Face's T5."""
    return {name.replace("shared.weight", "encoder.embed_tokens.weight"): t for name, t in tensors.items()}


def is_linear(name: str) -> bool:
    """Whether a tensor of a T5, or of a language model, is the weight of a linear."""
    return "_proj." in name or (("SelfAttention" in name or "DenseReluDense" in name) and "relative" not in name)


def _scaled(tensor: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    largest = tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().amax()
    scale = largest / torch.finfo(torch.float8_e4m3fn).max
    return (tensor / scale).to(torch.float8_e4m3fn), scale


def scaled_fp8_old(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """ComfyUI's first form: a `scaled_fp8` marker, `X.scale_weight` and `X.scale_input`, scalars."""
    result = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if is_linear(name):
            base = name.removesuffix(".weight")
            result[name], result[f"{base}.scale_weight"] = _scaled(tensor, rows=False)
            result[f"{base}.scale_input"] = torch.tensor(1.0)
        else:
            result[name] = tensor.half()
    return result


def scaled_fp8_new(tensors: dict[str, Tensor], rows: bool = False) -> dict[str, Tensor]:
    """ComfyUI's newer form: `X.weight_scale` and JSON bytes in `X.comfy_quant`."""
    result = {}
    for name, tensor in tensors.items():
        if is_linear(name):
            base = name.removesuffix(".weight")
            result[name], result[f"{base}.weight_scale"] = _scaled(tensor, rows)
            result[f"{base}.comfy_quant"] = json_tensor({"format": "float8_e4m3fn"})
        else:
            result[name] = tensor.half()
    return result


def write_scaled_fp8_metadata(path: Path, tensors: dict[str, Tensor], form: str = "float8_e4m3fn") -> Path:
    """The newer form, described in the file's metadata."""
    scaled = {name: t for name, t in scaled_fp8_new(tensors).items() if not name.endswith(".comfy_quant")}
    layers = {name.removesuffix(".weight"): {"format": form} for name in tensors if is_linear(name)}
    description = json.dumps({"format_version": "1.0", "layers": layers})
    save_file(scaled, path, metadata={"_quantization_metadata": description})
    return path


def gguf_name(name: str) -> str:
    """llama.cpp's name of a T5 encoder's tensor."""
    if name == "shared.weight":
        return "token_embd.weight"
    if name == "encoder.final_layer_norm.weight":
        return "enc.output_norm.weight"
    _, _, index, _, layer, part = name.removesuffix(".weight").split(".", 5)
    kind = GGUF_NAMES.get(part, {"0": "attn_norm", "1": "ffn_norm"}[layer])
    return f"enc.blk.{index}.{kind}.weight"


def write_gguf(path: Path, tensors: dict[str, Tensor], kind: str = "Q8_0") -> Path:
    """Write a T5 encoder as llama.cpp converts it: linears and embedding in blocks, norms in F32, the bias in F16.

    Args:
        path: The file.
        tensors: In Hugging Face's layout, float32.
        kind: A `gguf.GGMLQuantizationType` that the package can write: Q8_0, Q4_0, Q5_1, F16, BF16 …
    Returns:
        `path`.
    """
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "t5encoder")
    for name, tensor in tensors.items():
        matrix = is_linear(name) or name == "shared.weight"
        kind_name = kind if matrix else "F16" if "relative" in name else "F32"
        kind_of = gguf.GGMLQuantizationType[kind_name]
        writer.add_tensor(gguf_name(name), gguf.quants.quantize(tensor.float().numpy(), kind_of), raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_formats(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Path]:
    """One T5 in every format: float32 tensors -> path by the format's name."""
    paths = {}

    def write(name: str, content: dict[str, Tensor]) -> None:
        paths[name] = write_tensors(folder / f"t5-{name}.safetensors", content)

    for name, dtype in {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}.items():
        write(name, cast(tensors, dtype))
    write("fp8", cast(tensors, torch.float8_e4m3fn))
    write("scaled-old", scaled_fp8_old(tensors))
    write("scaled-new", scaled_fp8_new(tensors))
    write("scaled-rows", scaled_fp8_new(tensors, rows=True))
    write("prefixed", prefixed(tensors))
    write("tied", tied(tensors))
    paths["scaled-metadata"] = write_scaled_fp8_metadata(folder / "t5-scaled-metadata.safetensors", tensors)
    for kind in ("Q8_0", "Q4_0", "BF16"):
        paths[f"gguf-{kind}"] = write_gguf(folder / f"t5-{kind}.gguf", tensors, kind)
    return paths
