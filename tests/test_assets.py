"""The generated model files: same seed, same bytes; the shapes and names that their readers expect."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from harness import assets, broken_files, lora_files, lora_formats, tensor_files, tiny_models, tiny_others
from harness.tiny_models import TinyFluxConfig

TINY = TinyFluxConfig()
QUICK = [name for name in assets.assets() if "clip" not in name]


def prefix_of(key: str) -> str:
    """The file's key without its LoRA suffix."""
    for spelling in lora_formats.FORMATS.values():
        for suffix in (spelling.down, spelling.up, "alpha"):
            if key.endswith(f".{suffix}"):
                return key.removesuffix(f".{suffix}")
    raise AssertionError(f"{key} has no LoRA suffix")


def delta(tensors: dict[str, torch.Tensor], prefix: str, format: str) -> torch.Tensor:
    """alpha / rank * up @ down of one layer, (out_features, in_features)."""
    spelling = lora_formats.FORMATS[format]
    down, up = tensors[f"{prefix}.{spelling.down}"], tensors[f"{prefix}.{spelling.up}"]
    alpha = tensors.get(f"{prefix}.alpha", torch.tensor(float(len(down))))
    return alpha / len(down) * up @ down


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return assets.write_all(tmp_path_factory.mktemp("models"), QUICK)


def test_two_runs_write_the_same_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    again = assets.write_all(tmp_path, QUICK)
    assert again.keys() == models.keys()
    for name, path in models.items():
        assert path.read_bytes() == again[name].read_bytes(), name


def test_second_run_writes_nothing_and_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    name = "loras/demo-a.safetensors"
    lines: list[str] = []
    path = assets.write_all(tmp_path, [name], lines.append)[name]
    whole, written = path.read_bytes(), path.stat().st_mtime_ns
    assets.write_all(tmp_path, [name], lines.append)
    assert path.stat().st_mtime_ns == written
    path.write_bytes(whole[:-1])
    assets.write_all(tmp_path, [name], lines.append)
    assert path.read_bytes() == whole
    assert [line.rpartition(": ")[2] for line in lines] == ["writing", "is there", "writing"]
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_other_stamp_is_not_current(models: dict[str, Path]) -> None:
    name = "loras/demo-a.safetensors"
    assert tensor_files.is_current(models[name], assets.assets()[name].stamp)
    assert not tensor_files.is_current(models[name], "another")


@pytest.mark.parametrize("write", broken_files.UNREADABLE, ids=lambda write: write.__name__)
def test_unreadable_file_is_not_current(write: broken_files.Writer, tmp_path: Path) -> None:
    assert not tensor_files.is_current(write(tmp_path / "broken.safetensors"), "any")


def test_unknown_asset_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=r"loras/nothing\.safetensors.*Known: .*demo-a"):
        assets.write_all(tmp_path, ["loras/nothing.safetensors"])


def test_bf16_dev_is_the_rounded_fp32_dev(models: dict[str, Path]) -> None:
    full = load_file(models["diffusion_models/tiny-flux-dev-fp32.safetensors"])
    half = load_file(models["diffusion_models/tiny-flux-dev-bf16.safetensors"])
    assert full.keys() == half.keys()
    assert all(torch.equal(full[name].bfloat16(), half[name]) for name in full)


def test_flux_layout(models: dict[str, Path]) -> None:
    dev = load_file(models["diffusion_models/tiny-flux-dev-fp32.safetensors"])
    schnell = load_file(models["diffusion_models/tiny-flux-schnell-fp32.safetensors"])
    shapes = {
        "img_in.weight": (256, 64), "txt_in.weight": (256, 768), "vector_in.in_layer.weight": (256, 768),
        "double_blocks.1.img_attn.qkv.bias": (768,), "double_blocks.1.txt_attn.norm.key_norm.scale": (128,),
        "double_blocks.0.txt_mod.lin.weight": (1536, 256), "single_blocks.1.linear1.weight": (1792, 256),
        "single_blocks.1.linear2.weight": (256, 1280), "single_blocks.0.norm.query_norm.scale": (128,),
        "final_layer.linear.weight": (64, 256), "final_layer.adaLN_modulation.1.weight": (512, 256),
    }
    assert {name: tuple(dev[name].shape) for name in shapes} == shapes
    assert dev.keys() - schnell.keys() == {
        f"guidance_in.{layer}_layer.{part}" for layer in ("in", "out") for part in ("weight", "bias")}
    assert all(t.isfinite().all() and t.std() > 0 for t in (*dev.values(), *schnell.values()))


