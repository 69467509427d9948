"""One step of the load benchmark, in a process of its own: `python -m benchmarks.load_stage STAGE …` prints JSON.

A process of its own, because what an earlier load leaves in an allocator would count as the next one's memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from accel.checkpoint import inspect_checkpoint
from accel.engine import Engine
from accel.families.diffusers_models import model_class
from accel.families.streams.inputs import StreamInputs
from accel.lora.stack import LoraStack
from accel.quantize import find_mode
from accel.settings import EngineSettings, Quantization, QuantizedCache
from accel.spec import ModelSpec

from .families.registry import of

STATUS = Path("/proc/self/status")
SAMPLE_S = 0.005
READ_BYTES = 8 * 2**20
TEXT_TOKENS = 512
SEED = 7


class PeakMemory:
    """Samples this process's anonymous resident memory. Pages of mapped files are the system's to drop, and not in it.

    Attributes:
        bytes: the most that was seen, the libraries' own memory included.
    """

    def __init__(self) -> None:
        """Start with what is there."""
        self.bytes = anonymous_bytes()

    @contextmanager
    def sampling(self):
        """Sample while the block runs."""
        done = threading.Event()

        def sample() -> None:
            while not done.wait(SAMPLE_S):
                self.bytes = max(self.bytes, anonymous_bytes())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            self.bytes = max(self.bytes, anonymous_bytes())


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process (Linux)."""
    for line in STATUS.read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no RssAnon")


def drop(path: Path) -> None:
    """Drop a file from the page cache, so that the next read comes from the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)  # dirty pages cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def read_s(path: Path) -> float:
    """Seconds to read a file once, into a buffer that is used again and again: nothing can read it faster."""
    buffer = memoryview(bytearray(READ_BYTES))
    start = time.perf_counter()
    with open(path, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    return time.perf_counter() - start


class Notices:
    """Keeps what the engine says, to be sure that the cache was used, or was not."""

    def __init__(self) -> None:
        """Start with nothing said."""
        self.texts: list[str] = []
        self.warnings: list[str] = []

    def loading(self, done: int, total: int) -> None:
        """Ignore."""

    def notice(self, text: str, warning: bool) -> None:
        """Keep it."""
        self.texts.append(text)
        if warning:
            self.warnings.append(text)

    def compiling(self, region: str) -> None:
        """Ignore."""

    def compiled(self, region: str, seconds: float, count: int, why: str) -> None:
        """Ignore."""


def load(options: argparse.Namespace) -> dict:
    """Load an engine, from the checkpoint or from the cache; then, if asked for, swap a LoRA in and run a forward."""
    file = options.checkpoint
    cached = next(Path(options.cache).glob("*.safetensors"), None) if options.cache else None
    source = cached or file
    spec = inspect_checkpoint(str(file))
    import_libraries(spec, options.mode)
    notices, result = Notices(), {"from_cache": cached is not None}
    cache = QuantizedCache(str(options.cache), 10**13) if options.cache else None
    # Not "auto": two processes that measure may take different kernels, and their outputs are to be equal.
    settings = EngineSettings(
        dtype="bf16", attention="sdpa", compile="off", quantization=Quantization(options.mode, cache)
    )
    engine = Engine(spec, settings, notices)
    if not options.hot:
        drop(source)
    result["read_s"] = read_s(source)
    if not options.hot:
        drop(source)
    memory = PeakMemory()
    with memory.sampling():
        start = time.perf_counter()
        engine.load()
        result["load_s"] = time.perf_counter() - start
    result |= {"engine_bytes": engine.bytes, "peak_rss_bytes": memory.bytes, "notices": notices.texts}
    result["source_bytes"] = source.stat().st_size
    if options.lora:
        stack = LoraStack().with_lora(engine.read_lora(str(options.lora)), 0.8)
        result["swap_ms"] = engine.swap(stack).swap_ms
        with memory.sampling():
            start = time.perf_counter()
            output = engine(inputs(spec, options.latent))
            result["forward_s"] = time.perf_counter() - start
        result |= {"finite": bool(torch.isfinite(output).all()), "forward_peak_rss_bytes": memory.bytes}
        result["checksum"] = float(output.double().abs().sum())
    return result


def import_libraries(spec: ModelSpec, mode: str) -> None:
    """Import what a load imports: that takes seconds, and is not what is measured."""
    model_class(spec.family.diffusers_class)
    find_mode(mode).convert(torch.zeros(64, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.bfloat16), False)


def inputs(spec: ModelSpec, latent: int) -> StreamInputs:
    """Random inputs of a latent's size, the same in every process."""
    generator = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).bfloat16()

    return of(spec.config).forward_inputs(spec.config, normal, latent, TEXT_TOKENS)


def peer(options: argparse.Namespace) -> dict:
    """Load the same file as diffusers and torchao do it."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    transformer = model_class(inspect_checkpoint(str(options.checkpoint)).family.diffusers_class)
    drop(options.checkpoint)
    memory = PeakMemory()
    with memory.sampling():
        start = time.perf_counter()
        model = transformer.from_single_file(
            str(options.checkpoint), config=str(options.config), torch_dtype=torch.bfloat16
        )
        quantize_(model, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
        seconds = time.perf_counter() - start
    return {"load_s": seconds, "peak_rss_bytes": memory.bytes}


def main() -> None:
    """Run one stage and print what it found as the last line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("stage", choices=("load", "peer"))
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--mode")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--hot", action="store_true")
    options = parser.parse_args()
    result = {"load": load, "peer": peer}[options.stage](options)
    print(json.dumps(result), file=sys.stdout, flush=True)


if __name__ == "__main__":
    main()
