"""Fixtures shared by all tests. Nothing here needs the pack, ComfyUI or torch until a test asks for it."""

import gc
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from harness.paths import CACHE, REPO

# Compiles are shared with the server's and with earlier runs': a cold one takes a minute.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE / "inductor"))
# Several test files at once share the cores, and so do the processes that they start.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
# Every process that compiles would start another, which imports torch for Triton's kernels: a CPU needs none of them.
os.environ.setdefault("TORCH_WARM_POOL", "0")

PACK_ALIAS = "flux_hotswap_pack"
# Fixtures that start a server or another process, train, compile or draw much: whatever uses one is slow.
SLOW_FIXTURES = {"compiled", "finished", "held_out", "interrupted", "server", "stock", "straight", "traced"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what needs ComfyUI or a slow fixture; other slow tests carry the mark themselves."""
    with_comfyui = Path(__file__).parent / "comfy"
    for item in items:
        if with_comfyui in item.path.parents or SLOW_FIXTURES.intersection(item.fixturenames):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What imports made stays: no collection of garbage, some of which tests ask for, need look through it again."""
    gc.freeze()


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """The pack as ComfyUI imports it: a package under a name of its own, so that relative imports work.

    Its folder must not be importable as top-level names instead, because `nodes` is a module of ComfyUI's.
    """
    if PACK_ALIAS not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK_ALIAS, REPO / "__init__.py", submodule_search_locations=[str(REPO)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[PACK_ALIAS] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[PACK_ALIAS]
            raise
    return sys.modules[PACK_ALIAS]


@pytest.fixture(scope="session")
def models() -> Path:
    """A models folder with the generated tiny checkpoints, kept between runs."""
    from harness.assets import write_all

    folder = CACHE / "models"
    write_all(folder)
    return folder
