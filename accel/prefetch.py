"""Read and prepare LoRAs on a background thread while the model computes."""

from __future__ import annotations

import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .engine import Engine
from .errors import AccelError
from .files import FileIdentity
from .lora.schedule import Keyframes, ScheduledStack

log = logging.getLogger(__name__)

POLL_S = 0.25
# The lowest priority. With every core busy, the thread then gets a fiftieth of one.
NICENESS = 19
READ_BYTES = 2**20


@dataclass(frozen=True)
class WantedLora:
    """One LoRA that will be wanted.

    Attributes:
        path: its file.
        strength: None if it is not known yet: then the file is read, and nothing is prepared of it.
        keyframes: how the strength will vary.
        max_rank: what the stack is cut to from here on; 0 changes nothing.
        own: whether this package will read the file; otherwise somebody else will, and only the system's cache is
            filled.
    """

    path: str
    strength: float | None
    keyframes: Keyframes = ()
    max_rank: int = 0
    own: bool = True


# LoRAs of one model, first applied first.
WantedStack = tuple[WantedLora, ...]


class Prefetcher:
    """Prepares what a source asks for, on one daemon thread of low priority, between `start` and `stop`.

    Nothing that goes wrong here reaches anyone: a file that cannot be read is refused when its own turn comes.
    """

    def __init__(self, engine: Engine, wanted: Callable[[], Sequence[WantedStack]], poll_s: float = POLL_S) -> None:
        """Start nothing yet.

        Args:
            engine: held weakly; the thread ends when it is gone.
            wanted: called on the thread every `poll_s` seconds; what will be wanted, soonest first.
            poll_s: pause between two looks.
        """
        self._engine = weakref.ref(engine)
        self._wanted = wanted
        self._poll_s = poll_s
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._done: set[tuple] = set()

    def start(self) -> None:
        """Begin to look for work."""
        self._thread = threading.Thread(target=self._run, name="flux-hotswap-prefetch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End after the LoRA that is being prepared now; does not wait."""
        self._stopped.set()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait until the thread has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self) -> None:
        _lower_priority()
        while not self._stopped.is_set():
            try:
                for stack in self._wanted():
                    if self._stopped.is_set() or not self._prefetch(stack):
                        break
            except Exception:
                # Whatever a foreign queue or a broken file brings: sampling goes on, and the file's node says it.
                log.debug("Flux Hotswap: a LoRA could not be prepared ahead", exc_info=True)
            if self._engine() is None:
                return
            self._stopped.wait(self._poll_s)

    def _prefetch(self, stack: WantedStack) -> bool:
        """Prepare one stack. Returns whether there is room for further ones."""
        engine = self._engine()
        if engine is None:
            return False
        try:
            key = tuple((FileIdentity.of(lora.path), lora) for lora in stack)
            if key in self._done:
                return True
            self._done.add(key)
            scheduled = ScheduledStack()
            for lora in stack:
                if self._stopped.is_set():
                    return False
                if not lora.own:
                    _read_ahead(lora.path)
                else:
                    strength = 1.0 if lora.strength is None else lora.strength
                    scheduled = scheduled.with_lora(engine.read_lora(lora.path), strength, lora.keyframes)
                if lora.max_rank:
                    scheduled = scheduled.with_max_rank(lora.max_rank)
            if not all(lora.own and lora.strength is not None for lora in stack):
                return True
            for prepared in reversed(list(scheduled.stacks())):
                # Where there is no room now there is none for the rest of this sampling: read once, not at each look.
                if self._stopped.is_set() or not engine.prefetch_room(prepared):
                    return False
                engine.prefetch(prepared)
        except AccelError as exc:
            log.debug("Flux Hotswap: not prepared ahead: %s", exc)
        return True


def _read_ahead(path: str) -> None:
    """Bring a file into the system's page cache, in small pieces."""
    buffer = bytearray(READ_BYTES)
    with open(path, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass


def _lower_priority() -> None:
    """Let every other thread go first, where the system knows priorities of threads (Linux)."""
    if sys.platform == "linux":
        # Not the process's: Linux takes a thread's id here. Threads that kernels start from this one inherit it.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
