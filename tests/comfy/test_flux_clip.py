"""The CLIP of Flux Text Encoder Loader within ComfyUI's own code, in this process: what it encodes and remembers.

ComfyUI's stock FLUX CLIP loads a small T5 when it is told the sizes, which is the reference wherever both can load.
"""

import importlib
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file

from harness import text_encoder_files as files
from harness.graphs import relative_distance
from harness.tensor_files import write_tensors
from harness.tiny_models import seeded_normal
from harness.tiny_others import TinyT5Config, tiny_clip_l_state_dict, tiny_t5_state_dict

CPU = torch.device("cpu")
PROMPT = "a red fox jumps over the blue moon"
WEIGHTED = "a (red:1.3) fox ((jumps)) over [the] (blue:0.4) moon"
LONG = "a very long prompt about many things, " * 60
T5_SIZES = {"num_layers": 2, "d_model": 128, "d_ff": 256, "d_kv": 32, "num_heads": 4}
CLIP_SIZES = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 2}
# |ours − fp32| / |fp32| of T5's output, measured 0.0106, 0.0506, 0.135.
DISTANCE = {"int8": 0.015, "fp8": 0.07, "nf4": 0.18}


@pytest.fixture(scope="module")
def flux_clip(core):
    """The pack's module of FLUX.1's CLIP."""
    return core("nodes.families.flux1.clip")


@pytest.fixture(autouse=True)
def inference():
    """ComfyUI runs nodes in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("encoders")
    written = files.write_formats(folder, tiny_t5_state_dict())
    written["clip"] = write_tensors(folder / "clip.safetensors", tiny_clip_l_state_dict(hidden=128, layers=2))
    return written


@pytest.fixture
def make(flux_clip, paths, core):
    """`make("fp16", "nf4")`: a CLIP from one of the files."""
    spec, checkpoint = core("accel.text_encoder.recognise"), core("accel.checkpoint")

    def build(t5="fp16", mode="none", clip="clip", embeddings=None):
        t5_spec = spec.encoder_spec(checkpoint.read_file(str(paths.get(t5, t5))))
        clip_spec = clip and spec.clip_spec(checkpoint.read_file(str(paths[clip])))
        return flux_clip.FluxClip(t5_spec, clip_spec, mode, CPU, CPU, embeddings)

    return build


@pytest.fixture
def stock(flux_clip, paths):
    """ComfyUI's own FLUX CLIP with the sizes of the small encoders."""
    import comfy.sd
    import comfy.utils

    def build(t5="fp16"):
        state_dict, metadata = comfy.utils.load_torch_file(str(paths[t5]), return_metadata=True)
        options = {"t5xxl_model_config": T5_SIZES, "model_config": dict(CLIP_SIZES)}  # the latter is for CLIP-L
        state_dict, metadata = comfy.utils.convert_old_quants(state_dict, model_prefix="", metadata=metadata)
        quantized = comfy.utils.detect_layer_quantization(state_dict, "")
        if quantized is not None:
            options["t5xxl_quantization_metadata"] = quantized
        return comfy.sd.load_text_encoder_state_dicts(
            [comfy.utils.load_torch_file(str(paths["clip"])), state_dict],
            clip_type=comfy.sd.CLIPType.FLUX,
            model_options=options,
            disable_dynamic=True,
        )

    return build


def encode(clip, text=PROMPT, t5_text=None):
    """As CLIPTextEncode does, or CLIPTextEncodeFlux with two texts: T5's states and the pooled vector."""
    tokens = clip.tokenize(text)
    if t5_text is not None:
        tokens["t5xxl"] = clip.tokenize(t5_text)["t5xxl"]
    [[cond, extra]] = clip.encode_from_tokens_scheduled(tokens, add_dict={"guidance": 3.5})
    assert extra["guidance"] == 3.5
    return cond, extra["pooled_output"]


def same(ours, theirs) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def counts(clip) -> dict:
    return dict(clip.cond_stage_model.encode_counts)


