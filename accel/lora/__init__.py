"""LoRAs: from a file, or another program's patches, to tensors that a model's linears compute with.

The way of one LoRA:

    file            read.stream reads it, read.keys finds what every key is for, kinds.check_change checks its shapes
      │ read_lora
      ▼
    Adapter         kinds.convert made layers of its values: what it does to each linear, bias and norm; unscaled
      │ LoraStack.with_lora, ScheduledStack.with_lora
      ▼
    LoraStack       Adapters in order, each at a strength; what a MODEL carries. Nothing is computed yet
      │ pack.flat.flatten
      ▼
    FlatLora        one buffer in host memory: strengths folded in, ranks concatenated, in the transformer's dtype
      │ hold.device.DeviceLoras.upload
      ▼
    Bindings        views of that buffer's copy on the device, one for each linear
      │ hold.slots.LoraSlots.bind
      ▼
    slots           what `linear.layers.LoraLinear` reads when it runs; compiled code sees no change

`hold.library.LoraLibrary` walks this way for an engine and keeps each station's results: files, prepared stacks, stacks
on the device. A kind of LoRA is one module of `kinds`; nothing else asks which kind it has before it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import Adapter
    from .read.file import read_lora
    from .read.report import LoraReport
    from .schedule import Keyframe, ScheduledStack
    from .stack import LoraStack

# Name -> its module, imported when it is asked for: families use `read.names` before all that the rest needs is there.
_EXPORTS = {
    "Adapter": ".adapter",
    "Keyframe": ".schedule",
    "LoraReport": ".read.report",
    "LoraStack": ".stack",
    "ScheduledStack": ".schedule",
    "read_lora": ".read.file",
}
__all__ = ["Adapter", "Keyframe", "LoraReport", "LoraStack", "ScheduledStack", "read_lora"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name], __name__), name)
