"""What an engine as the `transformer` of a diffusers pipeline is, whatever the family.

diffusers hands over packed tokens with their positions; the engine takes latents and knows where they stand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffusers.configuration_utils import FrozenDict

from ...errors import SettingsError

if TYPE_CHECKING:
    from ...engine import Engine


class EngineInPipeline:
    """Give it to a pipeline as `transformer`; change LoRAs by `Engine.swap`, not by `load_lora_weights`.

    It is no `nn.Module`, so that `pipeline.to(...)` leaves the weights where the engine has put them.

    Attributes:
        engine: loaded.
        config: what diffusers' `config.json` says about a model of these sizes.
        dtype: what the engine computes in.
        device: where.
    """

    def __init__(self, engine: Engine) -> None:
        """Wrap an engine; `Engine.load` may come later."""
        self.engine = engine
        self.config = FrozenDict(engine.spec.family.diffusers_config(engine.spec.config))
        self.dtype = engine.dtype
        self.device = engine.device

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Do nothing: the pipeline names the condition that it computes, for diffusers' own caches."""
        yield

    def _refuse_other_options(self, joint_attention_kwargs: Mapping[str, Any] | None, return_dict: bool) -> None:
        if joint_attention_kwargs or return_dict:
            raise SettingsError(
                f"the pipeline asks for {joint_attention_kwargs or 'return_dict'}, which only diffusers' own "
                "transformer does. LoRAs and their strengths are changed by Engine.swap."
            )