def lora(part: str, seed: int = 5) -> dict[str, torch.Tensor]:
    """A kohya / OneTrainer LoRA on one layer of each kind of an encoder."""
    layers = {
        "clip_l": [f"lora_te1_text_model_encoder_layers_{i}_self_attn_q_proj" for i in (0, 1)],
        "t5xxl": [f"lora_te2_encoder_block_{i}_layer_0_SelfAttention_v" for i in (0, 1)],
    }[part]
    tensors = {}
    for layer in layers:
        tensors[f"{layer}.lora_down.weight"] = seeded_normal(seed, f"{layer}.down", (4, 128), 0.2)
        tensors[f"{layer}.lora_up.weight"] = seeded_normal(seed, f"{layer}.up", (128, 4), 0.2)
        tensors[f"{layer}.alpha"] = torch.tensor(2.0)
    return tensors


def with_lora(clip, *parts: str, strength: float = 0.8):
    import comfy.sd

    tensors = {key: value for part in parts for key, value in lora(part).items()}
    return comfy.sd.load_lora_for_models(None, clip, tensors, 0.0, strength)[1]


# What it encodes.


@pytest.mark.parametrize("layer", [None, -2])
@pytest.mark.parametrize("text", [PROMPT, WEIGHTED, LONG, ""], ids=["plain", "weights", "long", "empty"])
def test_bit_equal_to_stock(make, stock, text, layer):
    ours, theirs = make(), stock()
    for clip in (ours, theirs):
        clip.clip_layer(layer)
    assert same(encode(ours, text), encode(theirs, text))


def test_prompt_weights_and_two_texts_matter(make, stock):
    ours, theirs = make(), stock()
    plain = encode(ours)
    assert relative_distance(encode(ours, WEIGHTED)[0], plain[0]) > 0.05
    both = encode(ours, PROMPT, "another text for the T5")
    assert same(both, encode(theirs, PROMPT, "another text for the T5"))
    assert torch.equal(both[1], plain[1])
    assert relative_distance(both[0], plain[0]) > 0.05


@pytest.mark.parametrize("name", ["scaled-old", "scaled-new", "scaled-rows", "scaled-metadata"])
def test_scaled_fp8_equals_stock(make, stock, name):
    ours, theirs = encode(make(name)), encode(stock(name))
    # ComfyUI keeps the scale in its own order of operations; without scales the distance is over 1.
    assert relative_distance(ours[0], theirs[0]) < 1e-5
    assert torch.equal(ours[1], theirs[1])


def test_float32_equals_transformers(make):
    config = transformers.T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", dropout_rate=0.0, **T5_SIZES)
    reference = transformers.T5EncoderModel(config).eval()
    tensors = tiny_t5_state_dict()
    reference.load_state_dict({**tensors, "encoder.embed_tokens.weight": tensors["shared.weight"]})
    clip = make("fp32")
    ids = torch.tensor([[token for token, _ in clip.tokenize(PROMPT)["t5xxl"][0]]])
    expected = reference(input_ids=ids).last_hidden_state
    assert relative_distance(encode(clip)[0], expected) < 1e-5
    for mode, limit in DISTANCE.items():
        distance = relative_distance(encode(make("fp32", mode))[0], expected)
        assert limit / 4 < distance < limit


def test_any_sizes(make, tmp_path):
    path = write_tensors(tmp_path / "t5.safetensors", tiny_t5_state_dict(TinyT5Config(3, 64, 96, 2, 16)))
    cond, pooled = encode(make(str(path), "nf4"))
    assert (cond.shape, pooled.shape) == ((1, 256, 64), (1, 128))


def test_without_clip_l(make):
    clip = make(clip=None)
    cond, pooled = encode(clip)
    assert torch.equal(pooled, torch.zeros(1, 768))
    assert torch.equal(cond, encode(make())[0])
    assert counts(clip) == {"t5xxl": 1, "l": 0}


def test_embedding_files(make, stock, tmp_path):
    tensors = {"t5xxl": seeded_normal(0, "t5xxl", (3, 128)), "clip_l": seeded_normal(0, "clip_l", (2, 128))}
    path = write_tensors(tmp_path / "style.safetensors", tensors)
    ours, theirs = make(embeddings=[str(tmp_path)]), stock()
    for tokenizer in (theirs.tokenizer.t5xxl, theirs.tokenizer.clip_l):
        tokenizer.embedding_directory = [str(tmp_path)]
    text = "a fox, embedding:style in the (moon:1.2)"
    first = encode(ours, text)
    assert same(first, encode(theirs, text))
    assert relative_distance(first[0], encode(ours, "a fox, in the (moon:1.2)")[0]) > 0.05
    # The same prompt with another content of that file is another prompt.
    write_tensors(path, {name: tensor + 1.0 for name, tensor in tensors.items()})
    second = encode(ours, text)
    assert same(second, encode(theirs, text))
    assert relative_distance(second[0], first[0]) > 0.01


