"""Every LoRA that an engine knows: as files, prepared on the host, on the device; each within its budget."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, overload

import torch

from ...files import FileIdentity
from ...memory.base import DeviceMemory
from ...memory.budgets import MIB, PoolBudgets, pinned_bytes
from ...memory.buffers import HostBuffers
from ...memory.device import memory_of
from ...spec import ModelSpec
from ...store.lru import ByteLru
from ..adapter import Adapter
from ..pack.flat import FlatLora, flatten
from ..pack.strength import UnscaledB
from ..pack.truncate import truncate
from ..read.file import read_lora
from ..stack import LoraStack
from .device import DeviceLoras, Prepared
from .slots import LoraSlots

# What freed file buffers may keep: one LoRA of usual size is read into them. torch itself keeps page-locked memory.
BUFFERS_BYTES = 512 * MIB


@dataclass(frozen=True)
class StackKey:
    """What a prepared stack is found by.

    Attributes:
        identities: of its active LoRAs, in order.
        max_rank: that it is cut to; 0: exact.
        strengths: None where another strength is only another lora_B, so that one buffer serves them all.
    """

    identities: tuple[FileIdentity, ...]
    max_rank: int
    strengths: tuple[float, ...] | None

    @classmethod
    def of(cls, stack: LoraStack) -> StackKey:
        """The key of a stack."""
        return cls(stack.identities, stack.max_rank, None if stack.rescalable else stack.strengths)


@dataclass(frozen=True)
class ResidentStack:
    """A stack that lies on the device.

    Attributes:
        source: "hot", "strength" (there, with another lora_B), "warm" or "cold", see `history.SwapReport`.
        stack: with the strengths that are wanted.
        key: what it is found by.
        prepared: the buffer there; None: nothing of the stack is active.
        unscaled: what lora_B is to be multiplied from; None: it has the right strengths.
    """

    source: str
    stack: LoraStack
    key: StackKey | None = None
    prepared: Prepared | None = None
    unscaled: UnscaledB | None = None

    @property
    def error(self) -> float:
        """How far it was cut: relative error; 0 for an exact one."""
        return 0.0 if self.prepared is None else self.prepared.error


NOTHING_ACTIVE = ResidentStack("hot", LoraStack())


class LoraLibrary:
    """LoRAs on their way from a file to the device.

    `read` and `prepare` may be called from any thread; the others from one at a time, see `Engine`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: torch.device,
        budgets: PoolBudgets,
        cache_dir: str | os.PathLike[str] | None = None,
        memory: DeviceMemory | None = None,
    ) -> None:
        """Start empty.

        Args:
            spec: the model that the LoRAs must fit.
            dtype: the transformer's.
            device: where it runs.
            budgets: what may be kept.
            cache_dir: where matrices that are slow to compute are kept on disk, see `read.file.read_lora`.
            memory: of the device; by default as `memory.device.memory_of` has it.
        """
        self._spec = spec
        self._cache_dir = cache_dir
        self._order = spec.layout.modules
        self._buffers = HostBuffers(BUFFERS_BYTES)
        self._slots: LoraSlots | None = None
        self._dtype = dtype
        self._memory = memory or memory_of(device)
        self._pin = self._memory.pin
        self._files: ByteLru[Adapter] = ByteLru(budgets.files_bytes, lambda adapter: adapter.bytes)
        self._host: ByteLru[Prepared] = ByteLru(budgets.host_bytes, self._host_bytes)
        self._unscaled: ByteLru[UnscaledB] = ByteLru(budgets.strengths_bytes, lambda values: values.bytes)
        self._loras: DeviceLoras | None = None
        self._generation = 0

    @property
    def host_bytes(self) -> int:
        """What the prepared stacks take in host memory."""
        return self._host.bytes

    @property
    def host_budget_bytes(self) -> int:
        """What they may take."""
        return self._host.budget_bytes

    @property
    def pools(self) -> dict[str, tuple[int, int]]:
        """What is kept, and may be, in bytes: files, prepared stacks, stacks on the device, unscaled lora_B."""
        pools = {
            "files": (self._files.bytes, self._files.budget_bytes),
            "prepared": (self._host.bytes, self._host.budget_bytes),
        }
        if self._loras is not None:
            pools["device"] = self._loras.bytes, self._loras.budget_bytes
            pools["other strengths"] = self._unscaled.bytes, self._unscaled.budget_bytes
        return pools

    @property
    def device_bytes(self) -> int:
        """What they take of a device that is not the host."""
        if self._loras is None or not self._memory.separate:
            return 0
        return self._loras.bytes + self._unscaled.bytes

    def attach(self, slots: LoraSlots, budgets: PoolBudgets) -> None:
        """Begin to serve a model's slots, within budgets of the memory that is free now."""
        self._files.budget_bytes, self._host.budget_bytes = budgets.files_bytes, budgets.host_bytes
        self._unscaled.budget_bytes = budgets.strengths_bytes
        self._slots = slots
        separate, upload = self._memory.separate, self._memory.upload
        self._loras = DeviceLoras(
            slots, self._memory.device, budgets.device_bytes, share_host=not separate, upload=upload
        )

    def detach(self) -> None:
        """Forget what is on the device."""
        self._loras = self._slots = None
        self._unscaled.clear()

    def clear(self) -> None:
        """Give all memory back; what is being read or prepared on another thread meanwhile is not kept either."""
        self._generation += 1
        self.detach()
        self._host.clear()
        self._files.clear()
        self._buffers.clear()
        if self._pin and hasattr(torch.accelerator, "empty_host_cache"):
            torch.accelerator.empty_host_cache()  # torch keeps freed page-locked memory for itself otherwise

    def read(self, path: str | os.PathLike[str]) -> Adapter:
        """Read and check a file; from memory while the file is unchanged. See `read.file.read_lora` for the errors."""
        identity = FileIdentity.of(path)
        adapter = self._files.get(identity)
        if adapter is None:
            generation = self._generation
            adapter = read_lora(path, self._spec, self._cache_dir, buffers=self._buffers)
            if generation == self._generation:
                self._files.put(adapter.identity, adapter)
                self._drop_older(adapter.identity)
        return adapter

    def prepare(self, stack: LoraStack, *, background: bool = False) -> tuple[Prepared, bool]:
        """Flatten a stack into host memory, unless it is there, at whatever strengths.

        Args:
            stack: at least one LoRA of it active.
            background: see `pack.write.Writer`.

        Returns:
            The stack, and whether it was there.

        Raises:
            LoraError: see `pack.flat.flatten`.
        """
        key = StackKey.of(stack)
        prepared = self._host.get(key)
        if prepared is not None:
            return prepared, True
        generation = self._generation
        flat, error = self._flatten(stack, background), 0.0
        if stack.max_rank:
            cut = truncate(flat, stack.max_rank)
            flat, error = cut.flat, cut.overall_error
        prepared = Prepared(flat, stack.strengths, error)
        if generation == self._generation:
            self._host.put(key, prepared)
        return prepared, False

    def prepared(self, stack: LoraStack) -> bool:
        """Whether `prepare` would find a stack."""
        return StackKey.of(stack) in self._host

    @overload
    def make_resident(self, stack: LoraStack, *, evict: Literal[True] = True) -> ResidentStack: ...

    @overload
    def make_resident(self, stack: LoraStack, *, evict: bool) -> ResidentStack | None: ...

    def make_resident(self, stack: LoraStack, *, evict: bool = True) -> ResidentStack | None:
        """Have a stack on the device, and make sure that its strengths can be had there. Changes nothing bound.

        Args:
            stack: at any strengths.
            evict: whether others may have to leave; otherwise it stays in host memory when there is no room.

        Returns:
            What `bind` takes, at once; None: there was no room.

        Raises:
            LoraError: see `pack.flat.flatten`.
            torch.OutOfMemoryError: the device has no room for the stack; what is bound stays.
        """
        if not stack.active:
            return NOTHING_ACTIVE
        key, loras, source = StackKey.of(stack), self._loras, "hot"
        resident = loras.get(key)
        if resident is None:
            prepared, warm = self.prepare(stack)
            source = "warm" if warm else "cold"
            if not evict and not loras.fits(prepared.flat.bytes):
                return None
            resident = loras.upload(key, prepared)
        unscaled = None
        if resident.strengths != stack.strengths:
            unscaled = self._unscaled_of(key, stack, resident)
            unscaled.check(stack.active, self._dtype)
            source = "strength" if source == "hot" else source
        return ResidentStack(source, stack, key, resident, unscaled)

    def bind(self, resident: ResidentStack) -> int:
        """Bind a stack, at its strengths. Returns its size on the device in bytes."""
        prepared, stack = resident.prepared, resident.stack
        if prepared is None:
            self._loras.bind_empty()
            return 0
        if resident.unscaled is not None:
            prepared.strengths = None  # an interrupt may come while they are written
            resident.unscaled.multiply(stack.active, prepared.flat)
            prepared.strengths = stack.strengths
        self._loras.bind(resident.key)
        return prepared.flat.bytes

    def _flatten(self, stack: LoraStack, background: bool) -> FlatLora:
        return flatten(
            stack.active,
            self._dtype,
            self._pin,
            base=self._slots,
            buffers=self._buffers,
            order=self._order,
            background=background,
        )

    def _unscaled_of(self, key: StackKey, stack: LoraStack, resident: Prepared) -> UnscaledB:
        unscaled = self._unscaled.get(key)
        if unscaled is None or not unscaled.belongs_to(resident.flat):
            unscaled = UnscaledB(stack.active, resident.flat, self._memory.upload, self._buffers)
            self._unscaled.put(key, unscaled)
        return unscaled

    def _drop_older(self, identity: FileIdentity) -> None:
        """Drop what was made of earlier states of a file."""

        def older(other: FileIdentity) -> bool:
            return other.path == identity.path and other != identity

        def outdated(key: Hashable) -> bool:
            return any(map(older, key.identities)) if isinstance(key, StackKey) else older(key)

        for pool in (self._files, self._host, self._unscaled):
            pool.drop(outdated)

    def _host_bytes(self, prepared: Prepared) -> int:
        return pinned_bytes(prepared.flat.bytes) if self._pin else prepared.flat.bytes
