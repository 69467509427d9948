"""Memory that was freed goes back to the system."""

import gc
import platform
from pathlib import Path

import pytest

from accel.memory import budgets as memory

BLOCK = 2**16
STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    (line,) = [line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith("RssAnon")]
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not STATUS.is_file(), reason="the C library is not Linux's glibc"
)
def test_holes_between_what_is_in_use_are_given_back():
    gc.collect()
    memory.give_back_freed()
    blocks = [bytearray(b"x" * BLOCK) for _ in range(2048)]
    kept = blocks[::2]
    full = resident_bytes()
    del blocks
    # What a control shows first: freed memory stays while something behind it is in use.
    assert full - resident_bytes() < 2048 * BLOCK / 8
    memory.give_back_freed()
    assert full - resident_bytes() > 2048 * BLOCK / 2 * 0.8
    assert all(block == b"x" * BLOCK for block in kept)


def test_a_c_library_without_it_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory._malloc_trim.cache_clear()
    try:
        memory.give_back_freed()
    finally:
        memory._malloc_trim.cache_clear()
