"""Compiled code on disk, so that the next start neither traces nor compiles.

One entry of a disk store per kind of engine and machine. It holds inductor's own folder for that engine (kernels, and
the code that calls them) and the traced regions. An engine works in a private copy of that folder, which is unpacked
from the entry before and packed into it after each compile. So two processes cannot write into each other's folder, and
neither a killed compiler nor a cleaned temporary folder leaves half a library behind. Like every cache of torch's it
holds code that is run: whoever can write there can run programs.

`torch.compiler.save_cache_artifacts` gives the kernels alone, of all engines of the process together, and the next
start would trace again, which takes most of its time.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from ..errors import first_line
from ..store.disk import DamagedError, DiskStore
from ..store.entry import Key
from ..store.machine import FOLDER_VARIABLES, machine

# Raise it when the same key would give files of another kind.
FORMAT = 2
SUFFIX = ".flux-hotswap-compiled"
LIMIT_BYTES = 2 * 10**9
# In inductor's folder, but only of use while a compiler runs.
NOT_KEPT = ("locks",)
KERNELS, REGIONS = "kernels/", "regions/"

Notice = Callable[[str, bool], None]


@dataclass(frozen=True)
class CompileCache:
    """Where compiled code is kept for the next start.

    Attributes:
        folder: made when it is first written to.
        limit_bytes: what all its files may take; the least recently used ones are deleted.
    """

    folder: str
    limit_bytes: int = LIMIT_BYTES

    def files(self, engine: Mapping[str, str], notice: Notice) -> CompiledFiles:
        """The file of one kind of engine on this machine; nothing is read yet.

        Args:
            engine: what of the engine its code depends on.
            notice: gets (sentence for the user, whether it is a warning) when the disk is full or a file damaged.
        """
        key = Key.of({"format": FORMAT, **machine(engine.get("device", "cpu")), **engine})
        return CompiledFiles(DiskStore(self.folder, SUFFIX, self.limit_bytes), key, notice)


class CompiledFiles:
    """What is stored for one kind of engine, and the folder that inductor works in."""

    def __init__(self, store: DiskStore, key: Key, notice: Notice) -> None:
        """Name the entry; nothing is read."""
        self._store = store
        self._key = key
        self._notice = notice
        self._work: tempfile.TemporaryDirectory | None = None
        self._regions: dict[str, bytes] = {}
        self._dropped: set[str] = set()
        self._usable = True

    @contextmanager
    def inductor_folder(self) -> Iterator[None]:
        """Let inductor and Triton work in this engine's folder, unless the user chose one for the process.

        For the calls inside only: the variables are put back, those that inductor sets by itself included.
        """
        if not self._open():
            yield
            return
        before = {name: os.environ.get(name) for name in FOLDER_VARIABLES}
        try:
            if not chosen_by_user(before["TORCHINDUCTOR_CACHE_DIR"]):
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = self._work.name
                os.environ.pop("TRITON_CACHE_DIR", None)
                with _no_precompiled_headers():
                    yield
            else:
                yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def stored(self, region: str) -> list[bytes]:
        """The variants of a region that earlier processes stored."""
        if not self._open():
            return []
        return [data for name, data in sorted(self._regions.items()) if _region_of(name) == region]

    def store(self, region: str, data: bytes) -> None:
        """Keep a variant of a region, and what inductor made for it, for the next start.

        A disk that is full or read-only costs the next start, not this one.
        """
        if self._open():
            self._regions[f"{REGIONS}{region}-{hashlib.sha256(data).hexdigest()[:16]}"] = data
            self._write()

    def store_kernels(self) -> None:
        """Keep what inductor made for a region that cannot be stored itself."""
        if self._open():
            self._write()

    def drop(self, region: str, reason: Exception) -> None:
        """Forget the stored variants of a region, which did not load."""
        self._dropped |= {name for name in self._regions if _region_of(name) == region}
        self._regions = {name: data for name, data in self._regions.items() if name not in self._dropped}
        self._tell_damaged(f"the {region} blocks in it do not load: {first_line(reason)}")

    def start_afresh(self) -> None:
        """Forget all that is stored, and give inductor an empty folder."""
        self._regions = {}
        self._store.remove(self._key)
        if self._work is not None:
            self._work.cleanup()
            self._work = _private_folder()

    def _open(self) -> bool:
        """Unpack the file, the first time. Whether there is a folder to work in."""
        if self._work is None and self._usable:
            self._usable = not caches_are_off()
            if self._usable:
                try:
                    self._work = _private_folder()
                    self._unpack(self._read())
                except OSError as exc:
                    self._usable = False
                    self._notice(
                        f"there is no room for compiled code in '{exc.filename or tempfile.gettempdir()}' "
                        f"({exc.strerror or exc}): free space there, or every start compiles again.",
                        True,
                    )
        return self._usable

    def _unpack(self, content: Mapping[str, bytes]) -> None:
        for name, data in content.items():
            if name.startswith(REGIONS):
                self._regions[name] = data
                continue
            target = Path(self._work.name, *PurePosixPath(name).parts[1:])
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

    def _read(self) -> dict[str, bytes]:
        """The entry's content by name; empty when there is none, or when it is damaged."""
        try:
            entry = self._store.open(self._key)
        except DamagedError as exc:
            self._tell_damaged(exc.reason)
            return {}
        if entry is None:
            return {}
        return {name: zlib.decompress(data.numpy()) for name, data in entry.tensors.items() if _is_plain(name)}

    def _write(self) -> None:
        # What another process stored meanwhile stays; of two that write at once, one is the last.
        kept = {name: data for name, data in self._read().items() if name not in self._dropped}
        try:
            content = {**kept, **self._kernels(), **self._regions}
            self._store.put(self._key, {name: _packed(data) for name, data in sorted(content.items())})
        except OSError as exc:
            self._usable = False
            self._notice(
                f"compiled code could not be stored in '{self._store.folder}' ({exc.strerror or exc}); the model "
                "works, and the next start compiles again. Free space there, or make the folder writable.",
                True,
            )

    def _kernels(self) -> dict[str, bytes]:
        folder, found = Path(self._work.name), {}
        for path in folder.rglob("*"):
            place = path.relative_to(folder)
            if place.parts[0] not in NOT_KEPT and path.suffix != ".lock" and path.is_file():
                found[KERNELS + place.as_posix()] = path.read_bytes()
        return found

    def _tell_damaged(self, why: str) -> None:
        self._notice(f"stored compiled code is not used ({why}); it is compiled again, once.", True)


