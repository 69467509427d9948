"""Attention backends: one function each, chosen per engine, never for the process."""

from .backend import Attention, Backend, Target, Tolerance
from .backends import BACKENDS
from .choose import Choice, check_attention, choose_attention, prove_attention
from .native import sdpa

__all__ = [
    "BACKENDS",
    "Attention",
    "Backend",
    "Choice",
    "Target",
    "Tolerance",
    "check_attention",
    "choose_attention",
    "prove_attention",
    "sdpa",
]
