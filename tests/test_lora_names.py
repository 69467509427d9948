"""How LoRA files spell names: what is read however it is spelled, and what is said of the rest."""

import itertools

import pytest
import torch

from accel.checkpoint import inspect_checkpoint
from accel.errors import LoraError
from accel.families import registry
from accel.families.flux1 import Flux1Config
from accel.families.flux2 import Flux2Config
from accel.files import TensorInfo
from accel.lora.read.file import read_lora
from accel.lora.read.names import WORDS, known_names
from accel.lora.read.origins import origin
from accel.lora.read.other_models import for_another_model
from accel.lora.read.text_encoders import EncoderNames, sort_encoder_keys, split_encoder
from harness.lora_files import kind_state_dict, lora_state_dict, norm_state_dict
from harness.tensor_files import write_tensors
from harness.tiny_flux2 import TinyFlux2Config, tiny_flux2_state_dict
from harness.tiny_models import TinyFluxConfig

FAMILIES = {family.name: family for family in registry.FAMILIES}
TINY = {"FLUX.1": Flux1Config(256, 2, 2, 64, 64, 768, 768, 1024, True),
        "FLUX.2": Flux2Config(256, 2, 2, 768, 768, True)}  # fmt: skip
PUBLISHED = {name: (family, config) for family in registry.FAMILIES for name, config in family.published.items()}
MODELS = {f"{family.name} tiny": (family, TINY[family.name]) for family in registry.FAMILIES} | PUBLISHED
NAMES = {
    f"{name} {kind}": getattr(known_names(family, TINY[name]), kind)
    for name, family in FAMILIES.items()
    for kind in ("linears", "norms")
}
# What the programs write that are known.
PREFIXES = (
    "", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model.", "lora_unet_",
    "lora_transformer_", "lycoris_", "unet.", "pipe.dit.", "transformer.base_model.model.",
    "base_model.model.transformer.", "transformer._orig_mod.", "module.", "lora_unet__",
)  # fmt: skip
TINY_FLUX2 = TinyFlux2Config(guidance=True)


@pytest.fixture(scope="module")
def flux1(models):
    return inspect_checkpoint(str(models / "diffusion_models/tiny-flux-dev-fp32.safetensors"))


