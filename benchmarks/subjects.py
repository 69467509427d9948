"""What the ablation measures: one transformer in the hands of one library, with LoRAs that it switches in its own way.

Each runs in a process of its own, see `subject_process`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from accel.families.flux1 import Flux1Config
from accel.spec import ModelSpec

from .random_checkpoint import random_spec
from .sampling import Clock, Prompt


@dataclass(frozen=True)
class Setup:
    """How a subject runs.

    Attributes:
        library: "pack", "diffusers" or "comfyui".
        compile: "off", "regional", or "full" for the whole model at once.
        quantization: a mode of the pack; what torchao has under that name for diffusers.
        attention: a name of the pack's.
        hotswap: whether LoRAs are switched without loading them anew; the pack always does.
        lora: False leaves the LoRA out.
        fp32_compute: for "comfyui": what it does on a CPU by default, whatever the weights are.
    """

    library: str
    compile: str = "off"
    quantization: str = "none"
    attention: str = "auto"
    hotswap: bool = False
    lora: bool = True
    fp32_compute: bool = False


@dataclass(frozen=True)
class Work:
    """What every subject does.

    Attributes:
        model: a checkpoint in the original layout; or the sizes of one whose weights are random numbers that are made
            on the device.
        loras: two files.
        device: such as "cpu" or "cuda".
        comfyui: ComfyUI's folder; empty where none is measured.
        latent: height and width of the latent.
        text_tokens: length of the prompt.
        steps: of each image.
    """

    model: str | Flux1Config
    loras: tuple[str, str]
    device: str
    comfyui: str
    latent: int
    text_tokens: int
    steps: int

    def spec(self) -> ModelSpec:
        """The model, of which nothing but its header was read."""
        from accel.checkpoint import inspect_checkpoint

        if isinstance(self.model, Flux1Config):
            return random_spec(self.model, torch.device(self.device))
        return inspect_checkpoint(self.model)


class Subject(Protocol):
    """One transformer. `load`, `use`, `sample`, in that order; then `use` and `sample` in any."""

    def load(self) -> None:
        """Read the weights."""

    def use(self, lora: str | None) -> None:
        """Make a LoRA file the one that the next images are drawn with, in place of the last one."""

    def sample(self, prompt: Prompt, clock: Clock) -> Tensor:
        """Draw one image. Returns the final latent, (1, 16, h, w) float32 on the CPU."""

    def check(self) -> None:
        """Make sure that it did what its name says.

        Raises:
            BenchmarkError: it did not.
        """
