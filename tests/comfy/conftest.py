"""Real ComfyUI servers with the pack, and what the tests ask of them."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest
import torch

from harness import assets, comfyui, lora_files, tensor_files, tiny_models
from harness.client import Client, http_request
from harness.graphs import Graph, Picture, graph, latents, relative_distance
from harness.paths import CACHE, REPO
from harness.prompt_result import PromptResult
from harness.server import ComfyServer

PROBE_PACK = REPO / "tests" / "probe_pack"
NEWER_CORE_PACK = REPO / "tests" / "newer_core_pack"
Edit = Callable[[Graph, str], None]
"""Changes one picture's nodes; their ids begin with the second argument."""


@dataclass(frozen=True)
class Comparison:
    """The same picture by the pack, by stock ComfyUI, and by stock ComfyUI without what is tested."""

    ours: torch.Tensor
    stock: torch.Tensor
    plain: torch.Tensor | None
    result: PromptResult

    @property
    def distance(self) -> float:
        """How far the pack is from stock ComfyUI."""
        return relative_distance(self.ours, self.stock)

    @property
    def effect(self) -> float:
        """How far what is tested moves the picture of stock ComfyUI: without an effect, equality says nothing."""
        return relative_distance(self.stock, self.plain)


class Comfy:
    """One running server, its folders, and pictures drawn by it."""

    def __init__(self, server: ComfyServer, client: Client) -> None:
        self.server = server
        self.client = client

    def restart(self) -> None:
        """Stop the server and start it again in the same folder; its log begins anew."""
        self.client.close()
        self.server.stop()
        self.server.start()
        self.client = self.server.client()

    # Files.

    def model_file(self, folder: str, name: str) -> Path:
        """The path of a model file on this server."""
        return self.server.models / folder / name

    def lora(self, name: str, format: str = "kohya", **arguments: object) -> str:
        """Write a LoRA file for the tiny model and return its name."""
        return self.tensors("loras", name, lora_files.lora_state_dict(format, **arguments))

    def tensors(self, folder: str, name: str, tensors: dict[str, torch.Tensor]) -> str:
        """Write (or replace) a safetensors file in one of the server's model folders, and return its name."""
        tensor_files.write_tensors(self.model_file(folder, name), tensors)
        return name

    def checkpoint(self, name: str, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: object) -> str:
        """Write a FLUX checkpoint and return its name."""
        config = tiny_models.TinyFluxConfig(**sizes)
        tensors = tiny_models.tiny_flux_state_dict(config, seed)
        return self.tensors("diffusion_models", name, {key: value.to(dtype) for key, value in tensors.items()})

    # Pictures.

    def run(self, nodes: Graph) -> PromptResult:
        """Run a graph that must succeed."""
        return self.client.run(nodes, check=True)

    def sample(self, picture: Picture, edit: Edit | None = None) -> torch.Tensor:
        """The final latent of one picture, alone in its prompt."""
        return self.samples(picture, edit=edit)[0]

    def samples(self, *pictures: Picture, edit: Edit | None = None) -> list[torch.Tensor]:
        """The final latents of pictures that are drawn in one prompt."""
        nodes = graph(*pictures)
        for index in range(len(pictures) if edit else 0):
            edit(nodes, f"p{index}_")
        result = self.run(nodes)
        return [latents(self.client, result, index) for index in range(len(pictures))]

    def compare(self, picture: Picture, plain: Picture | None = None, edit: Edit | None = None,
                edit_plain: Edit | None = None) -> Comparison:
        """Draw a picture with the pack and with stock ComfyUI in one prompt.

        Args:
            picture: what to draw.
            plain: a third picture, to measure the effect of what is tested; drawn by stock ComfyUI.
            edit: changes the first two pictures' nodes.
            edit_plain: changes the third picture's nodes.
        """
        pictures = [picture, replace(picture, stock=True)]
        if plain is not None:
            pictures.append(replace(plain, stock=True))
        nodes = graph(*pictures)
        for prefix in ("p0_", "p1_") if edit else ():
            edit(nodes, prefix)
        if edit_plain:
            edit_plain(nodes, "p2_")
        result = self.run(nodes)
        drawn = [latents(self.client, result, index) for index in range(len(pictures))]
        return Comparison(drawn[0], drawn[1], drawn[2] if plain is not None else None, result)

    # What happens inside the server.

    def engines(self, collect: bool = False) -> dict:
        """See `engines` in tests/probe_pack; `collect` takes out the garbage first, when nothing runs."""
        return json.loads(http_request(f"{self.server.url}/probe/engines{'?collect=1' if collect else ''}"))

    def engine(self) -> dict:
        """The one engine that the registry holds, with the LoRAs that it keeps."""
        held = self.engines()["held"]
        assert len(held) == 1, f"the registry holds {len(held)} engines"
        return held[0]

    def built(self) -> dict:
        """The same engine without what using it changes."""
        return {key: value for key, value in self.engine().items() if key not in ("resident_stacks", "lora_files")}

    def stacks_of(self, nodes: Graph, checkpoint: Path) -> list:
        """[[file, strength], …] of each stack that the prefetch finds in a graph."""
        asked = {"graph": nodes, "checkpoint": str(checkpoint.resolve())}
        return json.loads(http_request(f"{self.server.url}/probe/stacks_of", asked))

    def open_gate(self) -> None:
        """Let a waiting ProbeGate go on."""
        http_request(f"{self.server.url}/probe/open", {})

    def interrupt_at_total(self, total: int) -> None:
        """Cancel the prompt at its first progress bar of that length, soon after that bar's begin."""
        http_request(f"{self.server.url}/probe/interrupt_at_total", {"total": total})

    @property
    def rss_bytes(self) -> int:
        """Memory of the server process."""
        return psutil.Process(self.server.pid).memory_info().rss

    def free(self, *, unload_models: bool, free_memory: bool) -> None:
        """Ask for memory back, and wait until the loaded weights are gone: ComfyUI collects garbage itself then."""
        # ComfyUI's worker overlooks a request that comes while it collects garbage after a prompt, until the next
        # prompt (main.py: it has looked for requests before, and waits for a notification afterwards). So ask again.
        for _ in range(6):
            self.client.free(unload_models=unload_models, free_memory=free_memory)
            again = time.monotonic() + 5
            while time.monotonic() < again:
                state = self.engines()
                if not any(engine["loaded"] for engine in state["held"]) and not any(state["weight_bytes"].values()):
                    return
                time.sleep(0.05)
        pytest.fail(f"/free did not give the weights back: {state}")


