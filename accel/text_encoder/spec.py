"""A recognised text encoder file, and what reading one of any architecture has in common."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch

from ..checkpoint.scales import STORED_AS, find_scales
from ..checkpoint.source import Checkpoint
from ..checkpoint.stored import check_stored
from ..errors import CheckpointError
from ..spec import StoredTensor
from .config import ClipConfig, LlmConfig, T5Config


@dataclass(frozen=True)
class EncoderSpec:
    """A recognised file: its sizes, and where it holds each parameter of the encoder.

    Attributes:
        file: of which the header was read.
        config: its sizes.
        weights: every parameter that the encoder needs, by its Hugging Face name, in the encoder's order.
        interleaved: weights whose rows the file has pair by pair, see `llm.halves` -> their heads.
    """

    file: Checkpoint
    config: T5Config | ClipConfig | LlmConfig
    weights: Mapping[str, StoredTensor]
    interleaved: Mapping[str, int] = field(default_factory=dict)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The float dtype of most of its bytes; GGUF blocks count as float16, which they are unpacked to."""
        count: Counter[torch.dtype] = Counter()
        for stored in self.weights.values():
            integer = not stored.info.dtype.is_floating_point
            dtype = torch.float16 if stored.info.packed else torch.bfloat16 if integer else stored.info.dtype
            count[dtype] += stored.info.bytes
        return count.most_common(1)[0][0]


def find_prefix(file: Checkpoint, pattern: str) -> str | None:
    """What stands before the encoder's names; of several encoders CLIP-L's."""
    found = {match[1] for key in file.tensors if (match := re.fullmatch(pattern, key))}
    return min(found, key=lambda prefix: ("clip_l" not in prefix, prefix)) if found else None


def with_scales(file: Checkpoint, prefix: str, keys: Iterable[str]) -> dict[str, StoredTensor]:
    """The weights among these keys, by their names without the prefix, each knowing its scale."""
    names = {key.removeprefix(prefix): file.tensors[key] for key in keys}
    scales, consumed = find_scales(file, prefix, names)
    weights = {name: StoredTensor(prefix + name, info) for name, info in names.items() if name not in consumed}
    for layer, scale in scales.items():
        name, info = f"{layer}.weight", names[f"{layer}.weight"]
        if info.dtype not in STORED_AS.values():
            raise CheckpointError(
                f"'{file.name}': '{prefix}{scale}' is the scale of '{prefix}{name}', which is stored as {info.dtype}; "
                "expected fp8 (e4m3 or e5m2) or int8. Choose a bf16, fp16, fp8, scaled fp8 or GGUF file."
            )
        weights[name] = StoredTensor(prefix + name, info, prefix + scale, names[scale].numel)
    return weights


def layer_count(names: Mapping[str, StoredTensor], pattern: str) -> int:
    """How many layers there are: one more than the highest index, the first group of the pattern."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def complete(
    file: Checkpoint, names: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, StoredTensor]:
    """The weights of an encoder, in its own order; every one is there, none is left over.

    Args:
        file: whose tensors they are.
        names: by Hugging Face's names.
        shapes: what the encoder has, by the same names.

    Raises:
        CheckpointError: tensors are missing, left over, or of a wrong shape or dtype.
    """
    missing = [name for name in shapes if name not in names]
    if missing:
        raise CheckpointError(
            f"'{file.name}': {len(missing)} of {len(shapes)} tensors are missing, such as '{missing[0]}'. It is "
            "incomplete: get the complete text encoder."
        )
    unknown = [stored.key for name, stored in names.items() if name not in shapes]
    if unknown:
        raise CheckpointError(
            f"'{file.name}': {len(unknown)} tensors have no place in the encoder, such as '{unknown[0]}': it belongs "
            "to another model. Choose the text encoder alone."
        )
    for name, shape in shapes.items():
        check_stored(file, names[name], shape)
    return {name: names[name] for name in shapes}
