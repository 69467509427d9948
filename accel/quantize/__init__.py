"""Quantized weights: the modes, the conversion of a model while it is read, and the cache of the result."""

from __future__ import annotations

from .linears import dequantize, parameter_bytes
from .mode import Mode
from .modes import ModeChoice, check, choose, find_mode, refusal

__all__ = ["Mode", "ModeChoice", "check", "choose", "dequantize", "find_mode", "parameter_bytes", "refusal"]
