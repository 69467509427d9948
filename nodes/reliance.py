"""What it is to rely on something in ComfyUI: its place, what of the pack needs it, and how to see whether it is there.

Nothing here is imported before it is checked, so that this module loads in every version.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Where a thing was last seen: in whole trees, in which this pack ran (0.18.2, 0.24.0, 0.27.0, 0.30.0); in a whole tree
# that was read; and in single files of later versions that were read.
RAN, READ, READ_FILES = "0.18.2 to 0.30", "0.18.2 to 0.33", "0.18.2 to 0.46"


@dataclass(frozen=True)
class Part:
    """A part of the pack that works, or does not, by itself.

    Attributes:
        without: what is not there when ComfyUI lacks something that it needs.
    """

    without: str


MODEL = Part("Accelerated Flux Loader and the nodes that take its model are left out")
OTHER_LORA_NODES = Part(
    "Load LoRA and the LoRA nodes of other packs do not work on the accelerated model; use Hotswap LoRA"
)
REFUSALS = Part("merging, saving, hooks or the bypass loader may fail on the accelerated model without a clear message")
CLIP_LORAS = Part("Hotswap LoRA changes no text encoder")
TEXT_ENCODERS = Part("Flux Text Encoder Loader is left out")
TAESD = Part("Flux TAESD Loader is left out")
NAMES = Part("LoRAs that come from other nodes are named by their content, not by their file")
PREFETCH = Part("the LoRAs of queued prompts are not prepared ahead")
TEXTS = Part("nothing is written below running nodes; the log has it all the same")
PINNING = Part("host memory is not page-locked, which makes loading and offloading slower")
VERSION = Part("Flux Accel Report does not know ComfyUI's version")


@dataclass(frozen=True)
class Reliance:
    """One thing that must be there.

    Attributes:
        where: "module:name.name".
        parts: what of the pack needs it.
        takes: the names of parameters that the pack passes, or is passed by ComfyUI where it overrides a method.
        seen: the versions of ComfyUI that had it so.
        finds: what is amiss with it beyond that; None or "" where nothing is.
    """

    where: str
    parts: tuple[Part, ...]
    takes: tuple[str, ...] = ()
    seen: str = READ_FILES
    finds: Callable[[Any], str] | None = None

    def mismatch(self) -> str:
        """What is amiss, as the end of a sentence that begins with "this ComfyUI"; empty where nothing is."""
        try:
            found = resolve(self.where)
        except (ImportError, AttributeError) as exc:
            return f"has no {self.where} ({exc})"
        lacking = _lacking(found, self.takes)
        if lacking:
            return f"has a {self.where} without {', '.join(lacking)}"
        try:
            return self.finds(found) if self.finds else ""
        except Exception as exc:  # whatever a changed class raises
            return f"has a {self.where} that cannot be used ({type(exc).__name__}: {exc})"


def each(prefix: str, names: str, parts: tuple[Part, ...], seen: str = READ_FILES) -> tuple[Reliance, ...]:
    """What several names, separated by spaces, have in common; see `Reliance` for the rest."""
    return tuple(Reliance(prefix + name, parts, seen=seen) for name in names.split())


def resolve(where: str) -> Any:
    """What is at "module:name.name".

    Raises:
        ImportError: there is no such module.
        AttributeError: nothing in it has that name.
    """
    module, _, path = where.partition(":")
    if module == "server":
        # ComfyUI imports it before any node pack. Importing it here would start another one in a process without.
        if module not in sys.modules:
            raise ImportError("it is not loaded")
        found = sys.modules[module]
    else:
        found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _lacking(found: Any, names: tuple[str, ...]) -> list[str]:
    if not names:
        return []
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):  # not written in Python
        return []
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return []
    return [name for name in names if name not in parameters]
