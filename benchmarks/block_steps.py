"""One double and one single block with LoRAs bound or none, beside bare ones and PEFT's: what `step` times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from accel.attention import Target, choose_attention
from accel.compile.compiler import RegionCompiler
from accel.files import FileIdentity
from accel.lora.adapter import Adapter
from accel.lora.hold.slots import Bindings, LoraSlots
from accel.lora.kinds.layers import LoraLayer
from accel.lora.pack.flat import flatten
from accel.lora.stack import LoraStack
from accel.observer import Silent

from .block_variants import PEFT_ADAPTER, add_peft, block_modules, quantize_blocks, without_lora_layers
from .families.base import Arguments, Config, Tokens
from .families.registry import of
from .flux_loras import meta_model
from .report import BenchmarkError
from .timing import CPU, Variant

DTYPE = torch.bfloat16
STRENGTH = 0.8
STACK = 4
# Variants, in the order of their first turn; `none` has no LoRA layers at all, `empty` has them and nothing is bound.
NAMES = ("none", "empty", "rank16", "rank128", "stack4", "peft_rank16")
# Relative L2 between two ways to compute the same in bfloat16, through two blocks; and where what is multiplied is
# rounded to 8 bits on the way, which may go either way (0.038 in fp8, 0.016 in int8).
SAME, SAME_IN_8_BITS = 0.02, 0.06


@dataclass(frozen=True)
class Case:
    """What is measured, and on what.

    Attributes:
        config: of one double and one single block.
        tokens: of the picture and of the prompt.
        rounds: at most; each has one step of every variant.
        device: where it runs.
        mode: quantization of the blocks' linears, or "none".
        attention: a backend; "auto" takes the fastest.
        compile: as in `EngineSettings`.
    """

    config: Config
    tokens: Tokens
    rounds: int
    device: torch.device = CPU
    mode: str = "none"
    attention: str = "sdpa"
    compile: str = "regional"

    @property
    def same(self) -> float:
        """How near two ways to compute the same must be."""
        return SAME if self.mode == "none" else SAME_IN_8_BITS


class Steps:
    """One double and one single block in three forms, over the same base weights.

    Attributes:
        attention: the backend that they run.
        regions: the compiled blocks, by the variant's name.
    """

    def __init__(self, case: Case) -> None:
        """Make the weights, the LoRAs and the inputs; nothing is compiled yet."""
        config, device, family = case.config, case.device, of(case.config).family
        self._case = case
        self._scope = RegionCompiler(case.compile, Silent())  # dynamo's options, the same for all
        bare = random_model(config, device)
        peft = sharing_weights(bare, config)
        add_peft(peft, block_modules(config), 16)
        if case.mode != "none":
            quantize_blocks(bare, config, case.mode)
            for name in block_modules(config):
                peft.get_submodule(name).base_layer = bare.get_submodule(name)
        ours = sharing_weights(bare, config)
        self._slots = LoraSlots(ours, block_modules(config), device)
        loras = [random_lora(config, 16, seed) for seed in range(STACK)]
        stacks = {"rank16": loras[:1], "rank128": [random_lora(config, 128, STACK)], "stack4": loras}
        self._bindings = {"empty": self._slots.empty, **{name: self._bound(each) for name, each in stacks.items()}}
        self._slots.bind(self._slots.empty)
        fill_peft(peft, loras[0], device)
        target = Target(device, DTYPE, *family.heads(config), compiled=case.compile != "off")
        attention = choose_attention(case.attention, target)
        self.attention = attention.name

        functions = family.regions(attention.attention)
        plain = [without_lora_layers(function) for function in functions]
        self._inputs, behind = _inputs(case)
        self.regions = {
            "none": _Regions(bare, plain, behind, case.compile),
            **dict.fromkeys(self._bindings, _Regions(ours, functions, behind, case.compile)),
            "peft_rank16": _Regions(peft, plain, behind, case.compile),
        }
        self._outputs: dict[str, Tensor] = {}
        self._output = self._inputs[0]

    def variants(self) -> list[Variant]:
        """All of `NAMES`."""
        return [
            Variant(name, lambda name=name: self._run(name), lambda name=name: self._bind(name),
                    lambda name=name: self._check(name))
            for name in NAMES
        ]  # fmt: skip

    def check_relations(self) -> None:
        """Compile each variant by running it once; what should be equal is, and what should differ does.

        Raises:
            BenchmarkError: a variant does not compute what it should.
        """
        for name in NAMES:
            self._bind(name)
            self._run(name)
            self._outputs[name] = self._output
        for name, other, same in (
            ("empty", "none", True),
            ("peft_rank16", "rank16", True),
            ("rank16", "none", False),
            ("rank128", "rank16", False),
            ("stack4", "rank16", False),
        ):
            distance = _distance(self._outputs[name], self._outputs[other])
            if (distance < self._case.same) != same:
                raise BenchmarkError(f"{name} differs from {other} by {distance:.3g}, expected same: {same}.")

    def check_compiles(self) -> None:
        """Make sure that each form was compiled once, two regions each.

        Raises:
            BenchmarkError: a variant compiled again.
        """
        for name, regions in self.regions.items():
            expected = 0 if self._case.compile == "off" else 2
            if regions.compiler.count != expected:
                raise BenchmarkError(f"{name}: {regions.compiler.count} compiles, expected {expected}.")

    def _bound(self, loras: Sequence[Adapter]) -> Bindings:
        stack = LoraStack()
        for lora in loras:
            stack = stack.with_lora(lora, STRENGTH)
        flat = flatten(stack.active, DTYPE, pin=False)
        return self._slots.bindings(replace(flat, buffer=flat.buffer.to(self._case.device)))

    def step(self, name: str) -> None:
        """One step of a variant."""
        self._bind(name)
        self._run(name)

    def _bind(self, name: str) -> None:
        if name in self._bindings:
            self._slots.bind(self._bindings[name])

    def _run(self, name: str) -> None:
        with torch.inference_mode(), self._scope.scope():
            self._output = self.regions[name](*self._inputs)

    def _check(self, name: str) -> None:
        distance = _distance(self._output, self._outputs[name])
        if not distance < self._case.same:
            raise BenchmarkError(f"{name}: its output moved by {distance:.3g} between rounds.")


class _Regions:
    """The two compiled block functions of one form, run one after the other.

    Attributes:
        compiler: counts the compiles.
    """

    def __init__(self, model: nn.Module, functions: Sequence[Callable], behind: Arguments, compile: str) -> None:
        self.compiler = RegionCompiler(compile, Silent())
        self._double, self._single = map(self.compiler.region, functions)
        self._model = model
        self._behind = behind

    def __call__(self, image: Tensor, text: Tensor) -> Tensor:
        image, text = self._double(self._model.transformer_blocks[0], image, text, *self._behind.double)
        joined = torch.cat([text, image], dim=1)
        return self._single(self._model.single_transformer_blocks[0], joined, *self._behind.single)


def random_model(config: Config, device: torch.device) -> nn.Module:
    """A model whose outputs are about as large as its inputs, and differ in every channel."""
    generator = torch.Generator(device).manual_seed(0)
    model = meta_model(config)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            value = torch.empty(parameter.shape, dtype=DTYPE, device=device)
            if value.ndim == 2:
                value.uniform_(-1, 1, generator=generator).mul_((3 / value.shape[1]) ** 0.5)
            else:
                value.uniform_(0, 1, generator=generator)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    return model


def sharing_weights(source: nn.Module, config: Config) -> nn.Module:
    """A model of its own over another one's weights: the same Parameters, quantized layers included."""
    model = meta_model(config)
    for name, module in source.named_modules():
        own = model.get_submodule(name)
        if type(own) is type(module):
            own._parameters.update(module._parameters)
        else:  # a quantized linear of another class
            model.set_submodule(name, module)
    return model


