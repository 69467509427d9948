"""LoRAs that lie in memory already, as another program's patches: known by their content."""

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import LoraError
from ...families.layout import LoraTarget, VectorWeight
from ...files import FLOAT_DTYPES, FileIdentity
from ...tensors import own_vector, to_float
from ..adapter import Adapter
from ..kinds import KINDS, check_change
from ..kinds.base import ALPHA, Change
from ..kinds.layers import VectorLayer
from ..kinds.lowrank import Tolerance
from ..kinds.shapes import INSTEAD, TensorHeader
from .convert import convert_all, make_report
from .factor_cache import Products
from .keys import FileKeys
from .values import check_finite

SOURCE = "LoRA"


@dataclass(frozen=True)
class LinearPatch:
    """The tensors that change one linear.

    Attributes:
        name: what messages call it.
        target: the linears that it means.
        values: role, see `kinds` -> tensor; alpha is a number.
    """

    name: str
    target: LoraTarget
    values: Mapping[str, Tensor | float]


@dataclass(frozen=True)
class NormPatch:
    """A change of a norm's scale.

    Attributes:
        name: what messages call it.
        vector: the norm.
        value: (size,), any float dtype.
        replaces: whether it stands in the scale's place.
    """

    name: str
    vector: VectorWeight
    value: Tensor
    replaces: bool


def from_patches(
    patches: Iterable[LinearPatch | NormPatch],
    digest: Callable[[str, Tensor], str],
    tolerance: Tolerance = Tolerance(),
    cache_dir: str | os.PathLike[str] | None = None,
) -> Adapter:
    """Make an adapter of tensors in memory, identified by their content.

    Args:
        patches: of one LoRA.
        digest: `tensor_digest`, or something that remembers its answers.
        tolerance: how far a product of high rank may be cut.
        cache_dir: where matrices that are slow to compute are kept; None computes them each time.

    Raises:
        LoraError: a wrong shape, NaN, or a kind that cannot be carried.
    """
    content = _Content(digest)
    norms: list[VectorLayer] = []
    changes: list[Change] = []
    values: dict[str, dict[str, Tensor]] = {}
    seen: Counter[str] = Counter()
    with torch.inference_mode(False), torch.no_grad():
        for patch in patches:
            if isinstance(patch, NormPatch):
                norms.append(_norm(patch))
                content.add_norm(patch)
            else:
                tensors = {role: _tensor(value) for role, value in patch.values.items()}
                # Rows of one fused linear come as patches of one name; names of changes must differ.
                seen[patch.name] += 1
                name = patch.name if seen[patch.name] == 1 else f"{patch.name}, part {seen[patch.name]}"
                changes.append(_change(name, patch.target, tensors))
                content.add_linear(patch, tensors)
                values[name] = tensors
        identity = content.identity()
        products = Products(changes, identity, tolerance, cache_dir)
        converted = convert_all(changes, lambda change: values[change.name], lambda change: None, products, tolerance)
        products.store()
    layers, vectors = converted.layers, (*norms, *converted.vectors)
    keys = FileKeys(tuple(changes), (), (), {})
    report = make_report("patches of another node", keys, layers, vectors, products.errors)
    return Adapter(identity, layers, (), vectors, math.inf, report)


def shapes_of(patches: Iterable[LinearPatch | NormPatch]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of the tensors of patches, as a file would name them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for patch in patches:
        if isinstance(patch, NormPatch):
            shapes[f"{patch.vector.parameter}.diff"] = tuple(patch.value.shape)
            continue
        # Patches of rows of a fused linear have its name.
        parts, (name, _, _) = patch.target.parts, patch.name.rpartition(".")
        layer = parts[0].module if len(parts) == 1 else name
        for role, value in patch.values.items():
            shapes[f"{layer}{KINDS.comfyui_endings[role]}"] = tuple(value.shape) if isinstance(value, Tensor) else ()
    return shapes


def tensor_digest(source: str, tensor: Tensor) -> str:
    """Digest of a tensor's bytes, dtype and shape; about a second per GB.

    Raises:
        LoraError: it holds NaN or infinity.
    """
    check_finite(source, tensor)
    content = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    content.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return content.hexdigest()


class _Content:
    """Digests what patches change and by what, so that the same LoRA is known when it comes again."""

    def __init__(self, digest: Callable[[str, Tensor], str]) -> None:
        self._digest = digest
        self._content = hashlib.blake2b(digest_size=8)
        self._size = 0

    def add_norm(self, patch: NormPatch) -> None:
        digest = self._digest(patch.name, patch.value)
        self._size += patch.value.nbytes
        self._content.update(f"{patch.name} {patch.replaces} {digest}".encode())

    def add_linear(self, patch: LinearPatch, tensors: Mapping[str, Tensor]) -> None:
        """Raises LoraError: a tensor is no float type, or not finite."""
        self._content.update(f"{patch.name} {patch.target}".encode())
        for role, tensor in sorted(tensors.items()):
            if role != ALPHA and tensor.dtype not in FLOAT_DTYPES:
                raise LoraError(f"{SOURCE}: '{patch.name}' has a {role} of {tensor.dtype}, expected a float type.")
            # Made anew each time, an alpha has no place in a memory of digests.
            said = float(tensor) if role == ALPHA else self._digest(patch.name, patch.values[role])
            self._content.update(f" {role} {said}".encode())
            self._size += tensor.nbytes

    def identity(self) -> FileIdentity:
        """What stands for a file's."""
        return FileIdentity(f"LoRA {self._content.hexdigest()}", 0, self._size)


def _change(name: str, target: LoraTarget, tensors: Mapping[str, Tensor]) -> Change:
    headers = {role: TensorHeader(f"{name} {role}", tuple(tensor.shape)) for role, tensor in tensors.items()}
    change = check_change(SOURCE, name, target, headers)
    alpha = float(tensors[ALPHA]) if ALPHA in tensors else 1.0
    if not math.isfinite(alpha) and not change.ignored:
        raise LoraError(f"{SOURCE}: '{name}' has alpha {alpha}, expected a finite number. {INSTEAD}")
    return change


def _tensor(value: Tensor | float) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(float(value), dtype=torch.float64)
    value = value.detach().cpu()
    return to_float(value) if value.dtype == torch.float64 else value


def _norm(patch: NormPatch) -> VectorLayer:
    if patch.value.numel() != patch.vector.size:
        raise LoraError(
            f"{SOURCE}: '{patch.name}' is changed by {tuple(patch.value.shape)}, expected ({patch.vector.size},): "
            "it is for a model of another size or kind. Choose a LoRA for this model."
        )
    return VectorLayer(patch.vector.parameter, own_vector(patch.value.detach().cpu()), 1.0, patch.replaces)
