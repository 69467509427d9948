"""What a quantization mode is, and why one cannot run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import SettingsError
from ..families.base import Workspace
from ..hardware import Hardware, dtype_name
from .library import Library


@dataclass(frozen=True)
class Mode:
    """One way to store the weight of a linear in fewer bits.

    What is converted is the same for all modes: the linears inside the blocks, see `ModelLinear.quantizable`. Of those
    a mode leaves the ones whose sizes its kernels cannot take; a load reports them.

    Attributes:
        name: one of `settings.QUANTIZATION_MODES`.
        summary: what it does, in a few words, for a user.
        library: what it builds on.
        lacks: hardware -> why it cannot run there by what is known of it, or None; `prove` then tries it.
        multiple_of: what out_features and in_features must be multiples of.
        weight_bytes: (out_features, in_features) -> bytes of a converted weight with its scales, without bias.
        convert: (weight ``out_features in_features`` of a float dtype, bias ``out_features`` of the same or None,
            whether the linear runs once per picture instead of on every token) -> a module with `in_features`,
            `out_features`, `bias` and `forward`, on the weight's device; its parameters do not require gradients, and
            their `dtype` is the weight's.
        workspace: what a converted linear holds while it runs, by which a plan counts.
        error: what the relative L2 distance of a linear's output from the unquantized one may be, on normal random
            data; see `prove`.
        instead: the nearest other modes, nearest first.
        does_without: (device, dtype of activations) -> what failed there and was replaced by something that gives the
            same, a sentence each; asked after the mode proved itself.
        needs_compile: without compiling it is slower than no quantization.
        bf16_only: on a GPU its kernels compute in bfloat16 alone.
        needs_device: the conversion itself runs on the GPU alone.
    """

    name: str
    summary: str
    library: Library
    lacks: Callable[[Hardware], str | None]
    multiple_of: tuple[int, int]
    weight_bytes: Callable[[int, int], int]
    convert: Callable[[Tensor, Tensor | None, bool], nn.Module]
    workspace: Workspace
    error: float
    instead: tuple[str, ...]
    does_without: Callable[[torch.device, torch.dtype], tuple[str, ...]] = lambda device, dtype: ()
    needs_compile: bool = False
    bf16_only: bool = False
    needs_device: bool = False

    @property
    def libraries(self) -> tuple[str, ...]:
        """The installed library with its version: part of what the converted weights depend on."""
        return (self.library.installed,)

    def fits(self, out_features: int, in_features: int) -> bool:
        """Whether the mode's kernels take a linear of this size."""
        return out_features % self.multiple_of[0] == 0 and in_features % self.multiple_of[1] == 0

    def missing(self, hardware: Hardware) -> str | None:
        """Why the mode cannot run: what the sentence after its name says. None: nothing speaks against it."""
        return self.library.missing() or self.lacks(hardware)

    def compute_dtype(self, dtype: torch.dtype, device: torch.device, explicit: bool) -> torch.dtype:
        """The dtype to compute in.

        Args:
            dtype: what it would be without quantization.
            explicit: whether the user chose it; otherwise another one may take its place.

        Raises:
            SettingsError: an explicit choice that the mode's kernels do not take.
        """
        if not self.bf16_only or device.type == "cpu" or dtype == torch.bfloat16:
            return dtype
        if explicit:
            raise SettingsError(
                f"quantization '{self.name}' computes in bfloat16 on a GPU, but dtype is {dtype_name(dtype)}: "
                "choose 'bf16' or 'auto', or a weight-only mode."
            )
        return torch.bfloat16


def runs_anywhere(hardware: Hardware) -> None:
    """A `Mode.lacks` of what is known of no device that it does not run there."""


def cuda_from(major: int, minor: int, what: str, or_on: tuple[str, ...] = ()) -> Callable[[Hardware], str | None]:
    """A `Mode.lacks` for kernels that NVIDIA cards have from a compute capability on, and other hardware by kind."""

    def lacks(hardware: Hardware) -> str | None:
        if hardware.kind in or_on or (hardware.capability or (0, 0)) >= (major, minor):
            return None
        wanted = f"needs {what}, which NVIDIA cards have from compute capability {major}.{minor} on"
        return f"{wanted}; {hardware.sentence}"

    return lacks