def test_flux_sizes_follow_the_config() -> None:
    config = TinyFluxConfig(hidden=384, depth=1, depth_single=3, context=512, in_channels=384)
    tensors = tiny_models.tiny_flux_state_dict(config, seed=3)
    assert tensors["img_in.weight"].shape == (384, 384)
    assert tensors["final_layer.linear.weight"].shape == (64, 384)
    assert "single_blocks.2.linear1.weight" in tensors
    assert "double_blocks.1.img_mod.lin.weight" not in tensors
    assert TinyFluxConfig.full_width().hidden == 3072
    with pytest.raises(ValueError, match="hidden is 200, expected a positive multiple of 128"):
        replace(config, hidden=200)


def test_tensors_have_streams_of_their_own() -> None:
    dev = tiny_models.tiny_flux_state_dict(TINY, seed=5)
    schnell = tiny_models.tiny_flux_state_dict(replace(TINY, guidance=False), seed=5)
    assert all(torch.equal(tensor, dev[name]) for name, tensor in schnell.items())
    assert not torch.equal(dev["txt_in.weight"], tiny_models.tiny_flux_state_dict(TINY, seed=6)["txt_in.weight"])


def test_taesd_layout(models: dict[str, Path]) -> None:
    tensors = load_file(models["vae/tiny-taesd.safetensors"])
    assert len(tensors) == 2 + 2 * 67
    assert tensors["taesd_decoder.1.weight"].shape == (64, 16, 3, 3)
    assert tensors["taesd_decoder.19.weight"].shape == (3, 64, 3, 3)
    assert tensors["taesd_encoder.14.weight"].shape == (16, 64, 3, 3)
    assert "taesd_decoder.7.bias" not in tensors
    assert "taesd_encoder.2.bias" not in tensors
    assert tensors["vae_scale"].item() == pytest.approx(0.3611)
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_clip_l_layout() -> None:
    tensors = tiny_others.tiny_clip_l_state_dict()
    assert tensors["text_model.embeddings.token_embedding.weight"].shape == (49408, 768)
    assert tensors["text_model.embeddings.position_embedding.weight"].shape == (77, 768)
    assert tensors["text_model.encoder.layers.11.mlp.fc2.weight"].shape == (768, 3072)
    assert len(tensors) == 2 + 12 * 16 + 3
    assert all(t.dtype == torch.float16 and t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize(("format", "expected"), [
    ("kohya", {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (8, 256),
               "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": (768, 8),
               "lora_unet_double_blocks_1_txt_mod_lin.lora_up.weight": (1536, 8),
               "lora_unet_single_blocks_1_linear1.lora_up.weight": (1792, 8),
               "lora_unet_single_blocks_1_modulation_lin.lora_down.weight": (8, 256),
               "lora_unet_final_layer_adaLN_modulation_1.alpha": ()}),
    ("diffusers", {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (8, 256),
                   "transformer.transformer_blocks.0.attn.add_v_proj.lora_B.weight": (256, 8),
                   "transformer.transformer_blocks.1.norm1.linear.lora_B.weight": (1536, 8),
                   "transformer.single_transformer_blocks.1.proj_mlp.lora_B.weight": (1024, 8),
                   "transformer.single_transformer_blocks.1.proj_out.lora_A.weight": (8, 1280),
                   "transformer.x_embedder.lora_A.weight": (8, 64),
                   "transformer.norm_out.linear.alpha": ()}),
    ("native", {"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (8, 256),
                "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": (768, 8),
                "diffusion_model.guidance_in.out_layer.lora_B.weight": (256, 8),
                "diffusion_model.img_in.alpha": ()}),
])
def test_lora_names_and_shapes(format: str, expected: dict[str, tuple[int, ...]]) -> None:
    tensors = lora_files.lora_state_dict(format, alpha=4.0)
    assert {key: tuple(tensors[key].shape) for key in expected} == expected
    assert len(tensors) == 3 * (50 if format == "diffusers" else 36)
    assert all(t.isfinite().all() and t.abs().sum() > 0 for t in tensors.values())
    assert not [key for key in lora_files.lora_state_dict(format) if key.endswith("alpha")]


@pytest.mark.parametrize("alpha", [None, 1.0, 32.0])
@pytest.mark.parametrize("rank", [1, 8, 17])
def test_lora_is_low_rank_and_its_size_does_not_depend_on_rank_or_alpha(rank: int, alpha: float | None) -> None:
    tensors = lora_files.lora_state_dict("kohya", rank=rank, alpha=alpha, scale=0.3)
    weights = tiny_models.tiny_flux_state_dict(TINY)
    for module in ("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mod.lin", "single_blocks.0.linear2"):
        change = delta(tensors, f"lora_unet_{module.replace('.', '_')}", "kohya")
        assert torch.linalg.matrix_rank(change) == rank
        assert 0.2 < change.norm() / weights[f"{module}.weight"].norm() < 0.45


def test_tied_formats_change_the_weights_alike() -> None:
    arguments = {"rank": 5, "alpha": 3.0, "tied": True, "seed": 4}
    native = lora_files.lora_state_dict("native", **arguments)
    kohya = lora_files.lora_state_dict("kohya", **arguments)
    diffusers = lora_files.lora_state_dict("diffusers", **arguments)
    for module in tiny_models.flux_linears(TINY):
        fused = delta(native, f"diffusion_model.{module}", "native")
        assert torch.equal(fused, delta(kohya, f"lora_unet_{module.replace('.', '_')}", "kohya"))
        for part in lora_formats.FORMATS["diffusers"].parts(module, TINY):
            rows = torch.cat([fused[start:stop] for start, stop in part.rows])
            torch.testing.assert_close(delta(diffusers, part.prefix, "diffusers"), rows)


def test_untied_parts_have_down_matrices_of_their_own() -> None:
    tensors = lora_files.lora_state_dict("diffusers")
    block = "transformer.transformer_blocks.0.attn"
    assert not torch.equal(tensors[f"{block}.to_q.lora_A.weight"], tensors[f"{block}.to_k.lora_A.weight"])


def test_mixed_ranks_and_targets() -> None:
    by_name = lora_files.lora_state_dict(
        "native", targets=lora_files.in_attention, rank=lambda module: 7 if module.startswith("double") else 13)
    prefixes = {prefix_of(key).removeprefix("diffusion_model.") for key in by_name}
    assert prefixes == {module for module in tiny_models.flux_linears(TINY) if lora_files.in_attention(module)}
    assert by_name["diffusion_model.double_blocks.1.txt_attn.proj.lora_A.weight"].shape == (7, 256)
    assert by_name["diffusion_model.single_blocks.1.linear2.lora_A.weight"].shape == (13, 1280)
    one = lora_files.lora_state_dict("native", targets=lambda module: module == "img_in", rank={"img_in": 3})
    assert one["diffusion_model.img_in.lora_B.weight"].shape == (256, 3)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"format": "webui"}, "LoRA format 'webui' is not known; expected one of kohya, diffusers, native"),
    ({"format": "kohya", "rank": 0}, "The rank of img_in is 0, expected 1 or more"),
    ({"format": "kohya", "targets": lambda module: False}, "would be empty"),
])
def test_impossible_loras_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lora_files.lora_state_dict(**arguments)


