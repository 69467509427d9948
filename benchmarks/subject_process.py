"""A subject of the ablation in a process of its own: what one leaves behind in memory or in dynamo is not another's."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from .child import STOP_S, Child, ChildError, OutOfTimeError, describe
from .make_subject import make_subject
from .report import BenchmarkError
from .sampling import Clock, prompt_for
from .subjects import Setup, Work


class SubjectFailedError(BenchmarkError):
    """A subject does not run on this machine; the message says why."""


class SubjectProcess:
    """Starts a subject and asks it for images. Close it in the end.

    Attributes:
        name: for messages.
        cpu_s: CPU time that it took; known when it was closed.
    """

    def __init__(
        self, name: str, setup: Setup, work: Work, folder: Path, cold: bool, ends: float | None = None
    ) -> None:
        """Start the process; it has imported what it needs when this returns.

        Args:
            name: for messages and the log's name.
            setup: what runs.
            work: what it does.
            folder: for its log, and the compile cache of a cold one.
            cold: compile as on a machine that never did, not from what earlier runs left.
            ends: it is ended at this time (`time.monotonic`), or None.

        Raises:
            SubjectFailedError: a library is missing, or refuses the setup.
        """
        self.name = name
        self.cpu_s = 0.0
        self._ends = ends
        log = folder / f"{name.replace(' ', '-')}.log"
        environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"{log.stem}-cache")} if cold else {}
        # This process may have asked for the card, and CUDA does not survive a fork.
        self._child = Child(name, _serve, (setup, work), log, fork=work.device == "cpu", environment=environment)
        self._receive()

    def first(self, lora: str | None) -> dict[str, Any]:
        """Load, compile, draw the first image.

        Returns:
            "ms" of all that, "peak_bytes" so far (None where the system does not tell).
        """
        return self._ask("first", lora)

    def switch(self, lora: str | None) -> dict[str, Any]:
        """Draw an image with another LoRA; "ms" is the switch and the image, "steps_ms" see `Clock.steps_ms`."""
        return self._ask("switch", lora)

    def image(self) -> dict[str, Any]:
        """Draw the same image again: "ms" and "steps_ms"."""
        return self._ask("image")

    def change(self) -> np.ndarray:
        """What the model made of the noise: the last image's latent without it, float32."""
        return self._ask("change")

    def peak_bytes(self) -> int | None:
        """The most memory so far."""
        return self._ask("peak")

    def check(self) -> None:
        """See `Subject.check`."""
        self._ask("check")

    def close(self) -> None:
        """End the process."""
        with suppress(SubjectFailedError, OSError):
            self._ends = time.monotonic() + STOP_S
            self.cpu_s = self._ask("cpu_s")
        self._child.close()

    def _ask(self, verb: str, *arguments: Any) -> Any:
        self._child.send((verb, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            limit_s = None if self._ends is None else max(0.0, self._ends - time.monotonic())
            failed, answer = self._child.receive(limit_s)
        except OutOfTimeError as exc:
            raise SubjectFailedError("it was ended: the time was over") from exc
        except ChildError as exc:
            raise SubjectFailedError(str(exc)) from exc
        if failed:
            raise SubjectFailedError(f"{self.name}: {answer}")
        return answer


def _serve(connection: Connection, setup: Setup, work: Work) -> None:
    """The process: answer (verb, arguments) with (False, result) or (True, why not), until the other end closes."""
    try:
        verbs = _answered(connection, lambda: _Server(setup, work))
        while verbs is not None:
            verb, arguments = connection.recv()
            _answered(connection, lambda verb=verb, arguments=arguments: getattr(verbs, verb)(*arguments))
    except EOFError:
        return


def _answered(connection: Connection, call: Callable[[], Any]) -> Any:
    """Call, send what came of it, and return it; None when it failed."""
    try:
        result = call()
    except Exception as error:  # whatever a library raises: the other process says it
        traceback.print_exc(file=sys.stderr)
        sys.stderr.flush()
        connection.send((True, describe(error)))
        return None
    connection.send((False, None if isinstance(result, _Server) else result))
    return result


class _Server:
    """Does what `SubjectProcess` asks for; its public methods are the verbs."""

    def __init__(self, setup: Setup, work: Work) -> None:
        import torch

        self._cuda = work.device.startswith("cuda")
        self._clock = Clock(torch.cuda.synchronize if self._cuda else lambda: None)
        self._subject = make_subject(setup, work)
        self._prompt = prompt_for(work.spec().config, work.latent, work.text_tokens, work.steps)
        self._memory = None if self._cuda else _peak_memory()
        self._compiles = setup.compile != "off"

    def first(self, lora: str | None) -> dict[str, Any]:
        start = time.perf_counter()
        with self._watched():
            self._subject.load()
            self._draw(lora, switch=True)
        elapsed_ms = (time.perf_counter() - start) * 1e3
        if self._compiles:
            from torch._inductor.async_compile import shutdown_compile_workers

            shutdown_compile_workers()  # they would sit in memory beside all subjects
        return {"ms": elapsed_ms, "peak_bytes": self.peak()}

    def switch(self, lora: str | None) -> dict[str, Any]:
        with self._watched():
            return self._draw(lora, switch=True)

    def image(self) -> dict[str, Any]:
        return self._draw(None, switch=False)

    def change(self) -> np.ndarray:
        return (self._latent - self._prompt.noise).numpy()

    def peak(self) -> int | None:
        import torch

        if self._cuda:
            return torch.cuda.max_memory_allocated()
        return None if self._memory is None else self._memory.bytes

    def check(self) -> None:
        self._subject.check()

    def cpu_s(self) -> float:
        return sum(os.times()[:4])  # its own and its children's, the compilers

    def _draw(self, lora: str | None, switch: bool) -> dict[str, Any]:
        start = time.perf_counter()
        if switch:
            self._subject.use(lora)
        self._clock.begin()
        self._latent = self._subject.sample(self._prompt, self._clock)
        return {"ms": (time.perf_counter() - start) * 1e3, "steps_ms": self._clock.steps_ms}

    def _watched(self) -> Any:
        return nullcontext() if self._memory is None else self._memory.sampling()


def _peak_memory() -> Any:
    from .load_stage import STATUS, PeakMemory

    return PeakMemory() if STATUS.is_file() else None  # only Linux tells
