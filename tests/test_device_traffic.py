"""A step on a GPU, traced without one: nothing goes to the host, nothing comes from it, nothing is left behind."""

import collections
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from accel.families.flux1 import Flux1, Flux1Inputs
from accel.families.streams.inputs import BlockState, Hooks, Residuals
from accel.linear import float8, layers, operators, product
from accel.linear.autotune import Autotuner
from accel.linear.slot import Bound
from accel.lora.hold.slots import Bindings, LoraSlots
from benchmarks.block_variants import block_modules, quantize_float8
from benchmarks.families.flux1 import one_of_each

CUDA = torch.device("cuda")
RANK = 16
DTYPE = torch.bfloat16
# Their result is on the host, or of a size that the host must know: they wait for the device.
WAITS = (
    *("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique"),
    "repeat_interleave.Tensor",
)


class Crossed(Exception):
    """Something went from the device to the host or the other way."""


class Traffic(TorchDispatchMode):
    """Raises at the first operator that waits for the device or touches a tensor on the host; counts the others."""

    def __init__(self):
        super().__init__()
        self.operators = collections.Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function).removeprefix("aten.")
        if name.startswith(WAITS):
            raise Crossed(f"{name} waits for the device")
        self.check(name, (arguments, options))
        try:
            result = function(*arguments, **(options or {}))
        except (DataDependentOutputException, DynamicOutputShapeException) as exc:
            raise Crossed(f"{name} waits for the device") from exc
        self.check(name, result)
        self.operators[name] += 1
        return result

    @staticmethod
    def check(name, values):
        for leaf in tree_leaves(values):
            device = leaf.device if isinstance(leaf, torch.Tensor) else leaf
            if isinstance(device, torch.device) and device.type != "cuda":
                raise Crossed(f"{name} on {device}")


def attention(query, key, value, mask):
    """Stands in for the backend, which asks the driver for its kernel."""
    return query + key.mean() + value if mask is None else query + mask.mean()


@pytest.fixture
def skeleton():
    """The model without data, made outside of any mode."""
    with torch.device("meta"):
        return Flux1().build(one_of_each(256)).eval().requires_grad_(False)


@pytest.fixture
def fake(skeleton):
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


@pytest.fixture(params=["bf16", *float8.WAYS])
def forward(request, skeleton, fake, monkeypatch):
    """A forward over a model with a LoRA on every linear, the operators' own code in place of their stand-ins."""
    config = one_of_each(256)
    model = skeleton
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = on_device(*parameter.shape)
    if request.param != "bf16":
        # Which one a device takes it has to try, which a fake one cannot.
        way = float8.Way(request.param, float8.WAYS[request.param], {})
        monkeypatch.setattr(float8, "way_on", lambda device, dtype: way)
        # It remembers its tensor, and must not remember a fake one.
        monkeypatch.setattr(float8, "_one", float8._one.__wrapped__)
        for module in block_modules(config):
            quantize_float8(model.get_submodule(module))
    modules = [part.module for linear in Flux1().layout(config).linears for part in linear.parts]
    slots = LoraSlots(model, modules, CUDA)
    linears = (model.get_submodule(module) for module in modules)
    loras = (
        Bound(on_device(RANK, layer.in_features), on_device(layer.out_features, RANK)) for layer in linears
    )
    slots.bind(Bindings(tuple(loras)))
    for name in ("linears", "joint_linears", "split_linears"):
        monkeypatch.setattr(torch.ops.flux_hotswap, name, getattr(operators, f"_{name}"))
    # A fake Parameter is not of Parameter's type.
    monkeypatch.setattr(layers, "is_plain", lambda base: not hasattr(base.weight, "qdata"))
    # A FakeTensor has no address, and Triton cannot read one.
    monkeypatch.setattr(operators, "_times_each_lora_A", lambda multiply, lora_A: [multiply(each) for each in lora_A])
    # PyTorch does not say what the one that writes to a given tensor does to fake ones.
    multiply = torch._scaled_mm
    monkeypatch.setattr(torch, "_scaled_mm", lambda *args, out=None, **given: written(multiply(*args, **given), out))
    monkeypatch.setattr(product, "gelu_fuses", lambda device, dtype: True)
    monkeypatch.setattr(Autotuner, "fastest", lambda self, x, shape, fused, separate, configs=(): separate())

    def make(attend=attention):
        return Flux1().forward(config, model, Flux1().regions(attend), attend)

    return make