@pytest.fixture(scope="module")
def core(pack) -> Iterator[Callable]:
    """ComfyUI in this process, kept on the CPU: `core("nodes.clip")` is a module of the pack that needs it."""
    sys.path.append(str(comfyui.source_path()))
    try:
        import comfy.cli_args

        comfy.cli_args.args.cpu = True
        yield lambda name: importlib.import_module(f"{pack.__name__}.{name}")
    finally:
        sys.path.remove(str(comfyui.source_path()))


@pytest.fixture(scope="session")
def models_cache() -> Path:
    """A models folder that outlives the session: the CLIP-L alone has 250 MB."""
    folder = CACHE / "test-models"
    assets.write_all(folder)
    return folder


@contextlib.contextmanager
def _running(
    models_cache: Path,
    base: Path,
    comfy_args: tuple[str, ...],
    version: str | None,
    newer_core: bool,
    env: Mapping[str, str],
) -> Iterator[Comfy]:
    for source in models_cache.glob("*/*.safetensors"):
        target = base / "models" / source.relative_to(models_cache)
        target.parent.mkdir(parents=True, exist_ok=True)
        _link(source, target)
    # Tiny tensors gain nothing from threads, and lose seconds to them when other programs run. The threshold makes
    # glibc give freed tensors back to the system, or memory that was released would still count as the process's.
    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1048576", **env}
    packs = [PROBE_PACK, NEWER_CORE_PACK] if newer_core else [PROBE_PACK]
    with ComfyServer(base, packs=packs, comfy_args=comfy_args, version=version, env=environment) as server:
        running = Comfy(server, server.client())
        yield running
        running.client.close()


def _link(source: Path, target: Path) -> None:
    """A second name for a file. Tests replace files, and never write into them, so the cached one stays as it is."""
    try:
        os.link(source, target)
    except OSError:
        target.symlink_to(source)


@pytest.fixture(scope="session")
def start_comfy(models_cache, tmp_path_factory) -> Callable:
    """Start a further server: `with start_comfy("--cache-none") as comfy`; see tests/newer_core_pack for the flag.

    A start takes some 15 seconds of a CPU, nearly all of it ComfyUI's imports: ask for a server of one's own only where
    a test leaves something behind in it or starts it with other arguments.
    """

    def start(
        *comfy_args: str, version: str | None = None, newer_core: bool = False, env: Mapping[str, str] | None = None
    ):
        return _running(models_cache, tmp_path_factory.mktemp("comfyui"), comfy_args, version, newer_core, env or {})

    return start


@pytest.fixture(scope="session")
def comfy(start_comfy) -> Iterator[Comfy]:
    """The server that most tests share."""
    with start_comfy() as running:
        yield running


@pytest.fixture(scope="session")
def newer_comfy(start_comfy) -> Iterator[Comfy]:
    """The server that behaves as ComfyUI 0.46, see tests/newer_core_pack, and forgets all but four nodes' outputs."""
    with start_comfy("--cache-lru", "4", newer_core=True) as running:
        yield running


