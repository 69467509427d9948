"""Wrong files and wrong graphs: an error at the node that says what to do, and nothing else changes."""

import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from harness import broken_files
from harness.graphs import Picture, graph, latents, node, relative_distance
from harness.lora_files import lora_state_dict

DEV = Picture(model="tiny-flux-dev-fp32.safetensors")
BF16 = replace(DEV, model="tiny-flux-dev-bf16.safetensors")

UNREADABLE = {
    "empty": ("empty (0 bytes)", "Get it again"),
    "truncated": ("is truncated", "get it again"),
    "truncated_header": ("is damaged", "get it again"),
    "html_page": ("holds a web page", "Download it again while signed in"),
    "giant_header": ("announce a header of 4,611,686,018,427,387,904 bytes", "get it again"),
    "garbage_header": ("its header is not the JSON of a safetensors file", "Get it again"),
    "offsets_outside": ("is truncated", "get it again"),
}
WRONG_LORAS = {
    "lora_nan": ("lora_unet_double_blocks_1_img_mlp_0.lora_up.weight", "NaN or infinity", "choose another file"),
    "lora_wrong_width": ("expected (rank, 256)", "a model of another size"),
    "lora_rank_mismatch": ("single_blocks.1.linear2.lora_A.weight' has rank 8", "has rank 4", "get it again"),
    "lora_missing_up": ("'lora_unet_single_blocks_0_linear1' has", "no lora_up / lora_B matrix", "get it again"),
    "lora_unknown_key": (
        "2 of 74 keys have no place", "lora_unet_double_blocks_0_img_attn_gate", "choose a file without them"),
    "lora_no_pairs": ("holds nothing for the FLUX.1 transformer", "1 keys of a trained embedding", "Choose a file"),
    "sdxl_lora": ("does not fit FLUX.1", "Stable Diffusion XL", "Expected names like"),
}
WRONG_CHECKPOINTS = {
    "sdxl_checkpoint": ("a Stable Diffusion or SDXL checkpoint", "expected a FLUX.1", "Choose a file such as"),
    "flux_vae": ("is a VAE", "expected a FLUX.1", "Choose a file such as"),
    "flux_missing_block": ("single_blocks.0 is missing", "single_blocks.1 is there", "get it again"),
    "flux_missing_tensor": ("1 of ", "double_blocks.1.txt_mlp.2.bias", "get the complete transformer"),
    "flux_wrong_shape": ("'double_blocks.1.img_mlp.0.weight' has shape (1024, 128), expected (1024, 256)", "damaged"),
    "flux_nan": ("'single_blocks.1.linear2.weight' holds NaN", "get it again"),
}
# Only reading its values can show this one, and values are read when sampling starts.
FOUND_BY_SAMPLING = ("flux_nan",)


@pytest.fixture
def undisturbed(comfy):
    """After the test, a picture with a LoRA and one without are bit for bit what they were before."""
    lora = comfy.lora("good.safetensors", "kohya", rank=8, alpha=4.0, seed=91)
    pictures = [DEV, replace(DEV, loras=[(lora, 0.9)])]
    before = comfy.samples(*pictures)
    assert relative_distance(*before) >= 0.05
    yield lora
    # without ComfyUI's cache: the LoRA is on another picture first
    comfy.sample(replace(pictures[1], seed=1000))
    result = comfy.run(graph(*pictures))
    assert [torch.equal(latents(comfy.client, result, index), before[index]) for index in (0, 1)] == [True, True]


def error_of(comfy, nodes, at):
    """The message of the error that a graph ends with, at that node."""
    result = comfy.client.run(nodes)
    assert result.status == "error"
    assert result.error.node_id == at, result.error
    return result.error.exception_message


def assert_says(message, *words):
    for word in words:
        assert word in message, message
    assert "Traceback" not in message


def test_every_broken_file_is_tested():
    for table, functions in (
        (UNREADABLE, broken_files.UNREADABLE),
        (WRONG_LORAS, broken_files.WRONG_LORAS),
        (WRONG_CHECKPOINTS, broken_files.WRONG_CHECKPOINTS),
    ):
        assert set(table) == {function.__name__ for function in functions}


