"""What LoRA layers cost per step: compiled blocks of real width on this CPU, with and without them, in one process.

All variants share their base weights, and take turns. A ratio is the median, over the rounds, of the ratio to the bare
blocks of the same round: so what else the machine does hits both alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from accel.attention import sdpa
from accel.compile import RegionCompiler
from accel.engine import Silent
from accel.families.flux1 import Flux1, Flux1Config
from accel.families.flux1.blocks import double_block, single_block
from accel.families.flux1.positions import rotary_table
from accel.files import FileIdentity
from accel.lora.flatten import flatten
from accel.lora.slots import Bindings, LoraSlots
from accel.lora.stack import LoraStack
from accel.lora.weights import LoraLayer, LoraWeights

from .block_variants import PEFT_ADAPTER, add_peft, block_modules, one_of_each, without_lora_layers
from .flux_loras import block_linears, meta_model
from .report import BenchmarkError, Goal, OtherLoad, Report, Row, Variant, figure, interleave

DTYPE = torch.bfloat16
CPU = torch.device("cpu")
ROUNDS = 41
QUICK_ROUNDS = 3
WARM_UP = 2
# The system itself takes a percent or two.
QUIET_SHARE = 0.05
STRENGTH = 0.8
STACK = 4
# Variants, in the order of their first turn; `none` has no LoRA layers at all, `empty` has them and nothing is bound.
NAMES = ("none", "empty", "rank16", "rank128", "stack4", "peft_rank16")
GOALS = {"empty": 1.01, "rank16": 1.03, "rank128": 1.09}
# Relative L2 between two ways to compute the same in bfloat16, through two blocks.
SAME = 0.02
NOTES = (
    "none: our block functions over bare linears. empty to stack4: the same functions over the pack's LoRA layers, one "
    "compiled code for all of them. peft_rank16: the same functions over PEFT's layers, which hold the LoRA of rank16.",
    "Each LoRA is on all linears of both blocks; stack4 is four LoRAs of rank 16.",
)


@dataclass(frozen=True)
class Sizes:
    """What is measured at: hidden size, tokens, rounds."""

    hidden: int
    image_tokens: int
    text_tokens: int
    rounds: int


FULL = Sizes(3072, 400, 192, ROUNDS)
QUICK = Sizes(256, 24, 8, QUICK_ROUNDS)


def run(quick: bool) -> Report:
    """Compile, check that all variants compute what they should, and time them in turn.

    Args:
        quick: narrow blocks and few rounds.

    Raises:
        BenchmarkError: a variant computed something else, or compiled again.
    """
    sizes = QUICK if quick else FULL
    with torch.inference_mode(False), torch.no_grad():
        steps = Steps(sizes)
    steps.check_relations()
    load = OtherLoad()
    samples = _rotate(steps.variants(), sizes.rounds)
    steps.check_compiles()
    return _report(sizes, samples, load.share())


def _rotate(variants: Sequence[Variant], rounds: int) -> dict[str, list[float]]:
    """Time variants in turn; each round another one begins, so that no variant always follows the same one."""
    interleave(variants, rounds=0, warm_up=WARM_UP)
    samples: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(rounds):
        first = number % len(variants)
        for name, (elapsed_ms,) in interleave([*variants[first:], *variants[:first]], rounds=1, warm_up=0).items():
            samples[name].append(elapsed_ms)
    return samples


class Steps:
    """One double and one single block in three forms, over the same base weights."""

    def __init__(self, sizes: Sizes) -> None:
        """Make the weights, the LoRAs and the inputs; nothing is compiled yet."""
        config = one_of_each(sizes.hidden)
        self._scope = RegionCompiler("regional", Silent())  # dynamo's options, the same for all
        bare = _random_model(config)
        ours = _sharing_weights(bare, config)
        self._slots = LoraSlots(ours, block_modules(config), CPU)
        loras = [_random_lora(config, 16, seed) for seed in range(STACK)]
        stacks = {"rank16": loras[:1], "rank128": [_random_lora(config, 128, STACK)], "stack4": loras}
        self._bindings = {"empty": self._slots.empty, **{name: self._bound(each) for name, each in stacks.items()}}
        self._slots.bind(self._slots.empty)
        peft = _sharing_weights(bare, config)
        add_peft(peft, config, 16)
        _fill_peft(peft, loras[0])
        own = _Regions(ours, lambda function: function)
        self._regions = {
            "none": _Regions(bare, without_lora_layers),
            **dict.fromkeys(self._bindings, own),
            "peft_rank16": _Regions(peft, without_lora_layers),
        }
        self._inputs = _inputs(sizes)
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
            if (distance < SAME) != same:
                raise BenchmarkError(f"{name} differs from {other} by {distance:.3g}, expected same: {same}.")

    def check_compiles(self) -> None:
        """Make sure that each form was compiled once, two regions each.

        Raises:
            BenchmarkError: a variant compiled again.
        """
        for name, regions in self._regions.items():
            if regions.compiler.count != 2:
                raise BenchmarkError(f"{name}: {regions.compiler.count} compiles, expected 2.")

    def _bound(self, loras: Sequence[LoraWeights]) -> Bindings:
        stack = LoraStack()
        for lora in loras:
            stack = stack.with_lora(lora, STRENGTH)
        return self._slots.bindings(flatten(stack.active, DTYPE, pin=False))

    def _bind(self, name: str) -> None:
        if name in self._bindings:
            self._slots.bind(self._bindings[name])

    def _run(self, name: str) -> None:
        with torch.inference_mode(), self._scope.scope():
            self._output = self._regions[name](*self._inputs)

    def _check(self, name: str) -> None:
        distance = _distance(self._output, self._outputs[name])
        if not distance < SAME:
            raise BenchmarkError(f"{name}: its output moved by {distance:.3g} between rounds.")


class _Regions:
    """The two compiled block functions of one form, run one after the other.

    Attributes:
        compiler: counts the compiles.
    """

    def __init__(self, model: nn.Module, adapt: Callable[[Callable], Callable]) -> None:
        self.compiler = RegionCompiler("regional", Silent())
        double_function, single_function = adapt(double_block), adapt(single_block)

        def double(block: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
            return double_function(block, *inputs, None, sdpa)

        def single(block: nn.Module, *inputs: Tensor) -> Tensor:
            return single_function(block, *inputs, None, sdpa)

        self._double, self._single = self.compiler.region(double), self.compiler.region(single)
        self._model = model

    def __call__(self, image: Tensor, text: Tensor, temb: Tensor, rotary: Tensor) -> Tensor:
        image, text = self._double(self._model.transformer_blocks[0], image, text, temb, rotary)
        joined = torch.cat([text, image], dim=1)
        return self._single(self._model.single_transformer_blocks[0], joined, temb, rotary)


def _random_model(config: Flux1Config) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    model = meta_model(config)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            value = torch.empty(parameter.shape, dtype=DTYPE)
            if value.ndim == 2:
                value.uniform_(-1, 1, generator=generator).mul_((3 / value.shape[1]) ** 0.5)
            else:
                value.uniform_(0, 1, generator=generator)
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    return model


def _sharing_weights(source: nn.Module, config: Flux1Config) -> nn.Module:
    model = meta_model(config)
    for name, module in model.named_modules():
        module._parameters.update(source.get_submodule(name)._parameters)
    return model


def _random_lora(config: Flux1Config, rank: int, seed: int) -> LoraWeights:
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return torch.empty(rows, columns, dtype=DTYPE).normal_(0.0, scale, generator=generator)

    layers = tuple(
        # A fifth of what the linear itself puts out.
        LoraLayer(
            module, normal(rank, in_features, in_features**-0.5), normal(out_features, rank, 0.2 * rank**-0.5), 1.0
        )
        for module, out_features, in_features in block_linears(Flux1().layout(config))
    )
    return LoraWeights(FileIdentity(f"rank {rank}, seed {seed}", 0, 0), layers, ())


def _fill_peft(model: nn.Module, lora: LoraWeights) -> None:
    for layer in lora.layers:
        module = model.get_submodule(layer.module)
        for half, value in ((module.lora_A, layer.lora_A), (module.lora_B, layer.lora_B.float() * STRENGTH)):
            half[PEFT_ADAPTER].weight = nn.Parameter(value.to(DTYPE), requires_grad=False)


def _inputs(sizes: Sizes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=DTYPE).normal_(generator=generator)

    positions = torch.arange(sizes.image_tokens + sizes.text_tokens)[None, :, None].expand(1, -1, 3)
    return (
        normal(1, sizes.image_tokens, sizes.hidden),
        normal(1, sizes.text_tokens, sizes.hidden),
        normal(1, sizes.hidden),
        rotary_table(positions.float()),
    )


def _distance(output: Tensor, reference: Tensor) -> float:
    return float((output.float() - reference.float()).norm() / reference.float().norm())


def _report(sizes: Sizes, samples: Mapping[str, Sequence[float]], other_cpu_share: float | None) -> Report:
    ratios = {
        name: [value / bare for value, bare in zip(samples[name], samples["none"], strict=True)] for name in NAMES
    }
    values = {f"{name}_over_none": statistics.median(ratios[name]) for name in NAMES if name != "none"}
    goals = tuple(
        Goal(f"{name}, step over that of a model without LoRA layers", values[f"{name}_over_none"], limit)
        for name, limit in GOALS.items()
    )
    content = {
        **{f"{name}_ms": statistics.median(samples[name]) for name in NAMES},
        **values,
        "other_cpu_share": other_cpu_share,
        "rounds": sizes.rounds,
        "model": {"hidden": sizes.hidden, "image_tokens": sizes.image_tokens, "text_tokens": sizes.text_tokens},
    }
    title = (
        f"A compiled step of one double and one single block, hidden {sizes.hidden}, {sizes.image_tokens} image and "
        f"{sizes.text_tokens} text tokens, bf16, CPU; medians of {sizes.rounds} interleaved rounds"
    )
    notes = list(NOTES)
    if other_cpu_share is not None and other_cpu_share > QUIET_SHARE:
        notes.append(
            f"NOT QUIET: other processes used {other_cpu_share:.0%} of the CPUs meanwhile: the times are too high, the "
            "ratios uncertain. Run it again alone."
        )
    return Report(title, tuple(_rows(content, ratios)), content, goals, notes, samples)


def _rows(values: Mapping[str, float], ratios: Mapping[str, Sequence[float]]) -> Iterator[Row]:
    yield Row("", "median ms", "over none, and the middle half of the rounds")
    for name in NAMES:
        ratio = values.get(f"{name}_over_none")
        remark = "" if ratio is None else f"{ratio:.3f}  ({_spread(ratios[name])})"
        yield Row(name, figure(values[f"{name}_ms"]), remark)


def _spread(ratios: Sequence[float]) -> str:
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{low:.3f} – {high:.3f}"
