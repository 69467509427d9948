"""What stored things depend on beside what they were made from: the machine, its libraries, and this package."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
from contextlib import suppress
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1]
# Environment variables that change what compilers make of the same source; where they keep it does not.
COMPILER_VARIABLES = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TRITON_", "CUDA_HOME", "CXX", "CC", "CFLAGS", "CXXFLAGS")
FOLDER_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
LIBRARIES = (
    "torch", "triton", "triton-windows", "torchao", "mslk", "bitsandbytes", "diffusers", "transformers",
    "flash-attn", "flash_attn_3", "flash-attn-4", "sageattention", "xformers", "kernels",
)  # fmt: skip


def machine(device: str) -> dict[str, object]:
    """Everything outside an engine that compiled code, and what a kernel was found to do, depend on."""
    versions = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    facts = {
        "sources": _sources_digest(),
        "package": __package__.rpartition(".")[0],  # traces name its modules
        "python": [platform.python_implementation(), *sys.version_info[:3], sys.prefix],
        "system": [platform.system(), platform.machine()],
        "libraries": versions,
        "torch": [torch.version.git_version, torch.version.cuda, torch.version.hip, os.path.dirname(torch.__file__)],
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(COMPILER_VARIABLES) and name not in FOLDER_VARIABLES
        },
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
        facts["gpu"] = [properties.name, properties.major, properties.minor, properties.total_memory, driver]
    elif device.startswith("xpu"):
        facts["gpu"] = str(torch.xpu.get_device_properties(device))  # with its driver
    return facts


@functools.cache
def _cpu() -> list[str]:
    """The processor: kernels are compiled for exactly the instructions that it has."""
    facts = [torch.backends.cpu.get_cpu_capability(), platform.processor()]
    with suppress(OSError):  # Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        for wanted in ("model name", "flags", "Features"):
            facts += [line.partition(":")[2].strip() for line in lines if line.startswith(wanted)][:1]
    return facts


@functools.cache
def _sources_digest() -> str:
    """This package's own sources: what is traced."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
