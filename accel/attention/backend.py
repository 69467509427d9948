"""What an attention backend is, and what it needs of a machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..hardware import Hardware, dtype_name, hardware_of

Attention: TypeAlias = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Target:
    """What attention has to run on.

    Attributes:
        device: of the tensors.
        dtype: of the tensors.
        heads: per token.
        head_dim: width of a head.
        compiled: whether torch.compile traces the call.
        assumed: what the device is taken to be; None for what it is.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    head_dim: int
    compiled: bool
    assumed: Hardware | None = None

    @property
    def hardware(self) -> Hardware:
        """What the device is."""
        return self.assumed or hardware_of(self.device)


@dataclass(frozen=True)
class MaxDeviation:
    """How far a backend may be from float32, as relative L2 distances; see `correctness.deviation`.

    Attributes:
        overall: of the whole result.
        worst: of the worst token of a head.
    """

    overall: float
    worst: float


# An exact kernel rounds the weights and its result to the dtype. SDPA on a CPU is at 0.0019 / 0.0030 in bfloat16 and
# 0.00024 / 0.00038 in float16; GPUs round as much. float32 leaves room for TF32. What it must catch: zero keys that pad
# the last tile count (0.011 / 0.030), the last key is lost (0.033 / 0.91), a scale is wrong by 2 % (0.049).
EXACT: Mapping[torch.dtype, MaxDeviation] = {
    torch.bfloat16: MaxDeviation(6e-3, 2e-2),
    torch.float16: MaxDeviation(3e-3, 1e-2),
    torch.float32: MaxDeviation(6e-3, 2e-2),
}


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: what the user chooses.
        hardware: why it cannot run on a target: what the sentence after its name says. None: it can.
        library: likewise, because of what is installed; imports it, once per process.
        make: gives the function to trace; called where nothing is missing.
        instead: other backends, nearest first; the first that runs is named in errors.
        max_deviation: by dtype; what is not in it is not computed.
        exact: whether it computes what SDPA computes, up to rounding: what "auto" may take.
        downloads: whether `make` would go to the network now.
    """

    name: str
    hardware: Callable[[Target], str | None]
    library: Callable[[], str | None]
    make: Callable[[], Attention]
    instead: tuple[str, ...]
    max_deviation: Mapping[torch.dtype, MaxDeviation]
    exact: bool = True
    downloads: Callable[[], bool] = lambda: False

    def missing(self, target: Target) -> str | None:
        """Why it cannot run on a target, or None. The machine first: nothing is worth installing that cannot run."""
        return self.hardware(target) or self._without_kernels(target.dtype) or self.library()

    def _without_kernels(self, dtype: torch.dtype) -> str | None:
        if dtype in self.max_deviation:
            return None
        known = ", ".join(dtype_name(each) for each in self.max_deviation)
        return f"computes in {known}, but dtype is {dtype_name(dtype)}"


def installed_with_torch() -> None:
    """A `Backend.library` of what PyTorch has itself."""


def nvidia(*majors: int, max_head_dim: int, amd: bool = False) -> Callable[[Target], str | None]:
    """A `Backend.hardware` for kernels of NVIDIA cards.

    Args:
        majors: compute capabilities, such as 9 for 9.0.
        max_head_dim: widest head.
        amd: whether there are kernels for AMD cards too.
    """

    def missing(target: Target) -> str | None:
        hardware = target.hardware
        if amd and hardware.kind == "rocm":
            return None
        if hardware.capability is None or hardware.capability[0] not in majors:
            return f"needs an NVIDIA card of compute capability {_ranges(majors)}; {hardware.sentence}"
        if target.head_dim > max_head_dim or target.head_dim % 8:
            return f"takes heads of up to {max_head_dim} channels, in eights; this model's have {target.head_dim}"
        return None

    return missing


def _ranges(majors: tuple[int, ...]) -> str:
    return " or ".join(f"{major}.x" for major in majors)
