"""LoRA files and stacks without ComfyUI: every key accounted for, every value in its place."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from accel.checkpoint import inspect_checkpoint
from accel.errors import FileError, LoraError
from accel.families.layout import LoraTarget
from accel.files import read_header
from accel.lora.pack import write as writing
from accel.lora.pack.flat import flatten
from accel.lora.pack.layout import HEAD_BYTES, aligned_rank
from accel.lora.read import stream as bulk
from accel.lora.read.file import read_lora
from accel.lora.read.patches import LinearPatch, from_patches, tensor_digest
from accel.lora.read.report import together
from accel.lora.schedule import ScheduledStack, between
from accel.lora.stack import LoraStack, grouped
from accel.memory.buffers import BYTES_ALIGNMENT
from accel.store.lru import ByteLru
from harness import broken_files
from harness.lora_files import clip_l_lora_state_dict, lora_state_dict, write_lora
from harness.lora_formats import ALL_FORMATS, FLUX2_FORMATS, format_named
from harness.tensor_files import write_tensors
from harness.tiny_flux2 import TinyFlux2Config, tiny_flux2_state_dict
from harness.tiny_models import TinyFluxConfig

TINY_FLUX2 = TinyFlux2Config(guidance=True)


@pytest.fixture(scope="module")
def spec(models):
    return inspect_checkpoint(str(models / "diffusion_models/tiny-flux-dev-fp32.safetensors"))


@pytest.fixture(scope="module")
def flux2(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux2") / "tiny.safetensors"
    return inspect_checkpoint(write_tensors(path, tiny_flux2_state_dict(TINY_FLUX2)))


def deltas(weights) -> dict[str, torch.Tensor]:
    """Module -> the change of its weight at strength 1, in float64."""
    total = {}
    for layer in weights.layers:
        change = layer.scale * layer.lora_B.double() @ layer.lora_A.double()
        total[layer.module] = total.get(layer.module, 0) + change
    return total


FORMATS = [("spec", TinyFluxConfig(), name) for name in ALL_FORMATS]
FORMATS += [("flux2", TINY_FLUX2, name) for name in FLUX2_FORMATS]


@pytest.mark.parametrize("alpha", [None, 3.0])
@pytest.mark.parametrize(("model", "config", "format"), FORMATS, ids=[f"{model}-{name}" for model, _, name in FORMATS])
def test_every_format_changes_every_linear_as_the_file_says(tmp_path, request, model, config, format, alpha):
    spec = request.getfixturevalue(model)
    weights = read_lora(str(write_lora(tmp_path / "a.safetensors", format, config, rank=5, alpha=alpha)), spec)
    file = load_file(tmp_path / "a.safetensors")
    ours, spelling = deltas(weights), format_named(format)
    assert weights.report.keys_applied == len(file)
    scale = 1.0 if alpha is None else alpha / 5
    for linear in spec.layout.linears:
        expected, touched = torch.zeros(linear.out_features, linear.in_features).double(), False
        for part in spelling.parts(linear.name, config):
            up, down = (file[f"{part.prefix}.{end}"].double() for end in (spelling.up, spelling.down))
            touched, row = True, 0
            for start, stop in part.rows:
                expected[start:stop] = scale * up[row : row + stop - start] @ down
                row += stop - start
        if linear.swap_halves:
            expected = torch.cat(expected.chunk(2)[::-1])
        for part in linear.parts:
            zeros = torch.zeros(part.rows, linear.in_features).double()
            actual = ours.get(part.module, zeros)
            torch.testing.assert_close(actual, expected[part.start : part.start + part.rows])
        assert touched or format == "xlabs"


@pytest.mark.parametrize(("model", "config", "formats"), [
    ("spec", TinyFluxConfig(), [format for format in ALL_FORMATS if format != "xlabs"]),  # attention only
    ("flux2", TINY_FLUX2, FLUX2_FORMATS),
], ids=["FLUX.1", "FLUX.2"])  # fmt: skip
def test_formats_that_say_the_same_read_the_same(tmp_path, request, model, config, formats):
    spec = request.getfixturevalue(model)
    read = [
        deltas(read_lora(str(write_lora(tmp_path / f"{format}.safetensors", format, config, rank=4, tied=True)), spec))
        for format in formats
    ]
    for module, change in read[0].items():
        for other in read[1:]:
            torch.testing.assert_close(other[module], change, rtol=1e-5, atol=1e-7)


SPELLINGS = {
    "PEFT with an adapter's name": ("lora_A.default.weight", "lora_B.default.weight"),
    "PEFT with an adapter's name of one's own": ("lora_A.my_style-2.weight", "lora_B.my_style-2.weight"),
    "down and up": ("lora_down.weight", "lora_up.weight"),
    "parameters": ("lora_A", "lora_B"),
    "linear layers": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
}
# Names that only some files have, besides those of the generator.
MODULES = {
    "PEFT's own saving": ("transformer.", "base_model.model."),
    "LyCORIS' feed-forward": ("ff.net.0.proj", "ff.linear_in"),
    "LyCORIS' feed-forward, out": ("ff_context.net.2", "ff_context.linear_out"),
}


def assert_reads_the_same(folder, spec, known, other):
    save_file(known, folder / "known.safetensors")
    save_file(other, folder / "other.safetensors")
    assert known.keys() != other.keys()
    assert_same_change(folder, spec)


@pytest.mark.parametrize(("down", "up"), SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("format", ["diffusers", "native"])
def test_other_spellings_of_the_matrices_read_the_same(tmp_path, spec, format, down, up):
    tensors = lora_state_dict(format, rank=3)
    other = {
        key.replace("lora_A.weight", down).replace("lora_B.weight", up): tensor for key, tensor in tensors.items()
    }
    assert_reads_the_same(tmp_path, spec, tensors, other)


@pytest.mark.parametrize(("name", "replacement"), MODULES.values(), ids=MODULES)
def test_other_names_of_modules_read_the_same(tmp_path, spec, name, replacement):
    tensors = lora_state_dict("diffusers", rank=3)
    assert_reads_the_same(
        tmp_path, spec, tensors, {key.replace(name, replacement): tensor for key, tensor in tensors.items()}
    )


def test_fused_single_blocks_under_diffusers_names(tmp_path, spec):
    tensors = lora_state_dict("native", rank=3, targets=lambda module: module.endswith((".linear1", ".linear2")))
    other = {
        key.replace("diffusion_model.single_blocks", "transformer.single_transformer_blocks")
        .replace("linear1", "attn.to_qkv_mlp_proj")
        .replace("linear2", "attn.to_out"): tensor
        for key, tensor in tensors.items()
    }
    assert_reads_the_same(tmp_path, spec, tensors, other)


def test_xlabs_names_read_as_the_layers_that_they_patch(tmp_path, spec):
    modules = {
        "double_blocks.1.img_attn.qkv": "double_blocks.1.processor.qkv_lora1",
        "double_blocks.1.txt_attn.qkv": "double_blocks.1.processor.qkv_lora2",
        "double_blocks.0.img_attn.proj": "double_blocks.0.processor.proj_lora1",
        "double_blocks.0.txt_attn.proj": "double_blocks.0.processor.proj_lora2",
        "single_blocks.1.linear2": "single_blocks.1.processor.proj_lora",
    }
    tensors = lora_state_dict("native", rank=3, targets=lambda module: module in modules)
    xlabs = {}
    for known, other in modules.items():
        xlabs[f"{other}.down.weight"] = tensors[f"diffusion_model.{known}.lora_A.weight"]
        xlabs[f"{other}.up.weight"] = tensors[f"diffusion_model.{known}.lora_B.weight"]
    # q, k and v of a single block, without the MLP half of its first linear
    down, up = torch.randn(3, 256), torch.randn(768, 3)
    single = "single_blocks.0.processor.qkv_lora"
    xlabs |= {f"{single}.down.weight": down, f"{single}.up.weight": up}
    for module, rows in zip(("to_q", "to_k", "to_v"), up.chunk(3), strict=True):
        prefix = f"transformer.single_transformer_blocks.0.attn.{module}"
        tensors |= {f"{prefix}.lora_A.weight": down.clone(), f"{prefix}.lora_B.weight": rows.clone()}
    save_file(tensors, tmp_path / "known.safetensors")
    save_file(xlabs, tmp_path / "other.safetensors")
    assert_same_change(tmp_path, spec)


def assert_same_change(folder, spec):
    known, other = (deltas(read_lora(str(folder / f"{name}.safetensors"), spec)) for name in ("known", "other"))
    assert known.keys() == other.keys()
    for module, change in known.items():
        assert torch.equal(other[module], change), module


def test_text_encoder_keys_are_set_aside_not_lost(tmp_path, spec):
    tensors = {**lora_state_dict("kohya"), **clip_l_lora_state_dict("kohya")}
    save_file(tensors, tmp_path / "both.safetensors")
    weights = read_lora(str(tmp_path / "both.safetensors"), spec)
    assert set(weights.text_encoder_keys) == set(clip_l_lora_state_dict("kohya"))
    only = tmp_path / "clip.safetensors"
    save_file(clip_l_lora_state_dict("kohya"), only)
    weights = read_lora(str(only), spec)
    assert (weights.layers, weights.vectors) == ((), ())
    assert len(weights.text_encoder_keys) == len(clip_l_lora_state_dict("kohya"))
    flat = flatten(LoraStack().with_lora(weights, 1.0).active, torch.float32, pin=False)
    assert not flat.placed
    assert not flat.buffer.any()


REFUSED = {
    "lora_nan": ["NaN or infinity", "choose"],
    "lora_wrong_width": ["expected (rank, 256)", "another size"],
    "lora_rank_mismatch": ["must be equal", "get it again"],
    "lora_missing_up": ["no lora_up / lora_B", "incomplete"],
    "lora_unknown_key": ["have no place", "choose a file"],
    "lora_no_pairs": ["'lora_no_pairs.safetensors'"],
    "sdxl_lora": ["does not fit FLUX.1", "Stable Diffusion XL", "Expected names like"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_files_are_explained(tmp_path, spec, name):
    path = getattr(broken_files, name)(tmp_path / f"{name}.safetensors")
    with pytest.raises(LoraError) as caught:
        read_lora(str(path), spec)
    for words in [f"'{name}.safetensors'", *REFUSED[name]]:
        assert words in str(caught.value)


def test_every_refused_file_of_the_generator_is_tested():
    assert set(REFUSED) == {function.__name__ for function in broken_files.WRONG_LORAS}


def test_a_missing_file(spec, tmp_path):
    with pytest.raises(FileError, match=r"none\.safetensors"):
        read_lora(str(tmp_path / "none.safetensors"), spec)


@pytest.mark.parametrize("chunk_bytes", [64, 1000 * 8, 2**23])
@pytest.mark.parametrize("format", ["kohya", "native", "diffusers"])
def test_a_file_is_read_alike_in_any_pieces(tmp_path, spec, monkeypatch, format, chunk_bytes):
    path = write_lora(tmp_path / "a.safetensors", format, rank=5, alpha=2.0)
    stored = load_file(path)
    monkeypatch.setattr(bulk, "CHUNK_BYTES", chunk_bytes)
    with bulk.BulkReader(path) as reader:
        keys = sorted(stored, key=lambda key: key[::-1])
        reader.expect(read_header(path), keys)
        read = {key: reader.tensor(key) for key in keys}
        reader.finish()
        assert reader.peak == max(float(tensor.abs().max()) for tensor in stored.values())
    assert all(torch.equal(read[key], tensor) for key, tensor in stored.items())
    assert all(read[key].data_ptr() % BYTES_ALIGNMENT == 0 for key in keys)


def test_what_a_text_encoder_needs_is_not_kept_in_memory(tmp_path, spec):
    tensors = lora_state_dict("kohya", rank=3)
    others = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(4000, 768)}
    save_file(tensors | others, tmp_path / "both.safetensors")
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert size <= read_lora(str(tmp_path / "both.safetensors"), spec).bytes < 1.1 * size


@pytest.mark.parametrize("format", ["kohya", "native", "diffusers"])
def test_a_file_that_was_read_becomes_a_buffer_in_few_operations(tmp_path, spec, monkeypatch, format):
    """As many as there are stretches without a rank to fill up, halves to swap or another alpha: not one a matrix."""
    weights = read_lora(str(write_lora(tmp_path / "a.safetensors", format, rank=16)), spec)
    entries = LoraStack().with_lora(weights, 0.7).active
    order = spec.layout.modules
    separate = flatten(entries, torch.float32, pin=False, order=order, background=True)
    monkeypatch.setattr(writing, "PARALLEL_ELEMENTS", 1)
    write, count = writing.Writer._write_scaled, []
    monkeypatch.setattr(writing.Writer, "_write_scaled", lambda self, *args: count.append(write(self, *args)))
    flat = flatten(entries, torch.float32, pin=False, order=order)
    assert 2 <= len(count) <= 8 < len(weights.layers)
    assert torch.equal(flat.buffer, separate.buffer)
    count.clear()
    monkeypatch.setattr(writing._Run, "append", lambda *args: False)
    assert torch.equal(flatten(entries, torch.float32, pin=False, order=order).buffer, flat.buffer)
    assert len(count) >= len(weights.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stack_is_exact(tmp_path, spec, dtype):
    """B @ A of the flat buffer is the sum of the scaled changes, up to one rounding of each matrix."""
    first = read_lora(str(write_lora(tmp_path / "a.safetensors", "kohya", rank=5, alpha=2.0)), spec)
    second = read_lora(str(write_lora(tmp_path / "b.safetensors", "diffusers", rank=16)), spec)
    stack = LoraStack().with_lora(first, 0.7).with_lora(second, -1.3).with_lora(first, 0.2)
    flat = flatten(stack.active, dtype, pin=False)
    one, two = deltas(first), deltas(second)
    assert set(flat.placed) == set(one) | set(two)
    for module, place in flat.placed.items():
        assert place.a_shape[0] == place.b_shape[1] == aligned_rank(5 + 16 + 5) == 32
        assert all(start * dtype.itemsize % BYTES_ALIGNMENT == 0 for start in (place.a_start, place.b_start))
        assert min(place.a_start, place.b_start) * dtype.itemsize >= HEAD_BYTES
        lora_A = flat.buffer.as_strided(place.a_shape, (place.a_shape[1], 1), place.a_start)
        lora_B = flat.buffer.as_strided(place.b_shape, (place.b_shape[1], 1), place.b_start)
        assert not lora_A[26:].any()
        assert not lora_B[:, 26:].any()
        expected = 0.9 * one[module] - 1.3 * two[module]
        error = (lora_B.double() @ lora_A.double() - expected).norm() / expected.norm()
        assert error < (1e-6 if dtype == torch.float32 else 5e-3)


def test_matrices_do_not_overlap_and_fused_layers_share_lora_A(tmp_path, spec):
    weights = read_lora(str(write_lora(tmp_path / "a.safetensors", "kohya", rank=5)), spec)
    flat = flatten(LoraStack().with_lora(weights, 1.0).active, torch.float32, pin=False)
    attention = [flat.placed[f"transformer_blocks.0.attn.{name}"] for name in ("to_q", "to_k", "to_v")]
    assert len({place.a_start for place in attention}) == 1
    spans = set()
    for place in flat.placed.values():
        for start, shape in ((place.a_start, place.a_shape), (place.b_start, place.b_shape)):
            spans.add((start, start + shape[0] * shape[1]))
    ordered = sorted(spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(ordered))
    assert ordered[-1][1] <= flat.buffer.numel()


@pytest.mark.parametrize(("rank", "alpha"), [(128, 1.0), (64, 0.5), (16, 48.0)])
def test_a_small_alpha_costs_no_digits_in_float16(tmp_path, spec, rank, alpha):
    """alpha / rank on lora_B alone would leave numbers of 1e-3, as trained LoRAs have, a percent off."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"A": 0.01, "B": 1e-3}
    tensors = {
        key: tensor
        if key.endswith("alpha")
        else torch.randn(tensor.shape, generator=generator) * sizes["A" if "lora_down" in key else "B"]
        for key, tensor in lora_state_dict("kohya", rank=rank, alpha=alpha).items()
    }
    save_file(tensors, tmp_path / "weak.safetensors")
    weights = read_lora(str(tmp_path / "weak.safetensors"), spec)
    flat = flatten(LoraStack().with_lora(weights, 0.3).active, torch.float16, pin=False)
    for layer in weights.layers:
        place = flat.placed[layer.module]
        lora_A = flat.buffer.as_strided(place.a_shape, (place.a_shape[1], 1), place.a_start).double()
        lora_B = flat.buffer.as_strided(place.b_shape, (place.b_shape[1], 1), place.b_start).double()
        expected = 0.3 * alpha / rank * layer.lora_B.double() @ layer.lora_A.double()
        assert (lora_B @ lora_A - expected).norm() < 1e-3 * expected.norm()


