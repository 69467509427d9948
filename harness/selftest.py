"""`python -m harness.selftest`: what works on this machine's devices, by trying it; without ComfyUI or a model.

Each attention backend, quantization, fused kernel and way to copy runs once on small random data and is compared with a
plain reference, as the nodes do before they use one.
"""

from __future__ import annotations

import argparse
import platform

import torch

from accel.hardware import hardware_of
from accel.selftest import Row, try_everything


def devices() -> list[torch.device]:
    """This machine's: its GPUs, and its CPU."""
    found = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        found.append(torch.device("xpu", 0))
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    return [*found, torch.device("cpu")]


def line_of(row: Row) -> str:
    """One row of the table."""
    if row.proof is None:
        return f"  {row.name:<34} not here  {row.reason}"
    return f"  {row.name:<34} {row.proof.sentence}"


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each device; returns 1 if something failed that should run."""
    parser = argparse.ArgumentParser(prog="python -m harness.selftest", description=main.__doc__)
    parser.add_argument("--device", action="append", help="such as cuda:0 or cpu; by default all of this machine")
    chosen = [torch.device(name) for name in parser.parse_args(arguments).device or ()] or devices()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {platform.system()} {platform.machine()}")
    failed = 0
    for device in chosen:
        hardware = hardware_of(device)
        capability = "" if hardware.capability is None else ", compute capability {}.{}".format(*hardware.capability)
        print(f"\n{device}: {hardware.name}{capability}", flush=True)
        for row in try_everything(device):
            failed += row.state == "FAILED"
            print(line_of(row), flush=True)
    print(f"\n{failed} failed" if failed else "\nnothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
