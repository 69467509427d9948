"""ComfyUI starts again, with an empty temporary folder: the first image comes from compiled code that was kept."""

import os
import re
import shutil

import pytest
import torch
import torch._dynamo

from harness.graphs import Picture, graph, latents
from harness.server import ComfyServer

PICTURE = Picture(model="tiny-flux-dev-fp32.safetensors", compile="regional", steps=2)


@pytest.mark.skipif(
    not getattr(torch._dynamo.config, "enable_aot_compile", False), reason="torch 2.9 and 2.11 do not store traces"
)
def test_a_restarted_server_compiles_nothing(models_cache, tmp_path):
    """Kernels come from the folder that all tests share, by TORCHINDUCTOR_CACHE_DIR; what is traced is the pack's."""
    base, temporary = tmp_path / "comfyui", tmp_path / "temp"
    shutil.copytree(models_cache, base / "models", copy_function=_link)
    logs, drawn = [], []
    for _ in range(2):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        environment = {"OMP_NUM_THREADS": "1", "TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
        with ComfyServer(base, env=environment) as server, server.client() as client:
            result = client.run(graph(PICTURE), timeout=600, check=True)
            drawn.append(latents(client, result))
            logs.append(server.log)
    kept = base / "models" / "flux_hotswap_cache" / "compiled"
    assert len(list(kept.iterdir())) == 1
    compiled = [re.findall(r"compiled the (\w+) blocks in", log) for log in logs]
    assert compiled == [["double", "single"], []]
    assert "| compiled 0 | recompiles 0 |" in logs[1]
    assert torch.equal(*drawn)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copy2(source, target)
