"""Attention backends: one function each, chosen per engine, never for the process."""

from .backend import Attention, Backend, MaxDeviation, Target
from .backends import BACKENDS
from .choose import ChosenAttention, check_attention, choose_attention, prove_attention
from .native import sdpa

__all__ = [
    "BACKENDS",
    "Attention",
    "Backend",
    "ChosenAttention",
    "MaxDeviation",
    "Target",
    "check_attention",
    "choose_attention",
    "prove_attention",
    "sdpa",
]
