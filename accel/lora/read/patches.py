"""LoRAs that lie in memory already, as another program's patches: known by their content."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import LoraError
from ...families.layout import LoraTarget, VectorWeight
from ...files import FLOAT_DTYPES, FileIdentity
from ..adapter import Adapter, Layer, VectorLayer, check_finite, own_vector, to_float
from ..kinds.convert import Change, check_change, convert
from ..kinds.lowrank import Tolerance
from ..kinds.shapes import INSTEAD, Piece
from .factor_cache import Products
from .file import make_report
from .keys import FileKeys

SOURCE = "LoRA"


@dataclass(frozen=True)
class LinearPatch:
    """The tensors that change one linear.

    Attributes:
        name: what messages call it.
        target: the linears that it means.
        values: role, see `kinds.COMPANIONS` -> tensor; alpha is a number.
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
        patches: as one LoRA brings them.
        digest: `tensor_digest`, or something that remembers its answers.
        tolerance: how far a product of high rank may be cut.
        cache_dir: where matrices that are slow to compute are kept; None computes them each time.

    Raises:
        LoraError: a wrong shape, NaN, or a kind that cannot be carried.
    """
    layers: list[Layer] = []
    vectors: list[VectorLayer] = []
    changes: list[Change] = []
    values: list[dict[str, Tensor]] = []
    content = hashlib.blake2b(digest_size=8)
    size = 0
    with torch.inference_mode(False), torch.no_grad():
        for patch in patches:
            if isinstance(patch, NormPatch):
                vectors.append(_norm(patch))
                size += patch.value.nbytes
                content.update(f"{patch.name} {patch.replaces} {digest(patch.name, patch.value)}".encode())
                continue
            tensors = {role: _tensor(value) for role, value in patch.values.items()}
            pieces = {role: Piece(f"{patch.name} {role}", tuple(tensor.shape)) for role, tensor in tensors.items()}
            change = check_change(SOURCE, patch.name, patch.target, pieces)
            alpha = float(tensors["alpha"]) if "alpha" in tensors else 1.0
            if not math.isfinite(alpha) and not change.ignored:
                raise LoraError(f"{SOURCE}: '{patch.name}' has alpha {alpha}, expected a finite number. {INSTEAD}")
            content.update(f"{patch.name} {patch.target}".encode())
            for role, tensor in sorted(tensors.items()):
                if role != "alpha" and tensor.dtype not in FLOAT_DTYPES:
                    raise LoraError(f"{SOURCE}: '{patch.name}' has a {role} of {tensor.dtype}, expected a float type.")
                # Made anew each time, an alpha has no place in a memory of digests.
                said = float(tensor) if role == "alpha" else digest(patch.name, patch.values[role])
                content.update(f" {role} {said}".encode())
                size += tensor.nbytes
            changes.append(change)
            values.append(tensors)
        identity = FileIdentity(f"LoRA {content.hexdigest()}", 0, size)
        products = Products(changes, identity, tolerance, cache_dir)
        for change, tensors in zip(changes, values, strict=True):
            converted = convert(change, tensors, None, products.of(change, tensors), tolerance)
            layers += converted.layers
            vectors += converted.vectors
        products.store()
    keys = FileKeys(tuple(changes), (), (), {})
    report = make_report("patches of another node", keys, layers, vectors, products.errors)
    return Adapter(identity, tuple(layers), (), tuple(vectors), math.inf, report)


def tensor_digest(source: str, tensor: Tensor) -> str:
    """Digest of a tensor's bytes, dtype and shape; about a second per GB.

    Raises:
        LoraError: it holds NaN or infinity.
    """
    check_finite(source, tensor)
    content = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    content.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return content.hexdigest()


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
