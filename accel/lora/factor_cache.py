"""Low-rank matrices that took seconds to compute, kept on the disk for the next time."""

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

from ..files import FileIdentity
from .kinds import Change
from .lowrank import Factors, Tolerance

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
