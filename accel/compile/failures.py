"""What it means when compiling fails: whether it is the compiler's fault, and what a user can do about it."""

from __future__ import annotations

import errno
import os
import platform
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
import torch._dynamo

from ..errors import first_line
from ..hardware import Hardware


class CompilerError(Exception):
    """Compiling failed, for the reason that is this error's cause."""


class NotStorable(CompilerError):
    """What was compiled cannot be kept for the next start, for the reason that is this error's cause."""


def compiler_for(hardware: Hardware) -> str:
    """What torch.compile needs on a device, in a few words."""
    if hardware.kind == "cpu":
        return "a C++ compiler"
    return {"mps": "nothing more (early Metal support)"}.get(hardware.kind, "Triton")


def is_compiler_failure(exc: BaseException) -> bool:
    """Whether an error says that something could not be compiled, not that the computation itself is wrong."""
    if isinstance(exc, torch._dynamo.exc.RecompileError):  # what `error_on_recompile` asks for
        return False
    dynamo = torch._dynamo.exc
    if isinstance(exc, (CompilerError, dynamo.TorchDynamoException, dynamo.FailOnRecompileLimitHit)):
        return True
    # Kernels that are compiled at their first launch, and code that inductor left behind, raise errors of their own.
    module = type(exc).__module__ or ""
    return module.startswith(("triton.", "torch._inductor.")) or isinstance(exc, (BrokenProcessPool, ImportError))


def failure_notice(region: str, exc: BaseException) -> str:
    """One sentence on what failed, one on what happens now, one on what to do."""
    return (
        f"torch.compile could not compile the {region} blocks on this machine ({reason(exc)}). The model goes on "
        f"without compiling: the same pictures, but slower. {_advice(exc)} Or set 'compile' to 'off' in Accelerated "
        "Flux Loader."
    )


def _advice(exc: BaseException) -> str:
    text = " ".join(f"{type(each).__name__} {each}" for each in _chain(exc))
    full = cause(exc, OSError)
    if full is not None and full.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"Free space on the disk of '{full.filename or os.environ.get('TORCHINDUCTOR_CACHE_DIR', 'temp')}'."
    if cause(exc, BrokenProcessPool) is not None:
        return "A compile worker was ended, as systems do when memory is short: close other programs and restart."
    if "fp8e4nv" in text:
        return "This card's compiled code reads no 8-bit floats: choose int8_weight_only in Quantize Transformer."
    if "triton" in text.lower():
        return "Install Triton: pip install triton on Linux, pip install triton-windows on Windows; then restart."
    if any(word in text for word in ("CppCompileError", "InvalidCxxCompiler", "C++ compiler", "cl is not found")):
        return {
            "Windows": "Install the C++ workload of Visual Studio Build Tools, and start ComfyUI from its command "
            "prompt (\"x64 Native Tools\").",
            "Darwin": "Install a C++ compiler: xcode-select --install; then restart.",
        }.get(platform.system(), "Install a C++ compiler (on Debian and Ubuntu: apt install g++); then restart.")
    return "Update torch, or delete its cache of compiled code, and restart."


def has_known_cause(exc: BaseException) -> bool:
    """Whether the advice is more than a guess, so that another attempt would end the same way."""
    return not _advice(exc).startswith("Update")


def _chain(exc: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        yield exc
        exc = getattr(exc, "inner_exception", None) or exc.__cause__


def cause(exc: BaseException, kind: type) -> Any:
    """The first error of a kind among an error and its causes; None without."""
    return next((each for each in _chain(exc) if isinstance(each, kind)), None)


def reason(exc: BaseException) -> str:
    """The innermost cause of an error: its type, and the first line of its message."""
    *_, innermost = _chain(exc)
    return f"{type(innermost).__name__}: {first_line(innermost)}"
