"""Changes of a weight as two thin matrices, change = B @ A: exactly, or cut off at a stated error.

All errors are relative Frobenius norms, ‖change − B @ A‖ / ‖change‖, and known without forming the change: QR of both
sides leaves a small core with the same singular values (Golub and Van Loan, Matrix Computations, 5.4.6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns beyond the wanted rank, and passes over the matrix, of `sketch`.
OVERSAMPLING = 16
POWER_ITERATIONS = 2


@dataclass(frozen=True)
class Factors:
    """A change B @ A of a weight, in float32.

    Attributes:
        lora_A: (rank, in_features).
        lora_B: (out_features, rank).
        error: relative Frobenius error that cutting off left; 0 where nothing was cut.
        norm: Frobenius norm of the whole change, 0 where it was not needed.
    """

    lora_A: Tensor
    lora_B: Tensor
    error: float = 0.0
    norm: float = 0.0

    @property
    def rank(self) -> int:
        """Rows of lora_A."""
        return self.lora_A.shape[0]


@dataclass(frozen=True)
class Tolerance:
    """How far a change of high rank may be cut.

    Attributes:
        error: relative Frobenius error that is aimed at.
        exact_rank: up to this rank nothing is cut, and a Kronecker product may become a low-rank change.
        max_rank: no change keeps more; the error is what it then is.
        max_error: where even `max_rank` leaves more than this, the file is refused.
    """

    error: float = 0.01
    exact_rank: int = 64
    max_rank: int = 512
    max_error: float = 0.1


def hadamard(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Factors:
    """(w1_a @ w1_b) * (w2_a @ w2_b), exactly, of rank r1 · r2: the Khatri–Rao products of the sides.

    Args:
        w1_a: (out_features, r1). w1_b: (r1, in_features). w2_a: (out_features, r2). w2_b: (r2, in_features).
    """
    lora_B = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
    lora_A = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
    return Factors(lora_A, lora_B)


def kronecker(first: Factors, second: Factors) -> Factors:
    """The Kronecker product of two changes, exactly, of the product of their ranks."""
    return Factors(torch.kron(first.lora_A, second.lora_A), torch.kron(first.lora_B, second.lora_B))


def whole(matrix: Tensor) -> Factors:
    """A full matrix as factors, exactly: one of them is the identity."""
    rows, columns = matrix.shape
    if rows <= columns:
        return Factors(matrix, torch.eye(rows, dtype=matrix.dtype))
    return Factors(torch.eye(columns, dtype=matrix.dtype), matrix)


def compress(factors: Factors, error: float, max_rank: int) -> Factors:
    """The same change at the smallest rank that keeps the error, or at `max_rank`: then with a larger error.

    Args:
        factors: any dtype; computed in float32.
        error: relative Frobenius error that may be left.
        max_rank: of the result.
    """
    u, s, v = _svd(factors)
    values = s.double()
    kept = _cut(values, error, max_rank, float(values.square().sum()))
    root = values[:kept].sqrt().float()
    return Factors(v[:kept] * root[:, None], u[:, :kept] * root, *_left(values, kept))


def sketch(matrix: Tensor, error: float, max_rank: int) -> Factors:
    """A matrix at the smallest rank that keeps the error, or at `max_rank`: then with a larger error.

    By randomized subspace iteration (Halko, Martinsson and Tropp, SIAM Review 53, 2011, algorithms 4.4 and 5.1): a
    full decomposition of a weight with ten thousand rows takes half a minute. The error is that of what is returned.

    Args:
        matrix: (out_features, in_features) float32.
        error: relative Frobenius error that may be left.
        max_rank: of the result.
    """
    generator = torch.Generator().manual_seed(0)  # its own: a sampler may be drawing its noise from the global one
    columns = min(max_rank + OVERSAMPLING, *matrix.shape)
    basis = torch.randn(matrix.shape[1], columns, generator=generator)
    for _ in range(1 + POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis).Q).Q
    u, s, v = torch.linalg.svd(matrix @ basis, full_matrices=False)
    values, energy = s.double(), float(matrix.double().square().sum())
    kept = _cut(values, error, max_rank, energy)
    root, norm = values[:kept].sqrt().float(), energy**0.5
    rest = max(0.0, energy - float(values[:kept].square().sum())) ** 0.5 / norm if norm else 0.0
    return Factors((v[:kept] @ basis.T) * root[:, None], u[:, :kept] * root, rest, norm)


def overall_error(errors: Mapping[str, tuple[float, float]]) -> tuple[float, float]:
    """The largest and the overall relative error of changes given as name -> (relative error, norm)."""
    total = math.fsum(norm**2 for _, norm in errors.values())
    lost = math.fsum((error * norm) ** 2 for error, norm in errors.values())
    return max((error for error, _ in errors.values()), default=0.0), math.sqrt(lost / total) if total else 0.0


def _svd(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of B @ A with V (rank, in_features), from QR of both sides where they are thin."""
    lora_A, lora_B = factors.lora_A.float(), factors.lora_B.float()
    if factors.rank >= min(lora_A.shape[1], lora_B.shape[0]):
        return torch.linalg.svd(lora_B @ lora_A, full_matrices=False)
    q_left, r_left = torch.linalg.qr(lora_B)
    q_right, r_right = torch.linalg.qr(lora_A.T)
    u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, s, v @ q_right.T


def _cut(values: Tensor, error: float, max_rank: int, energy: float) -> int:
    """How many of the descending singular values to keep, where the squares of all sum up to `energy`."""
    left = energy - values.square().cumsum(0)  # after keeping 1, 2, ... values
    enough = torch.nonzero(left <= error**2 * energy)
    needed = int(enough[0]) + 1 if len(enough) else len(values)
    return min(needed, max_rank, len(values))


def _left(values: Tensor, kept: int) -> tuple[float, float]:
    """The relative error of keeping so many values, and the norm of all."""
    norm = float(values.norm())
    return (float(values[kept:].norm()) / norm if norm else 0.0), norm