def test_strength_zero_leaves_the_stack(tmp_path, spec):
    weights = read_lora(str(write_lora(tmp_path / "a.safetensors", "kohya", rank=5)), spec)
    stack = LoraStack().with_lora(weights, 0.0)
    assert stack.active == ()
    assert stack.key == LoraStack().key
    assert str(stack) == "none"
    assert str(stack.with_lora(weights, 0.5)) == "a.safetensors × 0.5"


def key_by_key(spec, label, strengths, frames=()):
    """A stack to which another node adds a LoRA one layer after another, as loaders with weights per block do."""
    scheduled = ScheduledStack()
    for number, linear in enumerate(spec.layout.linears):
        target = LoraTarget.whole(linear)
        values = {"A": torch.ones(4, target.in_features), "B": torch.ones(target.out_features, 4), "alpha": 4.0}
        weights = from_patches([LinearPatch(linear.name, target, values)], tensor_digest)
        scheduled = scheduled.with_lora(replace(weights, label=label), strengths[number % len(strengths)], frames)
    return scheduled


def test_a_lora_that_is_added_key_by_key_is_named_once(spec):
    count = len(spec.layout.linears)
    stack = key_by_key(spec, "style.safetensors", [0.5])
    assert str(stack) == str(stack.stack) == "style.safetensors × 0.5"
    blocks = key_by_key(spec, "style.safetensors", [0.25, 1.0, -0.5])
    assert str(blocks) == str(blocks.stack) == f"style.safetensors × -0.5 to 1 ({count} parts)"
    nameless = key_by_key(spec, "", [0.25, 1.0])
    assert str(nameless) == f"LoRA of another node × 0.25 to 1 ({count} parts)"
    assert str(LoraStack(nameless.stack.entries[:1])).startswith("LoRA ")
    cut = key_by_key(spec, "style.safetensors", [0.5], between(0.0, 0.5))
    assert str(cut) == "style.safetensors × 0.5 (0–50 %)"
    (group,) = grouped(blocks.stack.entries)
    report = together([entry.adapter.report for entry in group])
    assert (report.kinds, report.keys_applied, report.ranks) == ({"LoRA": count}, 3 * count, (4, 4))
    assert report.targets == 50


