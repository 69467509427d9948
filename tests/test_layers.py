"""The pack's own LoRA layers: right over every kind of base, at any rank, eager and compiled once; free where empty."""

import copy
import itertools
import json
import os
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from accel.compile.compiler import RegionCompiler
from accel.linear import kernels, layers
from accel.linear import operators as lora_operators
from accel.linear.autotune import autotuner, choose
from accel.linear.inputs import GELU_TANH, NONE, SILU_GATE, Columns, modulated
from accel.linear.kronecker import Term, add_, multiplications
from accel.linear.layers import LoraLinear, linears
from accel.linear.product import Product
from accel.linear.slot import NOTHING, Bound, bound_to, make_slot
from accel.lora.hold.slots import LoraSlots
from accel.lora.pack.flat import FlatLora
from accel.lora.pack.layout import Placed
from accel.observer import Silent
from benchmarks.block_variants import quantize_float8
from harness.paths import REPO

CPU = torch.device("cpu")
IN_FEATURES = 256
OUT_FEATURES = {"q": 256, "k": 256, "mlp": 512}
ALIGN = 32

# Kind of base -> how far the outputs may be from float32 arithmetic over the same weights, relative L2. What float8 and
# int8 lose is their activations' rounding.
BASES = {"fp32": 2e-6, "bf16": 4e-3, "fp8": 4e-2, "fp8_weight_only": 4e-3, "int8": 2e-2, "int8_weight_only": 4e-3}
# Each kind where every linear has a bias, and the ways of computing where some have none.
EVERY, SOME = tuple(OUT_FEATURES), ("q",)
CASES = {
    **{kind: (kind, EVERY) for kind in BASES},
    **{f"{kind}, some biases": (kind, SOME) for kind in ("bf16", "fp8", "int8_weight_only")},
}
# What a LoRA adds, against what it should add, where nothing else changes: bfloat16 rounds each output once more.
EFFECT_TOLERANCE = 2e-2


def make_base(kind: str, with_bias: tuple[str, ...] = EVERY) -> nn.ModuleDict:
    torch.manual_seed(0)
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    model = nn.ModuleDict({
        name: nn.Linear(IN_FEATURES, size, bias=name in with_bias, dtype=dtype) for name, size in OUT_FEATURES.items()
    })
    model.requires_grad_(False)
    if kind == "fp8":
        for linear in model.values():
            quantize_float8(linear)
    elif kind not in ("fp32", "bf16"):
        import torchao.quantization as ao

        configs = {
            "fp8_weight_only": ao.Float8WeightOnlyConfig,
            "int8": ao.Int8DynamicActivationInt8WeightConfig,
            "int8_weight_only": ao.Int8WeightOnlyConfig,
        }
        ao.quantize_(model, configs[kind](set_inductor_config=False))
    return model


def dtype_of(model: nn.ModuleDict) -> torch.dtype:
    return next(module for module in model.modules() if isinstance(module, nn.Linear)).weight.dtype


def dequantized(linear: nn.Linear) -> torch.Tensor:
    weight = linear.weight
    return (weight.dequantize() if hasattr(weight, "qdata") else weight).float()


