"""What a LoRA is once its source is forgotten: low-rank changes of the model's linears."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import LoraError
from ..files import FileIdentity
from ..layout import LoraTarget, swap_halves
from ..tensors import all_finite


@dataclass(frozen=True)
class LoraLayer:
    """A low-rank change of one linear: weight + scale · B @ A.

    Attributes:
        module: the diffusers linear.
        lora_A: (rank, in_features) on the CPU, in the file's dtype.
        lora_B: (out_features, rank), likewise.
        scale: alpha / rank; 1 where the file has no alpha.
    """

    module: str
    lora_A: Tensor
    lora_B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """Columns of lora_B."""
        return self.lora_B.shape[1]


@dataclass(frozen=True)
class LoraWeights:
    """A LoRA file's weights over one model's linears. Immutable; shared by everything that uses the file.

    Attributes:
        identity: the file's state when it was read.
        layers: one or more per linear that it changes.
        text_encoder_keys: keys that belong to CLIP or T5, which the transformer does not use.
    """

    identity: FileIdentity
    layers: tuple[LoraLayer, ...]
    text_encoder_keys: tuple[str, ...]

    @property
    def name(self) -> str:
        """The file's name."""
        return self.identity.name

    @property
    def bytes(self) -> int:
        """Memory that the weights hold; lora_A of a fused linear serves several layers and counts once."""
        tensors = {id(tensor): tensor for layer in self.layers for tensor in (layer.lora_A, layer.lora_B)}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@dataclass(frozen=True)
class TensorPair:
    """The matrices of one module, as another program holds them.

    Attributes:
        name: what messages call the module.
        target: the linears that it means.
        lora_A: (rank, in_features), any float dtype.
        lora_B: (out_features, rank), likewise.
        alpha: the LoRA's alpha, or None for alpha = rank.
        digest: of both matrices' bytes, see `tensor_digest`.
    """

    name: str
    target: LoraTarget
    lora_A: Tensor
    lora_B: Tensor
    alpha: float | None
    digest: str


def split(target: LoraTarget, lora_A: Tensor, lora_B: Tensor, scale: float) -> list[LoraLayer]:
    """Give each linear of a target its rows of lora_B; lora_A serves them all."""
    if target.swap_halves:
        lora_B = swap_halves(lora_B)
    return [
        LoraLayer(part.module, lora_A, lora_B[part.start : part.start + part.rows], scale) for part in target.parts
    ]


def from_pairs(pairs: Iterable[TensorPair]) -> LoraWeights:
    """Make weights of tensors in memory, identified by their content.

    Raises:
        LoraError: a matrix has another shape than its target demands.
    """
    layers: list[LoraLayer] = []
    content = hashlib.blake2b(digest_size=8)
    size = 0
    for pair in pairs:
        target, lora_A, lora_B = pair.target, pair.lora_A, pair.lora_B
        rank = lora_A.shape[0]
        if tuple(lora_A.shape) != (rank, target.in_features) or tuple(lora_B.shape) != (target.out_features, rank):
            raise LoraError(
                f"LoRA for '{pair.name}': the matrices are {tuple(lora_A.shape)} and {tuple(lora_B.shape)}, expected "
                f"(rank, {target.in_features}) and ({target.out_features}, rank): it is for a model of another size or "
                "kind. Choose a LoRA for this model."
            )
        layers += split(target, lora_A, lora_B, 1.0 if pair.alpha is None else pair.alpha / rank)
        content.update(f"{pair.name} {target} {pair.alpha} {pair.digest}".encode())
        size += lora_A.nbytes + lora_B.nbytes
    return LoraWeights(FileIdentity(f"LoRA {content.hexdigest()}", 0, size), tuple(layers), ())


def tensor_digest(name: str, tensor: Tensor) -> str:
    """Digest of a tensor's bytes, dtype and shape; about a second per GB.

    Raises:
        LoraError: it holds NaN or infinity.
    """
    check_finite(name, tensor)
    content = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=16)
    content.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return content.hexdigest()


def check_finite(name: str, tensor: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        LoraError: there is one.
    """
    if not all_finite(tensor):
        raise LoraError(
            f"LoRA {name} holds NaN or infinity. Its training diverged or the file is damaged: choose another file or "
            "an earlier checkpoint."
        )
