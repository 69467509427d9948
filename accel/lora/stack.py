"""Stacks of LoRAs: what a MODEL carries, and what it costs to compute with it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from ..errors import LoraError
from ..files import FileIdentity
from .adapter import Adapter


@dataclass(frozen=True)
class StackEntry:
    """One LoRA of a stack."""

    adapter: Adapter
    strength: float


@dataclass(frozen=True)
class StackCost:
    """What a bound stack costs: memory, and matrix products in every step.

    Attributes:
        elements: numbers that lie on the device.
        multiplications: for one token in every step, as if every linear ran on every token.
        linears: that have low-rank matrices.
        kronecker_linears: that have Kronecker products.
        max_rank: the ranks of all LoRAs on one linear, summed, where that is most.
        summed_rank: the same over all linears: what the products of a step grow with.
    """

    elements: int
    multiplications: int
    linears: int
    kronecker_linears: int
    max_rank: int
    summed_rank: int

    def __str__(self) -> str:
        """What is computed beside the weights, such as `rank 16 at most on 304 linears`."""
        parts = []
        if self.linears or not self.kronecker_linears:
            parts.append(f"rank {self.max_rank} at most on {self.linears} linears")
        if self.kronecker_linears:
            parts.append(f"Kronecker products on {self.kronecker_linears} linears")
        return ", ".join(parts)

    def step_share(self, parameters: int) -> float:
        """Arithmetic of a step with the stack, over that of the model's weights (attention aside) without it."""
        return self.multiplications / parameters

    def megabytes(self, dtype: torch.dtype) -> float:
        """Size on the device in MB (10**6 bytes)."""
        return self.elements * dtype.itemsize / 1e6


@dataclass(frozen=True)
class LoraStack:
    """An ordered, immutable stack of LoRAs. The empty stack is the base model.

    Attributes:
        entries: first applied first.
        max_rank: what the summed rank on each linear is cut to, see `pack.truncate`; 0 leaves the stack exact.
            Kronecker products always stay exact, and do not count.
    """

    entries: tuple[StackEntry, ...] = ()
    max_rank: int = 0

    def with_lora(self, adapter: Adapter, strength: float) -> LoraStack:
        """A new stack with one more LoRA on top.

        Raises:
            LoraError: the strength is not a finite number.
        """
        if not math.isfinite(strength):
            raise LoraError(f"LoRA '{adapter.name}': strength is {strength}, expected a finite number.")
        return replace(self, entries=(*self.entries, StackEntry(adapter, float(strength))))

    def with_max_rank(self, max_rank: int) -> LoraStack:
        """The same stack, cut to a rank; 0 leaves it exact.

        Raises:
            LoraError: the rank is negative.
        """
        if max_rank < 0:
            raise LoraError(f"max_rank is {max_rank}, expected 0 (exact) or a rank such as 64.")
        return replace(self, max_rank=max_rank)

    @property
    def active(self) -> tuple[StackEntry, ...]:
        """The entries that change anything."""
        return tuple(entry for entry in self.entries if entry.strength != 0.0)

    @property
    def cost(self) -> StackCost:
        """What the stack takes when it is bound; see `StackCost`."""
        ranks: dict[str, int] = defaultdict(int)
        elements = multiplications = 0
        kroneckers: set[str] = set()
        counted: set[tuple[int, int]] = set()
        for number, entry in enumerate(self.active):
            for layer in entry.adapter.layers:
                cost = layer.cost
                elements += cost.elements
                multiplications += cost.multiplications
                if cost.shared is not None and (number, id(cost.shared)) not in counted:
                    counted.add((number, id(cost.shared)))
                    elements += cost.shared.numel()
                    multiplications += cost.shared_multiplications
                if layer.rank:
                    ranks[layer.module] += layer.rank
                if cost.has_kronecker:
                    kroneckers.add(layer.module)
        largest, summed = max(ranks.values(), default=0), sum(ranks.values())
        return StackCost(elements, multiplications, len(ranks), len(kroneckers), largest, summed)

    @property
    def key(self) -> tuple[tuple[FileIdentity, float] | int, ...]:
        """What the bound tensors depend on: equal keys, equal output."""
        active = tuple((entry.adapter.identity, entry.strength) for entry in self.active)
        return (*active, self.max_rank) if active and self.max_rank else active

    @property
    def needs_base(self) -> bool:
        """Whether preparing it takes the model's own weights."""
        return any(entry.adapter.needs_base for entry in self.active)

    @property
    def rescalable(self) -> bool:
        """Whether other strengths only multiply what is bound by other factors."""
        return not self.max_rank and all(entry.adapter.only_adds for entry in self.active)

    @property
    def identities(self) -> tuple[FileIdentity, ...]:
        """Which LoRAs change anything, in order."""
        return tuple(entry.adapter.identity for entry in self.active)

    @property
    def strengths(self) -> tuple[float, ...]:
        """How much each of `identities` does."""
        return tuple(entry.strength for entry in self.active)

    def __str__(self) -> str:
        """The stack as a person would write it: `a.safetensors × 0.8 + b.safetensors × 1`."""
        return " + ".join(map(describe, grouped(self.active))) or "none"


def grouped(entries: Iterable[StackEntry]) -> Iterator[tuple[StackEntry, ...]]:
    """The entries as a person counts them: a LoRA that another node added key by key is one, whatever its strengths.

    Such entries are neighbours of one name, or of none, that change different parts of the model. The same file twice
    stays two.
    """
    group: list[StackEntry] = []
    covered: set[str] = set()
    for entry in entries:
        if group and _called(group[0]) == _called(entry):
            covered = covered or set(group[0].adapter.changed)  # rarely asked for, and as long as the model is deep
            if covered.isdisjoint(entry.adapter.changed):
                group.append(entry)
                covered |= entry.adapter.changed
                continue
        if group:
            yield tuple(group)
        group, covered = [entry], set()
    if group:
        yield tuple(group)


def describe(group: Sequence[StackEntry], quote: str = "") -> str:
    """A group of entries, such as `a.safetensors × 0.8` or `a.safetensors × 0.2 to 1 (304 parts)`."""
    name = "LoRA of another node" if len(group) > 1 and group[0].adapter.nameless else group[0].adapter.name
    strengths = [entry.strength for entry in group]
    low, high = min(strengths), max(strengths)
    return f"{quote}{name}{quote} × {low:g}" + (f" to {high:g} ({len(group)} parts)" if low != high else "")


def _called(entry: StackEntry) -> str | None:
    return None if entry.adapter.nameless else entry.adapter.name


def overflow(entries: Iterable[StackEntry], dtype: torch.dtype) -> LoraError:
    """What to say of entries whose matrices, at their strengths, a dtype cannot hold."""
    names = " + ".join(describe(group, "'") for group in grouped(entries))
    return LoraError(f"LoRA {names} overflows {dtype}: lower the strength, or choose another dtype.")
