"""What messages say of a family, and by what they tell other models from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

STOCK_MODEL = "ComfyUI's own Load Diffusion Model"
STOCK_CHECKPOINT = "ComfyUI's own Load Checkpoint"


class KnownNames(NamedTuple):
    """Tensor names by which another model is told, for messages."""

    pattern: str
    """A regular expression for the beginning of a name."""
    what: str
    """What has such names, such as `a Chroma checkpoint`."""
    loader: str
    """What loads it."""


class KnownKeys(NamedTuple):
    """LoRA keys by which another model, or another program's format, is told, for messages."""

    pattern: str
    """A regular expression for a part of a key."""
    what: str
    """What has such keys, such as `Qwen-Image`."""


class KnownModels(NamedTuple):
    """The published models of a family that read one number of channels per token, for messages."""

    names: str
    """Such as `FLUX.1 Canny or Depth`."""
    runs: bool
    """Whether they run here."""


@dataclass(frozen=True)
class Wording:
    """What messages say to a person who chose the wrong file.

    Attributes:
        runs: the models that run here, such as `FLUX.1 (dev, schnell, …)`.
        layouts: the layouts of checkpoints that are read, after `in`, with the names that they begin with.
        example: a checkpoint's file name; `example_gguf` likewise.
        lora_keys: an example of a LoRA's key in each common spelling.
        author: whose names the original layout has.
    """

    runs: str
    layouts: str
    example: str
    example_gguf: str
    lora_keys: tuple[str, ...]
    author: str
