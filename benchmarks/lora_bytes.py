"""Bytes that the pack's linear operators move on a GPU, LoRA included. A count on paper: nothing here is measured.

TorchInductor counts each input of an operator that it does not know once, whatever happens inside. So these are counted
by what `accel.lora.layers` does with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Of activations, biases and LoRA matrices: bfloat16.
WIDTH = 2
# Of the scale of a row that is quantized: float32.
SCALE = 4


@dataclass(frozen=True)
class Linears:
    """One call: linears that read the same input.

    Attributes:
        rows: tokens of the input.
        in_features: of each.
        out_features: of each.
        weight_width: bytes of a weight's element; 1: float8, whose input is float8, too, both with a scale per row.
    """

    rows: int
    in_features: int
    out_features: Sequence[int]
    weight_width: int


def linears_bytes(linears: Linears, rank: int, fused: bool) -> int:
    """Count what one call reads and writes in device memory.

    Each matrix product reads its operands once and writes its result once (what a product reads again because its tiles
    do not fit on the chip depends on the kernel, and is left out, as it is in inductor's own count). So, per linear:

    - its input (in float8: the quantized one), its weight, its bias; and its output, written;

    and with a LoRA:

    - the first product, once for all linears of the call, whose lora_A lie side by side: the bfloat16 input and every
      lora_A, read; the hidden states, rows × rank of each linear, written;
    - the second product, per linear: its hidden states and lora_B, read. In the fused kernel it is added before the
      output is written. By itself it reads the output and writes it again.

    Args:
        linears: the call.
        rank: of each linear's LoRA; 0: none is bound, and nothing is computed.
        fused: whether `accel.lora.kernels` adds the LoRA, or a product of its own.
    """
    rows, in_features = linears.rows, linears.in_features
    scales = SCALE if linears.weight_width == 1 else 0
    total = 0
    for out_features in linears.out_features:
        total += rows * (in_features * linears.weight_width + scales)
        total += out_features * (in_features * linears.weight_width + scales + WIDTH)
        total += rows * out_features * WIDTH
    if not rank:
        return total
    ranks = rank * len(linears.out_features)
    total += WIDTH * (rows * in_features + ranks * in_features + rows * ranks)
    for out_features in linears.out_features:
        total += WIDTH * (rows + out_features) * rank
        if not fused:
            total += 2 * WIDTH * rows * out_features
    return total


def linears_products(linears: Linears, rank: int, fused: bool) -> int:
    """Count matrix products, a fused kernel as one: base, one with lora_A for all, one with each lora_B."""
    count = len(linears.out_features)
    if not rank:
        return count
    return 1 + count if fused else 1 + 2 * count
