"""The operators that compute linears over one input, each with the LoRA that is in its slot.

They are opaque to torch.compile, for three reasons: they look at the bound tensors when they run, so a linear that no
LoRA touches costs nothing; lora_A products of linears that read the same input become one; and the LoRA is accumulated
into the linear's output, where separate layers write it out and read it again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..hardware import dtype_name
from ..prove import Verdict, judge, proofs, random
from . import kernels, kronecker, packed, scaled
from .inputs import PLAIN, down, written_out
from .slot import Bound, bound_to

# Rounding to bfloat16 leaves 0.002. The GELU with erf instead of tanh is 0.0003 away, which would do no harm.
GELU_ERROR = 5e-3


@dataclass(frozen=True)
class Product:
    """x · Wᵀ, of plain matrices or of float8 ones with a scale for each row, and what comes right after it.

    Attributes:
        parts: (N, K₁), (N, K₂), …: x, its columns in one or more tensors.
        weight: (out_features, in_features), packed or not.
        scales: of x's rows, (N, 1), and of the weight's, (out_features, 1); or None. With them x has one part.
        dtype: of the result.
        gelu: whether the result goes through GELU (tanh).
        out: where it is written, (N, out_features); None for a tensor of its own.
    """

    parts: Sequence[Tensor]
    weight: Tensor
    scales: tuple[Tensor, Tensor] | None
    dtype: torch.dtype
    gelu: bool = False
    out: Tensor | None = None

    def linear(self, bias: Tensor | None, parts: int | None = None) -> Tensor:
        """The product and its bias; of the first parts alone, if a number is given."""
        if self.scales is not None:
            operands = scaled.Operands(self.parts[0], self.weight, *self.scales, bias, self.dtype, self.out)
            return scaled.multiply(operands)
        if self._is_one_row_on_a_cpu():
            twice = replace(self, parts=[part.repeat(2, 1) for part in self.parts], out=None)
            output = twice.linear(bias, parts)[:1]
            return output if self.out is None else self.out.copy_(output)
        if packed.is_packed(self.weight):
            output = packed.multiply(self.parts[0], self.weight, bias)
            return output if self.out is None else self.out.copy_(output)
        (first, weight), *others = list(zip(self.parts, self._weights(), strict=True))[:parts]
        if bias is None:
            output = torch.mm(first, weight.t(), out=self.out)
        else:
            output = torch.addmm(bias, first, weight.t(), out=self.out)
        for part, weight in others:
            output.addmm_(part, weight.t())
        return output

    def _is_one_row_on_a_cpu(self) -> bool:
        """Whether it is multiplied as two rows: one of bfloat16, as a picture's modulations are, see `packed`."""
        x = self.parts[0]
        one = len(x) == 1 and x.device.type == "cpu" and x.dtype == torch.bfloat16
        return one and packed.one_row_differs()

    def finish(self, output: Tensor) -> Tensor:
        """What comes after the bias and the LoRA, in place."""
        return torch.ops.aten.gelu_(output, approximate="tanh") if self.gelu else output

    def alone(self, bias: Tensor) -> Tensor:
        """The result where no LoRA is bound."""
        x = self.parts[0]
        if self.gelu and x.is_cuda and len(self.parts) == 1 and self.out is None and gelu_fuses(x.device, x.dtype):
            return _product_with_gelu(bias, x, self.weight)
        return self.finish(self.linear(bias))

    def with_lora(self, bias: Tensor, hidden: Tensor, lora_B: Tensor) -> Tensor:
        """The result with a LoRA: hidden, (N, rank), is its first product."""

        def separate() -> Tensor:
            return self.finish(self.linear(bias).addmm_(hidden, lora_B.t()))

        def fused(config: kernels.Config) -> Tensor:
            added, out = bias, self.out
            if len(self.parts) > 1:
                added = out = self.linear(bias, len(self.parts) - 1)
            part, weight = self.parts[-1], self._weights()[-1]
            return kernels.fused_linear(part, weight, added, hidden, lora_B, self.scales, config, self.gelu, out)

        if not self.parts[0].is_cuda or self.dtype == torch.float32:
            return separate()
        shape = (*(part.shape[1] for part in self.parts), *lora_B.shape, self.gelu)
        return kernels.fastest(self.parts[0], shape, fused, separate)

    def _weights(self) -> Sequence[Tensor]:
        if len(self.parts) == 1:
            return [self.weight]
        return self.weight.split([part.shape[1] for part in self.parts], dim=1)


