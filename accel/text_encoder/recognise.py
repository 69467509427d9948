"""Which text encoder a file is, of those that the pack takes; or what else it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..checkpoint.locate import SHARD
from ..checkpoint.other_models import OTHERS as OTHER_MODELS
from ..checkpoint.other_models import first_match, is_lora
from ..checkpoint.recognise import looks_like
from ..checkpoint.source import Checkpoint
from ..errors import CheckpointError
from ..families.text_encoders import examples, expected
from . import clip, llm, t5
from .spec import EncoderSpec


@dataclass(frozen=True)
class Architecture:
    """A kind of text encoder.

    Attributes:
        what: what messages call a file of it.
        matches: whether a file holds one, complete or not.
        read: its sizes and tensors; raises a CheckpointError that says what is wrong with it.
    """

    what: str
    matches: Callable[[Checkpoint], bool]
    read: Callable[[Checkpoint], EncoderSpec]


CLIP = Architecture("a CLIP text encoder", clip.matches, clip.read)
# Those whose hidden states a transformer reads: one of them is loaded, alone or beside a CLIP.
MAIN: Sequence[Architecture] = (
    Architecture("a T5 text encoder", t5.matches, t5.read),
    Architecture("a language model", llm.matches, llm.read),
)

# What else a user may choose by mistake.
OTHERS: Sequence[tuple[Callable[[Checkpoint], bool], str]] = (
    *((architecture.matches, architecture.what) for architecture in (*MAIN, CLIP)),
    (lambda file: any(key.startswith("decoder.block.") for key in file.tensors), "the decoder half of a T5"),
    (lambda file: any(".resblocks." in key for key in file.tensors), "a CLIP in OpenCLIP's layout"),
    (lambda file: is_lora(file.tensors), "a LoRA"),
)


def check_not_swapped(main: Checkpoint, second: Checkpoint | None) -> None:
    """Tell two files in each other's place from two wrong files.

    Raises:
        CheckpointError: they are swapped.
    """
    if second is None or not CLIP.matches(main) or CLIP.matches(second) or _main(main) is not None:
        return
    found = _main(second)
    if found is not None:
        raise CheckpointError(
            f"The two files are swapped: '{main.name}' is {CLIP.what} and '{second.name}' is {found.what}. Choose "
            f"'{second.name}' as t5_name and '{main.name}' as clip_l_name."
        )


def encoder_spec(file: Checkpoint) -> EncoderSpec:
    """Recognise a T5 v1.1 encoder, or a language model that transformers take, of any size.

    Raises:
        CheckpointError: another model, or tensors missing or of a wrong shape.
    """
    found = _main(file)
    if found is None:
        raise CheckpointError(
            f"'{file.name}' is {_guess(file)}, expected {expected()}. Their tensors are named encoder.block.* or "
            f"model.layers.*, in GGUF enc.blk.* or blk.*. Choose a file such as {examples()} as t5_name."
        )
    try:
        return found.read(file)
    except CheckpointError as exc:
        if not SHARD.search(file.name):
            raise
        raise CheckpointError(
            f"'{file.name}' is one shard of a model, not all of it. Choose one file that holds the whole text encoder, "
            f"such as {examples()}."
        ) from exc


def clip_spec(file: Checkpoint) -> EncoderSpec:
    """Recognise a CLIP-L text encoder of any size.

    Raises:
        CheckpointError: another model, or tensors missing or of a wrong shape.
    """
    if not CLIP.matches(file):
        raise CheckpointError(
            f"'{file.name}' is {_guess(file)}, expected a CLIP-L text encoder (text_model.*). Choose a file such as "
            "clip_l.safetensors as clip_l_name, or 'none'."
        )
    return CLIP.read(file)


def _main(file: Checkpoint) -> Architecture | None:
    return next((architecture for architecture in MAIN if architecture.matches(file)), None)


def _guess(file: Checkpoint) -> str:
    for matches, what in OTHERS:
        if matches(file):
            return what
    family = looks_like(file)
    if family is not None:
        return f"a {family.name} transformer"
    known = first_match(OTHER_MODELS, file.tensors)
    if known is not None:
        return known.what
    return f"not a text encoder that this pack knows (its first tensor is '{next(iter(file.tensors), '')}')"
