"""Bytes that the pack's linear operators move on a GPU, LoRA included. A count on paper: nothing here is measured.

TorchInductor counts each input of an operator that it does not know once, whatever happens inside. So these are counted
by what `accel.linear.operators` does with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from accel.linear.inputs import GELU_TANH, MODULATED, NONE, SILU_GATE, Activation, Recipe

# Of activations, biases and LoRA matrices: bfloat16.
WIDTH = 2
# Of the scale of a row that is quantized: float32.
SCALE = 4


@dataclass(frozen=True)
class Linears:
    """One call: linears that read the same input.

    Attributes:
        rows: tokens of the input.
        parts: columns of each tensor that the input, or what it is computed from, consists of.
        out_features: of each linear.
        weight_width: bytes of a weight's element; 1: float8, whose input is float8, too, both with a scale per row.
        recipe: how the input is computed from the parts, see `accel.linear.inputs`. float8 linears read it ready-made.
        activation: what the last output goes through.
    """

    rows: int
    parts: Sequence[int]
    out_features: Sequence[int]
    weight_width: int
    recipe: Recipe = NONE
    activation: Activation = NONE

    @property
    def in_features(self) -> int:
        """Columns of the input: a gate is half as wide as what it is computed from."""
        return sum(self.parts) - (self.parts[-1] // 2 if self.recipe == SILU_GATE else 0)


def linears_bytes(linears: Linears, rank: int, fused: bool) -> int:
    """Count what one call reads and writes in device memory.

    Each matrix product reads its operands once and writes its result once (what a product reads again because its tiles
    do not fit on the chip depends on the kernel, and is left out, as it is in inductor's own count). So, per linear:

    - its input (in float8: the quantized one), its weight, its bias; and its output, written. For an input in parts
      each further one is a product that reads the output and writes it again. GELU is part of the last product;

    and with a LoRA:

    - the first product, see `_lora_A_bytes`;
    - the second product, per linear: its hidden states and lora_B, read. In the fused kernel it is added before the
      output is written. By itself it reads the output and writes it again, and so does GELU then.

    Args:
        linears: the call.
        rank: of each linear's LoRA; 0: none is bound, and nothing is computed.
        fused: whether `accel.linear.kernels` adds the LoRA, or a product of its own.
    """
    rows, in_features = linears.rows, linears.in_features
    scales = SCALE if linears.weight_width == 1 else 0
    again = 0 if scales else len(linears.parts) - 1
    total = 0
    for out_features in linears.out_features:
        total += rows * (in_features * linears.weight_width + scales)
        total += out_features * (in_features * linears.weight_width + scales + WIDTH)
        total += (1 + 2 * again) * rows * out_features * WIDTH
    if not rank:
        return total
    total += _lora_A_bytes(linears, rank * len(linears.out_features), fused)
    for out_features in linears.out_features:
        total += WIDTH * (rows + out_features) * rank
        if not fused:
            total += 2 * WIDTH * rows * out_features
    if linears.activation == GELU_TANH and not fused:
        total += 2 * WIDTH * rows * linears.out_features[-1]
    return total


def _lora_A_bytes(linears: Linears, ranks: int, fused: bool) -> int:
    """The product with every lora_A of a call, side by side: see `accel.linear.inputs.times_lora_A`.

    It reads what the input consists of and lora_A, and writes the hidden states, rows × ranks. The activated last part
    is written out and read, unless it is GELU, which the kernel applies to what it reads. What is done to the columns
    of a modulated input is done to lora_A, and to the hidden states.
    """
    rows, in_features = linears.rows, linears.in_features
    total = WIDTH * (rows * sum(linears.parts) + ranks * in_features + rows * ranks)
    total += 2 * (len(linears.parts) - 1) * WIDTH * rows * ranks
    if linears.recipe == GELU_TANH and not fused:
        total += 2 * WIDTH * rows * linears.parts[-1]
    if linears.recipe == SILU_GATE:
        total += 2 * WIDTH * rows * (linears.parts[-1] // 2)
    if linears.recipe == MODULATED:
        # lora_A: times the scale (2 read, 4 written), its mean (4), less that (8), rounded (6), and in float32 (10).
        total += ranks * in_features * 30
        # The hidden states: times rstd (2 + 4), and the constant (4 + 2).
        total += ranks * rows * 12
    return total


def linears_products(linears: Linears, rank: int, fused: bool) -> int:
    """Count matrix products, a fused kernel as one: base, one with lora_A for all, one with each lora_B.

    Each further part of an input is one more product of each linear, and of lora_A; a modulated input's lora_A has one
    more, with the shift.
    """
    count = len(linears.out_features)
    base = count if linears.weight_width == 1 else count * len(linears.parts)
    if not rank:
        return base
    first = len(linears.parts) + (linears.recipe == MODULATED)
    return base + first if fused else base + first + count