@pytest.mark.parametrize("kind", [*UNREADABLE, *WRONG_LORAS])
def test_wrong_lora_file(comfy, undisturbed, kind):
    name = f"{kind}.safetensors"
    getattr(broken_files, kind)(comfy.model_file("loras", name))
    # on top of a good one, with which the engine is bound already
    picture = replace(DEV, loras=[(undisturbed, 0.9), (name, 1.0)])
    assert_says(error_of(comfy, graph(picture), "p0_lora1"), name, *{**UNREADABLE, **WRONG_LORAS}[kind])


@pytest.mark.parametrize("kind", [*UNREADABLE, *WRONG_CHECKPOINTS])
def test_wrong_checkpoint_file(comfy, undisturbed, kind):
    name = f"{kind}.safetensors"
    getattr(broken_files, kind)(comfy.model_file("diffusion_models", name))
    at = "p0_sample" if kind in FOUND_BY_SAMPLING else "p0_model"
    message = error_of(comfy, graph(replace(DEV, model=name)), at)
    assert_says(message, name, *{**UNREADABLE, **WRONG_CHECKPOINTS}[kind])


def test_a_wrong_checkpoint_does_not_evict_the_engine(comfy, undisturbed):
    engine = comfy.engine()
    broken_files.flux_vae(comfy.model_file("diffusion_models", "some-vae.safetensors"))
    error_of(comfy, graph(replace(DEV, model="some-vae.safetensors")), "p0_model")
    assert comfy.engine() == engine


def test_attention_that_cannot_run_here(comfy, undisturbed):
    choices = comfy.client.object_info("FluxAccelLoader")["FluxAccelLoader"]["input"]["required"]["attention"]
    assert {"auto", "sdpa", "cudnn", "flash_2", "flash_3", "flash_4", "sage", "xformers", "flex", "onednn"} == set(
        choices[1]["options"]
    )
    for name, reason in (("flash_3", "needs an NVIDIA card of compute capability 9.x"), ("flex", "runs compiled only")):
        nodes = graph(replace(DEV, compile="off"))
        nodes["p0_model"]["inputs"]["attention"] = name
        message = error_of(comfy, nodes, "p0_model")
        assert_says(message, f"attention '{name}' {reason}", "The nearest that runs here is 'sdpa'")


@pytest.mark.parametrize("native", [False, True], ids=["Hotswap LoRA", "Load LoRA"])
def test_a_lora_for_dev_on_schnell_equals_stock(comfy, undisturbed, native):
    """schnell has no guidance embedder: what is for it is left out, and said."""
    name = comfy.lora("for-dev.safetensors", "diffusers", seed=92)
    picture = replace(DEV, model="tiny-flux-schnell-fp32.safetensors", loras=[(name, 1.0)])

    def by_comfyui(nodes, prefix):
        if native:
            inputs = nodes[f"{prefix}lora0"]["inputs"]
            nodes[f"{prefix}lora0"] = node(
                "LoraLoaderModelOnly", model=inputs["model"], lora_name=name, strength_model=1.0
            )

    mark = comfy.server.mark()
    compared = comfy.compare(picture, plain=replace(picture, loras=()), edit=by_comfyui)
    assert compared.distance < 1e-4
    assert compared.effect > 0.02
    said = "guidance_in" if native else "4 not used: of the guidance embedder"
    assert said in comfy.server.log_since(mark)


def test_a_lora_that_is_switched_off_is_not_read(comfy, undisturbed):
    """As stock: strength 0 is how people mute a node, whatever its file is."""
    broken_files.lora_nan(comfy.model_file("loras", "muted.safetensors"))
    assert torch.equal(comfy.sample(replace(DEV, loras=[("muted.safetensors", 0.0)])), comfy.sample(DEV))


