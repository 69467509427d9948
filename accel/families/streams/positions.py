"""Where tokens stand: latent patches, reference images, and the rotary tables that encode both.

Shapes: b batch, c channels of the latent, n tokens, p the side of a patch.

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

OFFSET, INDEX, UXO = "offset", "index", "uxo"
# As `INDEX`; reference tokens are modulated as at timestep 0.
INDEX_TIMESTEP_ZERO = "index_timestep_zero"


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


@dataclass(frozen=True)
class Positions:
    """How a family tells its tokens where they stand.

    Attributes:
        axes_dim: channels of a head that each axis turns: index of the image, row, column, and so on.
        theta: base of the rotary angles.
        patch_size: p.
        methods: ways to place references that the family knows, its own first.
        index_step: between the indices of references, where each has its own.
        text_axis: along which text tokens are counted from 0; None: all of them stand at 0.
    """

    axes_dim: tuple[int, ...]
    theta: float
    patch_size: int
    methods: tuple[str, ...]
    index_step: float = 1.0
    text_axis: int | None = None

    def place(
        self,
        latent: Tensor,
        references: Sequence[Tensor],
        method: str | None,
        text_tokens: int,
        rope: RopeOptions = RopeOptions(),
    ) -> Placement:
        """Give every image its place.

        Args:
            latent: ``b c height width``, unpadded.
            references: reference latents, ``b c height width`` of each its own, unpadded; editing models read them.
            method: of `methods`: "offset" (all with index 1, side by side), "index" and "index_timestep_zero" (one
                index each), "uxo" (diagonally behind the image); None: the family's own.
            text_tokens: length of the text stream.
            rope: scales and shifts of the axes.

        Raises:
            SettingsError: a method that is not one of `methods`.
        """
        method = method or self.methods[0]
        if references and method not in self.methods:
            raise SettingsError(
                f"reference latent method '{method}' is not supported by this accelerated model, expected one of: "
                f"{', '.join(self.methods)}. Choose one in FluxKontextMultiReferenceLatentMethod."
            )
        rows, columns = self._patches(latent)
        grids = [Grid(rows, columns)]
        bottom = right = 0
        for number, reference in enumerate(references, start=1):
            height, width = reference.shape[-2:]
            own = self._patches(reference)
            if method in (INDEX, INDEX_TIMESTEP_ZERO):
                grids.append(Grid(*own, index=self.index_step * number))
            elif method == UXO:
                top, left = rows * self.patch_size + bottom, columns * self.patch_size + right
                grids.append(Grid(*own, 0.0, self._half_up(top), self._half_up(left)))
                bottom, right = bottom + height, right + width
            else:
                beside = height + bottom > width + right
                top, left = (0, right) if beside else (bottom, 0)
                grids.append(Grid(*own, 1.0, self._half_up(top), self._half_up(left)))
                bottom, right = max(bottom, height + top), max(right, width + left)
        return Placement(text_tokens, tuple(grids), rope)

    def image_ids(self, placement: Placement, device: torch.device) -> Tensor:
        """Positions of all image tokens, ``n axes`` float32: index, row, column, and zeros."""
        ids = torch.cat([_grid_ids(grid, placement.rope, device) for grid in placement.grids])
        return F.pad(ids, (0, len(self.axes_dim) - ids.shape[1]))

    def text_ids(self, placement: Placement, device: torch.device) -> Tensor:
        """Positions of all text tokens, ``n axes`` float32."""
        ids = torch.zeros(placement.text_tokens, len(self.axes_dim), device=device)
        if self.text_axis is not None:
            ids[:, self.text_axis] = torch.arange(placement.text_tokens, dtype=ids.dtype, device=device)
        return ids

    def rotary_table(self, ids: Tensor) -> Tensor:
        """Cosines and sines of the rotary embedding.

        Args:
            ids: ``n axes`` or ``b n axes`` float32 positions, text first.

        Returns:
            ``2 b 1 n pairs`` float32, cosines first, computed in float64; b = 1 for positions without a batch. A pair
            is two channels of a head.

        Source: black-forest-labs/flux math.py, rope().
        """
        # Devices without float64 (MPS) get a table computed on the CPU: float32 angles are wrong beyond position 1000.
        device = ids.device
        positions = ids.to("cpu" if device.type == "mps" else device, torch.float64)
        angles = []
        for axis, dim in enumerate(self.axes_dim):
            steps = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
            angles.append(positions[..., axis, None] / self.theta**steps)
        table = torch.cat(angles, dim=-1)
        if table.ndim == 2:
            table = table[None]
        return torch.stack([table.cos(), table.sin()])[:, :, None].float().to(device)

    def table_of(self, placement: Placement, device: torch.device) -> Tensor:
        """The rotary table of a placement, see `rotary_table`: about 2 MB at 1024×1024."""
        return self.rotary_table(torch.cat([self.text_ids(placement, device), self.image_ids(placement, device)]))

    def _half_up(self, size: int) -> int:
        return (size + self.patch_size // 2) // self.patch_size

    def _patches(self, latent: Tensor) -> tuple[int, int]:
        return self._half_up(latent.shape[-2]), self._half_up(latent.shape[-1])


def pad_to_patches(latent: Tensor, patch_size: int) -> Tensor:
    """Extend ``b c height width`` circularly to whole patches."""
    pad_bottom, pad_right = -latent.shape[2] % patch_size, -latent.shape[3] % patch_size
    if not pad_bottom and not pad_right:
        return latent
    return F.pad(latent, (0, pad_right, 0, pad_bottom), mode="circular")


def pack(latent: Tensor, patch_size: int) -> Tensor:
    """Fold latent patches into tokens: ``b c (rows p) (columns q) -> b (rows columns) (c p q)``, p = q.

    Args:
        latent: ``b c height width``, any float dtype; height and width multiples of p.
        patch_size: p.

    Returns:
        Same dtype.

    Raises:
        ValueError: height or width is no multiple of p.

    Source: black-forest-labs/flux sampling.py, prepare().
    """
    batch, channels, height, width = latent.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"latent is {height}×{width}, expected multiples of {patch_size}: pad it with pad_to_patches first."
        )
    rows, columns = height // patch_size, width // patch_size
    patches = latent.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def unpack(tokens: Tensor, rows: int, columns: int, patch_size: int) -> Tensor:
    """Undo `pack`: ``b (rows columns) (c p q) -> b c (rows p) (columns q)``, p = q.

    Source: black-forest-labs/flux sampling.py, unpack().
    """
    batch = tokens.shape[0]
    patches = tokens.reshape(batch, rows, columns, -1, patch_size, patch_size)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * patch_size, columns * patch_size)


def _grid_ids(grid: Grid, rope: RopeOptions, device: torch.device) -> Tensor:
    # ComfyUI scales the extent, then adds corner and shift: comfy/ldm/flux/model.py, process_img().
    last_row, last_column = (grid.rows - 1.0) * rope.scale_y, (grid.columns - 1.0) * rope.scale_x
    top, left = grid.top + rope.shift_y, grid.left + rope.shift_x
    ys = torch.linspace(top, last_row + top, grid.rows, device=device)
    xs = torch.linspace(left, last_column + left, grid.columns, device=device)
    index = torch.full((), grid.index + rope.shift_t, device=device)
    return torch.stack(torch.meshgrid(index[None], ys, xs, indexing="ij"), dim=-1).reshape(-1, 3)
