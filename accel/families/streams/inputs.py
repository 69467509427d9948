"""What one forward reads, and what others may do between its blocks.

Shapes: b batch, t text tokens, i image tokens (references included), h hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ...step_cache import StepCall
from .inside import InsideAttention
from .positions import RopeOptions


@dataclass(frozen=True)
class BlockState:
    """What enters and leaves one block.

    Attributes:
        hidden_states: ``b i h`` image tokens in a double block, ``b (t i) h`` all tokens in a single one.
        encoder_hidden_states: ``b t h`` text tokens in a double block, None in a single one.
        conditioning: what timestep, guidance and the like do to all blocks: the family's own dataclass.
        rotary: see `positions.rotary_table`.
        mask: attention mask or None.
        text_tokens: t.
    """

    hidden_states: Tensor
    encoder_hidden_states: Tensor | None
    conditioning: Any
    rotary: Tensor
    mask: Tensor | None
    text_tokens: int


BlockHook = Callable[[BlockState, Callable[[BlockState], BlockState]], BlockState]
AttentionHook = Callable[[BlockState, str, int], InsideAttention]
EmbeddingHook = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Hooks:
    """What others want to do between blocks.

    Attributes:
        after_embedding: each takes and returns image tokens ``b i h``, text tokens ``b t h``, image positions
            ``b i axes`` and text positions ``b t axes``.
        around_block: by ("double" or "single", index); each gets the state and the block to call.
        inside_attention: by what enters a block, "double" or "single", and its index; None: nothing is to be done.
    """

    after_embedding: Sequence[EmbeddingHook] = ()
    around_block: Mapping[tuple[str, int], BlockHook] = field(default_factory=dict)
    inside_attention: AttentionHook | None = None

    @property
    def need_every_block(self) -> bool:
        """Whether they count on every block to run in every step."""
        return bool(self.around_block) or self.inside_attention is not None


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
class StreamInputs:
    """One forward's inputs, in the transformer's dtype and on its device unless stated.

    Attributes:
        latent: ``b c height width``.
        timestep: ``b`` float32 in 0–1.
        encoder_hidden_states: ``b t context_dim``.
        references: see `positions.Positions.place`.
        reference_method: see `positions.Positions.place`; None: the family's own.
        attention_mask: see `accel.attention.sdpa`; over text and image tokens.
        residuals: ControlNet residuals.
        rope: scales and shifts of positions.
        hooks: patches between blocks.
        step_cache: asked whether to skip all blocks but the first; not asked while hooks need every block.
    """

    latent: Tensor
    timestep: Tensor
    encoder_hidden_states: Tensor
    references: Sequence[Tensor] = field(default=(), kw_only=True)
    reference_method: str | None = field(default=None, kw_only=True)
    attention_mask: Tensor | None = field(default=None, kw_only=True)
    residuals: Residuals = field(default=Residuals(), kw_only=True)
    rope: RopeOptions = field(default=RopeOptions(), kw_only=True)
    hooks: Hooks = field(default=Hooks(), kw_only=True)
    step_cache: StepCall | None = field(default=None, kw_only=True)
