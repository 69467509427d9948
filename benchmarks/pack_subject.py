"""This package's engine: a subject of the ablation."""

from __future__ import annotations

import torch
from torch import Tensor

from accel.engine import Engine
from accel.families.flux1 import Flux1Inputs
from accel.lora.stack import LoraStack
from accel.settings import EngineSettings, Quantization

from .flux_loras import STRENGTH
from .report import BenchmarkError
from .sampling import GUIDANCE, Clock, Prompt, euler
from .subjects import Setup, Work


class PackSubject:
    """This package's engine.

    Attributes:
        engine: the engine.
    """

    def __init__(self, setup: Setup, work: Work) -> None:
        """Read the header of the checkpoint."""
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
        stack = LoraStack()
        if lora is not None:
            stack = stack.with_lora(self.engine.read_lora(lora), STRENGTH)
        self.engine.swap(stack)

    def sample(self, prompt: Prompt, clock: Clock) -> Tensor:
        """See `Subject`."""
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
