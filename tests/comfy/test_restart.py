"""ComfyUI starts again in its folder, with an empty temporary one: compiled code and quantized weights were kept."""

import os
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo

from harness.graphs import Picture, graph, latents
from tests.comfy.test_quantize import files, quantized_graph

PICTURE = Picture(model="tiny-flux-dev-fp32.safetensors", dtype="fp32", steps=2)
COMPILED = replace(PICTURE, compile="regional")
COMPILE_TIMEOUT_S = 600


def drawn(comfy, nodes):
    return latents(comfy.client, comfy.client.run(nodes, timeout=COMPILE_TIMEOUT_S, check=True))


@pytest.fixture(scope="module")
def lives(start_comfy, tmp_path_factory):
    """The same two pictures in a server before and after it started again: their latents, and the two logs.

    Kernels come from the folder that all tests share, by TORCHINDUCTOR_CACHE_DIR; what is traced is the pack's.
    """
    temporary = tmp_path_factory.mktemp("temporary")
    with start_comfy(env=dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))) as comfy:
        found = []
        for _ in range(2):
            if found:
                shutil.rmtree(temporary)
                temporary.mkdir()
                comfy.restart()
            pictures = drawn(comfy, graph(COMPILED)), drawn(comfy, quantized_graph(PICTURE, "int8_weight_only"))
            found.append(SimpleNamespace(compiled=pictures[0], quantized=pictures[1], log=comfy.server.log))
        yield comfy, *found


@pytest.mark.skipif(
    not getattr(torch._dynamo.config, "enable_aot_compile", False), reason="torch 2.9 and 2.11 do not store traces"
)
def test_a_restarted_server_compiles_nothing(lives):
    comfy, first, second = lives
    kept = comfy.server.models / "flux_hotswap_cache" / "compiled"
    assert len(list(kept.iterdir())) == 1
    compiled = [re.findall(r"compiled the (\w+) blocks in", life.log) for life in (first, second)]
    assert compiled == [["double", "single"], []]
    assert "| compiled 0 | recompiles 0 |" in second.log
    assert torch.equal(first.compiled, second.compiled)


def test_a_restarted_server_reads_the_quantized_weights(lives):
    """Damaged, they are made again, the same to the byte."""
    comfy, first, second = lives
    (file,) = files(comfy)
    assert file.name.startswith("tiny-flux-dev-fp32-int8_weight_only-")
    said = f"from the cache, {file.name}"
    assert [said in life.log for life in (first, second)] == [False, True]
    assert torch.equal(first.quantized, second.quantized)

    data = file.read_bytes()
    comfy.free(unload_models=True, free_memory=True)
    os.unlink(file)
    file.write_bytes(data[: len(data) // 2])
    mark = comfy.server.mark()
    assert torch.equal(drawn(comfy, quantized_graph(PICTURE, "int8_weight_only")), first.quantized)
    assert "made again" in comfy.server.log_since(mark)
    assert file.read_bytes() == data