# What it remembers.


def test_a_prompt_is_encoded_once(make):
    clip = make("fp16", "int8")
    first = encode(clip)
    assert counts(clip) == {"t5xxl": 1, "l": 1}
    assert same(encode(clip), first)
    assert same(encode(clip.clone()), first)
    assert counts(clip) == {"t5xxl": 1, "l": 1}
    encode(clip, "another prompt")
    encode(clip, f"({PROMPT}:1.1)")
    assert counts(clip) == {"t5xxl": 3, "l": 3}
    encode(clip, "a third", PROMPT)  # T5 knows this text
    assert counts(clip) == {"t5xxl": 3, "l": 4}


def test_changing_what_one_gets_does_not_change_the_memory(make):
    clip = make()
    first = encode(clip)
    kept = [tensor.clone() for tensor in first]
    for tensor in (*first, *encode(clip)):
        tensor.zero_()
    assert same(encode(clip), kept)


def test_layer_option(make, stock):
    clip, theirs = make(), stock()
    plain = encode(clip)
    skipped = clip.clone()
    skipped.clip_layer(-2)
    theirs.clip_layer(-2)
    assert same(encode(skipped), encode(theirs))
    assert not same(encode(skipped), plain)
    assert same(encode(clip), plain)
    assert counts(clip) == {"t5xxl": 2, "l": 2}


def test_loras_make_only_their_encoder_run_again(make):
    clip = make("fp16", "int8")
    plain = encode(clip)
    for_clip = with_lora(clip, "clip_l")
    changed = encode(for_clip)
    assert torch.equal(changed[0], plain[0])
    assert relative_distance(changed[1], plain[1]) > 0.02
    assert counts(clip) == {"t5xxl": 1, "l": 2}
    assert same(encode(for_clip.clone()), changed)
    assert counts(clip) == {"t5xxl": 1, "l": 2}
    other = encode(with_lora(clip, "clip_l", strength=-0.5))
    assert relative_distance(other[1], changed[1]) > 0.02
    for_t5 = encode(with_lora(clip, "t5xxl"))
    assert relative_distance(for_t5[0], plain[0]) > 0.02
    assert torch.equal(for_t5[1], plain[1])
    assert same(encode(clip), plain)
    assert counts(clip) == {"t5xxl": 2, "l": 3}


def test_remembered_prompts_need_no_weights(make):
    clip = make("fp16", "nf4")
    first = encode(clip)
    clip.patcher.detach()
    assert all(parameter.is_meta for name, parameter in clip.cond_stage_model.named_parameters() if "logit" not in name)
    assert same(encode(clip), first)
    assert not clip.cond_stage_model.loaded
    encode(clip, "another prompt")
    assert clip.cond_stage_model.loaded
    clip.cache.clear()
    assert same(encode(clip), first)


def test_nothing_is_read_before_the_first_prompt(make):
    import comfy.model_management

    clip = make("bf16", "int8")
    announced = clip.patcher.model_size()
    assert not clip.cond_stage_model.loaded
    encode(clip)
    assert clip.cond_stage_model.loaded
    held = sum(parameter.untyped_storage().nbytes() for parameter in clip.cond_stage_model.parameters())
    assert held == announced == comfy.model_management.module_size(clip.cond_stage_model)


def test_weights_go_when_memory_is_scarce(make, core, monkeypatch):
    clip = make("fp16", "int8")
    changed = with_lora(clip, "clip_l", "t5xxl")
    expected, plain = encode(changed), encode(clip)
    clip.cache.clear()
    monkeypatch.setattr(core("nodes.clip"), "host_memory_is_scarce", lambda: True)
    for clone, known in ((changed, expected), (clip, plain), (changed, expected)):
        clip.cache.clear()
        assert same(encode(clone), known)
        assert not clip.cond_stage_model.loaded


# LoRAs and partial loading.