def test_a_lora_is_called_what_the_user_chose(comfy, undisturbed):
    """With its folder; and by the name of a link, not by the file that it leads to."""
    blob = comfy.lora("4f1a9ce0b2d7", "kohya", seed=95)
    folder = comfy.model_file("loras", "characters/ada.safetensors").parent
    folder.mkdir(exist_ok=True)
    link = folder / "ada.safetensors"
    link.unlink(missing_ok=True)
    link.symlink_to(comfy.model_file("loras", blob))
    name, mark = "characters/ada.safetensors", comfy.server.mark()
    comfy.sample(replace(DEV, loras=[(name, 0.7)]))
    nodes = graph(replace(DEV, loras=[(name, 0.6)]))
    nodes["p0_lora0"] = node(
        "LoraLoaderModelOnly", model=nodes["p0_lora0"]["inputs"]["model"], lora_name=name, strength_model=0.6
    )
    comfy.run(nodes)
    log = comfy.server.log_since(mark)
    assert "LoRAs characters/ada.safetensors × 0.7" in log
    assert "LoRAs characters/ada.safetensors × 0.6" in log
    comfy.model_file("loras", blob).write_bytes(b"<html>")
    assert_says(error_of(comfy, graph(replace(DEV, loras=[(name, 0.7)])), "p0_lora0"), "'ada.safetensors'", "web page")


@pytest.mark.parametrize("value", [float("inf"), float("-inf")], ids=str)
def test_infinite_lora(comfy, undisturbed, value):
    tensors = lora_state_dict("native", seed=93)
    tensors["diffusion_model.img_in.lora_A.weight"][0, 0] = value
    name = comfy.tensors("loras", f"infinite{value}.safetensors", tensors)
    message = error_of(comfy, graph(replace(DEV, loras=[(name, 1.0)])), "p0_lora0")
    assert_says(message, name, "diffusion_model.img_in.lora_A.weight", "NaN or infinity")


def test_nan_alpha(comfy, undisturbed):
    tensors = lora_state_dict("kohya", alpha=4.0, seed=93)
    tensors["lora_unet_img_in.alpha"] = torch.tensor(float("nan"))
    name = comfy.tensors("loras", "nan-alpha.safetensors", tensors)
    message = error_of(comfy, graph(replace(DEV, loras=[(name, 1.0)])), "p0_lora0")
    assert_says(message, name, "lora_unet_img_in.alpha", "NaN or infinity")


def test_lora_only_for_the_text_encoder(comfy, undisturbed):
    tensors = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4, 768),
               "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.zeros(3072, 4)}
    name = comfy.tensors("loras", "only-text.safetensors", tensors)
    message = error_of(comfy, graph(replace(DEV, loras=[(name, 1.0)])), "p0_lora0")
    assert_says(message, name, "only text encoders", "Connect clip")


def test_a_strength_that_overflows(comfy, undisturbed):
    """fp16 ends at 65504: refused while binding, and the LoRA that was bound stays."""
    name = comfy.lora("strong.safetensors", "kohya", rank=1, alpha=1.0, scale=1000.0, seed=94)
    picture = replace(DEV, dtype="fp16", loras=[(name, 0.001)])
    before, mark = comfy.sample(picture), comfy.server.mark()
    message = error_of(comfy, graph(replace(picture, loras=[(name, 100.0)])), "p0_sample")
    assert_says(message, name, "100", "overflows", "lower the strength")
    assert "Flux Hotswap: LoRAs" not in comfy.server.log_since(mark)  # it was never bound
    again = comfy.run(graph(picture))
    assert torch.equal(latents(comfy.client, again), before)


# Files that go while the prompt is on its way.