def on_device(*shape):
    return nn.Parameter(torch.empty(shape, dtype=DTYPE, device=CUDA), requires_grad=False)


def written(result, out):
    return result if out is None else out.copy_(result)


def inputs(batch=2, **others):
    with torch.device(CUDA):
        return Flux1Inputs(
            latent=torch.empty(batch, 16, 15, 16, dtype=DTYPE),
            timestep=torch.empty(batch),
            encoder_hidden_states=torch.empty(batch, 7, 256, dtype=DTYPE),
            pooled_projections=torch.empty(batch, 256, dtype=DTYPE),
            guidance=torch.empty(batch),
            **others,
        )


def traced(run):
    with torch.inference_mode(), Traffic() as traffic:
        output = run()
    return traffic.operators, output


def full(batch):
    """Everything that a step can be given."""
    same = Hooks((lambda *tokens: tokens,), {("double", 0): lambda state, run: run(state)})
    with torch.device(CUDA):
        residual = torch.empty(batch, 64, 256, dtype=DTYPE)
        return inputs(
            batch,
            references=[torch.empty(batch, 16, 8, 8, dtype=DTYPE)],
            attention_mask=torch.empty(batch, 1, 1, 87, dtype=DTYPE),
            residuals=Residuals([residual], [residual]),
            hooks=same,
        )


@pytest.mark.parametrize("make", [inputs, full], ids=["plain", "with everything"])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_stays_on_the_device(forward, batch, make):
    given = make(batch)
    run = forward()
    operators, output = traced(lambda: run(given))
    assert output.shape == (batch, 16, 15, 16)
    assert output.device.type == "cuda"
    # The operators' own code ran: a product with each lora_A and lora_B.
    assert operators["addmm_.default"] >= 20, operators
    assert sum(operators.values()) > 200


def test_without_guidance_and_pooled_text_it_stays_there_too(forward):
    given = replace(inputs(), guidance=None, pooled_projections=None)
    run = forward()
    traced(lambda: run(given))


def test_every_step_after_the_first_does_the_same_and_less(forward):
    given, run = inputs(), forward()
    first, second, third = (traced(lambda: run(given))[0] for _ in range(3))
    assert second == third
    # The rotary table is computed once.
    assert first["linspace.default"] == 2
    assert second["linspace.default"] == 0
    assert not second - first


def control(body):
    """An attention that also does something that it may not."""

    def attend(query, key, value, mask):
        body(query)
        return attention(query, key, value, mask)

    return attend


@pytest.mark.parametrize("forward", ["bf16"], indirect=True)
@pytest.mark.parametrize(
    "body",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x * torch.tensor([2.0], device="cpu").to(x.device),
        lambda x: x + torch.zeros(x.shape[-1], device="cpu").to(x),
        lambda x: torch.ones(3).to(x.device),
    ],
    ids=["item", "bool", "to the host", "nonzero", "a mask as index", "a constant", "a buffer", "a tensor made there"],
)
def test_control_a_copy_or_a_wait_is_noticed(forward, body):
    run = forward(control(body))
    given = inputs()
    with pytest.raises(Crossed):
        traced(lambda: run(given))


@pytest.mark.parametrize("forward", ["bf16"], indirect=True)
def test_control_a_copy_in_a_hook_is_noticed(forward):
    def hook(state: BlockState, run):
        return replace(run(state), rotary=state.rotary.cpu().to(CUDA))

    run = forward()
    given = inputs(hooks=Hooks((), {("single", 0): hook}))
    with pytest.raises(Crossed):
        traced(lambda: run(given))
