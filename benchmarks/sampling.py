"""One prompt that every subject of the ablation samples: the same noise, conditions and timesteps, and its clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# What diffusers' own forward rounds to a multiple of 16 in bfloat16, and nobody else: 4.0 × 1000 survives it.
GUIDANCE = 4.0
LATENT_CHANNELS = 16
SEED = 11


@dataclass(frozen=True)
class Prompt:
    """What is sampled, on the CPU in float32.

    Attributes:
        noise: (1, 16, h, w), where sampling starts.
        context: (1, T, context width): random numbers in the place of a T5's embeddings.
        pooled: (1, pooled width), likewise for CLIP-L.
        sigmas: (steps + 1,), from 1 to 0.
    """

    noise: Tensor
    context: Tensor
    pooled: Tensor
    sigmas: Tensor


def make_prompt(latent: int, text_tokens: int, context_dim: int, pooled_dim: int, steps: int) -> Prompt:
    """The same prompt in every process.

    Args:
        latent: height and width of the latent.
        text_tokens: length of the prompt.
        context_dim: width of a T5 embedding.
        pooled_dim: width of the CLIP-L embedding.
        steps: of the sampler.
    """
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Prompt(
        normal(1, LATENT_CHANNELS, latent, latent),
        normal(1, text_tokens, context_dim),
        normal(1, pooled_dim),
        exact_sigmas(steps),
    )


def prompt_for(config: Any, latent: int, text_tokens: int, steps: int) -> Prompt:
    """`make_prompt` for a model's sizes."""
    return make_prompt(latent, text_tokens, config.context_dim, config.pooled_dim, steps)


def exact_sigmas(steps: int) -> Tensor:
    """(steps + 1,) evenly from 1 to 0, moved to where bfloat16 does not change the timestep.

    diffusers rounds a timestep to the model's dtype, multiplies it by 1000 and rounds again. Elsewhere its output would
    differ from everybody else's by that alone.
    """
    thousandths = torch.arange(1, 1001, dtype=torch.float32)
    rounded = (thousandths / 1000).bfloat16() * 1000
    exact = thousandths[rounded.float() == thousandths] / 1000
    wanted = torch.linspace(1.0, 0.0, steps + 1)[:-1]
    nearest = exact[(exact[None] - wanted[:, None]).abs().argmin(dim=1)]
    return torch.cat([nearest, torch.zeros(1)])


@dataclass
class Clock:
    """When each step of a prompt ended.

    Attributes:
        ends: seconds, one per step.
    """

    synchronize: Callable[[], None]
    start: float = 0.0
    ends: list[float] = field(default_factory=list)

    def begin(self) -> None:
        """Forget the last prompt; the next one begins now."""
        self.synchronize()
        self.ends = []
        self.start = time.perf_counter()

    def step(self) -> None:
        """A step ends."""
        self.synchronize()
        self.ends.append(time.perf_counter())

    @property
    def ms(self) -> float:
        """From `begin` to the last step's end."""
        return (self.ends[-1] - self.start) * 1e3

    @property
    def steps_ms(self) -> list[float]:
        """Between the ends of neighbouring steps: nothing but a step is in it, whoever samples."""
        return [(end - start) * 1e3 for start, end in zip(self.ends, self.ends[1:], strict=False)]


def euler(velocity: Callable[[Tensor, Tensor], Tensor], prompt: Prompt, device: torch.device, clock: Clock) -> Tensor:
    """Sample with Euler's method, as ComfyUI's sampler `euler` does on a flow model.

    Args:
        velocity: (latent (1, 16, h, w) float32, sigma (1,) float32) -> (1, 16, h, w), both on `device`.
        prompt: where to start, and the sigmas.
        device: where the latent is.
        clock: told of every step.

    Returns:
        The final latent, float32 on the CPU.
    """
    latent, sigmas = prompt.noise.to(device), prompt.sigmas.to(device)
    for index in range(len(sigmas) - 1):
        change = sigmas[index + 1] - sigmas[index]
        latent = latent + change * velocity(latent, sigmas[index : index + 1]).float()
        clock.step()
    return latent.cpu()
