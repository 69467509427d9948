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

from .flux_loras import STRENGTH
from .random_checkpoint import random_spec
from .report import BenchmarkError
from .sampling import GUIDANCE, Clock, Prompt, euler


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


class PackSubject:
    """This package's engine.

    Attributes:
        engine: the engine.
    """

    def __init__(self, setup: Setup, work: Work) -> None:
        """Read the header of the checkpoint."""
        from accel.engine import Engine
        from accel.settings import EngineSettings, Quantization

        settings = EngineSettings(
            dtype="bf16", attention=setup.attention, compile=setup.compile, device=work.device,
            quantization=Quantization(setup.quantization),
        )  # fmt: skip
        self.engine = Engine(work.spec(), settings)

    def load(self) -> None:
        """See `Subject`."""
        self.engine.load()

    def use(self, lora: str | None) -> None:
        """See `Subject`: as the node does before it samples."""
        from accel.lora.stack import LoraStack

        stack = LoraStack()
        if lora is not None:
            stack = stack.with_lora(self.engine.read_lora(lora), STRENGTH)
        self.engine.swap(stack)

    def sample(self, prompt: Prompt, clock: Clock) -> Tensor:
        """See `Subject`."""
        from accel.families.flux1 import Flux1Inputs

        engine = self.engine
        context, pooled = (tensor.to(engine.device, engine.dtype) for tensor in (prompt.context, prompt.pooled))
        guidance = torch.full((1,), GUIDANCE, device=engine.device)

        def velocity(latent: Tensor, sigma: Tensor) -> Tensor:
            return engine(Flux1Inputs(latent.to(engine.dtype), sigma, context, pooled, guidance))

        return euler(velocity, prompt, engine.device, clock)

    def check(self) -> None:
        """See `Subject`."""
        if self.engine.compiler.recompiles:
            raise BenchmarkError(f"the pack compiled {self.engine.compiler.recompiles} times too often.")


def make_subject(setup: Setup, work: Work) -> Subject:
    """The subject of a setup's library.

    Raises:
        Exception: the library is missing, or refuses the setup.
    """
    if setup.library == "pack":
        return PackSubject(setup, work)
    if setup.library == "diffusers":
        from .diffusers_subject import DiffusersSubject

        return DiffusersSubject(setup, work)
    from .comfyui_subject import ComfySubject

    return ComfySubject(setup, work)
