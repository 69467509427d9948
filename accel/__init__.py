"""A compiled FLUX transformer that switches LoRAs by binding other tensors. Usable without ComfyUI.

```
inspect_checkpoint(path)                 reads a header        -> ModelSpec
Engine(spec, EngineSettings(...))        checks the machine
engine.load()                            reads the weights, compiles with the first call
engine.read_lora(path)                   checks the file       -> Adapter
LoraStack().with_lora(adapter, 0.8)      immutable, cheap
engine.swap(stack)                       optional: binds it    -> SwapReport
engine(inputs)                           one forward
make_plan(demand_of(...), ...)           what fits which GPU   -> OffloadPlan
write_report(Reported(engine))           what it is and did    -> text
```
What a forward takes and gives is the family's, such as `accel.families.flux1.Flux1Inputs`. `examples/` draws with it.

Everything here is imported when it is first asked for: `import accel` itself imports nothing, not even torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import inspect_checkpoint
    from .compile.cache import CompileCache
    from .engine import Engine
    from .errors import (
        AccelError,
        CheckpointError,
        DeviceMemoryError,
        EngineStateError,
        FileError,
        LibraryError,
        LoraError,
        SettingsError,
    )
    from .history import Sampling, SwapReport
    from .lora.adapter import Adapter
    from .lora.read.file import read_lora
    from .lora.schedule import Keyframe, ScheduledStack
    from .lora.stack import LoraStack
    from .memory.budgets import PoolBudgets
    from .observer import Observer
    from .offload.plan import OffloadPlan, Room, demand_of, make_plan
    from .offload.sizes import Workload
    from .registry import EngineKey, Registry
    from .report import Reported, write_report
    from .settings import EngineSettings, Offload, Quantization, QuantizedCache
    from .spec import ModelSpec
    from .step_cache import StepCache, StepCacheSettings

# Module -> the public names in it: the imports above, which only type checkers read.
_PUBLIC = {
    "checkpoint": ("inspect_checkpoint",),
    "compile.cache": ("CompileCache",),
    "engine": ("Engine",),
    "errors": (
        "AccelError", "CheckpointError", "DeviceMemoryError", "EngineStateError", "FileError", "LibraryError",
        "LoraError", "SettingsError",
    ),
    "history": ("Sampling", "SwapReport"),
    "lora.adapter": ("Adapter",),
    "lora.read.file": ("read_lora",),
    "lora.schedule": ("Keyframe", "ScheduledStack"),
    "lora.stack": ("LoraStack",),
    "memory.budgets": ("PoolBudgets",),
    "observer": ("Observer",),
    "offload.plan": ("OffloadPlan", "Room", "demand_of", "make_plan"),
    "offload.sizes": ("Workload",),
    "registry": ("EngineKey", "Registry"),
    "report": ("Reported", "write_report"),
    "settings": ("EngineSettings", "Offload", "Quantization", "QuantizedCache"),
    "spec": ("ModelSpec",),
    "step_cache": ("StepCache", "StepCacheSettings"),
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names}

__all__ = [
    "AccelError",
    "Adapter",
    "CheckpointError",
    "CompileCache",
    "DeviceMemoryError",
    "Engine",
    "EngineKey",
    "EngineSettings",
    "EngineStateError",
    "FileError",
    "Keyframe",
    "LibraryError",
    "LoraError",
    "LoraStack",
    "ModelSpec",
    "Observer",
    "Offload",
    "OffloadPlan",
    "PoolBudgets",
    "Quantization",
    "QuantizedCache",
    "Registry",
    "Reported",
    "Room",
    "Sampling",
    "ScheduledStack",
    "SettingsError",
    "StepCache",
    "StepCacheSettings",
    "SwapReport",
    "Workload",
    "demand_of",
    "inspect_checkpoint",
    "make_plan",
    "read_lora",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for (PEP 562).

    Raises:
        AttributeError: there is no such name.
    """
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'accel' has no attribute '{name}'.")
    value = globals()[name] = getattr(import_module(f".{home}", __name__), name)
    return value


def __dir__() -> list[str]:
    """The public names, and what Python itself puts into a module."""
    return sorted({*globals(), *__all__})
