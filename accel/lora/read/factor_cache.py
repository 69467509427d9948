"""Low-rank matrices that take seconds to compute, kept on the disk for the next time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...files import FileIdentity
from ..kinds.base import Change, product_factors
from ..kinds.lowrank import Factors, Tolerance

# Part of every file's name: another way to compute or to store the matrices is another version.
VERSION = 1


class FactorCache:
    """One safetensors file per LoRA file, written whole or not at all; a damaged one is computed anew."""

    def __init__(self, folder: str | os.PathLike[str], identity: FileIdentity, tolerance: Tolerance) -> None:
        """Name the cache file of one state of a LoRA file; touches no disk."""
        key = json.dumps([VERSION, identity.path, identity.mtime_ns, identity.size_bytes, repr(tolerance)])
        self.path = Path(folder) / f"lora-{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"

    def load(self, changes: Sequence[Change]) -> dict[str, Factors] | None:
        """Name of a change -> its factors; None if they are not all there and whole."""
        try:
            with safe_open(self.path, framework="pt", device="cpu") as handle:
                errors = json.loads((handle.metadata() or {})["errors"])
                found = {}
                for change in changes:
                    error, norm, digest = errors[change.name]
                    factors = Factors(
                        handle.get_tensor(f"{change.name}.A").clone(),
                        handle.get_tensor(f"{change.name}.B").clone(),
                        error,
                        norm,
                    )
                    if not _fits(factors, change) or digest != _digest(factors):
                        return None
                    found[change.name] = factors
                return found
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None

    def store(self, factors: Mapping[str, Factors]) -> None:
        """Write all factors at once. A full or read-only disk costs the next time, not this one."""
        tensors, errors = {}, {}
        for name, value in factors.items():
            tensors[f"{name}.A"], tensors[f"{name}.B"] = value.lora_A.contiguous(), value.lora_B.contiguous()
            errors[name] = (value.error, value.norm, _digest(value))
        with contextlib.suppress(OSError, SafetensorError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, suffix=".tmp")
            os.close(descriptor)
            try:
                save_file(tensors, temporary, metadata={"errors": json.dumps(errors)})
                os.replace(temporary, self.path)
            except BaseException:
                os.unlink(temporary)
                raise


def _fits(factors: Factors, change: Change) -> bool:
    return (
        factors.lora_A.shape == (factors.rank, change.target.in_features)
        and factors.lora_B.shape == (change.target.out_features, factors.rank)
    )


def _digest(factors: Factors) -> str:
    """Tells flipped bits and half-written files from what was stored."""
    content = hashlib.blake2b(digest_size=8)
    for matrix in (factors.lora_A, factors.lora_B):
        content.update(memoryview(matrix.contiguous().numpy()).cast("B"))
    return content.hexdigest()


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
