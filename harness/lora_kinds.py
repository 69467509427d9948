"""Random tensors of every kind of change of a linear that LoRA files hold."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .tiny_models import seeded_normal


@dataclass
class Source:
    """Random numbers for one linear; the n-th tensor that is asked for depends on n alone.

    Attributes:
        stream: names the random stream.
        shape: (out_features, in_features).
        rank: of every low-rank part.
        rms: rough size of the change per entry.
        seed: same seed, same values.
        lengths: (out_features, 1), about 1: rows' lengths for the kinds that scale rows.
    """

    stream: str
    shape: tuple[int, int]
    rank: int
    rms: float
    seed: int
    _count: int = 0

    def __post_init__(self) -> None:
        """Draw the lengths first."""
        self.lengths = 1.0 + 0.2 * self.normal(self.shape[0], 1).clamp(-2.0, 2.0)

    def normal(self, *size: int, std: float = 1.0) -> Tensor:
        """Normal values, float32, on the CPU."""
        self._count += 1
        return seeded_normal(self.seed, f"{self.stream}.{self._count}", size, std)

    def factors(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Two factors of out_features and two of in_features."""
        rows, columns = self.shape
        return _split_size(rows, 8), _split_size(columns, 8)

    def core(self) -> Tensor:
        """(rank, rank, 1, 1): what a Tucker decomposition has between its factors."""
        return self.normal(self.rank, self.rank, 1, 1, std=1.0 / math.sqrt(self.rank))

    @property
    def up_std(self) -> float:
        """Of a matrix that is multiplied with a standard normal one of this rank."""
        return self.rms / math.sqrt(self.rank)


Tensors = dict[str, Tensor]
Make = Callable[[Source], Tensors]


