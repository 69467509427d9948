"""Engines and text encoders that stay alive between prompts: the one piece of process-wide state of this package."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Generic, TypeVar

from .files import FileIdentity
from .quantize import find_mode
from .settings import EngineSettings

Held = TypeVar("Held")


@dataclass(frozen=True)
class EngineKey:
    """Everything that changes a built engine; not its LoRAs, nor resolutions or batches."""

    file: FileIdentity
    settings: EngineSettings
    libraries: tuple[str, ...]

    @classmethod
    def of(cls, file: FileIdentity, settings: EngineSettings) -> EngineKey:
        """Key of a checkpoint with settings under the installed libraries."""
        libraries = tuple(f"{name} {version(name)}" for name in ("torch", "diffusers"))
        mode = find_mode(settings.quantization.mode)
        return cls(file, settings, libraries if mode is None else (*libraries, *mode.libraries))


class Registry(Generic[Held]):
    """A thread-safe LRU that keeps whatever carries an engine alive.

    No `ByteLru`: it counts engines, whose sizes change while they are held, and builds under its lock, so that two
    nodes do not load one model twice.
    """

    def __init__(self, capacity: int = 1) -> None:
        """Keep up to `capacity` engines: FLUX fills a card, so one is the default."""
        self.capacity = capacity
        self._held: OrderedDict[Hashable, Held] = OrderedDict()
        self._lock = threading.RLock()

    def get_or_build(self, key: Hashable, build: Callable[[], Held]) -> Held:
        """The value under `key`, built if it is not there; then the least recently used one makes room."""
        with self._lock:
            if key not in self._held:
                built = build()  # may refuse: then the others stay
                while len(self._held) >= self.capacity:
                    self._held.popitem(last=False)
                self._held[key] = built
            self._held.move_to_end(key)
            return self._held[key]

    def keys(self) -> tuple[Hashable, ...]:
        """Keys held, least recently used first."""
        with self._lock:
            return tuple(self._held)

    def values(self) -> tuple[Held, ...]:
        """What is held, least recently used first."""
        with self._lock:
            return tuple(self._held.values())

    def clear(self) -> None:
        """Let everything go."""
        with self._lock:
            self._held.clear()


# Under this name for the whole process, so that a model outlives ComfyUI's own caches. It holds what the nodes give it.
ENGINES: Registry[Any] = Registry()
# Likewise for text encoders, which remember what they encoded.
TEXT_ENCODERS: Registry[Any] = Registry()
