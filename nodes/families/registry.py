"""The families, and the folder of each."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..reliance import TEXT_ENCODERS, Part, Reliance

if TYPE_CHECKING:
    from .base import ComfyFamily, FamilyContract

# The name of a family in `accel.families` -> its folder here, with what `base` describes.
FOLDERS: Mapping[str, str] = {
    "FLUX.1": "flux1",
    "FLUX.2": "flux2",
}
# Nodes that know families: module and class of each, and what must hold for it.
NODES: Sequence[tuple[str, str, Part | None]] = (
    ("text_encoder_node", "FluxTextEncoderLoader", TEXT_ENCODERS),
    ("flux2.tiny_vae_node", "FluxTinyVaeLoader", None),
)


@functools.cache
def families() -> Mapping[str, ComfyFamily]:
    """Every family by its name. The first call imports ComfyUI's models, which not every version has."""
    return {name: _module(folder, "family").FAMILY for name, folder in FOLDERS.items()}


def reliances() -> Iterator[Reliance]:
    """What the families need of ComfyUI; imports nothing of it."""
    for contract in _contracts().values():
        yield from contract.RELIANCES


def nameless_weights() -> Mapping[str, Sequence[str]]:
    """By family, see `FamilyContract.nameless_weights`."""
    return {name: contract.nameless_weights() for name, contract in _contracts().items()}


def _contracts() -> Mapping[str, FamilyContract]:
    return {name: _module(folder, "contract") for name, folder in FOLDERS.items()}


def _module(folder: str, name: str) -> Any:
    return importlib.import_module(f".{folder}.{name}", __package__)