def test_the_same_lora_twice_and_two_loras_stay_two(tmp_path, spec):
    one, two = (read_lora(str(write_lora(tmp_path / f"{name}.safetensors", "kohya", rank=5)), spec) for name in "ab")
    stack = LoraStack().with_lora(one, 0.5).with_lora(one, 0.2).with_lora(two, 0.2)
    assert str(stack) == "a.safetensors × 0.5 + a.safetensors × 0.2 + b.safetensors × 0.2"
    parts = key_by_key(spec, "b.safetensors", [0.5])
    again = parts.with_lora(parts.stack.entries[0].adapter, 0.3).with_lora(two, 1.0)
    assert str(again) == "b.safetensors × 0.5 + b.safetensors × 0.3 + b.safetensors × 1"


def test_byte_lru_keeps_the_newest_within_its_budget():
    lru = ByteLru(10, len)
    lru.put("a", b"1234")
    lru.put("b", b"1234")
    assert lru.get("a") == b"1234"
    lru.put("c", b"1234")
    assert lru.get("b") is None
    assert lru.get("a") == b"1234"
    assert lru.bytes == 8
    lru.put("d", b"x" * 100)
    assert [lru.get(key) is None for key in "acd"] == [True, True, False]
    lru.clear()
    assert lru.bytes == 0
