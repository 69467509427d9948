"""The operators that compute linears over one input, each with the LoRA that is in its slot.

They are opaque to torch.compile, for three reasons: they look at the bound tensors when they run, so a linear that no
LoRA touches costs nothing; lora_A products of linears that read the same input become one; and the LoRA is accumulated
into the linear's output, where separate layers write it out and read it again.

What `layers` gives each of them:

- of an input: its recipe and sources, see `inputs`, and `quantized`: its rows as float8, ``(b n) k``, with their
  scales, ``(b n) 1`` float32, where the weights are float8; empty where they are not;
- of each linear that reads it: the weight, ``o k``; its scales, ``o 1`` float32, where it is float8, else none at all;
  the bias, ``o``, or None; and the slot, see `slot`.

Shapes: b batch, n tokens (t of text, i of images), k in_features, o out_features, r rank. Only `add_loras_` writes to
what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import kronecker
from .inputs import NONE, Activation, Recipe, times_lora_A, written_out
from .product import Product
from .slot import Bound, bound_to


def _linears(
    recipe: Recipe,
    sources: Sequence[Tensor],
    quantized: Sequence[Tensor],
    weights: Sequence[Tensor],
    weight_scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slots: Sequence[Tensor],
    activation: Activation,
) -> list[Tensor]:
    """``b n o`` of each linear, the last one through an activation."""
    x = sources[0]
    products = _products(sources, quantized, weights, weight_scales)
    products[-1] = replace(products[-1], activation=activation)
    outputs = _run(products, recipe, sources, biases, slots)
    return [output.view(*x.shape[:-1], output.shape[-1]) for output in outputs]


def _joint_linears(
    text_recipe: Recipe,
    text_sources: Sequence[Tensor],
    text_quantized: Sequence[Tensor],
    image_recipe: Recipe,
    image_sources: Sequence[Tensor],
    image_quantized: Sequence[Tensor],
    *parameters: Sequence[Tensor | None],
) -> list[Tensor]:
    """``b (t i) o`` of each pair of linears; `parameters` are those of the text's linears, then of the images'."""
    text, image = text_sources[0], image_sources[0]
    count, text_tokens = len(parameters[0]) // 2, text.shape[1]
    outputs = _new_joint_outputs(text, image, parameters[0])
    streams = (
        (text_recipe, text_sources, text_quantized, slice(0, text_tokens), slice(0, count)),
        (image_recipe, image_sources, image_quantized, slice(text_tokens, None), slice(count, None)),
    )
    for recipe, sources, quantized, tokens, layers in streams:
        weights, scales, biases, slots = (each[layers] for each in parameters)
        length = sources[0].shape[1]
        # One sample at a time: only then are the rows of an output that a stream fills next to each other.
        for sample in range(image.shape[0]):
            of_sample = [source[sample : sample + 1] for source in sources]
            rows = [each[sample * length : (sample + 1) * length] for each in quantized]
            products = _products(of_sample, rows, weights, scales)
            placed = [
                replace(product, out=each[sample, tokens]) for product, each in zip(products, outputs, strict=True)
            ]
            _run(placed, recipe, of_sample, biases, slots)
    return outputs


def _new_joint_outputs(text: Tensor, image: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """What joint linears write to, ``b (t i) o`` of each pair, for ``b t k``, ``b i k`` and all weights, ``o k``."""
    size = (image.shape[0], text.shape[1] + image.shape[1])
    return [image.new_empty((*size, weight.shape[0])) for weight in weights[: len(weights) // 2]]


def _split_linears(
    joint: Tensor, quantized: Sequence[Tensor], *parameters: Sequence[Tensor | None] | int
) -> list[Tensor]:
    """``b t o`` of one linear and ``b i o`` of another, of ``b (t i) k``; the last of `parameters` is t."""
    *lists, text_tokens = parameters
    outputs = []
    for layer, tokens in enumerate((slice(None, text_tokens), slice(text_tokens, None))):
        rows = [each.unflatten(0, joint.shape[:2])[:, tokens].flatten(0, 1) for each in quantized]
        one = (each[layer : layer + 1] for each in lists)
        outputs += _linears(NONE, [joint[:, tokens]], rows, *one, NONE)
    return outputs


def _products(
    sources: Sequence[Tensor], quantized: Sequence[Tensor], weights: Sequence[Tensor], weight_scales: Sequence[Tensor]
) -> list[Product]:
    """The product of each linear with ``(b n) k``: the float8 rows where there are some, else the sources."""
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
    recipe: Recipe,
    sources: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slots: Sequence[Tensor],
) -> list[Tensor]:
    """``(b n) o`` of each linear, with what is in its slot, written where its product says."""
    bound = [bound_to(slot) for slot in slots]
    hidden = _times_each_lora_A(lambda matrix: times_lora_A(recipe, sources, matrix), [lora.lora_A for lora in bound])
    x = written_out(recipe, sources) if any(lora.terms for lora in bound) else None
    linears = zip(products, biases, bound, hidden, strict=True)
    return [_run_one(product, bias, lora, low, x) for product, bias, lora, low in linears]


def _run_one(product: Product, bias: Tensor | None, lora: Bound, hidden: Tensor | None, x: Tensor | None) -> Tensor:
    """``(b n) o`` of one linear; hidden, ``(b n) r``, is the product with its lora_A, x, ``(b n) k``, what it reads.

    Each is None where nothing that is bound needs it.
    """
    if lora.mixing is None and not lora.terms:
        return product.without_lora(bias) if hidden is None else product.with_lora(bias, hidden, lora.lora_B)
    if lora.mixing is not None:
        output = _mix(product.linear(None), lora.mixing)
        if bias is not None:
            output.add_(bias)
        if hidden is not None:
            output.addmm_(hidden, lora.lora_B.t())
    elif hidden is not None:
        output = replace(product, activation=NONE).with_lora(bias, hidden, lora.lora_B)
    else:
        output = product.linear(bias)
    _add_kroneckers_(output, x, lora)
    output = product.activate_(output)
    return output if product.out is None else product.out.copy_(output)


def _add_loras_(
    outputs: Sequence[Tensor], x: Tensor, biases: Sequence[Tensor | None], slots: Sequence[Tensor]
) -> None:
    """Add what is bound to the outputs of linears, ``b n o``, which others computed of x, ``b n k``; in place."""
    bound = [bound_to(slot) for slot in slots]
    rows = x.reshape(-1, x.shape[-1])
    hidden = _times_each_lora_A(lambda matrix: rows @ matrix.t(), [lora.lora_A for lora in bound])
    for output, bias, lora, low in zip(outputs, biases, bound, hidden, strict=True):
        flat = output.view(-1, output.shape[-1])
        if lora.mixing is not None:
            mixed = _mix(flat.float() if bias is None else flat.float() - bias, lora.mixing.float())
            flat.copy_(mixed if bias is None else mixed.add_(bias))
        if low is not None:
            flat.addmm_(low, lora.lora_B.t())
        _add_kroneckers_(flat, rows, lora)


def _add_kroneckers_(output: Tensor, x: Tensor, lora: Bound) -> None:
    """Add the Kronecker products of x, ``(b n) k``, to a linear's output, ``(b n) o``, in place."""
    rows = output.shape[1]
    for term in lora.terms:
        if (term.first, term.a * term.m, term.width) == (0, rows, 0):
            kronecker.add_(output, x, *term.matrices(lora.buffer))
            continue
        added = kronecker.rows_of(x, term, lora.buffer, rows)
        output.add_(_mix(added, term.blocks(lora.buffer, rows)) if term.width else added)


