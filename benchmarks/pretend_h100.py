"""Pretend to have an H100, far enough for TorchInductor to generate the code that it would generate there.

It replaces parts of torch and Triton for the whole process, so only a child process calls it, see `generated_code`.
Nothing runs on the pretended device: tensors are FakeTensors. `torch.cuda.is_available()` has to stay False, or
FakeTensorMode would open a real CUDA context.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

CAPABILITY = (9, 0)
# What the driver says of an H100 SXM5.
PROPERTIES = SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    total_memory=85 * 10**9,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=52428800,
    gcnArchName="",
    is_integrated=0,
    is_multi_gpu_board=0,
    uuid="0",
    pci_bus_id=0,
    pci_device_id=0,
    pci_domain_id=0,
    clock_rate=1980000,
    memory_clock_rate=2619000,
    memory_bus_width=5120,
)


class _Driver:
    """What Triton asks its driver while it generates code."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 10 * CAPABILITY[0] + CAPABILITY[1], 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda


def pretend() -> None:
    """Replace, in this process and for good, what asks for a GPU. Call it before anything is compiled."""
    import triton.runtime
    from torch._dynamo.device_interface import CudaInterface

    triton.runtime.driver.set_active(_Driver())
    both = {
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: PROPERTIES,
        "get_device_capability": lambda device=None: CAPABILITY,
        "get_device_name": lambda device=None: PROPERTIES.name,
        "_lazy_init": lambda: None,
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }
    for name, function in both.items():
        setattr(torch.cuda, name, function)
    only_dynamo = {
        "is_available": lambda: True,
        "get_compute_capability": lambda device=None: 10 * CAPABILITY[0] + CAPABILITY[1],
        "is_bf16_supported": lambda including_emulation=False: True,
        "get_raw_stream": lambda device=0: 0,
        "raise_if_triton_unavailable": lambda device=None: None,
    }
    for name, function in {**both, **only_dynamo}.items():
        setattr(CudaInterface, name, staticmethod(function))
    CudaInterface.Worker.current_device = staticmethod(lambda: 0)
    CudaInterface.Worker.get_device_properties = staticmethod(lambda device=None: PROPERTIES)