def wait_until_running(comfy, prompt):
    deadline = time.monotonic() + 30
    while comfy.client.queue_state()["running"] != [prompt]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def behind_a_gate(comfy, nodes, meanwhile):
    """Queue a prompt that waits, then the graph; do something while the graph is in the queue."""
    gate = graph(DEV)
    gate["p0_gate"] = node("ProbeGate", latent=["p0_empty", 0])
    gate["p0_sample"]["inputs"]["latent_image"] = ["p0_gate", 0]
    first = comfy.client.queue(gate)
    second = comfy.client.queue(nodes)
    wait_until_running(comfy, first)
    assert comfy.client.queue_state()["pending"] == [second]
    meanwhile()
    comfy.open_gate()
    assert comfy.client.wait(first).status == "success"
    return comfy.client.wait(second)


def test_lora_deleted_between_queueing_and_running(comfy, undisturbed):
    name = comfy.lora("deleted.safetensors", seed=95)
    path = comfy.model_file("loras", name)
    result = behind_a_gate(comfy, graph(replace(DEV, loras=[(name, 1.0)])), path.unlink)
    assert result.status == "error"
    assert result.error.node_id == "p0_lora0"
    assert_says(result.error.exception_message, name, "loras", "Put it back", "choose another file")


def test_lora_broken_between_queueing_and_running(comfy, undisturbed):
    name = comfy.lora("breaks.safetensors", seed=96)
    path = comfy.model_file("loras", name)
    result = behind_a_gate(comfy, graph(replace(DEV, loras=[(name, 1.0)])), lambda: broken_files.html_page(path))
    assert result.status == "error"
    assert result.error.node_id == "p0_lora0"
    assert_says(result.error.exception_message, name, "web page")


def test_checkpoint_deleted_between_queueing_and_running(comfy, undisturbed):
    name = comfy.checkpoint("deleted.safetensors", seed=97)
    path = comfy.model_file("diffusion_models", name)
    result = behind_a_gate(comfy, graph(replace(DEV, model=name)), path.unlink)
    assert result.status == "error"
    assert result.error.node_id == "p0_model"
    assert_says(result.error.exception_message, name, "diffusion_models", "Put it back", "choose another file")


def test_lora_deleted_after_it_was_used(comfy, undisturbed):
    """What ComfyUI has cached may be drawn; but a LoRA that is gone is never left out silently."""
    name = comfy.lora("gone.safetensors", seed=98)
    comfy.sample(replace(DEV, loras=[(name, 1.0)]))
    nodes = graph(replace(DEV, loras=[(name, 1.0)], seed=2))
    result = behind_a_gate(comfy, nodes, comfy.model_file("loras", name).unlink)
    assert result.status == "error"
    assert result.error.node_id == "p0_lora0"
    assert_says(result.error.exception_message, name, "Put it back")


def test_checkpoint_changed_while_it_is_unloaded(comfy, undisturbed):
    name = comfy.checkpoint("swapped.safetensors", seed=99)
    comfy.sample(replace(DEV, model=name))
    comfy.free(unload_models=True, free_memory=False)
    comfy.checkpoint(name, seed=100)
    copy = comfy.checkpoint("swapped-stock.safetensors", seed=100)
    new = comfy.sample(replace(DEV, model=name, seed=2))
    assert relative_distance(new, comfy.sample(replace(DEV, model=copy, stock=True, seed=2))) <= 1e-4


# Files that look odd and are fine.


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_lora_in_few_bits_works(comfy, dtype):
    stored = {key: tensor.to(dtype) for key, tensor in lora_state_dict("diffusers", rank=8, seed=101).items()}
    name = comfy.tensors("loras", f"few-bits-{dtype}.safetensors", stored)
    # stock ComfyUI gets the same numbers in float32: what it does with float8 is not the question here
    exact = {key: tensor.float() for key, tensor in stored.items()}
    copy = comfy.tensors("loras", f"few-bits-{dtype}-stock.safetensors", exact)
    ours, stock, plain = comfy.samples(
        replace(DEV, loras=[(name, 1.0)]), replace(DEV, loras=[(copy, 1.0)], stock=True), replace(DEV, stock=True))
    assert relative_distance(ours, stock) <= 1e-4
    assert relative_distance(stock, plain) >= 0.05


