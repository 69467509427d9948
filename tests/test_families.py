"""What a family must supply: a toy family, which nothing else knows of, goes through the whole pack."""

import importlib

import pytest
import torch

from accel.attention import sdpa
from accel.build import conversion_of
from accel.checkpoint import inspect_checkpoint
from accel.compile.cache import CompileCache
from accel.engine import Engine
from accel.errors import CheckpointError, LoraError
from accel.families import registry
from accel.families.base import Family
from accel.lora.read.names import known_names
from accel.lora.schedule import ScheduledStack
from accel.lora.stack import LoraStack
from accel.memory.budgets import PoolBudgets
from accel.memory.cpu import HostMemory
from accel.observer import Silent
from accel.offload.plan import OffloadPlan
from accel.plan import main as plan
from accel.quantize import find_mode
from accel.quantize.modes import MODES
from accel.report import Reported, write_report
from accel.settings import EngineSettings, Quantization, QuantizedCache
from harness.paths import REPO
from harness.tensor_files import write_tensors
from tests.toy_family import Toy, ToyConfig, layout_of
from tests.toy_family.model import ToyForward, ToyInputs, ToyModel, block_region

CONFIG = ToyConfig()
POOLS = PoolBudgets(2**24, 2**24, 2**24)
RANK = 4


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The one line of `registry` that a family needs."""
    family = Toy()
    monkeypatch.setattr(registry, "FAMILIES", (*registry.FAMILIES, family))
    return family


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def state_dict():
    """Every tensor of the toy's own layout."""
    tensors = {}
    for seed, (name, shape) in enumerate(layout_of(CONFIG).expected_shapes().items()):
        spread = 1.0 if len(shape) == 1 else shape[1] ** -0.5
        tensors[name] = normal(*shape, seed=seed) * spread
    return tensors


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_tensors(tmp_path_factory.mktemp("toy") / "toy.safetensors", state_dict()))


@pytest.fixture
def spec(toy, path):
    return inspect_checkpoint(path)


def inputs_of(height=6, width=4, batch=1, text=5):
    return ToyInputs(normal(batch, CONFIG.channels, height, width), normal(batch, text, CONFIG.text_width, seed=1))


def lora_tensors(spell="transformer.layers.{}.{}.lora_{}.weight", names=("read", "write"), matrices="AB"):
    tensors = {}
    for index in range(CONFIG.depth):
        for name, columns, rows in zip(names, (CONFIG.hidden, 2 * CONFIG.hidden), (4 * CONFIG.hidden, CONFIG.hidden),
                                       strict=True):  # fmt: skip
            tensors[spell.format(index, name, matrices[0])] = normal(RANK, columns, seed=index) * columns**-0.5
            tensors[spell.format(index, name, matrices[1])] = normal(rows, RANK, seed=index + 50) * 0.5
    return tensors


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    return str(write_tensors(tmp_path_factory.mktemp("loras") / "lora.safetensors", lora_tensors()))


def reference(strength=0.0):
    """Plain PyTorch with the LoRA merged into the weights."""
    model = ToyModel(CONFIG.hidden, CONFIG.depth, CONFIG.channels, CONFIG.text_width)
    names = {f"{linear.name}.weight": f"{linear.parts[0].module}.weight" for linear in layout_of(CONFIG).linears}
    names |= {vector.name: vector.parameter for vector in layout_of(CONFIG).vectors}
    model.load_state_dict({names[name]: tensor for name, tensor in state_dict().items()})
    loras = lora_tensors()
    with torch.no_grad():
        for index, block in enumerate(model.layers):
            for name in ("read", "write"):
                lora_A, lora_B = (loras[f"transformer.layers.{index}.{name}.lora_{half}.weight"] for half in "AB")
                block.get_submodule(name).weight += strength * lora_B @ lora_A
    return ToyForward(model, block_region(sdpa))


def engine_of(spec, mode="none", compile="off", observer=None, cache=None, **options):
    engine = Engine(spec, EngineSettings(compile=compile, quantization=Quantization(mode, cache)), observer, POOLS,
                    **options)  # fmt: skip
    engine.load()
    return engine


def close(output, expected):
    return torch.allclose(output, expected, rtol=1e-4, atol=1e-4)


# The contract.


@pytest.mark.parametrize("name", [name for name in Family.__annotations__ if not hasattr(Family, name)])
def test_a_family_that_lacks_an_attribute_is_refused_where_it_is_defined(name):
    attributes = {each: value for each, value in vars(Toy).items() if each in Family.__annotations__ and each != name}
    with pytest.raises(TypeError, match=f"the family Incomplete lacks {name}:"):
        type("Incomplete", (Family,), attributes)