def _times_each_lora_A(
    multiply: Callable[[Tensor], Tensor], lora_A: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The product with each lora_A, ``r k``, or None; one for all matrices that are the same or adjoin in memory."""
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
    """Multiply ``(b n) (blocks w)`` by a block-diagonal matrix, ``(blocks w w)``: each w outputs by their ``w w``."""
    width = mixing.numel() // rows.shape[1]
    if width == 1:
        return rows * mixing
    blocks = mixing.view(-1, width, width)
    return torch.einsum("nkj,kij->nki", rows.view(rows.shape[0], -1, width), blocks).reshape(rows.shape)


def _fake_linears(
    recipe: Recipe, sources: Sequence[Tensor], quantized: Sequence[Tensor], weights: Sequence[Tensor], *_: object
) -> list[Tensor]:
    x = sources[0]
    return [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]


def _fake_joint_linears(
    text_recipe: Recipe,
    text_sources: Sequence[Tensor],
    text_quantized: Sequence[Tensor],
    image_recipe: Recipe,
    image_sources: Sequence[Tensor],
    image_quantized: Sequence[Tensor],
    weights: Sequence[Tensor],
    *_: object,
) -> list[Tensor]:
    return _new_joint_outputs(text_sources[0], image_sources[0], weights)


def _fake_split_linears(
    joint: Tensor, quantized: Sequence[Tensor], weights: Sequence[Tensor], *parameters: Sequence[Tensor | None] | int
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
    parameters = "Tensor[] weights, Tensor[] weight_scales, Tensor?[] biases, Tensor[] slots"
    x, text, image = (
        f"str {name}recipe, Tensor[] {name}sources, Tensor[] {name}quantized" for name in ("", "text_", "image_")
    )
    for name, schema, function, fake in (
        ("linears", f"({x}, {parameters}, str activation) -> Tensor[]", _linears, _fake_linears),
        ("joint_linears", f"({text}, {image}, {parameters}) -> Tensor[]", _joint_linears, _fake_joint_linears),
        (
            "split_linears",
            f"(Tensor joint, Tensor[] quantized, {parameters}, SymInt text_tokens) -> Tensor[]",
            _split_linears,
            _fake_split_linears,
        ),
        (
            "add_loras_",
            "(Tensor(a!)[] outputs, Tensor x, Tensor?[] biases, Tensor[] slots) -> ()",
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