def test_text_encoder_lora() -> None:
    kohya = lora_files.clip_l_lora_state_dict("kohya", layers=range(2), alpha=2.0)
    assert kohya["lora_te1_text_model_encoder_layers_1_self_attn_q_proj.lora_down.weight"].shape == (4, 768)
    assert len(kohya) == 2 * 6 * 3
    diffusers = lora_files.clip_l_lora_state_dict("diffusers", layers=range(1))
    assert diffusers["text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_B.weight"].shape == (3072, 4)


def test_write_lora_and_demo_loras(models: dict[str, Path], tmp_path: Path) -> None:
    path = lora_files.write_lora(tmp_path / "sub" / "x.safetensors", "native", rank=2, dtype=torch.bfloat16)
    assert load_file(path)["diffusion_model.img_in.lora_A.weight"].dtype == torch.bfloat16
    first, second = (load_file(models[f"loras/demo-{letter}.safetensors"]) for letter in "ab")
    down = "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"
    assert len(first[down]) == 8
    assert first[down.replace("lora_down.weight", "alpha")].item() == 4
    assert len(second["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"]) == 16


@pytest.mark.parametrize("write", broken_files.UNREADABLE, ids=lambda write: write.__name__)
def test_unreadable_files_are_unreadable(write: broken_files.Writer, tmp_path: Path) -> None:
    path = write(tmp_path / "broken.safetensors")
    with pytest.raises(SafetensorError), safe_open(path, "pt") as file:
        file.keys()


