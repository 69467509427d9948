"""`python -m harness.device_table`: writes docs/devices.md, what each mode does on each kind of device.

The cells come from the rules that the nodes go by, so the page cannot say something else than they do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from accel.attention import BACKENDS, Target
from accel.attention.choose import AUTO
from accel.compile.failures import compiler_for
from accel.hardware import Hardware, dtype_name, dtype_on
from accel.memory.device import copies_on
from accel.quantize.modes import MODES, preferences
from accel.selftest import usual_heads
from harness.paths import REPO

PAGE = REPO / "docs" / "devices.md"
KINDS: Mapping[str, Hardware] = {
    "Turing (RTX 20, T4)": Hardware("cuda", "a Turing card", (7, 5)),
    "Ampere (RTX 30, A100)": Hardware("cuda", "an Ampere card", (8, 6)),
    "Ada (RTX 40, L4)": Hardware("cuda", "an Ada card", (8, 9)),
    "Hopper (H100)": Hardware("cuda", "a Hopper card", (9, 0)),
    "Blackwell (B200)": Hardware("cuda", "a Blackwell card", (10, 0)),
    "Blackwell (RTX 50)": Hardware("cuda", "a Blackwell card", (12, 0)),
    "AMD, ROCm": Hardware("rocm", "an AMD card"),
    "Intel, XPU": Hardware("xpu", "xpu"),
    "Apple, MPS": Hardware("mps", "mps"),
    "CPU": Hardware("cpu", "cpu"),
}

INTRODUCTION = """\
# Devices

What `auto` takes and what each choice does, by the rules that the nodes go by; this page is written from them by
`python -m harness.device_table`. The rules say what nothing speaks against. Before a mode or backend is used on a
device, it runs there once on small random data and is compared with a plain reference; what fails is refused by name,
and `auto` takes the next. So your machine has the last word: `python -m harness.selftest` prints what works there, and
the node Flux Accel Report what was tried.

**Only the CPU was ever run.** Everything else follows from the documentation and source of PyTorch and the libraries,
and waits for its first run.

"""
NOTES = """
`yes`: nothing speaks against it. Quantization needs torchao (nf4: bitsandbytes), the attention backends their packages.

- **fp8** multiplies with a scale for each row where PyTorch has such a kernel for the device. Its CUTLASS kernels are
  not built on Windows (read in aten/src/ATen/native/cuda/RowwiseScaledMM.cu, not run), and cuBLAS refused them on
  compute capability 12.0 with PyTorch 2.10 (pytorch issue #192707). There rows and columns are scaled after a product
  with one scale, or in our Triton kernel where that is faster: the same result.
- **fp8_weight_only** below compute capability 8.9 runs without compiling: Triton converts no float8_e4m3fn there. Take
  int8_weight_only.
- **int8** on AMD, Intel and Apple devices, and **fp8** on AMD's, are left out because nobody has tried them with this
  pack, not because the hardware lacks them.
- **nf4** has no rule: what trying it finds decides.
- Turing has no bfloat16: `dtype` auto is float16, whose range FLUX.1's residual stream exceeds; it is clamped where
  ComfyUI clamps it.
"""


def cells() -> Mapping[str, Callable[[Hardware], str]]:
    """The rows: title -> what it says of a kind of device."""
    rows: dict[str, Callable[[Hardware], str]] = {
        "`dtype` auto (of a bf16 file)": lambda on: dtype_name(dtype_on("auto", torch.bfloat16, on)),
        "`quantization` auto, best first": lambda on: ", ".join(candidates(on)) or "none",
    }
    for name, mode in MODES.items():
        rows[f"quantization {name}"] = lambda on, mode=mode: _yes(mode.lacks(on), mode.bf16_only and on.kind != "cpu")
    rows["`attention` auto, of those installed"] = lambda on: ", ".join(attention_candidates(on))
    for name, backend in BACKENDS.items():
        rows[f"attention {name}"] = lambda on, backend=backend: _yes(backend.hardware(_target(on)), False)
    rows["`compile` needs"] = compiler_for
    rows["`offload` stream copies"] = copies_on
    return rows


def candidates(hardware: Hardware) -> list[str]:
    """Quantizations that "auto" tries on a device, best first."""
    return [name for name, _ in preferences(hardware) if MODES[name].lacks(hardware) is None]


def attention_candidates(hardware: Hardware) -> list[str]:
    """Attention backends that "auto" times on a device, where they are installed."""
    target = _target(hardware)
    backends = ((name, BACKENDS[name]) for name in AUTO)
    return [name for name, each in backends if target.dtype in each.max_deviation and not each.hardware(target)]


def page() -> str:
    """The page's text."""
    rows = cells()
    text = INTRODUCTION
    names = list(KINDS)
    for part in (names[:6], names[6:]):
        text += "| | " + " | ".join(part) + " |\n|" + " --- |" * (len(part) + 1) + "\n"
        for title, cell in rows.items():
            text += f"| {title} | " + " | ".join(cell(KINDS[name]) for name in part) + " |\n"
        text += "\n"
    return text.rstrip() + "\n" + NOTES


def _target(hardware: Hardware) -> Target:
    dtype = dtype_on("auto", torch.bfloat16, hardware)
    device = torch.device("cuda" if hardware.kind == "rocm" else hardware.kind)
    return Target(device, dtype, *usual_heads(), compiled=True, assumed=hardware)


def _yes(reason: str | None, bf16_only: bool) -> str:
    if reason is not None:
        return "–"
    return "yes, in bf16" if bf16_only else "yes"


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
