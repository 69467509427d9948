"""LoRAs that lie on the device, ready to bind."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..pack.flat import FlatLora
from .slots import Bindings, LoraSlots


@dataclass
class Prepared:
    """A stack in a flat buffer.

    Attributes:
        flat: the buffer.
        strengths: that its lora_B has now; None: not known, as after writing them was interrupted.
        error: relative error of a stack that was cut to a lower rank.
    """

    flat: FlatLora
    strengths: tuple[float, ...] | None = None
    error: float = 0.0


@dataclass(frozen=True)
class _Resident:
    """A stack in a device buffer, which may be larger than the stack, and what is bound of it."""

    prepared: Prepared
    bindings: Bindings

    @property
    def flat(self) -> FlatLora:
        return self.prepared.flat

    @property
    def bytes(self) -> int:
        return self.flat.bytes


class DeviceLoras:
    """Prepared stacks on the device, least recently used out first.

    Buffers are reused, and so are the views of them when the next stack has the same layout (LoRAs from one
    trainer usually have): then switching costs one copy and no allocation. The buffer that is bound is never
    overwritten, so a copy that fails leaves the model as it was. No `ByteLru`, which would drop what is bound like
    any other, and let go of the buffer that is to be used again.
    """

    def __init__(
        self,
        slots: LoraSlots,
        device: torch.device,
        budget_bytes: int,
        *,
        share_host: bool | None = None,
        upload: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """Hold up to `budget_bytes` on the device, but at least what is bound and what is being prepared.

        Args:
            slots: the model's LoRA layers.
            device: where the model is.
            budget_bytes: 0 keeps nothing but the bound stack.
            share_host: bind host buffers themselves, without a copy; by default where the device is the host.
            upload: makes a copy of a host tensor on the device.
        """
        self._slots = slots
        self._budget_bytes = budget_bytes
        self._share_host = device.type == "cpu" if share_host is None else share_host
        self._copy = upload or (lambda tensor: tensor.to(device, non_blocking=True, copy=True))
        self._residents: OrderedDict[Hashable, _Resident] = OrderedDict()
        self._bound: Hashable | None = None

    @property
    def budget_bytes(self) -> int:
        """What the buffers may take."""
        return self._budget_bytes

    @property
    def bytes(self) -> int:
        """What the buffers take."""
        return sum(resident.bytes for resident in self._residents.values())

    def get(self, key: Hashable) -> Prepared | None:
        """A stack as it lies on the device; None: it is not there."""
        resident = self._residents.get(key)
        return None if resident is None else resident.prepared

    def upload(self, key: Hashable, prepared: Prepared) -> Prepared:
        """Copy a stack to the device; the least recently used ones leave where there is no room.

        Returns:
            The stack as it lies there: with `share_host` the same object, for its buffer is the same, too.
        """
        flat = prepared.flat
        victim = self._make_room(flat)
        if self._share_host:
            self._residents[key] = _Resident(prepared, self._slots.bindings(flat))
            return prepared
        with torch.inference_mode(False), torch.no_grad():
            # On a GPU the copy runs while the views are made; what binds them runs behind it in the stream.
            if victim is None:
                buffer = self._copy(flat.buffer)
            else:
                buffer = victim.flat.buffer
                buffer[: flat.buffer.numel()].copy_(flat.buffer, non_blocking=True)
        same_layout = (
            victim is not None
            and victim.flat.placed == flat.placed
            and victim.flat.kroneckers == flat.kroneckers
            and not any((flat.mixing, flat.vectors, victim.flat.mixing, victim.flat.vectors))
        )
        mixing, vectors = self._copies(flat.mixing), self._copies(flat.vectors)
        on_device = replace(flat, buffer=buffer, mixing=mixing, vectors=vectors)
        bindings = victim.bindings if same_layout else self._slots.bindings(on_device)
        uploaded = replace(prepared, flat=on_device)
        self._residents[key] = _Resident(uploaded, bindings)
        return uploaded

    def bind(self, key: Hashable) -> None:
        """Make the model compute with a stack that `upload` put here."""
        resident = self._residents[key]
        self._residents.move_to_end(key)
        self._bound = key
        self._slots.bind(resident.bindings)

    def bind_empty(self) -> None:
        """Make the model compute without LoRA."""
        self._bound = None
        self._slots.bind(self._slots.empty)

    def fits(self, size: int) -> bool:
        """Whether a stack of `size` bytes fits on the device beside all that are there."""
        return self.bytes + size <= self._budget_bytes

    def _copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            return {name: self._copy(tensor) for name, tensor in tensors.items()}

    def _make_room(self, flat: FlatLora) -> _Resident | None:
        """Drop what is over the budget; return the dropped buffer that fits best, to be reused."""
        best: _Resident | None = None
        for key in list(self._residents):
            if self.fits(flat.bytes):
                break
            if key != self._bound:
                dropped = self._residents.pop(key)
                size = dropped.flat.buffer.nbytes  # not what stands beside it: only the buffer is used again
                if size >= flat.buffer.nbytes and (best is None or size < best.flat.buffer.nbytes):
                    best = dropped
        return best
