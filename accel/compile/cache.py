"""Compiled code on disk, so that the next start neither traces nor compiles.

One file per kind of engine and machine. It holds inductor's own folder for that engine (kernels, and the code that
calls them) and the traced regions. An engine works in a private copy of that folder, which is unpacked from the file
before and packed into it after each compile. So a file is either whole or absent: it is replaced, never changed; its
checksum is compared before anything in it is used; two processes cannot write into each other's folder; and neither a
killed compiler nor a cleaned temporary folder leaves half a library behind. Like every cache of torch's it holds code
that is run: whoever can write there can run programs.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import io
import json
import os
import platform
import sys
import tempfile
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch

# Raise it when the same key would give files of another kind.
FORMAT = 1
MAGIC = b"flux-hotswap-compiled\n"
# Only files of this name are ever deleted: a user may point the cache at a folder that holds others.
SUFFIX = ".flux-hotswap-compiled"
LIMIT_BYTES = 2 * 10**9
DIGEST_BYTES = 32
ABANDONED_S = 3600
# In inductor's folder, but only of use while a compiler runs.
NOT_KEPT = ("locks",)
KERNELS, REGIONS = "kernels/", "regions/"
FOLDER_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
# Environment variables that change what compilers make of the same source.
COMPILER_VARIABLES = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TRITON_", "CUDA_HOME", "CXX", "CC", "CFLAGS", "CXXFLAGS")
LIBRARIES = (
    "torch", "triton", "triton-windows", "torchao", "mslk", "bitsandbytes", "diffusers", "transformers",
    "flash-attn", "flash_attn_3", "flash-attn-4", "sageattention", "xformers", "kernels",
)  # fmt: skip

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
        key = json.dumps({"format": FORMAT, **machine(engine.get("device", "cpu")), **engine}, sort_keys=True)
        return CompiledFiles(self, key, notice)


class CompiledFiles:
    """What is stored for one kind of engine, and the folder that inductor works in."""

    def __init__(self, cache: CompileCache, key: str, notice: Notice) -> None:
        """Name the file; nothing is read."""
        self._cache = cache
        self._notice = notice
        self._path = Path(cache.folder) / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}{SUFFIX}"
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
        self._tell_damaged(f"the {region} blocks in it do not load: {_first_line(reason)}")

    def start_afresh(self) -> None:
        """Forget all that is stored, and give inductor an empty folder."""
        self._regions = {}
        with suppress(OSError):
            self._path.unlink()
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
        """The file's content by name; empty when there is none, or when it is damaged."""
        try:
            data = self._path.read_bytes()
        except OSError:  # none, or out of reach: then writing will say so
            return {}
        digest, body = data[len(MAGIC) : len(MAGIC) + DIGEST_BYTES], data[len(MAGIC) + DIGEST_BYTES :]
        if not data.startswith(MAGIC) or hashlib.sha256(body).digest() != digest:
            with suppress(OSError):
                self._path.unlink()
            self._tell_damaged("its content was changed or cut off")
            return {}
        with suppress(OSError):
            os.utime(self._path)  # used now: others are older
        with zipfile.ZipFile(io.BytesIO(body)) as archive:
            return {name: archive.read(name) for name in archive.namelist() if _is_plain(name)}

    def _write(self) -> None:
        temporary = self._path.with_name(f".{self._path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # What another process stored meanwhile stays; of two that write at once, one is the last.
            kept = {name: data for name, data in self._read().items() if name not in self._dropped}
            content = {**kept, **self._kernels(), **self._regions}
            body = _packed(content)
            if len(body) > self._cache.limit_bytes:
                return
            make_room(Path(self._cache.folder), self._cache.limit_bytes - len(body), self._path)
            temporary.write_bytes(MAGIC + hashlib.sha256(body).digest() + body)
            os.replace(temporary, self._path)
        except OSError as exc:
            self._usable = False
            with suppress(OSError):
                temporary.unlink()
            self._notice(
                f"compiled code could not be stored in '{self._path.parent}' ({exc.strerror or exc}); the model works, "
                "and the next start compiles again. Free space there, or make the folder writable.",
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


def make_room(folder: Path, limit_bytes: int, keep: Path) -> None:
    """Delete the least recently used files until all but `keep` fit, and what broken-off writes left behind."""
    for temporary in folder.glob(f".*{SUFFIX}.*.tmp"):
        with suppress(OSError):
            if time.time() - temporary.stat().st_mtime >= ABANDONED_S:
                temporary.unlink()
    files = []
    for path in folder.glob(f"*{SUFFIX}"):
        with suppress(OSError):  # another process deleted it
            stat = path.stat()
            if path != keep:
                files.append((stat.st_mtime_ns, stat.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= limit_bytes:
            break
        with suppress(OSError):
            path.unlink()
        total -= size


def chosen_by_user(folder: str | None) -> bool:
    """Whether TORCHINDUCTOR_CACHE_DIR is someone's choice: inductor itself sets it to its default on first use."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return folder is not None and os.path.abspath(folder) != os.path.abspath(default_cache_dir())


def caches_are_off() -> bool:
    """Whether the user switched torch's own caches off, and so would not want ours."""
    from torch._inductor import config

    return config.force_disable_caches or not config.fx_graph_cache


def machine(device: str) -> dict[str, object]:
    """Everything outside an engine that compiled code depends on."""
    versions = {}
    for name in LIBRARIES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    facts = {
        "sources": _sources_digest(),
        "package": __package__,
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
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


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


def _packed(content: Mapping[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, data in sorted(content.items()):
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def _is_plain(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return name.startswith((KERNELS, REGIONS)) and ".." not in parts and len(parts) > 1


def _region_of(name: str) -> str:
    return name.removeprefix(REGIONS).rpartition("-")[0]


def _first_line(exc: BaseException) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