def _split_size(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a size, the first the largest one up to `factor`: what LyCORIS calls factorization."""
    first = next(number for number in range(factor, 0, -1) if size % number == 0)
    return first, size // first


def _lora(source: Source) -> Tensors:
    rows, columns = source.shape
    return {
        "lora_down.weight": source.normal(source.rank, columns),
        "lora_up.weight": source.normal(rows, source.rank, std=source.up_std),
    }


def _convolution(source: Source) -> Tensors:
    return {key: value[:, :, None, None] for key, value in _lora(source).items()}


def _locon(source: Source) -> Tensors:
    return {**_convolution(source), "lora_mid.weight": source.core()}


def _peft(source: Source) -> Tensors:
    tensors = _lora(source)
    return {"lora_A.weight": tensors["lora_down.weight"], "lora_B.weight": tensors["lora_up.weight"]}


def _peft_dora(source: Source) -> Tensors:
    return {**_peft(source), "lora_magnitude_vector": source.lengths.flatten()}


def _peft_bias(source: Source) -> Tensors:
    return {**_peft(source), "lora_B.bias": source.normal(source.shape[0], std=0.1)}


def _loha(source: Source) -> Tensors:
    (rows, columns), rank = source.shape, source.rank
    return {
        "hada_w1_a": source.normal(rows, rank, std=source.rms / rank), "hada_w1_b": source.normal(rank, columns),
        "hada_w2_a": source.normal(rows, rank), "hada_w2_b": source.normal(rank, columns),
    }  # fmt: skip


def _loha_tucker(source: Source) -> Tensors:
    (rows, columns), rank = source.shape, source.rank
    return {
        "hada_w1_a": source.normal(rank, rows, std=source.rms / rank), "hada_w1_b": source.normal(rank, columns),
        "hada_w2_a": source.normal(rank, rows), "hada_w2_b": source.normal(rank, columns),
        "hada_t1": source.core(), "hada_t2": source.core(),
    }  # fmt: skip


def _lokr(source: Source) -> Tensors:
    (rows1, rows2), (columns1, columns2) = source.factors()
    return {
        "lokr_w1": source.normal(rows1, columns1),
        "lokr_w2_a": source.normal(rows2, source.rank, std=source.up_std),
        "lokr_w2_b": source.normal(source.rank, columns2),
    }


def _lokr_products(source: Source) -> Tensors:
    (rows1, rows2), (columns1, columns2) = source.factors()
    rank = source.rank
    return {
        "lokr_w1_a": source.normal(rows1, rank), "lokr_w1_b": source.normal(rank, columns1),
        "lokr_w2_a": source.normal(rows2, rank, std=source.rms / rank), "lokr_w2_b": source.normal(rank, columns2),
    }  # fmt: skip


def _lokr_full(source: Source) -> Tensors:
    (rows1, rows2), (columns1, columns2) = source.factors()
    return {
        "lokr_w1": source.normal(rows1, columns1), "lokr_w2": source.normal(rows2, columns2, std=source.rms),
    }  # fmt: skip


def _lokr_tucker(source: Source) -> Tensors:
    (rows1, rows2), (columns1, columns2) = source.factors()
    return {
        "lokr_w1": source.normal(rows1, columns1),
        "lokr_w2_a": source.normal(source.rank, rows2, std=source.up_std),
        "lokr_w2_b": source.normal(source.rank, columns2),
        "lokr_t2": source.core(),
    }


def _glora(source: Source) -> Tensors:
    (rows, columns), rank = source.shape, source.rank
    return {
        "a1.weight": source.normal(columns, rank, std=0.3 / math.sqrt(columns)),
        "a2.weight": source.normal(rank, columns, std=1.0 / math.sqrt(rank)),
        "b1.weight": source.normal(rows, rank, std=source.up_std),
        "b2.weight": source.normal(rank, columns),
    }


def _glora_old(source: Source) -> Tensors:
    """The roles' names the other way round."""
    tensors = _glora(source)
    other = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    return {f"{other[key[:2]]}.weight": value for key, value in tensors.items()}


def _difference(source: Source) -> Tensors:
    (rows, columns), rank = source.shape, source.rank
    return {"diff": source.normal(rows, rank, std=source.up_std) @ source.normal(rank, columns)}


def _oft(source: Source) -> Tensors:
    return {"oft_blocks": source.normal(source.shape[0] // 16, 16, 16, std=0.05)}


def _bias(source: Source) -> Tensors:
    return {"diff_b": source.normal(source.shape[0], std=0.1)}


def _dora(make: Make) -> Make:
    """A kind with new lengths of the rows."""
    return lambda source: {**make(source), "dora_scale": source.lengths}


KINDS: Mapping[str, Make] = {
    "LoRA": _lora, "LoRA 1x1": _convolution, "LoCon": _locon, "DoRA": _dora(_lora), "PEFT DoRA": _peft_dora,
    "PEFT bias": _peft_bias, "LoHa": _loha, "LoHa DoRA": _dora(_loha), "LoHa Tucker": _loha_tucker, "LoKr": _lokr,
    "LoKr DoRA": _dora(_lokr), "LoKr products": _lokr_products, "LoKr full": _lokr_full,
    "LoKr full DoRA": _dora(_lokr_full), "LoKr Tucker": _lokr_tucker, "GLoRA": _glora, "GLoRA old": _glora_old,
    "difference": _difference, "OFT": _oft, "bias": _bias,
}  # fmt: skip
"""Kinds of change of a linear. The names of PEFT's own are read by PEFT and diffusers, not by ComfyUI."""
WITHOUT_ALPHA = ("bias", "difference")


def kind_tensors(kind: str, shape: tuple[int, int], *, rank: int = 4, alpha: float | None = None, rms: float = 0.05,
                 seed: int = 0, name: str = "") -> dict[str, Tensor]:
    """Random tensors of one kind of change of a linear, by the ends of their keys.

    Args:
        kind: a name in `KINDS`.
        shape: (out_features, in_features).
        rank: of every low-rank part.
        alpha: written as `alpha`; for OFT the constraint on the rotation.
        rms: rough size of the change per entry, so that no kind vanishes or explodes.
        seed: same arguments, same values.
        name: of the linear; names the random stream.
    Returns:
        Float32 CPU tensors, named as LyCORIS (https://github.com/KohakuBlueleaf/LyCORIS) and PEFT name them.
    Raises:
        ValueError: The kind is not known.
    """
    if kind not in KINDS:
        raise ValueError(f"The kind of change {kind!r} is not known; expected one of {', '.join(KINDS)}.")
    tensors = KINDS[kind](Source(f"{name}.{kind}", shape, rank, rms, seed))
    if alpha is not None and kind not in WITHOUT_ALPHA:
        tensors["alpha"] = torch.tensor(alpha)
    return tensors