@pytest.mark.parametrize("mode", ["none", "int8", "fp8", "nf4"])
def test_loras_on_a_quantized_t5(make, tmp_path, mode):
    """The LoRA is added to the weight that the quantized layer computes with, and nothing is rounded again."""
    quantized = make("fp32", mode)
    plain = encode(quantized)
    prefix, tensors = "t5xxl.transformer.", tiny_t5_state_dict()
    for name, layer in quantized.cond_stage_model.quantized.items():
        tensors[name.removeprefix(prefix)] = layer.dequantize(torch.float32, CPU).clone()
    path = write_tensors(tmp_path / "expanded.safetensors", {k: v.contiguous() for k, v in tensors.items()})
    expanded = make(str(path))
    assert relative_distance(plain[0], encode(expanded)[0]) < 1e-5
    ours, theirs = (encode(with_lora(clip, "clip_l", "t5xxl")) for clip in (quantized, expanded))
    assert relative_distance(ours[0], theirs[0]) < 1e-5
    assert torch.equal(ours[1], theirs[1])
    assert relative_distance(ours[0], plain[0]) > 0.02
    assert same(encode(quantized), plain)


@pytest.fixture
def patch_clip(pack, flux_clip, tmp_path):
    """`patch_clip(clip, tensors, strength)`: what Hotswap LoRA does with the keys for text encoders."""
    module = importlib.import_module(f"{pack.__name__}.nodes.clip_lora")

    def patch(clip, tensors, strength=0.8):
        path = write_tensors(tmp_path / "lora.safetensors", tensors)
        return module.patch_clip(clip, str(path), list(tensors), strength)

    return patch


# Encoder -> the layers of `lora`, and what others put before them.
SPELLINGS = {
    "clip_l": ("text_model.encoder.layers.{}.self_attn.q_proj", [
        "text_encoder.", "clip_l.", "te1.", "text_encoders.clip_l.transformer.", "base_model.model.text_encoder."]),
    "t5xxl": ("encoder.block.{}.layer.0.SelfAttention.v", [
        "text_encoder_2.", "t5.", "t5xxl.transformer.", "te2.", "lora_te3_", "text_encoder_2.base_model.model."]),
}  # fmt: skip


@pytest.mark.parametrize("part", SPELLINGS)
def test_every_spelling_of_a_lora_is_the_one_that_stock_reads(make, patch_clip, part):
    clip, (layer, prefixes) = make(), SPELLINGS[part]
    expected = encode(with_lora(clip, part))
    for prefix in prefixes:
        tensors = {}
        for key, tensor in lora(part).items():
            end = key.partition(".")[2]
            spelled = layer.format(re.search(r"(?:layers|block)_(\d)", key)[1])
            tensors[f"{prefix}{spelled.replace('.', '_') if prefix[-1] == '_' else spelled}.{end}"] = tensor
        patched, found = patch_clip(clip, tensors)
        assert (found.applied, found.left) == (6, {}), prefix
        assert same(encode(patched), expected), prefix
    assert not clip.patcher.patches


@pytest.mark.parametrize("mode", ["none", "int8"])
def test_what_stock_would_drop_in_silence_is_named(make, patch_clip, mode):
    clip = make(mode=mode)
    wrong = {f"lora_te3_encoder_block_1_layer_1_DenseReluDense_wo.lora_{role}.weight": torch.ones(4, 4)
             for role in ("down", "up")}  # fmt: skip
    unknown = {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 128)}
    patched, found = patch_clip(clip, {**lora("clip_l"), **lora("t5xxl"), **wrong, **unknown})
    assert found.applied == 12
    assert set(found.left.values()) == {tuple(wrong), tuple(unknown)}
    assert same(encode(patched), encode(with_lora(clip, "clip_l", "t5xxl")))