@pytest.fixture(scope="module")
def flux2(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux2") / "tiny.safetensors"
    return inspect_checkpoint(write_tensors(path, tiny_flux2_state_dict(TINY_FLUX2)))


@pytest.fixture(scope="module")
def spec(flux1):
    return flux1


def spellings(name):
    return name, name.replace(".", "_"), f"{name.replace('.', '_')}_"


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_any_words_before_any_name_with_dots_or_underscores_mean_the_same(names):
    before = [
        "".join(word + separator for word in words)
        for count in range(3)
        for words in itertools.product(WORDS, repeat=count)
        for separator in "._"
    ]
    for name, target in names.targets.items():
        for spelling, prefix in itertools.product(spellings(name), (*before, *PREFIXES)):
            assert names.find(prefix + spelling) is target, prefix + spelling


@pytest.mark.parametrize(("family", "config"), MODELS.values(), ids=MODELS)
def test_no_spelling_means_two_things(family, config):
    names = {**family.lora_names(config).linears, **family.lora_names(config).norms}
    spelled = {}
    for name, target in names.items():
        for spelling in set(spellings(name)):
            assert spelled.setdefault(spelling, target) is target, spelling
    assert not set(names) & {word.replace("_", ".") for word in WORDS}


@pytest.mark.parametrize(("family", "config"), PUBLISHED.values(), ids=PUBLISHED)
def test_what_hints_at_another_origin_is_in_no_name_of_its_own(family, config):
    for names in (family.lora_names(config).linears, family.lora_names(config).norms):
        keys = [prefix + spelling + ".lora_down.weight" for name in names for spelling in spellings(name)
                for prefix in ("", "lora_unet_", "transformer.", "diffusion_model.", "lora_transformer_")]  # fmt: skip
        assert origin(keys, family) is None
        assert not any(split_encoder(key) for key in keys)


@pytest.mark.parametrize(
    "name",
    [
        "double_blocks.0.img_attn_qkv",
        "transformer_double_block_0",
        "blocks.0.attn.to_q",
        "transformer",
        "",
        "_",
        "unet.",
        "transformer.transformer_blocks.2.attn.to_q",
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_other_names_mean_nothing(family, name):
    assert NAMES[f"{family} linears"].find(name) is None


# FLUX.2: a name of each program -> linear of the checkpoint, and its first row and its rows as multiples of the width.
FLUX2_NAMES = {
    "diffusion_model.double_blocks.1.img_attn.qkv": ("double_blocks.1.img_attn.qkv", 0, 3),
    "double_blocks.1.txt_mlp.0": ("double_blocks.1.txt_mlp.0", 0, 6),
    "base_model.model.single_blocks.1.linear2": ("single_blocks.1.linear2", 0, 1),
    "base_model.model.double_stream_modulation_txt.lin": ("double_stream_modulation_txt.lin", 0, 6),
    "lora_unet_double_blocks_0_img_attn_qkv": ("double_blocks.0.img_attn.qkv", 0, 3),
    "lora_unet_double_stream_modulation_img_lin": ("double_stream_modulation_img.lin", 0, 6),
    "lora_unet_single_stream_modulation_lin": ("single_stream_modulation.lin", 0, 3),
    "transformer.transformer_blocks.0.attn.to_q": ("double_blocks.0.img_attn.qkv", 0, 1),
    "transformer.transformer_blocks.0.attn.to_qkv": ("double_blocks.0.img_attn.qkv", 0, 3),
    "transformer.transformer_blocks.1.attn.add_v_proj": ("double_blocks.1.txt_attn.qkv", 2, 1),
    "transformer.transformer_blocks.1.attn.to_added_qkv": ("double_blocks.1.txt_attn.qkv", 0, 3),
    "transformer.transformer_blocks.0.attn.to_out.0": ("double_blocks.0.img_attn.proj", 0, 1),
    "transformer.transformer_blocks.0.attn.to_add_out": ("double_blocks.0.txt_attn.proj", 0, 1),
    "transformer.transformer_blocks.0.ff.linear_in": ("double_blocks.0.img_mlp.0", 0, 6),
    "transformer.transformer_blocks.0.ff_context.linear_out": ("double_blocks.0.txt_mlp.2", 0, 1),
    "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj": ("single_blocks.0.linear1", 0, 9),
    "transformer.single_transformer_blocks.0.attn.to_out": ("single_blocks.0.linear2", 0, 1),
    "transformer.single_transformer_blocks.0.attn.to_qkv": ("single_blocks.0.linear1", 0, 3),
    "transformer.single_transformer_blocks.0.attn.to_k": ("single_blocks.0.linear1", 1, 1),
    "transformer.single_transformer_blocks.0.proj_mlp": ("single_blocks.0.linear1", 3, 6),
    "transformer.single_transformer_blocks.0.proj_out": ("single_blocks.0.linear2", 0, 1),
    "diffusion_model.single_blocks.0.linear1_qkv": ("single_blocks.0.linear1", 0, 3),
    "transformer.double_blocks.0.img_attn.qkv.1": ("double_blocks.0.img_attn.qkv", 1, 1),
    "lycoris_single_transformer_blocks_1_attn_to_qkv_mlp_proj": ("single_blocks.1.linear1", 0, 9),
    "lora_transformer_transformer_blocks_1_ff_linear_in": ("double_blocks.1.img_mlp.0", 0, 6),
    # What ComfyUI's own map lacks.
    "transformer.double_stream_modulation_img.linear": ("double_stream_modulation_img.lin", 0, 6),
    "transformer.double_stream_modulation_txt.linear": ("double_stream_modulation_txt.lin", 0, 6),
    "lora_transformer_single_stream_modulation_linear": ("single_stream_modulation.lin", 0, 3),
    "transformer.time_guidance_embed.timestep_embedder.linear_1": ("time_in.in_layer", 0, 1),
    "transformer.time_guidance_embed.guidance_embedder.linear_2": ("guidance_in.out_layer", 0, 1),
    "transformer.time_text_embed.timestep_embedder.linear_2": ("time_in.out_layer", 0, 1),
    "transformer.x_embedder": ("img_in", 0, 1),
    "transformer.context_embedder": ("txt_in", 0, 1),
    "transformer.norm_out.linear": ("final_layer.adaLN_modulation.1", 0, 2),
    "transformer.proj_out": ("final_layer.linear", 0, 0.5),
}


@pytest.mark.parametrize("name", FLUX2_NAMES)
def test_every_programs_names_of_flux2(name):
    family, config = FAMILIES["FLUX.2"], TINY["FLUX.2"]
    linears = {linear.name: linear for linear in family.layout(config).linears}
    target = known_names(family, config).linears.find(name)
    of, first, count = FLUX2_NAMES[name]
    linear = linears[of]
    rows = {part.module: range(part.start, part.start + part.rows) for part in linear.parts}
    covered = [row for part in target.parts for row in rows[part.module]]
    assert covered == list(range(int(first * 256), int((first + count) * 256)))
    assert (target.in_features, target.out_features) == (linear.in_features, len(covered))
    # Only the original layout has the halves in the other order.
    assert not target.swap_halves


def test_flux2s_norms_have_both_names():
    norms = known_names(FAMILIES["FLUX.2"], TINY["FLUX.2"]).norms
    for original, diffusers in (
        ("double_blocks.1.txt_attn.norm.key_norm", "transformer_blocks.1.attn.norm_added_k"),
        ("single_blocks.0.norm.query_norm", "single_transformer_blocks.0.attn.norm_q"),
    ):
        assert norms.find(f"diffusion_model.{original}") is norms.find(f"transformer.{diffusers}") is not None


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("config", [TinyFluxConfig(), TINY_FLUX2], ids=FAMILIES)
def test_files_in_any_spelling_read_the_same(tmp_path, request, config, prefix):
    spec = request.getfixturevalue("flux2" if config is TINY_FLUX2 else "flux1")
    known = lora_state_dict("diffusers", config, rank=3)
    expected = read_lora(str(write_tensors(tmp_path / "known.safetensors", known)), spec)
    layers = {layer.module: layer for layer in expected.layers}
    for number, spell in enumerate((str, lambda name: name.replace(".", "_") + "_")):
        file = {}
        for key, tensor in known.items():
            module, matrix, end = key.removeprefix("transformer.").rsplit(".", 2)
            file[f"{prefix}{spell(module)}.{matrix}.{end}"] = tensor
        weights = read_lora(str(write_tensors(tmp_path / f"{number}.safetensors", file)), spec)
        assert weights.report.keys_applied == len(file)
        assert {layer.module for layer in weights.layers} == set(layers)
        assert all(torch.equal(layer.lora_B, layers[layer.module].lora_B) for layer in weights.layers)


# Models of other sizes.


def larger(format, depth, depth_single):
    """A LoRA for a model of more or fewer blocks than the tiny one, which has two of each kind."""
    return lora_state_dict(format, TinyFluxConfig(depth=depth, depth_single=depth_single), rank=3)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "native", "bfl", "onetrainer", "omi"])
def test_blocks_that_a_pruned_model_lacks_are_left_out_and_counted(tmp_path, spec, format):
    file = larger(format, 4, 5)
    weights = read_lora(str(write_tensors(tmp_path / "larger.safetensors", file)), spec)
    own = read_lora(str(write_tensors(tmp_path / "own.safetensors", larger(format, 2, 2))), spec)
    assert {layer.module for layer in weights.layers} == {layer.module for layer in own.layers}
    double = len(larger(format, 3, 2)) - len(larger(format, 2, 2))
    single = len(larger(format, 2, 3)) - len(larger(format, 2, 2))
    assert weights.report.unused == {
        "of double blocks beyond the 2 that this model has": 2 * double,
        "of single blocks beyond the 2 that this model has": 3 * single,
    }
    assert f"{2 * double} not used: of double blocks beyond the 2" in str(weights.report)
    assert weights.report.keys_applied + sum(weights.report.unused.values()) == len(file)


def test_norms_of_absent_blocks_are_counted_too(tmp_path, spec):
    file = norm_state_dict(TinyFluxConfig(depth=3, depth_single=3))
    report = read_lora(str(write_tensors(tmp_path / "norms.safetensors", file)), spec).report
    assert sorted(report.unused.values()) == [2, 4]


def test_a_lora_of_fewer_blocks_is_applied_whole(tmp_path, spec):
    file = larger("kohya", 1, 1)
    report = read_lora(str(write_tensors(tmp_path / "smaller.safetensors", file)), spec).report
    assert (report.keys_applied, report.unused) == (len(file), {})


OTHER_SIZES = {
    "only absent blocks": (
        {key: value for key, value in larger("native", 4, 2).items() if "double_blocks.3" in key},
        "holds nothing for the FLUX.1 transformer: 20 keys of double blocks beyond the 2"),
    "other widths": (
        lora_state_dict("kohya", TinyFluxConfig(hidden=384, depth=4), rank=3), "for a model of another size"),
    "more blocks than any": (larger("native", 20, 2), "(by its names: a model of more blocks, as HunyuanVideo)"),
    "more single blocks than any": (larger("diffusers", 2, 40), "a model of more blocks, as HunyuanVideo"),
}  # fmt: skip


@pytest.mark.parametrize(("file", "words"), OTHER_SIZES.values(), ids=OTHER_SIZES)
def test_what_no_flux1_of_this_width_has_is_refused(tmp_path, spec, file, words):
    with pytest.raises(LoraError) as caught:
        read_lora(str(write_tensors(tmp_path / "other.safetensors", file)), spec)
    assert "'other.safetensors'" in str(caught.value)
    assert words in str(caught.value)


# Published models, told from one another.


def shapes_of(name, keep=lambda linear: True, diffusers=False, rank=4):
    """Key -> shape of a LoRA for a published model."""
    family, config = PUBLISHED[name]
    shapes = {}
    for linear in family.layout(config).linears:
        if keep(linear.name):
            whole = [(f"diffusion_model.{linear.name}", linear.out_features)]
            for module, rows in (
                [(f"transformer.{part.module}", part.rows) for part in linear.parts] if diffusers else whole
            ):
                shapes |= {
                    f"{module}.lora_A.weight": (rank, linear.in_features),
                    f"{module}.lora_B.weight": (rows, rank),
                }
    return shapes


def everything(name):
    return True


def in_blocks(name):
    return "_blocks." in name


def attention(name):
    return name.endswith((".qkv", ".proj"))


WIDE = {"flux1-dev": 3072, "flux1-schnell": 3072, "flux2-dev": 6144, "flux2-klein-9b": 4096, "flux2-klein-4b": 3072}
TITLES = {"flux1-dev": "FLUX.1", "flux1-schnell": "FLUX.1", "flux2-dev": "FLUX.2 dev",
          "flux2-klein-9b": "FLUX.2 klein 9B", "flux2-klein-4b": "FLUX.2 klein 4B"}  # fmt: skip
PAIRS = [(one, other) for one, other in itertools.permutations(PUBLISHED, 2) if TITLES[one] != TITLES[other]]


@pytest.mark.parametrize("diffusers", [False, True], ids=["original", "diffusers"])
@pytest.mark.parametrize("keep", [everything, in_blocks])
@pytest.mark.parametrize(("of", "on"), PAIRS, ids=[f"{one} on {other}" for one, other in PAIRS])
def test_a_lora_of_another_model_is_refused_by_its_name(of, on, keep, diffusers):
    message = for_another_model("LoRA 'x'", shapes_of(of, keep, diffusers), *PUBLISHED[on])
    this = TITLES[on] if "FLUX.2" in TITLES[on] else f"FLUX.1 {on.removeprefix('flux1-')}"
    assert message.startswith(f"LoRA 'x': it is for {TITLES[of]}")
    assert f", not for {this}: its layers " in message
    assert message.endswith(f", or a LoRA for {this}.")
    widths = f"its layers are {WIDE[of]} wide, this model's are {WIDE[on]} wide"
    assert (widths in message) == (WIDE[of] != WIDE[on])


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_is_said_of_a_models_own_lora_or_its_twins(name):
    for other in PUBLISHED:
        if TITLES[other] == TITLES[name]:
            assert for_another_model("", shapes_of(other), *PUBLISHED[name]) is None
    damaged = {key: shape for key, shape in shapes_of(name).items() if "single" not in key or "lora_A" not in key}
    assert for_another_model("", damaged, *PUBLISHED[name]) is None
    assert for_another_model("", {"a.lora_A.weight": (4, 4)}, *PUBLISHED[name]) is None


def test_layers_of_both_families_with_equal_shapes_are_told_by_their_number():
    """FLUX.1's and klein 4B's attention is as wide, and called the same; FLUX.1 has 19 blocks of it, klein 4B 5."""
    on_klein = for_another_model("LoRA 'x'", shapes_of("flux1-dev", attention), *PUBLISHED["flux2-klein-4b"])
    assert "it is for FLUX.1, not for FLUX.2 klein 4B: its layers have that model's names and shapes" in on_klein
    on_dev = for_another_model("LoRA 'x'", shapes_of("flux2-klein-4b", attention), *PUBLISHED["flux2-dev"])
    assert "it is for FLUX.1 or FLUX.2 klein 4B, not for FLUX.2 dev: its layers are 3072 wide" in on_dev


@pytest.mark.parametrize("kind", ["LoKr", "LoHa", "difference", "OFT", "GLoRA", "DoRA"])
def test_every_kind_is_told_by_its_shapes(tmp_path, flux2, kind, monkeypatch):
    """A model as small as the tests' stands for a published one."""
    published = dict(FAMILIES["FLUX.1"].published, small=TINY["FLUX.1"])
    monkeypatch.setattr(FAMILIES["FLUX.1"], "published", published, raising=False)
    file = kind_state_dict(kind, targets=lambda name: name.startswith("single_blocks.0.linear"))
    with pytest.raises(LoraError, match=r"LoRA 'kind\.safetensors': it is for FLUX\.1 dev, not for FLUX\.2 dev"):
        read_lora(write_tensors(tmp_path / "kind.safetensors", file), flux2)


@pytest.mark.parametrize("format", ["kohya", "diffusers", "native"])
def test_files_of_one_family_are_refused_by_the_other(tmp_path, flux1, flux2, format):
    """Also where nothing of their size is published, by the names that only one of them has."""
    for config, spec, name in ((TinyFluxConfig(), flux2, "FLUX.1"), (TINY_FLUX2, flux1, "FLUX.2")):
        path = write_tensors(tmp_path / f"{name}.safetensors", lora_state_dict(format, config, rank=3))
        with pytest.raises(LoraError, match=rf"(by its names: {name.replace('.', '[.]')})"):
            read_lora(path, spec)


# Other origins.

ORIGINS = {
    "oft_unet_double_blocks_0_img_attn_qkv.oft_blocks": "sd-scripts' OFT",
    "diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": "HunyuanVideo",
    "lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight": "HunyuanVideo",
    "diffusion_model.double_blocks.0.img_mod.linear.lora_A.weight": "HunyuanVideo",
    "transformer_blocks.0.mlp_fc1.lora_down": "Nunchaku",
    "transformer_blocks.0.mlp_context_fc2.lora_up": "Nunchaku",
    "transformer.transformer_blocks.0.img_mod.1.lora_A.weight": "Qwen-Image",
    "lora_unet_transformer_blocks_0_img_mod_1.lora_down.weight": "Qwen-Image",
    "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": "Stable Diffusion XL",
    "lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": "Stable Diffusion 1.5 or XL",
    "lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight": "Stable Diffusion 3",
    "lora_unet__blocks_0_cross_attn_k.lora_down.weight": "Wan",
    "diffusion_model.layers.0.attention.qkv.lora_A.weight": "Z-Image",
    "lora_unet_double_blocks_0_img_attn_gate.lora_down.weight": None,
}


FLUX2_ORIGINS = {
    "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": "FLUX.1",
    "diffusion_model.single_blocks.0.modulation.lin.lora_A.weight": "FLUX.1",
    "transformer.transformer_blocks.0.norm1.linear.lora_A.weight": "FLUX.1",
    "transformer.transformer_blocks.0.ff.net.0.proj.lora_A.weight": "FLUX.1",
    "transformer.time_text_embed.text_embedder.linear_1.lora_A.weight": "FLUX.1",
    "double_blocks.0.processor.qkv_lora1.down.weight": "FLUX.1",
    "diffusion_model.double_blocks.0.img_mod.linear.lora_A.weight": "HunyuanVideo",
    "transformer.transformer_blocks.0.img_mod.1.lora_A.weight": "Qwen-Image",
    "diffusion_model.distilled_guidance_layer.layers.0.in_layer.lora_A.weight": "Chroma",
    "lora_unet_input_blocks_4_1_proj_in.lora_down.weight": "Stable Diffusion XL",
}


@pytest.mark.parametrize("key", FLUX2_ORIGINS)
def test_the_origin_of_what_is_no_lora_of_flux2(tmp_path, flux2, key):
    file = {**lora_state_dict("kohya", TINY_FLUX2, rank=2), key: torch.zeros(4)}
    with pytest.raises(LoraError) as caught:
        read_lora(write_tensors(tmp_path / "other.safetensors", file), flux2)
    assert f"(by its names: {FLUX2_ORIGINS[key]}" in str(caught.value)
    assert "no place in this FLUX.2 model" in str(caught.value)


@pytest.mark.parametrize("key", ORIGINS)
def test_the_origin_of_a_file_is_told_by_what_only_that_has(tmp_path, spec, key):
    file = {**lora_state_dict("kohya", rank=2), key: torch.zeros(4)}
    with pytest.raises(LoraError) as caught:
        read_lora(str(write_tensors(tmp_path / "other.safetensors", file)), spec)
    assert ("by its names" in str(caught.value)) == (ORIGINS[key] is not None)
    assert (ORIGINS[key] or key) in str(caught.value)


# Text encoders.

CLIP_L = "text_model.encoder.layers.0.self_attn.q_proj"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
QWEN3 = "layers.0.self_attn.q_proj"
LANGUAGE_MODEL = f"qwen3_4b.transformer.model.{QWEN3}.weight"
WEIGHTS = {"clip_l": f"clip_l.transformer.{CLIP_L}.weight", "t5xxl": f"t5xxl.transformer.{T5}.weight"}
SPELLED = {
    "clip_l": ["clip_l.", "clip_l.transformer.", "text_encoder.", "text_encoder_1.", "te.", "te1.", "lora_te_",
               "lora_te1_", "text_encoders.clip_l.transformer.", "text_encoder.base_model.model.",
               "base_model.model.text_encoder.", "lycoris_text_encoder_", "text_encoder.transformer.", ""],
    "t5xxl": ["t5.", "t5xxl.", "t5xxl.transformer.", "text_encoder_2.", "text_encoder_3.", "te2.", "te3.", "lora_te2_",
              "lora_te3_", "text_encoders.t5xxl.transformer.", "text_encoder_2.base_model.model.",
              "base_model.model.text_encoder_2.", "lycoris_text_encoder_2_", ""],
}  # fmt: skip


@pytest.mark.parametrize("encoder", SPELLED)
def test_any_spelling_of_an_encoders_layer_finds_it(encoder):
    names, layer = EncoderNames(WEIGHTS.values()), {"clip_l": CLIP_L, "t5xxl": T5}[encoder]
    layers = [layer, layer.removeprefix("text_model.")] if encoder == "clip_l" else [layer]
    for before, spelling in itertools.product(SPELLED[encoder], (each for name in layers for each in spellings(name))):
        bare = before == "" and spelling.startswith("encoder") and encoder == "clip_l"
        assert names.find(before + spelling) == (None if bare else WEIGHTS[encoder]), before + spelling
        assert split_encoder(f"{before}{spelling}.lora_A.weight") is not None or bare


@pytest.mark.parametrize("before", [
    "qwen3_4b.transformer.model.", "text_encoders.qwen3_4b.transformer.model.", "text_encoders.transformer.model.",
    "text_encoder.model.", "text_encoder.base_model.model.model.", "lora_te_", "lora_te1_", "lora_te_model_", "model.",
    "text_encoders.qwen3_8b.transformer.model.", "text_encoder.model.language_model.", "",
])  # fmt: skip
def test_any_spelling_of_a_language_models_layer_finds_it(before):
    """Whatever size a file says that it is for: the matrices tell."""
    names = EncoderNames([LANGUAGE_MODEL])
    for spelling in spellings(QWEN3):
        assert names.find(before + spelling) == LANGUAGE_MODEL, before + spelling
        assert split_encoder(f"{before}{spelling}.lora_A.weight") is not None
    assert "of which nothing is read" in names.missing(f"{before}layers.35.mlp.up_proj")
    assert "which the connected CLIP does not have" in names.missing(f"clip_l.{CLIP_L}")
    assert "which the connected CLIP does not have" in EncoderNames(WEIGHTS.values()).missing(before + QWEN3)


LEFT = {
    f"text_encoder_2.{CLIP_L}.lora_A.weight": "such as SDXL's CLIP-G",
    "lora_te2_text_model_encoder_layers_0_mlp_fc1.alpha": "such as SDXL's CLIP-G",
    f"clip_g.{CLIP_L}.lora_A.weight": "such as SDXL's CLIP-G",
    "t5.encoder.block.9.layer.0.SelfAttention.q.lora_A.weight": "for layers that the t5xxl does not have",
    "text_encoder.text_model.embeddings.x.lora_A.weight": "for layers that the clip_l does not have",
    f"t5.{T5}.something": "in a form that ComfyUI does not read",
}


def sort(file, weights=tuple(WEIGHTS.values()), known=()):
    tensors = {key: TensorInfo(shape, torch.float32) for key, shape in file.items()}
    return sort_encoder_keys(tensors, file, EncoderNames(weights), dict(known), lambda weight: (8, 8))


@pytest.mark.parametrize("key", LEFT)
def test_keys_that_a_clip_has_no_layer_for_are_left_with_the_reason(key):
    good = {f"t5.{T5}.lora_A.weight": (4, 8), f"t5.{T5}.lora_B.weight": (8, 4)}
    found = sort({**good, key: (4, 8)})
    assert list(found.layers) == [WEIGHTS["t5xxl"]]
    assert [keys for why, keys in found.left.items() if LEFT[key] in why] == [(key,)]
    assert str(found).startswith(f"2 keys for text encoders applied; 1 not, such as '{key}': ")


def test_layers_that_cannot_be_applied_whole_are_left_whole():
    pair = {f"clip_l.{CLIP_L}.lora_A.weight": (4, 8), f"clip_l.{CLIP_L}.lora_B.weight": (8, 4)}
    for changes, why in (
        ({f"clip_l.{CLIP_L}.lora_magnitude_vector": (8,)}, "of a kind that ComfyUI does not read"),
        ({f"clip_l.{CLIP_L}.lora_B.weight": (16, 4)}, "of another size"),
        ({f"clip_l.{CLIP_L}.lora_B.weight": (8, 3)}, "of another size"),
    ):
        found = sort({**pair, **changes})
        assert (found.applied, len(found.left)) == (0, 1)
        assert why in str(found)
    assert "incomplete" in str(sort({f"clip_l.{CLIP_L}.lora_A.weight": (4, 8)}))
    twice = sort({**pair, f"lora_te1_{CLIP_L.replace('.', '_')}.lora_down.weight": (4, 8)})
    assert (twice.applied, f"the same layer as 'clip_l.{CLIP_L}'" in str(twice)) == (2, True)
    alone = sort({**pair, f"t5.{T5}.lora_A.weight": (4, 8)}, weights=[WEIGHTS["clip_l"]])
    assert "for t5xxl, which the connected CLIP does not have" in str(alone)
    assert sort(pair, weights=(), known=[(f"clip_l.{CLIP_L}", "other.weight")]).layers.keys() == {"other.weight"}
