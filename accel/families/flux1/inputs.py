"""What one forward of FLUX.1 reads, and what others may do between its blocks.

Shapes: b batch, t text tokens, i image tokens (references included), h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ...step_cache import StepCall
from .positions import RopeOptions


@dataclass(frozen=True)
class BlockState:
    """What enters and leaves one block.

    Attributes:
        hidden_states: ``b i h`` image tokens in a double block, ``b (t i) h`` all tokens in a single one.
        encoder_hidden_states: ``b t h`` text tokens in a double block, None in a single one.
        conditioning: ``b h`` embedding of timestep, guidance and pooled text, before its activation.
        rotary: see `positions.rotary_table`.
        mask: attention mask or None.
        text_tokens: t.
    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor | None
    conditioning: Tensor
    rotary: Tensor
    mask: Tensor | None
    text_tokens: int


BlockHook = Callable[[BlockState, Callable[[BlockState], BlockState]], BlockState]
EmbeddingHook = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Hooks:
    """What others want to do between blocks.

    Attributes:
        after_embedding: each takes and returns image tokens ``b i h``, text tokens ``b t h``, image positions ``b i 3``
            and text positions ``b t 3``.
        around_block: by ("double" or "single", index); each gets the state and the block to call.
    """

    after_embedding: Sequence[EmbeddingHook] = ()
    around_block: Mapping[tuple[str, int], BlockHook] = field(default_factory=dict)


@dataclass(frozen=True)
class Residuals:
    """What a ControlNet adds after each block to the first n image tokens; lists may be short or hold None.

    Attributes:
        double: entry i, ``b n h``, is added after double block i.
        single: entry i, ``b n h``, is added after single block i, behind the text tokens.
    """

    double: Sequence[Tensor | None] = ()
    single: Sequence[Tensor | None] = ()

    @property
    def places(self) -> tuple[tuple[int, ...], ...]:
        """After which double and which single blocks something is added."""
        return tuple(
            tuple(index for index, residual in enumerate(kind) if residual is not None)
            for kind in (self.double, self.single)
        )


@dataclass(frozen=True)
class Flux1Inputs:
    """One forward's inputs, in the transformer's dtype and on its device unless stated.

    Attributes:
        latent: ``b c height width``; c is 16, or 32 / 96 with what a control or fill model concatenates.
        timestep: ``b`` float32 in 0–1.
        encoder_hidden_states: ``b t context_dim``.
        pooled_projections: ``b pooled_dim``, further columns are not read; None for zeros.
        guidance: ``b`` float32, or None to leave the guidance embedding out.
        references: see `positions.place`.
        reference_method: see `positions.place`.
        attention_mask: see `accel.attention.sdpa`; over text and image tokens.
        residuals: ControlNet residuals.
        rope: scales and shifts of positions.
        hooks: patches between blocks.
        step_cache: asked whether to skip all blocks but the first; not asked while hooks patch blocks, which they
            expect to run in every step.
    """

    latent: Tensor
    timestep: Tensor
    encoder_hidden_states: Tensor
    pooled_projections: Tensor | None = None
    guidance: Tensor | None = None
    references: Sequence[Tensor] = ()
    reference_method: str = "offset"
    attention_mask: Tensor | None = None
    residuals: Residuals = Residuals()
    rope: RopeOptions = RopeOptions()
    hooks: Hooks = Hooks()
    step_cache: StepCall | None = None
