"""Child process of `gpu_code`: generate the code of blocks for an H100, and print as JSON what is in it.

    python -m benchmarks.generated_code MODEL IMAGE_TOKENS TEXT_TOKENS [VARIANT ...]

MODEL is the name of a published model, whose width the blocks have; without VARIANT it is all of `VARIANTS`.

Per variant and block: the Triton kernels, the matrix products, what crosses to the host, the bytes that all of it
moves, and the calls of the pack's own operators, which are opaque here and are counted by `lora_bytes`.
"""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from accel.families.streams.layout import HEAD_DIM
from accel.linear.inputs import MODULATED, NONE
from accel.lora.hold.slots import LoraSlots

from .block_variants import add_peft, block_modules, diffusers_modules, quantize_float8, without_lora_layers
from .families.base import Config, Tokens
from .families.registry import config_of, of
from .flux_loras import diffusers_model, meta_model
from .pretend_h100 import pretend

DTYPE = torch.bfloat16
# Our block functions over our LoRA layers; over bare linears; diffusers' blocks, bare; those with PEFT's layers.
KINDS = ("ours", "bare", "diffusers", "peft")
THEIRS = KINDS[2:]
VARIANTS = tuple(f"{kind}_{dtype}" for dtype in ("bf16", "fp8") for kind in KINDS)
PEFT_RANK = 16
BLOCKS = ("double", "single")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm", "_int_mm")
# What makes the host wait for the device, and what moves data to it, in generated code.
SYNCS = r"\.item\(\)|\.tolist\(\)|synchronize\(|_local_scalar_dense|\.wait\(\)"
HOST_COPIES = r"\.cpu\(\)|device\(type='cpu'|device='cpu'|empty_strided_cpu|\.to\('cpu"


class _Generated(Exception):
    """Ends a compile when its code is there: nothing can run it."""


def main() -> None:
    """Print the JSON."""
    model, image_tokens, text_tokens, *wanted = sys.argv[1:]
    warnings.filterwarnings("ignore")
    pretend()
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    generate = _capture()
    whole = config_of(model)
    config, tokens = of(whole).one_of_each(whole.hidden_size), Tokens(int(image_tokens), int(text_tokens))
    print(json.dumps({name: _variant(generate, config, name, tokens) for name in wanted or VARIANTS}))


def _variant(generate: Callable, config: Config, name: str, tokens: Tokens) -> dict[str, Any]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    kind, _, dtype = name.partition("_")
    theirs = kind in THEIRS
    modules = diffusers_modules(config) if theirs else block_modules(config)
    model = diffusers_model(config) if theirs else meta_model(config)
    if kind == "peft":
        with torch.device("meta"):
            add_peft(model, modules, PEFT_RANK)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), torch.device("cuda"):
        _to_device(model)
        if dtype == "fp8":
            for module in modules:
                linear = model.get_submodule(module)
                # PEFT's layer for torchao's weights has the same forward as its ordinary one, which is there already.
                quantize_float8(linear.base_layer if kind == "peft" else linear)
        if kind == "ours":
            slots = LoraSlots(model, modules, torch.device("cuda"))
            slots.bind(slots.empty)
        blocks = model.transformer_blocks[0], model.single_transformer_blocks[0]
        runs = zip(BLOCKS, _functions(kind, config), blocks, _inputs(config, tokens, theirs), strict=True)
        return {block_type: generate(*run) for block_type, *run in runs}


def _to_device(model: nn.Module) -> None:
    """Give every Parameter a place there, and `DTYPE`: PEFT makes its layers in float32."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=DTYPE, device="cuda")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)


def _functions(kind: str, config: Config) -> Iterator[Callable]:
    """What runs a double and a single block."""
    for function in of(config).family.regions(_attention):
        if kind in THEIRS:
            yield lambda block, *inputs: block(*inputs)
        else:
            yield without_lora_layers(function) if kind == "bare" else function


def _inputs(config: Config, tokens: Tokens, theirs: bool) -> tuple[tuple, tuple]:
    """What a double and a single block are called with."""
    family, hidden_size = of(config), config.hidden_size

    def make(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPE)

    if theirs:
        rotary = torch.empty(tokens.all, HEAD_DIM), torch.empty(tokens.all, HEAD_DIM)
        called = family.theirs(config, make, tokens, rotary)
        return called.double, called.single
    behind = family.ours(config, make, torch.empty(2, 1, 1, tokens.all, HEAD_DIM // 2))
    streams = make(1, tokens.image, hidden_size), make(1, tokens.text, hidden_size)
    return (*streams, *behind.double), (make(1, tokens.all, hidden_size), *behind.single)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ops.flux_hotswap_bench.attention(query, key, value)


def _register_attention() -> None:
    # Opaque, as FlashAttention 3 would be: SDPA asks the driver which kernel to take.
    @torch.library.custom_op("flux_hotswap_bench::attention", mutates_args=())
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.empty_like(query)

    attention.register_fake(lambda query, key, value: torch.empty_like(query))

    from diffusers.models.transformers import transformer_flux, transformer_flux2

    for module in (transformer_flux, transformer_flux2):
        module.dispatch_attention_fn = lambda query, key, value, **_: _attention(query, key, value, None)


def _capture() -> Callable[[Callable, nn.Module, tuple], dict[str, Any]]:
    """A function that compiles and gives what `_describe` says of the code."""
    from torch._inductor.graph import GraphLowering

    _register_attention()
    original, described = GraphLowering.codegen, []

    def codegen(self: GraphLowering) -> None:
        code = original(self)[0]
        described.append(_describe(getattr(code, "value", code), self))
        raise _Generated

    GraphLowering.codegen = codegen

    def generate(function: Callable, block: nn.Module, inputs: tuple) -> dict[str, Any]:
        described.clear()
        torch._dynamo.reset()
        try:
            torch.compile(function, fullgraph=True, dynamic=False)(block, *inputs)
        except Exception:
            if len(described) != 1:
                raise
        return described[0]

    return generate


def _describe(code: str, graph: Any) -> dict[str, Any]:
    # Behind it stands what would time it, with inputs that it makes: those of the host, too, which no call moves.
    call = re.split(r"\ndef (?:get_args|benchmark_compiled_module)\(", code[code.index("def call(") :])[0]
    spilled, products, works, operators = 0, 0, [], []
    for node in graph.scheduler.nodes:
        own = _own_operator(node.node)
        operators += own
        if own:
            continue
        product = _product(node.node)
        products += product is not None
        # Inductor takes a slice that a library reads for the whole buffer: products are counted by their sizes.
        works.append(product or (node.get_read_write_buffers_sizes(), _attention_flops(node.node), 2))
        spilled += sum(size for _, size in _spilled(node, graph))
    return {
        "works": works,
        "bytes": sum(moved for moved, _, _ in works),
        "spilled_bytes": spilled,
        "inductor_bytes": graph.count_bytes()[0],
        "kernels": len(re.findall(r"triton_[a-z0-9_]+\.run\(", call)),
        "products": products,
        **crossings(call),
        "operators": operators,
    }


def _spilled(node: Any, graph: Any) -> Iterator[tuple[str, int]]:
    """Buffers that a fused kernel writes for itself alone, and their bytes: inductor's count leaves them out."""
    own = {each.get_name() for each in node.get_nodes()} if hasattr(node, "get_nodes") else set()
    for each in node.get_outputs() if len(own) > 1 else ():
        name, readers = each.get_name(), {user.get_name() for user in each.users if not user.is_weak}
        if readers <= own and name not in graph.removed_buffers:
            yield name, _tensor_bytes(each.node)