def random_lora(config: Config, rank: int, seed: int) -> Adapter:
    """A LoRA on every linear of both blocks."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return torch.empty(rows, columns, dtype=DTYPE).normal_(0.0, scale, generator=generator)

    linears = of(config).family.layout(config).by_module
    layers = tuple(
        # A fifth of what the linear itself puts out.
        LoraLayer(
            module,
            normal(rank, linears[module].in_features, linears[module].in_features**-0.5),
            normal(linears[module].out_features, rank, 0.2 * rank**-0.5),
            1.0,
        )
        for module in block_modules(config)
    )
    return Adapter(FileIdentity(f"rank {rank}, seed {seed}", 0, 0), layers, ())


def fill_peft(model: nn.Module, lora: Adapter, device: torch.device) -> None:
    """Give PEFT's layers what a LoRA holds, with its strength in B."""
    for layer in lora.layers:
        module = model.get_submodule(layer.module)
        for half, value in ((module.lora_A, layer.lora_A), (module.lora_B, layer.lora_B.float() * STRENGTH)):
            half[PEFT_ADAPTER].weight = nn.Parameter(value.to(device, DTYPE), requires_grad=False)


def _inputs(case: Case) -> tuple[tuple[Tensor, Tensor], Arguments]:
    """Image and text tokens, and what the regions read behind them."""
    device, config, tokens, family = case.device, case.config, case.tokens, of(case.config)
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPE, device=device).normal_(generator=generator)

    streams = normal(1, tokens.image, config.hidden_size), normal(1, tokens.text, config.hidden_size)
    axes = len(family.positions.axes_dim)
    positions = torch.arange(tokens.all, device=device)[None, :, None].expand(1, -1, axes)
    return streams, family.ours(config, normal, family.positions.rotary_table(positions.float()))


def _distance(output: Tensor, reference: Tensor) -> float:
    return float((output.float() - reference.float()).norm() / reference.float().norm())
