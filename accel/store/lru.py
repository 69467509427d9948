"""Keep what was read and prepared, least recently used out first, within a budget of bytes.

Where what counts is how many, `functools.lru_cache` does. cachetools' `LRUCache` (MIT) counts sizes too, but refuses a
value that alone is over the budget, and leaves locking to its caller; both would be added around it here.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Value = TypeVar("Value")


class ByteLru(Generic[Value]):
    """A thread-safe cache that holds values up to a number of bytes.

    The newest value always stays, even when it alone is over the budget: it is in use.
    """

    def __init__(self, budget_bytes: int, size_of: Callable[[Value], int]) -> None:
        """Hold up to `budget_bytes`, counted by `size_of`."""
        self.budget_bytes = budget_bytes
        self._size_of = size_of
        self._values: OrderedDict[Hashable, Value] = OrderedDict()
        # Reentrant: an interrupt just before a `with` ends must not lock its own thread out for ever.
        self._lock = threading.RLock()

    @property
    def bytes(self) -> int:
        """What the held values take."""
        with self._lock:
            return sum(map(self._size_of, self._values.values()))

    def get(self, key: Hashable) -> Value | None:
        """The value, now the most recently used; or None."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)

    def put(self, key: Hashable, value: Value) -> None:
        """Add a value, and drop the least recently used ones that no longer fit."""
        with self._lock:
            self._values[key] = value
            self._values.move_to_end(key)
            total = sum(map(self._size_of, self._values.values()))
            while total > self.budget_bytes and len(self._values) > 1:
                _, dropped = self._values.popitem(last=False)
                total -= self._size_of(dropped)

    def __contains__(self, key: Hashable) -> bool:
        """Whether there is a value, without using it."""
        with self._lock:
            return key in self._values

    def drop(self, outdated: Callable[[Hashable], bool]) -> None:
        """Drop the values whose keys are outdated."""
        with self._lock:
            for key in [key for key in self._values if outdated(key)]:
                del self._values[key]

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._values.clear()
