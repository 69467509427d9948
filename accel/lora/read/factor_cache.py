"""Low-rank matrices that take seconds to compute, kept on the disk for the next time."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress

from torch import Tensor

from ...files import FileIdentity
from ...store.disk import DamagedError, DiskStore
from ...store.entry import Key
from ..kinds.base import Change, product_factors
from ..kinds.lowrank import Factors, Tolerance

# Part of every key: another way to compute the matrices is another version.
VERSION = 2
SUFFIX = ".flux-hotswap-factors.safetensors"
LIMIT_BYTES = 10**10


class FactorCache:
    """One entry of a disk store per LoRA file. What is damaged or cannot be stored costs seconds, and no message."""

    def __init__(self, folder: str | os.PathLike[str], identity: FileIdentity, tolerance: Tolerance) -> None:
        """Name the entry of one state of a LoRA file; touches no disk."""
        self._store = DiskStore(os.fspath(folder), SUFFIX, LIMIT_BYTES)
        self._key = Key.of({
            "version": VERSION, "path": identity.path, "mtime_ns": identity.mtime_ns,
            "size_bytes": identity.size_bytes, "tolerance": repr(tolerance),
        })  # fmt: skip

    def load(self, changes: Sequence[Change]) -> dict[str, Factors] | None:
        """Name of a change -> its factors, float32; None if they are not all there and whole."""
        try:
            entry = self._store.open(self._key)
        except DamagedError:
            return None
        found = {}
        for change in changes:
            if entry is None or change.name not in entry.content:
                return None
            # Copies, so that the file may be replaced.
            lora_A, lora_B = (entry.tensors[f"{change.name}.{side}"].clone() for side in "AB")
            found[change.name] = Factors(lora_A, lora_B, *entry.content[change.name])
            if not _fits(found[change.name], change):
                return None
        return found

    def store(self, factors: Mapping[str, Factors]) -> None:
        """Write all factors at once. A full or read-only disk costs the next time, not this one."""
        tensors = {f"{name}.A": value.lora_A for name, value in factors.items()}
        tensors |= {f"{name}.B": value.lora_B for name, value in factors.items()}
        with suppress(OSError):
            self._store.put(self._key, tensors, {name: (value.error, value.norm) for name, value in factors.items()})


def _fits(factors: Factors, change: Change) -> bool:
    return (
        factors.lora_A.shape == (factors.rank, change.target.in_features)
        and factors.lora_B.shape == (change.target.out_features, factors.rank)
    )


class Products:
    """The low-rank matrices of a LoRA's products: computed when they are asked for, those that were cut once for all.

    Attributes:
        known: names of changes whose values are not needed, because their matrices were on the disk.
    """

    def __init__(
        self,
        changes: Sequence[Change],
        identity: FileIdentity,
        tolerance: Tolerance,
        cache_dir: str | os.PathLike[str] | None,
    ) -> None:
        """Look for what is on the disk.

        Args:
            changes: all that the LoRA has.
            identity: of its file or its content.
            tolerance: how far a product of high rank may be cut.
            cache_dir: where matrices are kept; None computes them each time.
        """
        cut = [change for change in changes if change.approximated(tolerance)]
        self._tolerance = tolerance
        self._cache = FactorCache(cache_dir, identity, tolerance) if cut and cache_dir is not None else None
        found = self._cache.load(cut) if self._cache is not None else None
        self._names = {change.name for change in cut}
        self._factors = dict(found or {})
        self.known = frozenset(self._factors)

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """Name of a change that was cut -> its relative error and its norm."""
        return {name: (factors.error, factors.norm) for name, factors in self._factors.items()}

    def of(self, change: Change, tensors: Mapping[str, Tensor]) -> Factors | None:
        """The matrices of a change; None if it is not a product.

        Args:
            change: one of those that the LoRA has.
            tensors: role -> values; only needed if the change is not `known`.

        Raises:
            LoraError: see `kinds.base.product_factors`.
        """
        if not change.kind.is_product:
            return None
        if change.name in self._factors:
            return self._factors[change.name]
        factors = product_factors(change, tensors, self._tolerance)
        if change.name in self._names:
            self._factors[change.name] = factors
        return factors

    def store(self) -> None:
        """Keep what was computed for the next time; call it when all are."""
        if self._cache is not None and not self.known:
            self._cache.store(self._factors)