@functools.cache
def gelu_fuses(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product with GELU (tanh) in one call proved itself on a device."""
    subject = f"product with GELU, {dtype_name(dtype)}"
    return proofs().of(subject, device, functools.partial(_compare_gelu, device, dtype)).refusal is None


def _product_with_gelu(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    # cuBLASLt applies it before it writes. On CUDA this operator's GELU is that of tanh, elsewhere it is not:
    # torch/_decomp/decompositions.py, _addmm_activation().
    return torch._addmm_activation(bias, x, weight.t(), use_gelu=True)


def _compare_gelu(device: torch.device, dtype: torch.dtype) -> Verdict:
    x, weight, bias = (
        random(shape, device, seed, scale).to(dtype)
        for seed, (shape, scale) in enumerate((((134, 512), 1.0), ((384, 512), 512**-0.5), ((384,), 1.0)))
    )
    product = torch.addmm(bias.float(), x.float(), weight.float().t())
    return judge(_product_with_gelu(bias, x, weight), F.gelu(product, approximate="tanh"), GELU_ERROR)


def _linears(
    recipe: str,
    sources: Sequence[Tensor],
    quantized: Sequence[Tensor],
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    loras: Sequence[Tensor],
    gelu_last: bool,
) -> list[Tensor]:
    x = sources[0]
    products = _products(sources, quantized, weights, weight_scales)
    if gelu_last:
        products[-1] = replace(products[-1], gelu=True)
    outputs = _run(products, recipe, sources, biases, loras)
    return [output.view(*x.shape[:-1], output.shape[-1]) for output in outputs]


def _joint_linears(
    text_recipe: str,
    text_sources: Sequence[Tensor],
    text_quantized: Sequence[Tensor],
    image_recipe: str,
    image_sources: Sequence[Tensor],
    image_quantized: Sequence[Tensor],
    *parameters: Sequence[Tensor],
) -> list[Tensor]:
    text, image = text_sources[0], image_sources[0]
    count, text_tokens = len(parameters[0]) // 2, text.shape[1]
    outputs = _like_joint_linears(text_recipe, text_sources, None, None, image_sources, None, parameters[0])
    streams = (
        (text_recipe, text_sources, text_quantized, slice(0, text_tokens), slice(0, count)),
        (image_recipe, image_sources, image_quantized, slice(text_tokens, None), slice(count, None)),
    )
    for recipe, sources, quantized, tokens, layers in streams:
        weights, scales, biases, loras = (each[layers] for each in parameters)
        length = sources[0].shape[1]
        # One picture at a time: only then are the rows of an output that a stream fills next to each other.
        for picture in range(image.shape[0]):
            of_picture = [source[picture : picture + 1] for source in sources]
            rows = [each[picture * length : (picture + 1) * length] for each in quantized]
            products = _products(of_picture, rows, weights, scales)
            placed = [
                replace(product, out=each[picture, tokens]) for product, each in zip(products, outputs, strict=True)
            ]
            _run(placed, recipe, of_picture, biases, loras)
    return outputs


def _split_linears(joint: Tensor, quantized: Sequence[Tensor], *parameters: Sequence[Tensor] | int) -> list[Tensor]:
    *lists, text_tokens = parameters
    outputs = []
    for layer, tokens in enumerate((slice(None, text_tokens), slice(text_tokens, None))):
        rows = [each.unflatten(0, joint.shape[:2])[:, tokens].flatten(0, 1) for each in quantized]
        one = (each[layer : layer + 1] for each in lists)
        outputs += _linears(PLAIN, [joint[:, tokens]], rows, *one, False)
    return outputs


def _products(
    sources: Sequence[Tensor], quantized: Sequence[Tensor], weights: Sequence[Tensor], weight_scales: Sequence[Tensor]
) -> list[Product]:
    dtype = sources[0].dtype
    if quantized:
        rows, scale = quantized
        pairs = zip(weights, weight_scales, strict=True)
        return [Product([rows], weight, (scale, weight_scale), dtype) for weight, weight_scale in pairs]
    # The kernel reads rows that follow each other.
    parts = [source.reshape(-1, source.shape[-1]).contiguous() for source in sources]
    return [Product(parts, weight, None, dtype) for weight in weights]


def _run(
    products: Sequence[Product],
    recipe: str,
    sources: Sequence[Tensor],
    biases: Sequence[Tensor],
    loras: Sequence[Tensor],
) -> list[Tensor]:
    bound = [bound_to(slot) for slot in loras]
    hidden = _down(lambda matrix: down(recipe, sources, matrix), [lora.lora_A for lora in bound])
    x = written_out(recipe, sources) if any(lora.terms for lora in bound) else None
    outputs = []
    for product, bias, lora, low in zip(products, biases, bound, hidden, strict=True):
        if lora.mixing is not None or lora.terms:
            if lora.mixing is not None:
                output = _mix(product.linear(None), lora.mixing).add_(bias)
                if low is not None:
                    output.addmm_(low, lora.lora_B.t())
            elif low is not None:
                output = replace(product, gelu=False).with_lora(bias, low, lora.lora_B)
            else:
                output = product.linear(bias)
            _add_kroneckers_(output, x, lora)
            output = product.finish(output)
            outputs.append(output if product.out is None else product.out.copy_(output))
        elif low is not None:
            outputs.append(product.with_lora(bias, low, lora.lora_B))
        else:
            outputs.append(product.alone(bias))
    return outputs


def _add_loras_(outputs: Sequence[Tensor], x: Tensor, biases: Sequence[Tensor], loras: Sequence[Tensor]) -> None:
    bound = [bound_to(slot) for slot in loras]
    rows = x.reshape(-1, x.shape[-1])
    hidden = _down(lambda matrix: rows @ matrix.t(), [lora.lora_A for lora in bound])
    for output, bias, lora, low in zip(outputs, biases, bound, hidden, strict=True):
        out_features = output.shape[-1]
        if lora.mixing is not None:
            mixed = _mix((output.float() - bias).view(-1, out_features), lora.mixing.float()).add_(bias)
            output.copy_(mixed.view(output.shape))
        if low is not None:
            output.view(-1, out_features).addmm_(low, lora.lora_B.t())
        if lora.terms:
            _add_kroneckers_(output.view(-1, out_features), rows, lora)


def _add_kroneckers_(output: Tensor, x: Tensor, lora: Bound) -> None:
    """Add the Kronecker products of x, (N, in_features), to a linear's output, (N, out_features), in place."""
    rows = output.shape[1]
    for term in lora.terms:
        if (term.first, term.a * term.m, term.width) == (0, rows, 0):
            kronecker.add_(output, x, *term.matrices(lora.buffer))
            continue
        added = kronecker.rows_of(x, term, lora.buffer, rows)
        output.add_(_mix(added, term.blocks(lora.buffer, rows)) if term.width else added)


def _down(multiply: Callable[[Tensor], Tensor], lora_A: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The products with each lora_A, None where there is none; one product for matrices that are the same or adjoin."""
    hidden: list[Tensor | None] = [None] * len(lora_A)
    start = 0
    while start < len(lora_A):
        first = lora_A[start]
        if first is None:
            start += 1
            continue
        rank, end = first.shape[0], first.data_ptr() + first.nbytes
        columns = [(0, rank)]
        for matrix in lora_A[start + 1 :]:
            if matrix is None:
                break
            size = matrix.shape[0]
            if matrix.data_ptr() == first.data_ptr() and size == first.shape[0]:
                columns.append((0, size))
            elif matrix.data_ptr() == end:
                columns.append((rank, size))
                rank, end = rank + size, end + matrix.nbytes
            else:
                break
        whole = first if rank == first.shape[0] else first.as_strided((rank, first.shape[1]), (first.shape[1], 1))
        product = multiply(whole)
        for index, (column, size) in enumerate(columns, start):
            hidden[index] = product[:, column : column + size]
        start += len(columns)
    return hidden


def _mix(rows: Tensor, mixing: Tensor) -> Tensor:
    """Multiply (N, out_features) by a block-diagonal matrix on its columns: each block of b outputs by its (b, b)."""
    width = mixing.numel() // rows.shape[1]
    if width == 1:
        return rows * mixing
    blocks = mixing.view(-1, width, width)
    return torch.einsum("nkj,kij->nki", rows.view(rows.shape[0], -1, width), blocks).reshape(rows.shape)


def _like_linears(
    recipe: str, sources: Sequence[Tensor], quantized: Sequence[Tensor], weights: Sequence[Tensor], *_: object
) -> list[Tensor]:
    x = sources[0]
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _like_joint_linears(
    text_recipe: str,
    text_sources: Sequence[Tensor],
    text_quantized: Sequence[Tensor] | None,
    image_recipe: str | None,
    image_sources: Sequence[Tensor],
    image_quantized: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    *_: object,
) -> list[Tensor]:
    text, image = text_sources[0], image_sources[0]
    size = (image.shape[0], text.shape[1] + image.shape[1])
    return [image.new_empty((*size, weight.shape[0])) for weight in weights[: len(weights) // 2]]


def _like_split_linears(
    joint: Tensor, quantized: Sequence[Tensor], weights: Sequence[Tensor], *parameters: Sequence[Tensor] | int
) -> list[Tensor]:
    batch, tokens, _ = joint.shape
    text_tokens = parameters[-1]
    lengths = (text_tokens, tokens - text_tokens)
    pairs = zip(lengths, weights, strict=True)
    return [joint.new_empty((batch, length, weight.shape[0])) for length, weight in pairs]


def _register() -> torch.library.Library | None:
    namespace = "flux_hotswap"
    if hasattr(getattr(torch.ops, namespace), "linears"):
        return None  # this file was imported under another package name before: the operators are the same
    library = torch.library.Library(namespace, "FRAGMENT")
    parameters = "Tensor[] weights, Tensor[] weight_scales, Tensor[] biases, Tensor[] loras"
    x, text, image = (
        f"str {name}recipe, Tensor[] {name}sources, Tensor[] {name}quantized" for name in ("", "text_", "image_")
    )
    for name, schema, function, fake in (
        ("linears", f"({x}, {parameters}, bool gelu_last) -> Tensor[]", _linears, _like_linears),
        ("joint_linears", f"({text}, {image}, {parameters}) -> Tensor[]", _joint_linears, _like_joint_linears),
        (
            "split_linears",
            f"(Tensor joint, Tensor[] quantized, {parameters}, SymInt text_tokens) -> Tensor[]",
            _split_linears,
            _like_split_linears,
        ),
        (
            "add_loras_",
            "(Tensor(a!)[] outputs, Tensor x, Tensor[] biases, Tensor[] loras) -> ()",
            _add_loras_,
            lambda *_: None,
        ),
    ):
        library.define(name + schema)
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library


# The registration lives as long as this object.
_LIBRARY = _register()