def test_every_family_answers_for_its_published_models():
    for family in registry.FAMILIES:
        for config in family.published.values():
            assert hash(config) == hash(config)
            assert config.variant
            assert config.sizes
            layout = family.layout(config)
            assert {linear.block for linear in layout.by_module.values()} == {None, *range(len(layout.blocks))}
            assert family.text_encoders(config)


def test_comfyuis_side_has_every_family(pack):
    """With a line in its own registry and a folder beside it; the toy has none."""
    sides = importlib.import_module(f"{pack.__name__}.nodes.families.registry")
    assert set(sides.FOLDERS) == {family.name for family in registry.FAMILIES[:-1]}
    for folder in sides.FOLDERS.values():
        assert (REPO / "nodes" / "families" / folder / "family.py").is_file()


def test_every_mode_says_what_its_linears_hold():
    widest = [mode.name for mode in MODES.values() if mode.workspace.input_bytes and mode.workspace.unpacks_weight]
    assert not widest  # a weight that is unpacked is multiplied in the compute dtype
    assert {mode.name for mode in MODES.values() if mode.needs_compile} == {
        mode.name for mode in MODES.values() if mode.workspace.input_bytes
    }


# Files.


def test_it_is_recognised_beside_others(spec, toy, models, tmp_path):
    assert (spec.family, spec.config) == (toy, CONFIG)
    assert spec.parameter_count == sum(tensor.numel() for tensor in state_dict().values())
    flux = inspect_checkpoint(str(models / "diffusion_models/tiny-flux-dev-fp32.safetensors"))
    assert flux.family is registry.FAMILIES[0]
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in state_dict().items()}
    assert inspect_checkpoint(str(write_tensors(tmp_path / "all.safetensors", prefixed))).config == CONFIG


