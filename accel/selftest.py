"""Everything that an engine might use on a device, tried there: what `python -m harness.selftest` prints."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import BACKENDS, Target
from .attention.correctness import verify
from .compile.compiler import RegionCompiler
from .errors import AccelError
from .families.registry import FAMILIES
from .hardware import dtype_name, hardware_of, has_bf16
from .linear import kernels
from .linear.layers import LoraLinear, linears
from .linear.product import gelu_fuses
from .linear.slot import NOTHING, make_slot
from .memory.device import memory_of
from .observer import Silent
from .offload.prove import restrict
from .prove import Proof, Verdict, proofs, random
from .quantize.modes import MODES
from .quantize.prove import prove


def usual_heads() -> tuple[int, int]:
    """(heads, width of a head) that attention is tried with: those of the first published model of the families."""
    return next(family.heads(config) for family in FAMILIES for config in family.published.values())


@dataclass(frozen=True)
class Row:
    """One thing on one device.

    Attributes:
        name: of the thing.
        proof: what trying it found; None where it was not tried.
        reason: why it was not.
    """

    name: str
    proof: Proof | None
    reason: str = ""

    @property
    def state(self) -> str:
        """In one word."""
        if self.proof is None:
            return "not here"
        return "works" if self.proof.refusal is None else "FAILED"


def try_everything(device: torch.device, compiled: bool = True) -> Iterator[Row]:
    """Try each thing on a device, in the dtype that it is best at; yields as soon as each is tried.

    Args:
        device: of this machine.
        compiled: whether to try what a compiler makes, too, which takes seconds.
    """
    hardware = hardware_of(device)
    dtype = torch.bfloat16 if has_bf16(hardware) else torch.float16
    target = Target(device, dtype, *usual_heads(), compiled)
    for name, backend in BACKENDS.items():
        reason = backend.missing(target)
        if reason is None and backend.downloads():
            reason = "would be fetched from the network first"
        yield _row(f"attention {name}", reason, functools.partial(verify, name, target))
    for name, mode in MODES.items():
        computed_in = mode.compute_dtype(dtype, device, explicit=False)
        run = functools.partial(prove, mode, device, computed_in)
        yield _row(f"quantization {name}", mode.missing(hardware), run)
    yield from _made_by(device, "float8 product", lambda: None)
    on_gpus = None if device.type == "cuda" else f"is for GPUs; {hardware.sentence}"
    yield _row("fused LoRA kernel", on_gpus, lambda: kernels.prove(device, dtype))
    for name, run in (
        ("product with GELU", lambda: gelu_fuses(device, dtype)),
        ("page-locked host memory", lambda: restrict(memory_of(device))),
        ("copying beside the computation", lambda: restrict(memory_of(device))),
    ):
        if on_gpus is not None:
            yield Row(name, None, on_gpus)
        else:
            yield from _made_by(device, name, run)
    if compiled:
        yield _row("compiled region", None, lambda: prove_compiling(device, dtype))


def prove_compiling(device: torch.device, dtype: torch.dtype) -> Proof:
    """Compile a small region and compare it with the same uncompiled. Takes seconds where nothing is cached."""
    subject = f"compiled region, {dtype_name(dtype)}"
    return proofs().of(subject, device, lambda: _compare_compiled(device, dtype))


def _compare_compiled(device: torch.device, dtype: torch.dtype) -> Verdict:
    compiler = RegionCompiler("regional", Silent())
    block = LoraLinear(nn.Linear(256, 256, device=device, dtype=dtype).requires_grad_(False))
    block.lora = make_slot(device)
    block.lora.bound_lora = NOTHING
    region = compiler.region(_region)
    with compiler.scope():
        for tokens in (67, 134):
            region(block, random((2, tokens, 256), device, tokens).to(dtype))
    return Verdict(None if compiler.failure is None else f"does not work here ({compiler.failure})")


def _region(block: nn.Module, x: Tensor) -> Tensor:
    return x + F.silu(linears(F.layer_norm(x, x.shape[-1:]), block)[0])


def _row(name: str, reason: str | None, run: Callable[[], Proof]) -> Row:
    if reason is not None:
        return Row(name, None, reason)
    try:
        return Row(name, run())
    except (AccelError, torch.OutOfMemoryError) as exc:
        return Row(name, None, str(exc))


def _made_by(device: torch.device, name: str, run: Callable[[], object]) -> Iterator[Row]:
    """The proofs of a name that `run` asks for, or that were asked for before."""
    run()
    found = [proof for proof in proofs().all if proof.name.startswith(name) and proof.device == str(device)]
    yield from (Row(proof.name.partition(",")[0], proof) for proof in found)