def make_lora(
    ranks=(0, 0, 0),
    dtype=torch.bfloat16,
    adjoin=False,
    shared=False,
    mixing=None,
    bias=False,
    kroneckers=(),
    seed=1,
):
    """A stack on q, k and mlp: ranks of each; lora_A side by side, or one for all; mixing blocks of some width on q.

    Kroneckers are (name, sizes of left, first row, width of what the product is mixed with).
    """
    generator = torch.Generator().manual_seed(seed)
    placed, end = {}, ALIGN

    def take(elements):
        nonlocal end
        start, end = end, end + -(-elements // ALIGN) * ALIGN
        return start

    used = {name: rank for name, rank in zip(OUT_FEATURES, ranks, strict=True) if rank}
    a_starts = {}
    for name, rank in used.items():
        a_starts[name] = next(iter(a_starts.values())) if shared and a_starts else take(rank * IN_FEATURES)
        if not adjoin:
            placed[name] = take(OUT_FEATURES[name] * rank)
    for name in used if adjoin else ():
        placed[name] = take(OUT_FEATURES[name] * used[name])
    places = {
        name: Placed(a_starts[name], (rank, IN_FEATURES), placed[name], (OUT_FEATURES[name], rank))
        for name, rank in used.items()
    }

    def normal(*shape, scale):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    terms = {}
    for name, (a, b), first, width in kroneckers:
        m, n = -(-(OUT_FEATURES[name]) // a), IN_FEATURES // b
        a += first < 0  # one block of rows more, of which other linears have some
        left, right, mixes = take(a * b), take(m * n), take(OUT_FEATURES[name] * width)
        terms.setdefault(name, []).append(Term(left, a, b, right, m, n, abs(first), mixes, width))
    blocks = {} if mixing is None else {"q": normal(OUT_FEATURES["q"] // mixing, mixing, mixing, scale=mixing**-0.5)}
    vectors = {"q.bias": normal(OUT_FEATURES["q"], scale=1.0)} if bias else {}
    buffer = normal(end, scale=1.0)
    for place in places.values():
        for start, size in ((place.a_start, place.a_shape), (place.b_start, place.b_shape)):
            # What the LoRA adds is then about as large as the linear's own output, at every rank.
            part = buffer[start : start + size[0] * size[1]]
            part.copy_(normal(part.numel(), scale=0.19 * place.a_shape[0] ** -0.25))
    for name, of_linear in terms.items():
        for term in of_linear:
            for side in term.matrices(buffer):
                side.copy_(normal(*side.shape, scale=0.19))
            mixes = term.blocks(buffer, OUT_FEATURES[name])
            mixes.copy_(normal(mixes.numel(), scale=max(1, term.width) ** -0.5))
    return FlatLora(buffer, places, blocks, vectors, {name: tuple(each) for name, each in terms.items()})


LORAS = {
    "one of three": {"ranks": (0, 16, 0)},
    "ranks 1, 17, 128": {"ranks": (1, 17, 128)},
    "equal ranks": {"ranks": (16, 16, 16)},
    "lora_A side by side": {"ranks": (16, 32, 16), "adjoin": True},
    "lora_A shared": {"ranks": (32, 32, 32), "shared": True},
    "mixing of 1": {"ranks": (0, 0, 16), "mixing": 1},
    "mixing of 32": {"mixing": 32},
    "mixing and LoRA": {"ranks": (16, 0, 128), "mixing": 32},
    "bias": {"bias": True},
    "all": {"ranks": (128, 1, 17), "mixing": 1, "bias": True, "seed": 9},
    "Kronecker": {"kroneckers": [("k", (16, 16), 0, 0)]},
    "Kronecker, its right matrix the smaller one": {"kroneckers": [("mlp", (128, 64), 0, 0)]},
    "Kronecker of a fused linear": {"kroneckers": [("q", (4, 16), -40, 0), ("mlp", (4, 8), 130, 0)]},
    "Kroneckers": {"kroneckers": [("q", (16, 16), 0, 0), ("q", (8, 32), -3, 0), ("mlp", (2, 1), 0, 0)]},
    "Kronecker, mixed": {"kroneckers": [("q", (16, 16), 0, 32), ("k", (8, 8), -30, 1)]},
    "everything": {
        "ranks": (16, 0, 32), "mixing": 1, "bias": True, "kroneckers": [("q", (16, 16), 0, 1), ("mlp", (4, 4), 7, 0)]
    },
}


def block(model: nn.ModuleDict, x: torch.Tensor) -> list[torch.Tensor]:
    return linears(F.silu(x), *model.values())


def reference(model: nn.ModuleDict, flat: FlatLora, x: torch.Tensor) -> list[torch.Tensor]:
    """The same in float32, written as the formula of `LoraLinear`."""
    x = F.silu(x).float()
    outputs = []
    for name, layer in model.items():
        weight = dequantized(layer.base)
        if name in flat.mixing:
            weight = torch.block_diag(*flat.mixing[name].float()) @ weight
        if name in flat.placed:
            place = flat.placed[name]
            lora_A = flat.buffer[place.a_start :][: place.a_shape[0] * place.a_shape[1]].view(place.a_shape).float()
            lora_B = flat.buffer[place.b_start :][: place.b_shape[0] * place.b_shape[1]].view(place.b_shape).float()
            weight = weight + lora_B @ lora_A
        for term in flat.kroneckers.get(name, ()):
            product = torch.kron(*(side.float() for side in term.matrices(flat.buffer)))
            product = product.roll(-term.first, 0)[: len(weight)]
            if term.width:
                mixes = term.blocks(flat.buffer, len(weight)).float().view(-1, term.width, term.width)
                product = torch.block_diag(*mixes) @ product
            weight = weight + product
        bias = flat.vectors.get(f"{name}.bias", layer.base.bias)
        outputs.append(F.linear(x, weight, None if bias is None else bias.float()))
    return outputs


def distance(output: torch.Tensor, expected: torch.Tensor) -> float:
    return float((output.float() - expected.float()).norm() / expected.float().norm())


@pytest.fixture(scope="module", params=CASES)
def wrapped(request):
    """Kind of base, the wrapped model, its slots, the compiled block and its compiler, run once with nothing bound."""
    kind, with_bias = CASES[request.param]
    return kind, *wrap(make_base(kind, with_bias))


def wrap(model):
    slots = LoraSlots(model, list(OUT_FEATURES), CPU)
    slots.bind(slots.empty)
    compiler = RegionCompiler("regional", Silent())
    return model, slots, compiler.region(block), compiler


def inputs(model, *shape) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*shape, IN_FEATURES, generator=generator).to(dtype_of(model))


@pytest.mark.slow
def test_every_lora_equals_the_formula_eager_and_compiled_once(wrapped):
    kind, model, slots, compiled, compiler = wrapped
    originals = {name: layer.base.bias for name, layer in model.items()}
    with torch.inference_mode(), compiler.scope():
        x = inputs(model, 2, 20)
        before_eager, before = block(model, x), compiled(model, x)
    assert compiler.count == 1
    bases = reference(model, make_lora(), x)
    for output, eager, expected in zip(before, before_eager, bases, strict=True):
        assert distance(output, expected) < BASES[kind]
        assert distance(eager, expected) < BASES[kind]

    for number, (name, options) in enumerate(LORAS.items()):
        flat = make_lora(**options, dtype=x.dtype)
        slots.bind(slots.bindings(flat))
        # Other batches and lengths, too, none of which the code was compiled for.
        size = ((2, 20), (1, 7), (3, 33))[number % 3]
        with (
            torch.inference_mode(),
            compiler.scope(),
            torch._dynamo.config.patch(error_on_recompile=True),
        ):
            part = inputs(model, *size)
            outputs, eager = compiled(model, part), block(model, part)
        expected = reference(model, flat, part)
        unbound = reference(model, replace(flat, placed={}, mixing={}, kroneckers={}), part)
        for layer, output, other, wanted, base in zip(model, outputs, eager, expected, unbound, strict=True):
            assert distance(output, wanted) < BASES[kind], (name, layer)
            assert distance(other, wanted) < BASES[kind], (name, layer)
            changed = layer in {**flat.placed, **flat.mixing, **flat.kroneckers}
            assert (distance(wanted, base) > 0.1) == changed, (name, layer)

    slots.bind(slots.empty)
    with torch.inference_mode(), compiler.scope(), torch._dynamo.config.patch(error_on_recompile=True):
        for output, old in zip(compiled(model, x), before, strict=True):
            assert torch.equal(output, old)
        for output, old in zip(block(model, x), before_eager, strict=True):
            assert torch.equal(output, old)
    assert all(layer.base.bias is originals[name] for name, layer in model.items())
    assert (compiler.count, compiler.recompiles) == (1, 0)


def test_what_a_lora_adds_survives_the_quantization_of_the_base(wrapped):
    kind, model, slots, _, _ = wrapped
    flat = make_lora((16, 0, 128), kroneckers=[("mlp", (16, 16), -9, 0)], dtype=dtype_of(model))
    with torch.inference_mode():
        x = inputs(model, 2, 20)
        without = block(model, x)
        slots.bind(slots.bindings(flat))
        outputs = block(model, x)
        slots.bind(slots.empty)
    expected = zip(reference(model, flat, x), reference(model, make_lora(), x), strict=True)
    for name, output, base, (wanted, wanted_base) in zip(model, outputs, without, expected, strict=True):
        if name in flat.placed:
            assert distance(output.float() - base.float(), wanted - wanted_base) < EFFECT_TOLERANCE, (kind, name)
        else:
            assert torch.equal(output, base), (kind, name)


@pytest.mark.slow
def test_compiled_first_with_a_lora_it_runs_without_one():
    """The other way round: what was bound when the block was compiled is not what it is bound to."""
    model, slots, compiled, compiler = wrap(make_base("bf16"))
    slots.bind(slots.bindings(make_lora(**LORAS["all"])))
    with torch.inference_mode(), compiler.scope():
        x = inputs(model, 1, 20)
        compiled(model, x)
        slots.bind(slots.empty)
        with torch._dynamo.config.patch(error_on_recompile=True):
            outputs = compiled(model, x)
    for output, expected in zip(outputs, reference(model, make_lora(), x), strict=True):
        assert distance(output, expected) < BASES["bf16"]
    assert compiler.count == 1


def graph_of(model, given, compiler_scope):
    """Inputs of the block's graph, and what they are."""
    graphs = []

    def backend(graph, example_inputs):
        graphs.append([node.meta["example_value"] for node in graph.graph.nodes if node.op == "placeholder"])
        return graph.forward

    torch._dynamo.reset()
    with torch.inference_mode(), compiler_scope:
        torch.compile(block, backend=backend, fullgraph=True, dynamic=True)(model, given)
    (found,) = graphs
    return found


@pytest.mark.parametrize("options", [LORAS["equal ranks"], LORAS["everything"]], ids=["equal ranks", "everything"])
def test_a_compiled_block_knows_nothing_of_what_is_bound(options):
    """Its inputs are x and its sizes, weights, biases, and one empty slot for each linear."""
    model, slots, _, compiler = wrap(make_base("bf16"))
    given = inputs(model, 2, 20)
    seen = []
    for flat in (make_lora(), make_lora(**options)):
        slots.bind(slots.bindings(flat))
        seen.append(graph_of(model, given, compiler.scope()))
    kinds = [[tuple(map(str, getattr(value, "shape", ("size",)))) for value in values] for values in seen]
    assert kinds[0] == kinds[1]
    sizes = [value for value in seen[0] if not isinstance(value, torch.Tensor)]
    x = [value for value in seen[0] if isinstance(value, torch.Tensor) and value.dim() == 3]
    assert len(x) == 1
    assert {str(size) for size in sizes} == {str(size) for size in x[0].shape if isinstance(size, torch.SymInt)}
    assert kinds[0].count(("0",)) == len(model)
    assert len(kinds[0]) == len(sizes) + 1 + 3 * len(model)


class VisibleLora(nn.Module):
    """A linear with a LoRA beside it in the graph, as it would be without operators and slots."""

    def __init__(self, base):
        super().__init__()
        self.base, self.lora_A, self.lora_B = base, None, None

    def forward(self, x):
        return self.base(x) + x @ self.lora_A.t() @ self.lora_B.t()


@pytest.mark.slow
def test_control_ranks_that_the_graph_knows_recompile():
    model = make_base("bf16")
    layer, compiler = VisibleLora(model["q"]), RegionCompiler("regional", Silent())
    compiled = compiler.region(lambda layer, x: layer(x))
    with torch.inference_mode(), compiler.scope(), torch._dynamo.config.patch(error_on_recompile=True):
        x = inputs(model, 1, 20)
        for rank, recompiles in ((16, False), (16, False), (32, True)):
            with torch.inference_mode(False):
                shapes = (rank, IN_FEATURES), (OUT_FEATURES["q"], rank)
                layer.lora_A, layer.lora_B = (
                    nn.Parameter(torch.randn(shape, dtype=torch.bfloat16), requires_grad=False) for shape in shapes
                )
            if recompiles:
                with pytest.raises(torch._dynamo.exc.RecompileError):
                    compiled(layer, x)
            else:
                compiled(layer, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "flaw"),
    [
        *(("bf16", flaw) for flaw in ("a copy", "a new Parameter", "emptied", "after unbind")),
        *(("int8_weight_only", flaw) for flaw in ("a copy", "after unbind")),
    ],
)
def test_a_slot_to_which_nothing_is_bound_is_refused(kind, flaw):
    """Eager and compiled; never taken for no LoRA. Both operators: that with plain weights, and `add_loras_`."""
    model, slots, compiled, compiler = wrap(make_base(kind))
    with torch.inference_mode(), compiler.scope():
        x = inputs(model, 1, 20)
        expected = compiled(model, x)
        slot = model["k"].lora
        if flaw == "a copy":
            with torch.inference_mode(False):
                model["k"]._parameters["lora"] = copy.deepcopy(slot)
        elif flaw == "a new Parameter":
            model["k"]._parameters["lora"] = make_slot(CPU)
        elif flaw == "emptied":
            slot.bound_lora = None
        else:
            slots.unbind()
            model["k"]._parameters["lora"] = slot
            for other in ("q", "mlp"):
                model[other]._parameters["lora"] = make_slot(CPU)
                model[other].lora.bound_lora = NOTHING
        with torch._dynamo.config.patch(error_on_recompile=True):
            for run in (block, compiled):
                with pytest.raises(RuntimeError, match=r"LoRA slot of a linear.*shape \(0,\).*LoraSlots"):
                    run(model, x)
            model["k"]._parameters["lora"] = slot
            slot.bound_lora = NOTHING
            for output, wanted in zip(compiled(model, x), expected, strict=True):
                assert torch.equal(output, wanted)
    assert compiler.failure is None


def test_unbinding_lets_go_of_everything():
    model, slots, _, _ = wrap(make_base("bf16"))
    flat = make_lora(**LORAS["everything"])
    slots.bind(slots.bindings(flat))
    held = weakref.ref(bound_to(model["q"].lora).lora_A)
    slots.unbind()
    assert all(layer.lora is None for layer in model.values())
    assert held() is None


class Operators(TorchDispatchMode):
    """Names of the aten operators that run, views left out."""

    VIEWS = (
        *("view", "t", "slice", "split_with_sizes", "as_strided", "_unsafe_view", "reshape", "detach", "alias"),
        "transpose",
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function._schema.name.removeprefix("aten::")
        if name not in self.VIEWS:
            self.names.append(name)
        return function(*arguments, **(options or {}))


def operators(run):
    # Not in inference mode, in which a mode sees `linear` and `matmul` whole.
    with torch.no_grad(), Operators() as seen:
        result = run()
    return seen.names, result


def times_each_lora_A(rows, lora_A):
    names, hidden = operators(lambda: lora_operators._times_each_lora_A(lambda matrix: rows @ matrix.t(), lora_A))
    for low, matrix in zip(hidden, lora_A, strict=True):
        if matrix is not None:
            torch.testing.assert_close(low, rows @ matrix.t(), atol=1e-5, rtol=1e-5)
        else:
            assert low is None
    return names


def side_by_side(*ranks):
    buffer = torch.randn(sum(ranks), 64)
    return list(buffer.split(ranks))


@pytest.mark.parametrize(
    ("products", "make"),
    [
        (0, lambda: [None] * 3),
        (1, lambda: side_by_side(16, 32, 16)),
        (1, lambda: side_by_side(16) * 3),
        # q, k, v share one, the MLP's lies behind it.
        (1, lambda: (lambda a, b: [a, a, a, b])(*side_by_side(16, 32))),
        (3, lambda: [torch.randn(16, 64) for _ in range(3)]),
        (2, lambda: [*side_by_side(16, 16), torch.randn(1, 64)]),
        (2, lambda: (lambda a, b: [a, None, b])(*side_by_side(16, 16))),
        # In the other order they do not adjoin.
        (2, lambda: side_by_side(16, 16)[::-1]),
    ],
)
def test_lora_a_products_that_can_be_one_are_one(products, make):
    assert times_each_lora_A(torch.randn(10, 64), make()) == ["mm"] * products


def run_linears(x, linear, lora):
    slot = make_slot(CPU)
    slot.bound_lora = lora
    operands = (NONE, [x], [], [linear.weight], [], [linear.bias], [slot], NONE)
    return operators(lambda: lora_operators._linears(*operands))


@pytest.mark.parametrize("sizes", [((16, 16), (12, 4)), ((4, 32), (12, 4)), ((32, 4), (4, 12)), ((1, 8), (6, 5))])
def test_a_kronecker_product_is_two_small_ones_and_no_other_pass(sizes):
    """In the cheaper order, the second into the output."""
    left, right = (torch.randn(size) for size in sizes)
    x, output = torch.randn(7, left.shape[1] * right.shape[1]), torch.randn(7, left.shape[0] * right.shape[0])
    expected = output + x @ torch.kron(left, right).t()
    names, _ = operators(lambda: add_(output, x, left, right))
    torch.testing.assert_close(output, expected)
    (a, b), (m, n) = sizes
    orders = {("bmm", "addmm_"): a * b * n + a * m * n, ("mm", "baddbmm_"): b * m * n + a * b * m}
    taken = tuple(name for name in names if name != "expand")
    assert orders[taken] == multiplications(*sizes) == min(orders.values())


def test_nothing_bound_runs_what_a_linear_runs():
    linear = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(2, 5, 64)
    expected, output = operators(lambda: F.linear(x, linear.weight, linear.bias))
    names, (ours,) = run_linears(x, linear, NOTHING)
    assert names == expected == ["addmm"]
    assert torch.equal(ours, output)


def test_a_lora_is_two_more_products_and_no_other_pass():
    linear = nn.Linear(64, 32).requires_grad_(False)
    x = torch.randn(2, 5, 64)
    names, _ = run_linears(x, linear, Bound(torch.randn(16, 64), torch.randn(32, 16)))
    assert names == ["mm", "addmm", "addmm_"]


def test_a_linear_by_itself_is_linears_of_one():
    model = make_base("bf16")
    slots = LoraSlots(model, list(OUT_FEATURES), CPU)
    slots.bind(slots.bindings(make_lora((16, 16, 16))))
    assert isinstance(model["q"], LoraLinear)
    x = inputs(model, 1, 4)
    with torch.inference_mode():
        together = linears(x, *model.values())
        assert all(torch.equal(layer(x), output) for layer, output in zip(model.values(), together, strict=True))


# What the operators do on a GPU, here on a CPU: inputs in parts or as recipes, GELU with the product.

FEED_FORWARD = ("up", "down", "wide_down")


def make_feed_forward(kind, activation=GELU_TANH, bias=True):
    """Two linears with an activation between them; the second reads it alone, or behind the input."""
    torch.manual_seed(0)
    sizes = (256, 1024 if activation == SILU_GATE else 512), (512, 256), (768, 256)
    model = nn.ModuleDict({
        name: nn.Linear(*size, bias=bias, dtype=torch.bfloat16) for name, size in zip(FEED_FORWARD, sizes, strict=True)
    })
    model.requires_grad_(False)
    if kind == "fp8":
        for linear in model.values():
            quantize_float8(linear)
    slots = LoraSlots(model, list(FEED_FORWARD), CPU)
    slots.bind(slots.empty)
    return model, slots


def feed_forward(model, activation, hidden_states, modulation):
    shift, scale = modulation[:, None].chunk(2, dim=-1)
    x = modulated(hidden_states, shift, scale, 1e-6)
    hidden = linears(x, model["up"], activation=activation)[0]
    return [*linears(hidden, model["down"]), *linears(hidden.after(hidden_states), model["wide_down"])]


def activated(x, activation):
    """In float32, written as the formulas."""
    if activation == SILU_GATE:
        gate, value = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return gate * torch.sigmoid(gate) * value
    return F.gelu(x, approximate="tanh")


def plain_feed_forward(model, activation, loras, hidden_states, modulation):
    """The same in float32."""
    shift, scale = modulation[:, None].float().chunk(2, dim=-1)
    wide = hidden_states.float()

    def run(name, x):
        return plain_linear(model[name].base, loras.get(name), x)

    x = F.layer_norm(wide, wide.shape[-1:], eps=1e-6) * (1 + scale) + shift
    hidden = activated(run("up", x), activation)
    return [run("down", hidden), run("wide_down", torch.cat([wide, hidden], dim=-1))]


def plain_linear(base, lora, x):
    weight = dequantized(base)
    if lora is not None:
        weight = weight + lora[1] @ lora[0]
    return F.linear(x, weight, None if base.bias is None else base.bias.float())


def bind_feed_forward(model, slots, rank, names=FEED_FORWARD, kroneckers=()):
    """Bind a LoRA whose effect is as large as the linears', and return its matrices in float32.

    Some linears get a Kronecker product, too, which is returned as further columns of lora_B.
    """
    generator = torch.Generator().manual_seed(1)
    sizes = {name: (layer.in_features, layer.out_features) for name, layer in model.items()}
    buffer, placed, loras = [torch.zeros(ALIGN)], {}, {}
    for name in names:
        (in_features, out_features), starts = sizes[name], []
        for rows, columns in ((rank, in_features), (out_features, rank)):
            starts.append(sum(part.numel() for part in buffer))
            buffer.append((torch.randn(rows * columns, generator=generator) * 0.19 * rank**-0.25).bfloat16().float())
        placed[name] = Placed(starts[0], (rank, in_features), starts[1], (out_features, rank))
        loras[name] = buffer[-2].view(rank, -1), buffer[-1].view(-1, rank)
    terms = {}
    for name in kroneckers:
        in_features, out_features = sizes[name]
        start = sum(part.numel() for part in buffer)
        left, right = torch.randn(16, 16, generator=generator), torch.randn(
            out_features // 16, in_features // 16, generator=generator)
        buffer += [(0.19 * side).bfloat16().float().flatten() for side in (left, right)]
        terms[name] = (Term(start, 16, 16, start + 256, *right.shape, 0, 0, 0),)
        lora_A, lora_B = loras.get(name, (torch.zeros(0, in_features), torch.zeros(out_features, 0)))
        product = torch.kron(buffer[-2].view(16, 16), buffer[-1].view(right.shape))
        loras[name] = torch.cat([lora_A, torch.eye(in_features)]), torch.cat([lora_B, product], dim=1)
    slots.bind(slots.bindings(FlatLora(torch.cat(buffer).bfloat16(), placed, {}, {}, terms)))
    return loras


def feed_forward_inputs(batch, tokens):
    generator = torch.Generator().manual_seed(2)
    hidden_states = torch.randn(batch, tokens, 256, generator=generator)
    # As a trained transformer's: a few channels are much larger than the others, and the mean is not 0.
    hidden_states[..., :4] *= 30
    return (hidden_states + 0.5).bfloat16(), torch.randn(batch, 512, generator=generator).bfloat16()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "activation", "bias", "on_gpu"),
    [
        ("bf16", GELU_TANH, True, True), ("fp8", GELU_TANH, True, True), ("bf16", GELU_TANH, False, True),
        ("bf16", SILU_GATE, False, True), ("fp8", SILU_GATE, False, True), ("bf16", SILU_GATE, True, False),
        ("fp8", SILU_GATE, True, False),
    ],
)
def test_every_lora_of_a_feed_forward_equals_the_formula(kind, activation, bias, on_gpu, monkeypatch):
    monkeypatch.setattr(layers, "fuses", lambda x: on_gpu)
    model, slots = make_feed_forward(kind, activation, bias)
    compiler = RegionCompiler("regional", Silent())
    compiled = compiler.region(lambda model, *given: feed_forward(model, activation, *given))
    for rank, size, kroneckers in (
        (0, (2, 20), ()), (16, (1, 7), ()), (1, (3, 33), FEED_FORWARD[:1]), (128, (2, 20), ()),
        (16, (2, 9), FEED_FORWARD), (0, (1, 20), FEED_FORWARD), (0, (2, 20), FEED_FORWARD[1:]),
    ):
        loras = bind_feed_forward(model, slots, rank, FEED_FORWARD if rank else (), kroneckers)
        given = feed_forward_inputs(*size)
        with torch.inference_mode(), compiler.scope():
            outputs = compiled(model, *given), feed_forward(model, activation, *given)
        expected = plain_feed_forward(model, activation, loras, *given)
        for output in outputs:
            for part, wanted in zip(output, expected, strict=True):
                # Two linears follow each other, and the bfloat16 between them.
                assert distance(part, wanted) < 2 * BASES[kind], (rank, size)
    assert (compiler.count, compiler.recompiles) == (1, 0)


@pytest.mark.parametrize("with_kronecker", [False, True])
@pytest.mark.parametrize(
    ("name", "activation"),
    [("up", NONE), *((name, each) for name in FEED_FORWARD[1:] for each in (GELU_TANH, SILU_GATE))],
)
def test_as_on_a_gpu_what_a_lora_adds_survives_float8(name, activation, with_kronecker, monkeypatch):
    """The LoRA starts from what the input is computed from, not from the input's eight bits."""
    kroneckers = [name] if with_kronecker else []
    monkeypatch.setattr(layers, "fuses", lambda x: True)
    model, slots = make_feed_forward("fp8", activation)
    hidden_states, modulation = feed_forward_inputs(2, 40)
    shift, scale = modulation[:, None].chunk(2, dim=-1)
    up = torch.randn(2, 40, model["up"].out_features, generator=torch.Generator().manual_seed(4)).bfloat16()
    x = {
        "up": modulated(hidden_states, shift, scale, 1e-6),
        "down": Columns((up,), activation),
        "wide_down": Columns((up,), activation).after(hidden_states),
    }[name]
    with torch.inference_mode():
        without = linears(x, model[name])[0]
        lora_A, lora_B = bind_feed_forward(model, slots, 16, [name], kroneckers)[name]
        added = linears(x, model[name])[0].float() - without.float()
    normed = F.layer_norm(hidden_states.float(), (256,), eps=1e-6) * (1 + scale.float()) + shift.float()
    hidden = activated(up.float(), activation)
    exact = {"up": normed, "down": hidden, "wide_down": torch.cat([hidden_states.float(), hidden], -1)}[name]
    assert distance(added, exact @ lora_A.t() @ lora_B.t()) < EFFECT_TOLERANCE


def parallel_block(model, x):
    """One linear gives what attention reads and a gate; another reads attention's output and what the gate lets by."""
    attended, gate = linears(x, model["up"])[0].split([256, 1024], dim=-1)
    return linears(Columns((gate,), SILU_GATE).after(attended.sin()), model["down"])[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_as_on_a_gpu_a_linear_reads_slices_of_what_another_gives(kind, monkeypatch):
    monkeypatch.setattr(layers, "fuses", lambda x: True)
    torch.manual_seed(0)
    sizes = {"up": (256, 1280), "down": (768, 256)}
    model = nn.ModuleDict({name: nn.Linear(*size, bias=False).bfloat16() for name, size in sizes.items()})
    model.requires_grad_(False)
    if kind == "fp8":
        for linear in model.values():
            quantize_float8(linear)
    slots = LoraSlots(model, list(sizes), CPU)
    slots.bind(slots.empty)
    compiler = RegionCompiler("regional", Silent())
    compiled = compiler.region(parallel_block)
    for rank, size in ((0, (2, 20)), (16, (1, 7))):
        loras = bind_feed_forward(model, slots, rank, tuple(sizes) if rank else ())
        x = inputs(model, *size)
        with torch.inference_mode(), compiler.scope():
            outputs = compiled(model, x), parallel_block(model, x)
        attended, gate = plain_linear(model["up"].base, loras.get("up"), x.float()).split([256, 1024], dim=-1)
        read = torch.cat([attended.sin(), activated(gate, SILU_GATE)], dim=-1)
        expected = plain_linear(model["down"].base, loras.get("down"), read)
        for output in outputs:
            assert distance(output, expected) < 2 * BASES[kind], rank
    assert (compiler.count, compiler.recompiles) == (1, 0)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("with_bias", [EVERY, SOME], ids=["biases", "some biases"])
def test_joint_and_split_linears_are_those_of_each_stream(kind, on_gpu, with_bias, monkeypatch):
    monkeypatch.setattr(layers, "fuses", lambda x: on_gpu)
    model = make_base(kind, with_bias)
    slots = LoraSlots(model, list(OUT_FEATURES), CPU)
    flat = make_lora((16, 0, 32))
    text, image = inputs(model, 2, 5), inputs(model, 2, 9) * 2
    mixed = make_lora((16, 0, 0), mixing=32, bias=True)
    kroneckers = make_lora((16, 0, 0), kroneckers=[("q", (16, 16), 0, 32), ("k", (8, 8), -5, 0), ("mlp", (8, 4), 0, 0)])
    for binding in (slots.empty, *map(slots.bindings, (flat, mixed, kroneckers))):
        slots.bind(binding)
        with torch.inference_mode():
            joint = layers.joint_linears(text, image, [model["q"], model["k"]], [model["k"], model["q"]])
            wanted = [
                torch.cat([linears(text, model[first])[0], linears(image, model[second])[0]], dim=1)
                for first, second in (("q", "k"), ("k", "q"))
            ]
            both = torch.cat([text, image], dim=1)
            split = layers.split_linears(both, 5, model["mlp"], model["q"])
            wanted += [linears(text, model["mlp"])[0], linears(image, model["q"])[0]]
        for output, expected in zip([*joint, *split], wanted, strict=True):
            # Two pictures at once and one after another are products of other sizes.
            assert output.is_contiguous()
            assert distance(output, expected) < 4e-3


# Binding, interrupted.


class Interrupt(BaseException):
    pass


def interrupted_after(lines: int, run) -> bool:
    """Run, and raise before line number `lines` of slots.py that runs. Whether it came to that."""
    left = lines

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename != LoraSlots.bind.__code__.co_filename:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Interrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        run()
    except Interrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("then", ["empty", "first", "second"])
def test_after_a_bind_that_was_interrupted_anywhere_the_next_one_is_right(then):
    model = make_base("bf16")
    originals = {name: linear.bias for name, linear in model.items()}
    slots = LoraSlots(model, list(OUT_FEATURES), CPU)
    flats = {
        "empty": make_lora(),
        "first": make_lora((16, 0, 16), mixing=1, bias=True, seed=1),
        "second": make_lora((0, 32, 16), mixing=32, bias=True, kroneckers=[("q", (16, 16), 0, 0)], seed=2),
    }
    bindings = {name: slots.bindings(flat) if name != "empty" else slots.empty for name, flat in flats.items()}
    x = inputs(model, 1, 4)
    with torch.inference_mode():
        outputs = {}
        for name in flats:
            slots.bind(bindings[name])
            outputs[name] = block(model, x)
        lines = 0
        while True:
            slots.bind(bindings["first"])
            came_to_it = interrupted_after(lines, lambda: slots.bind(bindings["second"]))
            slots.bind(bindings[then])
            assert all(map(torch.equal, block(model, x), outputs[then])), lines
            slots.bind(slots.empty)
            assert all(map(torch.equal, block(model, x), outputs["empty"])), lines
            assert all(layer.base.bias is originals[name] for name, layer in model.items()), lines
            if not came_to_it:
                break
            lines += 1
    assert lines > 20


# The fused kernel.

INTERPRETED = """
import json, sys, torch
import torch.nn.functional as F
from accel.linear.kernels import Config, activated_product, fused_linear
torch.manual_seed(0)
distances = {}

def note(name, output, wanted):
    distances[name] = float((output.float() - wanted).norm() / wanted.norm())

for rank in (0, 16, 20, 128):  # 0: a scaled product without a LoRA
    for m, n, k in ((70, 96, 160), (1, 33, 48), (64, 64, 64)):
        x, weight, bias = torch.randn(m, k).half(), torch.randn(n, k).half(), torch.randn(n).half()
        # A slice of the hidden states of several linears.
        hidden, lora_B = torch.randn(m, rank + 8).half()[:, 4 : 4 + rank], torch.randn(n, rank or 1).half()[:, :rank]
        scales = torch.rand(m) + 0.5, torch.rand(n) + 0.5
        lora = hidden.float() @ lora_B.float().t() + bias.float()
        product = x.float() @ weight.float().t()
        for name, given, base in (
            ("unscaled", None, product), ("scaled", scales, product * scales[0][:, None] * scales[1])
        ):
            config = Config(32, 32, 32, 4, 2)
            case, arguments = f"{name} rank {rank} {m}x{n}x{k}", (x, weight, bias, hidden, lora_B, given, config)
            note(case, fused_linear(*arguments), base + lora)
            arguments = (x, weight, None, hidden, lora_B, given, config)
            note(f"no bias {case}", fused_linear(*arguments), base + lora - bias.float())
            gelu = F.gelu((base + lora) / 8, approximate="tanh")
            eighth = [None if part is None else part / 8 for part in (bias, lora_B, given and given[0])]
            scale = eighth[2] is None
            note(
                f"gelu {case}",
                fused_linear(
                    x, weight / 8 if scale else weight, eighth[0], hidden, eighth[1],
                    given and (eighth[2], given[1]), config, activation="gelu_tanh",
                ),
                gelu,
            )
            # Further columns of x, whose weight is a slice, added to what the others gave, in its place.
            more = torch.randn(m, 2 * k).half()
            wide = torch.randn(n, 3 * k).half()
            out = torch.randn(m, n).half()
            if given is None:
                wanted = out.float() + more.float() @ wide[:, k:].float().t() + lora - bias.float()
                result = fused_linear(more, wide[:, k:], out, hidden, lora_B, None, config, out=out)
                assert result is out
                note(f"added {case}", out, wanted)
                wanted = F.gelu(x.float(), approximate="tanh") @ weight.float().t()
                note(f"gelu x {case}", activated_product(x, weight, None, "gelu_tanh", config), wanted)
                out = torch.randn(m, n).half()
                wanted += out.float()
                note(f"gelu x added {case}", activated_product(x, weight, out, "gelu_tanh", config), wanted)
print(json.dumps(distances))
"""


@pytest.mark.slow
def test_the_fused_kernel_in_tritons_interpreter():
    """In float16: the interpreter's `tl.dot` is wrong for bfloat16 and float8, which it computes with as integers."""
    pytest.importorskip("triton", reason="no Triton for this system; the pack does without the kernel there")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        cwd=REPO,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    distances = json.loads(done.stdout)
    assert len(distances) == 3 * 24 + 3 * 12
    # float16 rounds what is read and the result once each, by up to 2 ** -11.
    assert all(value < 1e-3 for value in distances.values()), distances


# Shared memory that one program may have, NVIDIA's CUDA programming guide, "technical specifications".
SHARED_BYTES = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize("config", kernels.CONFIGS + kernels.LORA_A_CONFIGS)
def test_the_fused_kernel_compiles_for_every_gpu_and_fits_it(capability, config):
    pytest.importorskip("triton", reason="no Triton for this system; the pack does without the kernel there")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    pointers = ("x", "weight", "bias", "hidden", "lora_B", "output", "x_scale", "weight_scale")
    sizes = ("M", "N", "K", "R", "weight_stride", "bias_stride", "hidden_stride")
    of_lora_A = config in kernels.LORA_A_CONFIGS
    dtypes = ("bf16", "fp8e4nv") if capability >= 89 and not of_lora_A else ("bf16",)
    # What a wider rank changes is no matter of the instructions of 8.9 and 12.0.
    blocks_r = (16,) if of_lora_A or capability in (89, 120) else (16, 64)
    for dtype, block_r in itertools.product(dtypes, blocks_r):
        constants = {
            "SCALED": dtype != "bf16",
            "BIAS": block_r == 16,
            "ACTIVATION_X": GELU_TANH if of_lora_A else NONE,
            "ACTIVATION": GELU_TANH if block_r == 16 and not of_lora_A else NONE,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_R": block_r,
            "GROUP_M": 8,
        }
        signature = dict.fromkeys(pointers, "*bf16")
        signature.update(dict.fromkeys(("x", "weight"), f"*{dtype}"))
        if dtype != "bf16":
            signature.update(dict.fromkeys(("x_scale", "weight_scale"), "*fp32"))
        signature.update(dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr"))
        # As at run time: every pointer, and every size but the number of rows, is a multiple of 16.
        names = [*pointers, *sizes]
        attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in names if name != "M"}
        source = ASTSource(kernels.kernel(), signature, constexprs=constants, attrs=attributes)
        options = {"num_warps": config.warps, "num_stages": config.stages}
        compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        assert "mma" in compiled.asm["ptx"]
        if block_r == 16:
            assert compiled.metadata.shared <= SHARED_BYTES[capability]


FAST, SLOW, WRONG = kernels.CONFIGS


def chosen(candidates, seconds):
    """What `choose` takes, where `separate` gives ones; candidates and seconds by configuration, None: separate."""
    runs = {config: lambda result=result: result() for config, result in candidates.items()}
    owner = {run: config for config, run in runs.items()}
    return choose(runs, lambda: torch.ones(8), lambda run: seconds[owner.get(run)])


def test_the_fastest_right_kernel_is_chosen():
    right = {FAST: lambda: torch.ones(8), SLOW: lambda: torch.ones(8) * 1.001}
    assert chosen(right, {None: 3.0, FAST: 1.0, SLOW: 2.0}) == FAST
    assert chosen(right, {None: 3.0, FAST: 2.0, SLOW: 1.0}) == SLOW


def test_separate_products_are_chosen_where_they_are_faster():
    right = {FAST: lambda: torch.ones(8), SLOW: lambda: torch.ones(8)}
    assert chosen(right, {None: 1.0, FAST: 1.0, SLOW: 2.0}) is None


def raises():
    raise RuntimeError("out of resource: shared memory")


@pytest.mark.parametrize(
    "wrong", [lambda: torch.full((8,), 1.1), lambda: torch.full((8,), torch.nan), lambda: torch.zeros(8), raises]
)
def test_a_kernel_that_is_wrong_or_raises_is_never_chosen(wrong):
    seconds = {None: 3.0, WRONG: 0.1, SLOW: 2.0}
    assert chosen({WRONG: wrong, SLOW: lambda: torch.ones(8)}, seconds) == SLOW
    assert chosen({WRONG: wrong}, seconds) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("rank", [16, 128])
@pytest.mark.parametrize("scaled", [False, True])
def test_on_a_gpu_the_fastest_way_is_right(rank, scaled):
    if scaled and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 products need compute capability 8.9")
    torch.manual_seed(0)
    with torch.device("cuda"):
        x, weight = torch.randn(1000, 3072), torch.randn(3072, 3072) / 55
        bias = torch.randn(3072).bfloat16()
        hidden, lora_B = torch.randn(1000, 2 * rank).bfloat16()[:, :rank], torch.randn(3072, rank).bfloat16()
        scales = (torch.rand(1000, 1) + 0.5, torch.rand(3072, 1) + 0.5) if scaled else None
    dtype = torch.float8_e4m3fn if scaled else torch.bfloat16
    x, weight = x.to(dtype), (weight * 16).to(dtype)
    product = Product([x], weight, scales, torch.bfloat16)
    base = x.float() @ weight.float().t()
    if scaled:
        base = base * scales[0] * scales[1].t()
    expected = base + bias.float() + hidden.float() @ lora_B.float().t()
    autotuner.cache_clear()
    for _ in range(2):
        assert distance(product.with_lora(bias, hidden, lora_B), expected) < kernels.TOLERANCE
    assert len(autotuner().chosen) == 1
    for config in kernels.CONFIGS:
        if rank <= 16:
            output = kernels.fused_linear(x, weight, bias, hidden, lora_B, scales, config)
            assert distance(output, expected) < kernels.TOLERANCE
