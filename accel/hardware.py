"""What the machine can do."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import SettingsError

# What a user may let a transformer compute in; "auto" depends on the checkpoint and the device.
DTYPES = {"auto": None, "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Hardware:
    """What the rules of modes and backends ask of a device; made by `hardware_of`, or by hand for one that is not here.

    Attributes:
        kind: "cuda" (NVIDIA), "rocm" (AMD), or torch's own name of any other device type, such as "cpu".
        name: of the card, or torch's name of the device.
        capability: NVIDIA's compute capability; None for others.
    """

    kind: str
    name: str
    capability: tuple[int, int] | None = None

    @property
    def sentence(self) -> str:
        """What it is, for the end of a refusal."""
        if self.capability is not None:
            return f"{self.name} has {self.capability[0]}.{self.capability[1]}"
        return "this is an AMD card" if self.kind == "rocm" else f"this is the device {self.name}"


def hardware_of(device: torch.device) -> Hardware:
    """What a device of this machine is.

    Raises:
        RuntimeError: it is a GPU that torch does not find.
    """
    if device.type != "cuda":
        return Hardware(device.type, str(device))
    if torch.version.hip is not None:
        return Hardware("rocm", torch.cuda.get_device_name(device))
    return Hardware("cuda", torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def resolve_dtype(choice: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Decide the dtype that the transformer computes in.

    Args:
        choice: a key of `DTYPES`.
        stored: the dtype of most of the checkpoint's bytes.
        device: where the transformer runs.

    Returns:
        The chosen dtype. "auto" keeps a checkpoint's own float16 or bfloat16, keeps float32 on a CPU (there it is as
        fast as anything and exact), and computes in bfloat16 otherwise; in float16 where there is no bfloat16.

    Raises:
        SettingsError: the device cannot compute in an explicitly chosen dtype.
    """
    return dtype_on(choice, stored, hardware_of(device))


def dtype_on(choice: str, stored: torch.dtype, hardware: Hardware) -> torch.dtype:
    """`resolve_dtype` for any hardware."""
    explicit = DTYPES[choice]
    if explicit is None:
        if stored in (torch.bfloat16, torch.float16):
            explicit = stored
        else:
            explicit = torch.float32 if stored == torch.float32 and hardware.kind == "cpu" else torch.bfloat16
        if explicit == torch.bfloat16 and not has_bf16(hardware):
            return torch.float16
        return explicit
    if explicit == torch.bfloat16 and not has_bf16(hardware):
        raise SettingsError(
            f"dtype is 'bf16', which NVIDIA cards compute in from compute capability 8.0 on; {hardware.sentence}: "
            "choose 'fp16' or 'auto'."
        )
    return explicit


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as a person writes it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def has_bf16(hardware: Hardware) -> bool:
    """Whether it has bfloat16 arithmetic (NVIDIA from compute capability 8.0; the others always)."""
    return hardware.capability is None or hardware.capability >= (8, 0)