def test_kinds_of_a_text_encoder_lora_equal_stock(make, patch_clip):
    """Names of ours, ends of ComfyUI's: each role arrives where its own loader would put it."""
    import comfy.sd

    name = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj"
    kinds = {
        "LoHa": {f"hada_w{n}_{side}": (128, 4) if side == "a" else (4, 128) for n in "12" for side in "ab"},
        "LoKr": {"lokr_w1": (8, 8), "lokr_w2_a": (16, 2), "lokr_w2_b": (2, 16)},
        "difference": {"diff": (128, 128), "diff_b": (128,)},
        "DoRA": {"lora_A.weight": (4, 128), "lora_B.weight": (128, 4), "dora_scale": (128, 1)},
    }
    clip = make()
    for kind, shapes in kinds.items():
        stock_named = {f"{name}.{end}": seeded_normal(3, end, shape, 0.2) for end, shape in shapes.items()}
        theirs = comfy.sd.load_lora_for_models(None, clip, stock_named, 0.0, 0.8)[1]
        ours, found = patch_clip(clip, {key.replace("text_encoders.clip_l", "te"): t for key, t in stock_named.items()})
        assert (found.applied, found.left) == (len(shapes), {}), kind
        assert same(encode(ours), encode(theirs)), kind
        assert not same(encode(ours), encode(clip)), kind


def test_two_loras_in_turn_leave_no_trace(make):
    clip = make("fp16", "nf4")
    plain = encode(clip)
    stacked = with_lora(with_lora(clip, "t5xxl", "clip_l"), "t5xxl", strength=-0.3)
    first = encode(stacked)
    clip.cache.clear()
    assert same(encode(clip), plain)
    clip.cache.clear()
    assert same(encode(stacked), first)
    stacked.patcher.detach()
    assert not any(layer.weight_function for layer in clip.cond_stage_model.quantized.values())


def test_partial_loading_applies_a_lora_once(make):
    """As on a card with little memory: some layers stay where they are, others come and go."""
    clip = make("fp16", "int8")
    changed = with_lora(clip, "t5xxl")
    expected = encode(changed)
    patcher = changed.patcher
    for step in (
        lambda: patcher.partially_unload(CPU, 10**9),
        lambda: patcher.load(CPU, lowvram_model_memory=patcher.model_size() // 2),
        lambda: patcher.load(CPU, lowvram_model_memory=10**12),
        lambda: patcher.partially_unload(CPU, 1),
    ):
        step()
        lengths = {len(layer.weight_function) for layer in clip.cond_stage_model.quantized.values()}
        assert lengths == {0, 1}
        tokens = changed.tokenize(PROMPT)["t5xxl"]
        [again] = clip.cond_stage_model.encode_part("t5xxl", tokens)
        assert relative_distance(again, expected[0]) < 1e-6
    patcher.detach()
    assert not any(layer.weight_function for layer in clip.cond_stage_model.quantized.values())


def test_scheduled_loras(make):
    """A hook's LoRA works on CLIP-L, is not confused with what is remembered, and is refused on a quantized T5."""
    import comfy.hooks

    clip = make("fp16", "int8")
    plain = encode(clip)

    def hooked(part):
        hooks = comfy.hooks.create_hook_lora(lora=lora(part), strength_model=0.0, strength_clip=0.8)
        copy = clip.clone()
        copy.apply_hooks_to_conds = hooks
        copy.patcher.forced_hooks = hooks.clone()
        copy.patcher.forced_hooks.set_keyframes_on_hooks(None)
        copy.patcher.register_all_hook_patches(
            hooks, comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Clip)
        )
        return copy

    changed = encode(hooked("clip_l"))
    assert relative_distance(changed[1], plain[1]) > 0.02
    merged = encode(with_lora(clip, "clip_l"))
    assert relative_distance(changed[1], merged[1]) < 1e-3
    assert same(encode(clip), plain)
    with pytest.raises(Exception, match="scheduled by a hook"):
        encode(hooked("t5xxl"))
    assert same(encode(clip), plain)


def test_what_a_quantized_t5_refuses(make):
    clip = make("fp16", "nf4")
    for call in (clip.get_sd, clip.state_dict_for_saving):
        with pytest.raises(Exception, match=r"cannot be saved.*quantization 'none'"):
            call()
    with pytest.raises(Exception, match="cannot be merged"):
        clip.get_key_patches()
    with pytest.raises(Exception, match="Use Load LoRA"):
        clip.patcher.set_injections("bypass_lora", [])


def test_saving_an_unquantized_one(make, paths):
    clip = make()
    clip.load_model()
    saved = clip.state_dict_for_saving()
    for path, prefix in ((paths["fp16"], "t5xxl.transformer."), (paths["clip"], "clip_l.transformer.")):
        for name, tensor in load_file(path).items():
            assert torch.equal(saved[prefix + name], tensor), name
