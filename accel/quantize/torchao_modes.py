"""The modes that torchao computes: plain `nn.Linear` modules with a tensor subclass as weight.

The weights are made directly (`from_hp`), not by `quantize_`, where that checks for a GPU: so the same construction
runs on a CPU. `quantize_` would also change inductor's settings for the whole process, unless told not to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..families.base import Workspace
from ..hardware import Hardware
from ..linear.float8 import way_on
from .library import Library
from .mode import Mode, cuda_from, runs_anywhere

# 0.15 has no int8 weights with a scale for each row, 0.16 stores them otherwise; 0.18 does not load under torch 2.10.
LIBRARY = Library("torchao", "0.17", needs_torch=(("0.18", "2.11"),))
# On a CPU, rows are converted in runs that stay in its cache: 1,200 instead of 200 million weights per second (2 cores,
# 2026-11-22), and no float32 copy of a whole weight.
RUN_ELEMENTS = 2**18
ROW_SCALE_BYTES = 4
INT4_GROUP = 128
NVFP4_BLOCK = 16
MXFP8_BLOCK = 32


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(in_features, out_features, bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _by_rows(weight: Tensor, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    """Quantize a weight whose rows do not depend on one another."""
    rows = max(1, RUN_ELEMENTS // weight.shape[1])
    if weight.device.type != "cpu" or rows >= weight.shape[0]:
        return quantize(weight)
    joined: dict[str, Tensor] = {}
    for start, run in enumerate(weight.split(rows)):
        quantized = quantize(run)
        names, attributes = quantized.__tensor_flatten__()
        for name in names:
            part = getattr(quantized, name)
            if name not in joined:
                # Its memory at once: hundreds of parts that wait to be joined leave as many holes in the heap.
                joined[name] = part.new_empty((len(weight), *part.shape[1:]))
            joined[name][start * rows :][: len(part)] = part
    return type(quantized).__tensor_unflatten__(joined, attributes, weight.shape, weight.stride())


def _fp8_weight(weight: Tensor, dynamic: bool) -> Tensor:
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import (
        Float8Tensor,
        QuantizeTensorToFloat8Kwargs,
    )

    options = {"float8_dtype": torch.float8_e4m3fn, "granularity": PerRow()}
    if dynamic:
        options["mm_config"] = Float8MMConfig(use_fast_accum=True)
        options["act_quant_kwargs"] = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow())
    return _by_rows(weight, lambda run: Float8Tensor.from_hp(run, **options))


def _int8_weight(weight: Tensor, dynamic: bool) -> Tensor:
    from torchao.quantization.granularity import PerRow
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor, QuantizeTensorToInt8Kwargs

    activations = QuantizeTensorToInt8Kwargs(granularity=PerRow()) if dynamic else None
    return _by_rows(weight, lambda run: Int8Tensor.from_hp(run, granularity=PerRow(), act_quant_kwargs=activations))


def _to_fp8(weight: Tensor, bias: Tensor | None, per_picture: bool) -> nn.Module:
    return _linear(_fp8_weight(weight, dynamic=True), bias)


def _to_fp8_weight_only(weight: Tensor, bias: Tensor | None, per_picture: bool) -> nn.Module:
    return _linear(_fp8_weight(weight, dynamic=False), bias)


def _to_int8(weight: Tensor, bias: Tensor | None, per_picture: bool) -> nn.Module:
    # A linear that sees one row per picture gains nothing from int8 activations, and CUDA's int8 product refuses fewer
    # than 17 rows (torch._int_mm), so its weight alone is int8.
    return _linear(_int8_weight(weight, dynamic=not per_picture), bias)


def _to_int8_weight_only(weight: Tensor, bias: Tensor | None, per_picture: bool) -> nn.Module:
    return _linear(_int8_weight(weight, dynamic=False), bias)


def _to_int4(weight: Tensor, bias: Tensor | None, per_picture: bool) -> nn.Module:
    from torchao.quantization import Int4WeightOnlyConfig

    # The format that PyTorch's own kernel reads; the others need the package mslk.
    config = Int4WeightOnlyConfig(
        group_size=INT4_GROUP, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
    )
    return _quantized(_linear(weight, bias), config)


def _to_nvfp4(weight: Tensor, bias: Tensor | None, per_picture: bool) -> nn.Module:
    from torchao.prototype.mx_formats import NVFP4DynamicActivationNVFP4WeightConfig

    return _quantized(_linear(weight, bias), NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=False))


def _to_mxfp8(weight: Tensor, bias: Tensor | None, per_picture: bool) -> nn.Module:
    from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig

    return _quantized(_linear(weight, bias), MXDynamicActivationMXWeightConfig(block_size=MXFP8_BLOCK))


def _quantized(linear: nn.Linear, config: object) -> nn.Module:
    from torchao.quantization import quantize_

    around = nn.Sequential(linear)  # quantize_ replaces children
    quantize_(around, config)
    return around[0]


def _has_float8(hardware: Hardware) -> str | None:
    return "needs 8-bit floats, which Apple GPUs do not have" if hardware.kind == "mps" else None


def _row_bytes(extra: int) -> Callable[[int, int], int]:
    def weight_bytes(out_features: int, in_features: int) -> int:
        return out_features * (in_features + extra)

    return weight_bytes


def _int4_bytes(out_features: int, in_features: int) -> int:
    # The packed format rounds in_features up to 1024, and has a scale and a zero point in bfloat16 for each group.
    padded = -(-in_features // 1024) * 1024
    return out_features * padded // 2 + out_features * (padded // INT4_GROUP) * 4


def _nvfp4_bytes(out_features: int, in_features: int) -> int:
    # One scale byte per block, in tiles of 128 × 4, and one float32 scale for the tensor.
    return out_features * in_features // 2 + _tiled(out_features, in_features // NVFP4_BLOCK) + 4


def _mxfp8_bytes(out_features: int, in_features: int) -> int:
    return out_features * in_features + _tiled(out_features, in_features // MXFP8_BLOCK)


def _tiled(rows: int, columns: int) -> int:
    return -(-rows // 128) * 128 * (-(-columns // 4) * 4)


def _fp8_does_without(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    way = way_on(device, dtype)
    return tuple(f"float8 products {name}: {why}; they are {way.name}" for name, why in way.refusals.items())


FP8 = Mode(
    name="fp8",
    summary="weights and activations in 8-bit floats, scaled by row (torchao)",
    library=LIBRARY,
    lacks=cuda_from(8, 9, "fp8 products", or_on=("cpu",)),
    multiple_of=(16, 16),
    weight_bytes=_row_bytes(ROW_SCALE_BYTES),
    convert=_to_fp8,
    workspace=Workspace(input_bytes=1),
    does_without=_fp8_does_without,
    error=0.06,
    instead=("fp8_weight_only", "int8", "int8_weight_only"),
    needs_compile=True,
    bf16_only=True,
)
FP8_WEIGHT_ONLY = Mode(
    name="fp8_weight_only",
    summary="weights in 8-bit floats, scaled by row (torchao)",
    library=LIBRARY,
    lacks=_has_float8,
    multiple_of=(1, 1),
    weight_bytes=_row_bytes(ROW_SCALE_BYTES),
    convert=_to_fp8_weight_only,
    workspace=Workspace(unpacks_weight=True),
    error=0.045,
    instead=("int8_weight_only", "nf4"),
)
INT8 = Mode(
    name="int8",
    summary="weights and activations in 8-bit integers, scaled by row (torchao)",
    library=LIBRARY,
    lacks=cuda_from(7, 5, "int8 products", or_on=("cpu",)),
    multiple_of=(16, 16),
    weight_bytes=_row_bytes(ROW_SCALE_BYTES + 1),  # and a zero point, which is zero
    convert=_to_int8,
    workspace=Workspace(input_bytes=1, product_bytes=4),  # int32
    error=0.03,
    instead=("int8_weight_only", "fp8_weight_only", "nf4"),
    needs_compile=True,
)
INT8_WEIGHT_ONLY = Mode(
    name="int8_weight_only",
    summary="weights in 8-bit integers, scaled by row (torchao)",
    library=LIBRARY,
    lacks=runs_anywhere,
    multiple_of=(1, 1),
    weight_bytes=_row_bytes(ROW_SCALE_BYTES + 1),
    convert=_to_int8_weight_only,
    workspace=Workspace(unpacks_weight=True),
    error=0.02,
    instead=("fp8_weight_only", "nf4"),
)
INT4 = Mode(
    name="int4",
    summary=f"weights in 4-bit integers, in groups of {INT4_GROUP} (torchao)",
    library=LIBRARY,
    lacks=cuda_from(8, 0, "the tinygemm kernel"),
    multiple_of=(8, INT4_GROUP),
    weight_bytes=_int4_bytes,
    convert=_to_int4,
    workspace=Workspace(),  # the kernel unpacks as it multiplies
    error=0.17,
    instead=("nf4", "int8_weight_only"),
    bf16_only=True,
    needs_device=True,
)
NVFP4 = Mode(
    name="nvfp4",
    summary=f"weights and activations in 4-bit floats, in blocks of {NVFP4_BLOCK} (torchao)",
    library=LIBRARY,
    lacks=cuda_from(10, 0, "fp4 products"),
    multiple_of=(16, 16),
    weight_bytes=_nvfp4_bytes,
    convert=_to_nvfp4,
    workspace=Workspace(input_bytes=1),  # half of it, and scales
    error=0.2,
    instead=("int4", "nf4", "fp8", "int8_weight_only"),
    needs_compile=True,
    bf16_only=True,
    needs_device=True,
)
MXFP8 = Mode(
    name="mxfp8",
    summary=f"weights and activations in 8-bit floats, in blocks of {MXFP8_BLOCK} (torchao)",
    library=LIBRARY,
    lacks=cuda_from(10, 0, "mxfp8 products"),
    multiple_of=(16, MXFP8_BLOCK),
    weight_bytes=_mxfp8_bytes,
    convert=_to_mxfp8,
    workspace=Workspace(input_bytes=1),
    error=0.08,
    instead=("fp8", "fp8_weight_only", "int8", "int8_weight_only"),
    needs_compile=True,
    bf16_only=True,
    needs_device=True,
)