def test_a_wrong_file_is_told_what_every_family_takes(tmp_path):
    file = write_tensors(tmp_path / "other.safetensors", {"something.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError) as caught:
        inspect_checkpoint(str(file))
    for family in registry.FAMILIES:
        assert family.name in str(caught.value)
        assert family.wording.example in str(caught.value)
    relative = {**state_dict(), "distilled_guidance_layer.in_proj.weight": torch.zeros(2, 2)}
    with pytest.raises(CheckpointError, match="1 tensors have no place in the model"):  # only others' relative
        inspect_checkpoint(str(write_tensors(tmp_path / "relative.safetensors", relative)))


def test_a_missing_tensor_and_a_bias_too_many_are_refused(tmp_path):
    tensors = state_dict()
    missing = {name: tensor for name, tensor in tensors.items() if name != "stages.1.outward.weight"}
    with pytest.raises(CheckpointError, match=r"1 of \d+ tensors are missing, such as 'stages.1.outward.weight'"):
        inspect_checkpoint(str(write_tensors(tmp_path / "missing.safetensors", missing)))
    more = {**tensors, "stages.1.outward.bias": torch.zeros(CONFIG.hidden)}
    with pytest.raises(CheckpointError, match=r"1 tensors have no place .* 'stages.1.outward.bias'"):
        inspect_checkpoint(str(write_tensors(tmp_path / "more.safetensors", more)))


# LoRAs.


def test_a_lora_is_read_in_every_spelling(spec, tmp_path, lora):
    engine = engine_of(spec)
    expected = engine.read_lora(lora).report
    assert (expected.format, expected.targets, expected.keys_applied) == ("diffusers / PEFT", 6, 12)
    spellings = {
        "lora_unet_stages_{}_{}.lora_{}.weight": ("Kohya sd-scripts", ("inward", "outward"), ("down", "up")),
        "diffusion_model.layers.{}.{}.lora_{}.weight":
            ("diffusers' names behind ComfyUI's prefix", ("read", "write"), "AB"),
        "stages.{}.{}.lora_{}.weight": ("Nobody", ("inward", "outward"), "AB"),
    }  # fmt: skip
    for number, (spell, (name, modules, matrices)) in enumerate(spellings.items()):
        file = write_tensors(tmp_path / f"{number}.safetensors", lora_tensors(spell, modules, matrices))
        report = engine.read_lora(str(file)).report
        assert (report.format, report.targets, report.keys_applied) == (name, 6, 12)


def test_a_lora_of_another_model_is_refused_in_the_familys_words(spec, tmp_path):
    engine = engine_of(spec)
    other = {"lora_unet_joint_blocks_0_x.lora_down.weight": torch.zeros(4, 4)}
    with pytest.raises(LoraError) as caught:
        engine.read_lora(str(write_tensors(tmp_path / "other.safetensors", other)))
    assert "does not fit Toy (by its names: Stable Diffusion 3)" in str(caught.value)
    assert Toy.wording.lora_keys[0] in str(caught.value)
    assert known_names(spec.family, spec.config).absent.find("lora_unet_stages_9_inward")


@pytest.mark.parametrize("ending", ["diff_b", "lora_B.bias"])
def test_a_lora_that_changes_a_bias_is_refused_where_there_is_none(spec, tmp_path, ending):
    file = {**lora_tensors(), f"transformer.layers.0.read.{ending}": torch.zeros(4 * CONFIG.hidden)}
    with pytest.raises(LoraError, match=rf"'transformer.layers.0.read.{ending}' changes a bias of .* which has none"):
        engine_of(spec).read_lora(str(write_tensors(tmp_path / "bias.safetensors", file)))


# Engines.


def test_it_computes_what_plain_pytorch_does_with_and_without_a_lora(spec, lora):
    engine, inputs = engine_of(spec), inputs_of()
    with torch.no_grad():
        plain, changed = reference()(inputs), reference(0.7)(inputs)
    before = engine(inputs)
    assert close(before, plain)
    assert not close(plain, changed)
    engine.swap(LoraStack().with_lora(engine.read_lora(lora), 0.7))
    assert close(engine(inputs), changed)
    engine.swap(LoraStack())
    assert torch.equal(engine(inputs), before)


class Listener(Silent):
    def __init__(self):
        self.regions = []

    def compiled(self, region, seconds, count, why):
        self.regions.append(region)


@pytest.mark.parametrize("mode", ["regional", "full"])
def test_it_compiles_once_for_all_sizes_and_loras_and_a_restart_compiles_nothing(spec, lora, tmp_path, mode):
    listener = Listener()
    engine = engine_of(spec, compile=mode, observer=listener, compile_cache=CompileCache(str(tmp_path)))
    with torch.no_grad():
        assert close(engine(inputs_of()), reference()(inputs_of()))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for sizes in ({"height": 8}, {"batch": 2, "text": 7}):
                assert close(engine(inputs_of(**sizes)), reference()(inputs_of(**sizes)))
            engine.swap(LoraStack().with_lora(engine.read_lora(lora), 0.7))
            assert close(engine(inputs_of()), reference(0.7)(inputs_of()))
    assert listener.regions == ["block" if mode == "regional" else "whole"]
    again = engine_of(spec, compile=mode, compile_cache=CompileCache(str(tmp_path)))
    assert close(again(inputs_of()), reference()(inputs_of()))
    assert again.compiler.count == 0
    assert again.compiler.failure is None


@pytest.mark.parametrize("mode", ["int8", "int8_weight_only", "nf4"])
def test_its_blocks_are_quantized_and_kept_on_disk(spec, lora, tmp_path, mode):
    conversion = conversion_of(spec, find_mode(mode))
    assert (conversion.converted, conversion.left, conversion.unfit) == (2 * CONFIG.depth, 3, [])
    cache = QuantizedCache(str(tmp_path), 2**30)
    engine, inputs = engine_of(spec, mode, cache=cache), inputs_of()
    assert engine.bytes < spec.parameter_count * 4 / 2
    before = engine(inputs)
    with torch.no_grad():
        expected = reference()(inputs)
    assert (before - expected).norm() < 0.2 * expected.norm()
    engine.swap(LoraStack().with_lora(engine.read_lora(lora), 0.7))
    with torch.no_grad():
        changed = reference(0.7)(inputs)
    assert (engine(inputs) - changed).norm() < 0.2 * changed.norm()
    engine.swap(LoraStack())
    assert torch.equal(engine(inputs), before)
    assert list(tmp_path.iterdir())
    assert torch.equal(engine_of(spec, mode, cache=cache)(inputs), before)


@pytest.mark.parametrize("resident", range(CONFIG.depth))
def test_its_blocks_are_streamed(spec, lora, resident):
    blocks = len(spec.layout.blocks)
    streamed = engine_of(
        spec, plan=OffloadPlan("stream", resident, blocks, 0, 0, ""), memory=HostMemory(10**9, flat=True)
    )
    whole, inputs = engine_of(spec), inputs_of()
    for engine in (streamed, whole):
        engine.swap(LoraStack().with_lora(engine.read_lora(lora), 0.7))
    assert torch.equal(streamed(inputs), whole(inputs))
    assert streamed.device_bytes < whole.device_bytes or resident + 2 >= blocks


# For people.


def test_the_plan_and_the_report_speak_of_it(spec, path, capsys):
    for file in (path, "toy-small"):
        assert plan([file, "--vram", "8", "--text-encoder", "int8"]) == 0
        out = capsys.readouterr().out
        assert f"({CONFIG.depth} blocks of " in out
        assert "Speller (int8) 1.0 MB, VAE 1.0 MB" in out
    text = write_report(Reported(engine_of(spec), ScheduledStack()))
    assert "Toy small, " in text
    assert "3 stages, hidden size 128" in text
    assert "FLUX" not in text