def test_a_header_that_begins_like_a_pickle_works(comfy):
    """A header of 640 bytes makes the file begin with 80 02, which is how pickles begin."""
    tensors = lora_state_dict("native", targets=lambda module: module == "img_in", scale=2.0)
    path = comfy.model_file("loras", "pickle-like.safetensors")
    for length in range(600):
        save_file(tensors, path, metadata={"pad": "x" * length})
        if path.read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no padding gives a header of 640 bytes")
    ours, stock, plain = comfy.samples(
        replace(DEV, loras=[(path.name, 1.0)]), replace(DEV, loras=[(path.name, 1.0)], stock=True), DEV)
    assert relative_distance(ours, stock) <= 1e-4
    assert relative_distance(ours, plain) >= 0.05


# Graphs that ask for what cannot be done.


def test_hotswap_lora_on_another_model(comfy, undisturbed):
    nodes = graph(replace(DEV, stock=True))
    nodes["lora"] = node("FluxHotswapLora", model=["p0_model", 0], lora_name=undisturbed, strength=1.0)
    nodes["p0_sample"]["inputs"]["model"] = ["lora", 0]
    message = error_of(comfy, nodes, "lora")
    assert_says(message, "Accelerated Flux Loader", "Load LoRA", "Flux")


@pytest.mark.parametrize(
    ("class_type", "inputs", "words"),
    [
        ("ModelSave", {"filename_prefix": "saved"}, ["cannot be saved", "tiny-flux-dev-fp32.safetensors"]),
        ("ModelMergeSimple", {"model2": ["p1_model", 0], "ratio": 0.5}, ["cannot be merged", "Load Diffusion Model"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_weights_in_place_would_need(comfy, undisturbed, class_type, inputs, words):
    nodes = graph(DEV, replace(DEV, seed=2))
    model = {"model1" if class_type == "ModelMergeSimple" else "model": ["p0_model", 0]}
    nodes["odd"] = node(class_type, **model, **inputs)
    nodes["p0_sample"]["inputs"]["model"] = ["odd", 0] if class_type != "ModelSave" else ["p0_model", 0]
    assert_says(error_of(comfy, nodes, "odd"), "accelerated FLUX.1 model", *words)


def test_merging_into_a_stock_model_is_refused_too(comfy, undisturbed):
    nodes = graph(replace(DEV, stock=True), DEV)
    nodes["odd"] = node("ModelMergeSimple", model1=["p0_model", 0], model2=["p1_model", 0], ratio=0.5)
    nodes["p0_sample"]["inputs"]["model"] = ["odd", 0]
    assert_says(error_of(comfy, nodes, "odd"), "cannot be merged")


def test_torch_compile_downstream_warns_and_is_still_right(comfy, undisturbed):
    mark = comfy.server.mark()

    def compiled(nodes, prefix):
        nodes["compile"] = node("TorchCompileModel", model=["p0_lora0", 0], backend="inductor")
        nodes["p0_sample"]["inputs"]["model"] = ["compile", 0]

    picture = replace(DEV, loras=[(undisturbed, 0.9)])
    plain = comfy.sample(replace(picture, seed=3))
    drawn = comfy.sample(replace(picture, seed=3), edit=compiled)
    assert torch.equal(drawn, plain)
    assert "TorchCompileModel has no effect on the accelerated model" in comfy.server.log_since(mark)


@pytest.mark.parametrize("method", ["index_timestep_zero"])
def test_reference_method_that_is_not_supported(comfy, undisturbed, method):
    nodes = graph(DEV)
    nodes["reference"] = node("ReferenceLatent", conditioning=["p0_guidance", 0], latent=["p0_empty", 0])
    nodes["method"] = node(
        "FluxKontextMultiReferenceLatentMethod", conditioning=["reference", 0], reference_latents_method=method)
    nodes["p0_sample"]["inputs"]["positive"] = ["method", 0]
    message = error_of(comfy, nodes, "p0_sample")
    assert_says(message, method, "offset, index, uxo", "FluxKontextMultiReferenceLatentMethod")
