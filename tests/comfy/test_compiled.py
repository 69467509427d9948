"""A server that compiled: fifty prompts where a recompile is an error; then it starts again, and compiles nothing."""

import os
import random
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo

from harness.graphs import Picture, graph, latents, node, relative_distance
from harness.lora_files import kind_state_dict
from tests.comfy.test_quantize import files, quantized_graph

WORDS = "a red circle on a blue square beside two green stars under the yellow moon"
LORAS = {
    "rank4.safetensors": {"format": "kohya", "rank": 4},
    "rank8.safetensors": {"format": "kohya", "rank": 8, "alpha": 4.0, "seed": 1},
    "rank17.safetensors": {"format": "diffusers", "rank": 17, "seed": 2},
    "rank64.safetensors": {"format": "native", "rank": 64, "seed": 3},
    "mixed.safetensors": {"format": "diffusers", "rank": lambda module: 4 + len(module) % 9, "seed": 4},
}
KRONECKER = "lokr.safetensors"
COMPILED, EAGER = Picture(compile="regional", steps=2), Picture(steps=2)


def random_picture(rng: random.Random, stock: bool = False) -> Picture:
    stack = rng.sample(sorted([*LORAS, KRONECKER]), rng.randint(0, 3))
    return Picture(
        loras=[(name, rng.choice([-0.8, 0.0, 0.35, 0.7, 1.0, 1.6])) for name in stack],
        prompt=" ".join(rng.choices(WORDS.split(), k=rng.choice([3, 30, 90, 200]))),
        negative="blurry",
        seed=rng.randrange(2**32),
        steps=2,
        cfg=rng.choice([1.0, 3.0]),
        width=rng.choice([64, 72, 96, 256]),
        height=rng.choice([64, 104, 128, 256]),
        batch=rng.choice([1, 1, 2]),
        compile="regional",
        stock=stock,
    )


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """The server's temporary folder."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def warm(start_comfy, temporary):
    """A server whose engine has drawn one picture, and in which any further compile is an error from then on.

    Kernels come from the folder that all tests share, by TORCHINDUCTOR_CACHE_DIR; what is traced is the pack's.
    """
    with start_comfy(env=dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))) as comfy:
        for name, options in LORAS.items():
            comfy.lora(name, **options)
        comfy.tensors("loras", KRONECKER, kind_state_dict("LoKr full"))
        comfy.run({"probe": node("ProbeRecompile", size=3)})
        comfy.sample(Picture(compile="regional"))
        assert comfy.engine()["compile_count"] == 2
        comfy.run({"set": node("ProbeErrorOnRecompile")})
        yield comfy


def test_control_recompiles_are_errors_in_this_server(warm):
    result = warm.client.run({"probe": node("ProbeRecompile", size=5)})
    assert result.status == "error"
    assert "Recompil" in result.error.exception_message


def test_fifty_random_prompts(warm):
    rng = random.Random(20261122)
    pictures = [random_picture(rng) for _ in range(50)]
    pending = [(picture, warm.client.queue(graph(picture))) for picture in pictures]
    for number, (picture, prompt_id) in enumerate(pending):
        result = warm.client.wait(prompt_id)
        assert result.status == "success", f"prompt {number} {picture}: {result.error}"
        assert latents(warm.client, result).isfinite().all()
    engine = warm.engine()
    assert (engine["compile_count"], engine["recompile_count"], engine["load_count"]) == (2, 0, 1)


@pytest.mark.parametrize("seed", range(4))
def test_a_random_picture_of_that_kind_equals_stock(warm, seed):
    """So that the fifty were not fast for doing something else."""
    picture = random_picture(random.Random(seed))
    comparison = warm.compare(picture)
    assert comparison.distance < 1e-4
    if picture.loras:
        assert relative_distance(warm.sample(Picture(**{**vars(picture), "loras": ()})), comparison.ours) > 0.01


# A restart.


@pytest.fixture(scope="module")
def lives(warm, temporary):
    """The same two pictures before and after the server starts again, with an empty temporary folder; its two logs."""
    before = draw_both(warm)
    shutil.rmtree(temporary)
    temporary.mkdir()
    warm.restart()
    return before, draw_both(warm)


def draw_both(comfy):
    compiled = comfy.sample(COMPILED)
    quantized = latents(comfy.client, comfy.run(quantized_graph(EAGER, "int8_weight_only")))
    return SimpleNamespace(compiled=compiled, quantized=quantized, log=comfy.server.log)


@pytest.mark.skipif(
    not getattr(torch._dynamo.config, "enable_aot_compile", False), reason="torch 2.9 and 2.11 do not store traces"
)
def test_a_restarted_server_compiles_nothing(warm, lives):
    first, second = lives
    kept = warm.server.models / "flux_hotswap_cache" / "compiled"
    assert len(list(kept.iterdir())) == 1
    compiled = [re.findall(r"compiled the (\w+) blocks in", life.log) for life in lives]
    assert compiled == [["double", "single"], []]
    assert "| compiled 0 | recompiles 0 |" in second.log
    assert torch.equal(first.compiled, second.compiled)


def test_a_restarted_server_reads_the_quantized_weights(warm, lives):
    """Damaged, they are made again, the same to the byte."""
    first, second = lives
    (file,) = files(warm)
    assert file.name.startswith("tiny-flux-dev-fp32-int8_weight_only-")
    said = f"from the cache, {file.name}"
    assert [said in life.log for life in lives] == [False, True]
    assert torch.equal(first.quantized, second.quantized)

    data = file.read_bytes()
    warm.free(unload_models=True, free_memory=True)
    os.unlink(file)
    file.write_bytes(data[: len(data) // 2])
    mark = warm.server.mark()
    again = warm.run(quantized_graph(EAGER, "int8_weight_only"))
    assert torch.equal(latents(warm.client, again), first.quantized)
    assert "made again" in warm.server.log_since(mark)
    assert file.read_bytes() == data