def chosen_by_user(folder: str | None) -> bool:
    """Whether TORCHINDUCTOR_CACHE_DIR is someone's choice: inductor itself sets it to its default on first use."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return folder is not None and os.path.abspath(folder) != os.path.abspath(default_cache_dir())


def caches_are_off() -> bool:
    """Whether the user switched torch's own caches off, and so would not want ours."""
    from torch._inductor import config

    return config.force_disable_caches or not config.fx_graph_cache


def _no_precompiled_headers() -> AbstractContextManager:
    """Keep inductor from compiling C++ headers in the system's temporary folder before it looks for a kernel.

    It does so at each start, for seconds, even if every kernel is there (torch 2.14, CppCodeCache.load_async); and
    kernels that were compiled with them have other names.
    """
    from torch._inductor import config

    name = "cpp_cache_precompile_headers"
    return config.patch({name: False}) if hasattr(config, name) else nullcontext()


def _private_folder() -> tempfile.TemporaryDirectory:
    # Removed with the engine, or when the process ends; libraries in use stay loaded (Windows keeps their files).
    return tempfile.TemporaryDirectory(prefix="flux-hotswap-", ignore_cleanup_errors=True)


def _packed(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(zlib.compress(data, level=1)), dtype=torch.uint8)


def _is_plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return name.startswith((KERNELS, REGIONS)) and ".." not in parts and len(parts) > 1


def _region_of(name: str) -> str:
    return name.removeprefix(REGIONS).rpartition("-")[0]
