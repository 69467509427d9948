"""Where tokens stand: latent patches, reference images, and the rotary tables that encode both.

Shapes: b batch, c channels of the latent, n tokens, p = 2, the side of a patch.

Source: black-forest-labs/flux sampling.py `prepare`, math.py `rope`; the placement of reference latents and the scaling
of positions follow ComfyUI's comfy/ldm/flux/model.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import SettingsError
from .config import AXES_DIM, PATCH_SIZE

THETA = 10000.0
REFERENCE_METHODS = ("offset", "index", "uxo")


@dataclass(frozen=True)
class RopeOptions:
    """Scales and shifts of the position axes: t (image index), y, x. ComfyUI's FLUX takes no notice of scale_t."""

    scale_t: float = 1.0
    scale_y: float = 1.0
    scale_x: float = 1.0
    shift_t: float = 0.0
    shift_y: float = 0.0
    shift_x: float = 0.0


@dataclass(frozen=True)
class Grid:
    """One image's tokens: rows and columns of patches, its index, and where its corner lies, in patches."""

    rows: int
    columns: int
    index: float = 0.0
    top: int = 0
    left: int = 0


@dataclass(frozen=True)
class Placement:
    """Every token of one forward. Equal placements share one rotary table."""

    text_tokens: int
    grids: tuple[Grid, ...]
    rope: RopeOptions = RopeOptions()


def pad_to_patches(latent: Tensor) -> Tensor:
    """Extend ``b c height width`` circularly to even height and width, as FLUX's 2×2 patches need."""
    pad_bottom, pad_right = -latent.shape[2] % PATCH_SIZE, -latent.shape[3] % PATCH_SIZE
    if not pad_bottom and not pad_right:
        return latent
    return F.pad(latent, (0, pad_right, 0, pad_bottom), mode="circular")


def pack(latent: Tensor) -> Tensor:
    """Fold 2×2 latent patches into FLUX tokens: ``b c (rows p) (columns q) -> b (rows columns) (c p q)``, p = q = 2.

    Args:
        latent: ``b c height width``, any float dtype; height and width even.

    Returns:
        Same dtype.

    Raises:
        ValueError: height or width is odd.

    Source: black-forest-labs/flux sampling.py, prepare().
    """
    batch, channels, height, width = latent.shape
    if height % PATCH_SIZE or width % PATCH_SIZE:
        raise ValueError(f"latent is {height}×{width}, expected even sizes: pad it with pad_to_patches first.")
    rows, columns = height // PATCH_SIZE, width // PATCH_SIZE
    patches = latent.reshape(batch, channels, rows, PATCH_SIZE, columns, PATCH_SIZE)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * PATCH_SIZE**2)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `pack`: ``b (rows columns) (c p q) -> b c (rows p) (columns q)``, p = q = 2.

    Source: black-forest-labs/flux sampling.py, unpack().
    """
    batch = tokens.shape[0]
    patches = tokens.reshape(batch, rows, columns, -1, PATCH_SIZE, PATCH_SIZE)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * PATCH_SIZE, columns * PATCH_SIZE)


def place(
    latent: Tensor, references: Sequence[Tensor], method: str, text_tokens: int, rope: RopeOptions
) -> Placement:
    """Give every image its place.

    Args:
        latent: ``b c height width``, unpadded.
        references: reference latents, ``b 16 height width`` of each its own, unpadded; Kontext and other editing models
            read them.
        method: "offset" (all with index 1, side by side), "index" (one index each), "uxo" (diagonally behind the
            image).
        text_tokens: length of the text stream.
        rope: scales and shifts of the axes.

    Raises:
        SettingsError: an unknown method.
    """
    grids = [Grid(*_patches(latent))]
    bottom = right = 0
    for number, reference in enumerate(references, start=1):
        height, width = reference.shape[-2:]
        rows, columns = _patches(reference)
        if method == "index":
            grids.append(Grid(rows, columns, index=float(number)))
        elif method == "uxo":
            image_rows, image_columns = _patches(latent)
            top, left = image_rows * PATCH_SIZE + bottom, image_columns * PATCH_SIZE + right
            grids.append(Grid(rows, columns, 0.0, _half_up(top), _half_up(left)))
            bottom, right = bottom + height, right + width
        elif method == "offset":
            beside = height + bottom > width + right
            top, left = (0, right) if beside else (bottom, 0)
            grids.append(Grid(rows, columns, 1.0, _half_up(top), _half_up(left)))
            bottom, right = max(bottom, height + top), max(right, width + left)
        else:
            raise SettingsError(
                f"reference latent method '{method}' is not supported by the accelerated FLUX.1, expected one of: "
                f"{', '.join(REFERENCE_METHODS)}. Choose one in FluxKontextMultiReferenceLatentMethod."
            )
    return Placement(text_tokens, tuple(grids), rope)


def _half_up(size: int) -> int:
    return (size + PATCH_SIZE // 2) // PATCH_SIZE


def _patches(latent: Tensor) -> tuple[int, int]:
    return _half_up(latent.shape[-2]), _half_up(latent.shape[-1])


def image_ids(placement: Placement, device: torch.device) -> Tensor:
    """Positions of all image tokens, ``n 3`` float32: index, y, x."""
    return torch.cat([_grid_ids(grid, placement.rope, device) for grid in placement.grids])


def _grid_ids(grid: Grid, rope: RopeOptions, device: torch.device) -> Tensor:
    # ComfyUI scales the extent, then adds corner and shift: comfy/ldm/flux/model.py, process_img().
    last_row, last_column = (grid.rows - 1.0) * rope.scale_y, (grid.columns - 1.0) * rope.scale_x
    top, left = grid.top + rope.shift_y, grid.left + rope.shift_x
    ys = torch.linspace(top, last_row + top, grid.rows, device=device)
    xs = torch.linspace(left, last_column + left, grid.columns, device=device)
    index = torch.full((), grid.index + rope.shift_t, device=device)
    return torch.stack(torch.meshgrid(index[None], ys, xs, indexing="ij"), dim=-1).reshape(-1, 3)


def rotary_table(ids: Tensor) -> Tensor:
    """Cosines and sines of the rotary embedding.

    Args:
        ids: ``n 3`` or ``b n 3`` float32 positions, text first.

    Returns:
        ``2 b 1 n 64`` float32, cosines first, computed in float64; b = 1 for positions without a batch.

    Source: black-forest-labs/flux math.py, rope().
    """
    # Devices without float64 (MPS) get a table computed on the CPU: float32 angles are wrong beyond position 1000.
    device = ids.device
    positions = ids.to("cpu" if device.type == "mps" else device, torch.float64)
    angles = []
    for axis, dim in enumerate(AXES_DIM):
        steps = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
        angles.append(positions[..., axis, None] / THETA**steps)
    table = torch.cat(angles, dim=-1)
    if table.ndim == 2:
        table = table[None]
    return torch.stack([table.cos(), table.sin()])[:, :, None].float().to(device)


def table_of(placement: Placement, device: torch.device) -> Tensor:
    """The rotary table of a placement, see `rotary_table`: (2, 1, 1, N, 64) float32, about 2 MB at 1024×1024."""
    text = torch.zeros(placement.text_tokens, 3, device=device)
    return rotary_table(torch.cat([text, image_ids(placement, device)]))