def crossings(call: str) -> dict[str, int]:
    """Count what crosses from the device to the host in the code of a `call` function."""
    return {"host_copies": len(re.findall(HOST_COPIES, call)), "syncs": len(re.findall(SYNCS, call))}


def _own_operator(node: Any) -> list[dict[str, Any]]:
    """A call of an operator of ours: the linears that read each of its inputs, as fields of `lora_bytes.Linears`."""
    operator = getattr(node, "op_overload", None)
    if operator is None or operator.namespace != "flux_hotswap":
        return []
    arguments = node.unflatten_args(node.inputs, node.constant_args)[0]
    names = [argument.name for argument in operator._schema.arguments]
    given = dict(zip(names, arguments, strict=False))
    if "sources" not in given and "joint" not in given and "text_sources" not in given:
        raise ValueError(f"the bytes of {operator} are not known.")
    weights, inputs = given["weights"], list(_inputs_of(given))
    count = len(weights) // len(inputs)
    return [
        {
            "rows": math.prod(_size(sources[0])[:-1]),
            # Of a modulated input's sources the first is the large one.
            "parts": [_size(source)[-1] for source in (sources[:1] if recipe == MODULATED else sources)],
            "out_features": [_size(weight)[0] for weight in weights[number * count : (number + 1) * count]],
            "weight_width": weights[0].get_dtype().itemsize,
            "recipe": recipe,
            "activation": given.get("activation", NONE),
        }
        for number, (recipe, sources) in enumerate(inputs)
    ]


def _inputs_of(given: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Recipe and sources of each input of a call."""
    if "joint" in given:
        batch, tokens, width = _size(given["joint"])
        text_tokens = int(given["text_tokens"])
        for length in (text_tokens, tokens - text_tokens):
            yield NONE, [(batch, length, width)]
        return
    for prefix in ("text_", "image_") if "text_sources" in given else ("",):
        yield given[f"{prefix}recipe"], given[f"{prefix}sources"]


def _size(tensor: Any) -> tuple[int, ...]:
    return tensor if isinstance(tensor, tuple) else tuple(map(int, tensor.get_size()))


def _product(node: Any) -> tuple[int, int, int] | None:
    """Bytes and operations of a matrix product, and bytes of an element; None for other kernels.

    Each operand is read once, by its own size, and the result written once.
    """
    names = (str(getattr(node, "python_kernel_name", "")), str(getattr(node, "op_overload", "")))
    if not any(name.endswith((f".{product}", f"aten.{product}.default")) for name in names for product in PRODUCTS):
        return None
    left = next(each for each in node.inputs if len(each.get_size()) > 1)
    flops = 2 * _size(left)[-1] * math.prod(_size(node))
    return sum(_tensor_bytes(tensor) for tensor in (*node.inputs, node)), flops, left.get_dtype().itemsize


def _attention_flops(node: Any) -> int:
    """Operations of the stand-in for attention, two products of (N, D) and (N, N) per head; 0 for other kernels."""
    if getattr(node, "op_overload", None) is not torch.ops.flux_hotswap_bench.attention.default:
        return 0
    # (B, heads, N, D), or, as diffusers calls it, (B, N, heads, D): there are more tokens than heads.
    size = _size(node)
    return 4 * math.prod(size) * max(size[1:3])


def _tensor_bytes(tensor: Any) -> int:
    layout = tensor.get_layout()
    # A broadcast dimension is read once.
    sizes: Iterator[int] = (
        int(size) for size, stride in zip(layout.size, layout.stride, strict=True) if int(stride) != 0
    )
    return math.prod(sizes) * layout.dtype.itemsize


if __name__ == "__main__":
    main()