def test_unreadable_files_are_what_they_claim(tmp_path: Path) -> None:
    def content(write: broken_files.Writer) -> bytes:
        return write(tmp_path / write.__name__).read_bytes()

    assert content(broken_files.empty) == b""
    assert content(broken_files.html_page).startswith(b"<!DOCTYPE html>")
    assert int.from_bytes(content(broken_files.giant_header)[:8], "little") == 2**62
    garbage = content(broken_files.garbage_header)
    assert int.from_bytes(garbage[:8], "little") < len(garbage)
    cut = content(broken_files.truncated)
    assert int.from_bytes(cut[:8], "little") + 8 < len(cut)
    cut = content(broken_files.truncated_header)
    assert int.from_bytes(cut[:8], "little") + 8 > len(cut)


def test_wrong_loras_are_what_they_claim(tmp_path: Path) -> None:
    loaded = {write.__name__: load_file(write(tmp_path / write.__name__)) for write in broken_files.WRONG_LORAS}
    good = lora_files.lora_state_dict("kohya")
    assert sum(int(t.isnan().sum()) for t in loaded["lora_nan"].values()) == 1
    assert loaded["lora_nan"].keys() == loaded["lora_wrong_width"].keys() == good.keys()
    assert loaded["lora_wrong_width"]["lora_unet_single_blocks_0_linear2.lora_down.weight"].shape == (8, 1920)
    layer = "diffusion_model.single_blocks.1.linear2.lora"
    assert len(loaded["lora_rank_mismatch"][f"{layer}_A.weight"]) == 8
    assert loaded["lora_rank_mismatch"][f"{layer}_B.weight"].shape == (256, 4)
    assert good.keys() - loaded["lora_missing_up"].keys() == {"lora_unet_single_blocks_0_linear1.lora_up.weight"}
    assert len(loaded["lora_unknown_key"].keys() - good.keys()) == 2
    assert loaded["lora_no_pairs"].keys() == {"emb_params"}
    assert not loaded["sdxl_lora"].keys() & good.keys()


def test_wrong_checkpoints_are_what_they_claim(tmp_path: Path) -> None:
    loaded = {write.__name__: load_file(write(tmp_path / write.__name__)) for write in broken_files.WRONG_CHECKPOINTS}
    good = tiny_models.tiny_flux_state_dict(TINY)
    missing = good.keys() - loaded["flux_missing_block"].keys()
    assert missing == {name for name in good if name.startswith("single_blocks.0.")}
    assert good.keys() - loaded["flux_missing_tensor"].keys() == {"double_blocks.1.txt_mlp.2.bias"}
    wrong = {name for name, t in loaded["flux_wrong_shape"].items() if t.shape != good[name].shape}
    assert wrong == {"double_blocks.1.img_mlp.0.weight"}
    assert sum(int(t.isnan().sum()) for t in loaded["flux_nan"].values()) == 1
    assert not loaded["sdxl_checkpoint"].keys() & good.keys()
    assert loaded["flux_vae"]["encoder.conv_in.weight"].shape == (128, 3, 3, 3)


def test_velocity_layers_are_not_near_zero() -> None:
    tensors = tiny_models.tiny_flux_state_dict(TINY)
    for module, (_, in_features) in tiny_models.flux_linears(TINY).items():
        gain = float(tensors[f"{module}.weight"].std()) * math.sqrt(in_features)
        assert 0.3 < gain < 4.0, module
