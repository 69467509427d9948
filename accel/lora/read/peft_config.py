"""The scale of a LoRA's layers as PEFT's configuration says it, which diffusers writes into a file's metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...errors import LoraError
from ...files import TensorFile

KEY = "lora_adapter_metadata"
PREFIX = "transformer."


@dataclass(frozen=True)
class AdapterConfig:
    """PEFT's LoraConfig of the transformer, as far as it scales a LoRA.

    Source: peft LoraModel._create_and_replace (patterns) and LoraLayer.update_layer (scaling); diffusers
    loaders/lora_base.py, `_save_lora_weights` (the metadata).

    Attributes:
        source: what messages begin with.
        rank: of layers that no pattern names.
        alpha: likewise.
        rank_pattern: end of a module's name, as a regular expression -> its rank.
        alpha_pattern: likewise for alpha.
        use_rslora: whether the scale is alpha / sqrt(rank).
    """

    source: str
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False

    def scale(self, name: str, rank: int) -> float:
        """What a layer's product is multiplied with.

        Args:
            name: the module as the file calls it.
            rank: of its matrices.

        Raises:
            LoraError: the configuration says another rank.
        """
        module = name.removeprefix(PREFIX)
        expected = _by_pattern(self.rank_pattern, module, self.rank)
        if expected != rank:
            raise LoraError(
                f"{self.source}: '{name}' has rank {rank}, but its {KEY} says {expected}. The file was changed without "
                "its metadata, so its scale is not known: get it again."
            )
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def adapter_config(file: TensorFile) -> AdapterConfig | None:
    """The configuration in a file's metadata, or None.

    Raises:
        LoraError: it is there, but not what diffusers writes.
    """
    text = file.metadata.get(KEY)
    if text is None:
        return None
    source = f"LoRA '{file.name}'"
    try:
        values: Any = json.loads(text) or {}
        own = {key.removeprefix(PREFIX): value for key, value in values.items() if key.startswith(PREFIX)}
        if not own:
            own = {key: value for key, value in values.items() if "." not in key}
        if "r" not in own:
            return None
        return AdapterConfig(
            source,
            int(own["r"]),
            _finite(own.get("lora_alpha", own["r"])),
            {_pattern(key): int(value) for key, value in (own.get("rank_pattern") or {}).items()},
            {_pattern(key): _finite(value) for key, value in (own.get("alpha_pattern") or {}).items()},
            bool(own.get("use_rslora", False)),
        )
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, re.error) as exc:
        raise LoraError(
            f"{source}: its {KEY} is not a configuration of PEFT ({exc}), so its scale is not known. Get the file "
            "again, or save it without this metadata."
        ) from exc


def _finite(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"an alpha is {number}")
    return number


def _pattern(text: str) -> str:
    re.compile(text)
    return text


def _by_pattern(pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return otherwise
