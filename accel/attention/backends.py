"""The backends by name."""

from __future__ import annotations

from collections.abc import Mapping

from .backend import Backend
from .flash import FLASH_2, FLASH_3, FLASH_4
from .memory_efficient import XFORMERS
from .native import CUDNN, FLEX, SDPA
from .onednn import ONEDNN
from .sage import SAGE

BACKENDS: Mapping[str, Backend] = {
    backend.name: backend for backend in (SDPA, CUDNN, FLASH_2, FLASH_3, FLASH_4, SAGE, XFORMERS, FLEX, ONEDNN)
}
