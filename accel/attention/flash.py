"""FlashAttention 2, 3 and 4: three packages of one project, each for other cards.

Signatures are those of flash-attn 2.8.4, flash_attn_3 3.0.0 and flash-attn-4 4.0.0b36. Dao-AILab/flash-attention:
flash_attn/flash_attn_interface.py, hopper/flash_attn_interface.py and flash_attn/cute/interface.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import first_line
from .backend import EXACT, HALF, Attention, Backend, nvidia
from .library import Library, has_operator
from .native import sdpa
from .operator import opaque, register

PROJECT = "github.com/Dao-AILab/flash-attention"
FLASH_2_LIBRARY = Library(
    "flash-attn", "flash_attn", "flash_attn_func",
    f"pip install flash-attn --no-build-isolation, or a wheel for your torch from {PROJECT}/releases", "2.6.3",
)  # fmt: skip
FLASH_3_LIBRARY = Library(
    "flash_attn_3", "flash_attn_interface", "flash_attn_func",
    f"pip install 'kernels>=0.12', which gets it from the Hugging Face Hub, or build the folder hopper of {PROJECT}",
)  # fmt: skip
FLASH_4_LIBRARY = Library(
    "flash-attn-4", "flash_attn.cute", "flash_attn_func", "pip install --pre flash-attn-4", "4.0.0b4",
)  # fmt: skip
KERNELS_LIBRARY = Library("kernels", "kernels", "get_kernel", "pip install 'kernels>=0.12'", "0.12")

# The build that diffusers 0.42.1 takes, for every torch and CUDA that the Hub has it for.
HUB_KERNEL, HUB_VERSION = "kernels-community/flash-attn3", 1

# Operators that the packages register themselves, from 2.7.0 and from November 2025 on.
FLASH_2_ARGUMENTS = (
    "q", "k", "v", "dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right", "softcap",
    "alibi_slopes", "return_softmax",
)  # fmt: skip
FLASH_3_ARGUMENTS = ("q", "k", "v")


def flash_2(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """FlashAttention 2; see `native.sdpa`."""
    return opaque(query, key, value, "flash_2") if mask is None else sdpa(query, key, value, mask)


def flash_2_by_its_operator(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """FlashAttention 2 from 2.7.0 on; see `native.sdpa`."""
    if mask is not None:
        return sdpa(query, key, value, mask)
    scale = query.shape[-1] ** -0.5
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    forward = torch.ops.flash_attn._flash_attn_forward
    return forward(query, key, value, 0.0, scale, False, -1, -1, 0.0, None, False)[0].transpose(1, 2)


def flash_3(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """FlashAttention 3; see `native.sdpa`."""
    return opaque(query, key, value, "flash_3") if mask is None else sdpa(query, key, value, mask)


def flash_3_by_its_operator(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """FlashAttention 3 from November 2025 on; see `native.sdpa`."""
    if mask is not None:
        return sdpa(query, key, value, mask)
    scale = query.shape[-1] ** -0.5
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    return torch.ops.flash_attn_3._flash_attn_forward(query, key, value, softmax_scale=scale)[0].transpose(1, 2)


def flash_4(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """FlashAttention 4; see `native.sdpa`."""
    return opaque(query, key, value, "flash_4") if mask is None else sdpa(query, key, value, mask)


def _make_flash_2() -> Attention:
    FLASH_2_LIBRARY.load()
    if has_operator("flash_attn", "_flash_attn_forward", FLASH_2_ARGUMENTS):
        return flash_2_by_its_operator
    register("flash_2", _flash_2)
    return flash_2


def _make_flash_3() -> Attention:
    _flash_3_function()
    installed = FLASH_3_LIBRARY.missing() is None
    if installed and has_operator("flash_attn_3", "_flash_attn_forward", FLASH_3_ARGUMENTS, ("softmax_scale",)):
        return flash_3_by_its_operator
    register("flash_3", _flash_3)
    return flash_3


def _make_flash_4() -> Attention:
    register("flash_4", _flash_4)
    return flash_4


def _flash_2(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _output(FLASH_2_LIBRARY.load()(query, key, value))


def _flash_3(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _output(_flash_3_function()(query, key, value))


def _flash_4(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _output(FLASH_4_LIBRARY.load()(query, key, value))


def _output(result: Any) -> Tensor:
    # Which versions return the log-sum-exp beside it differs from package to package.
    return result[0] if isinstance(result, (tuple, list)) else result


def _flash_3_function() -> Callable[..., Any]:
    return FLASH_3_LIBRARY.load() if FLASH_3_LIBRARY.missing() is None else _hub_function()


@functools.cache
def _hub_function() -> Callable[..., Any]:
    """FlashAttention 3 as `kernels` finds it: on the disk, or once from the network.

    Raises:
        ImportError: it is on neither.
    """
    get_kernel = KERNELS_LIBRARY.load()
    try:
        return get_kernel(HUB_KERNEL, version=HUB_VERSION).flash_attn_func
    except Exception as exc:  # no network, no build for this torch, an untrusted publisher: many kinds
        raise ImportError(
            f"needs {HUB_KERNEL} from the Hugging Face Hub, which 'kernels' could not load ({type(exc).__name__}: "
            f"{first_line(exc)}): connect once to the network, or build the folder hopper of {PROJECT}"
        ) from exc


def _flash_3_missing() -> str | None:
    reason = FLASH_3_LIBRARY.missing()
    return None if KERNELS_LIBRARY.missing() is None else reason


FLASH_2 = Backend(
    name="flash_2",
    hardware=nvidia(8, 9, 10, 11, 12, max_head_dim=256, amd=True),
    library=FLASH_2_LIBRARY.missing,
    make=_make_flash_2,
    instead=("cudnn",),
    max_deviation={dtype: EXACT[dtype] for dtype in HALF},
)

FLASH_3 = Backend(
    name="flash_3",
    hardware=nvidia(9, max_head_dim=256),
    library=_flash_3_missing,
    make=_make_flash_3,
    instead=("cudnn", "flash_2"),
    max_deviation={dtype: EXACT[dtype] for dtype in HALF},
    downloads=lambda: FLASH_3_LIBRARY.missing() is not None,
)

FLASH_4 = Backend(
    name="flash_4",
    hardware=nvidia(9, 10, 11, 12, max_head_dim=128),
    library=FLASH_4_LIBRARY.missing,
    make=_make_flash_4,
    instead=("cudnn", "flash_3", "flash_2"),
    max_deviation={dtype: EXACT[dtype] for dtype in HALF},
)
