"""FLUX.2 through the whole library, against diffusers' own model; with ComfyUI it is in tests/comfy/test_flux2.py."""

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor

from accel.checkpoint import inspect_checkpoint
from accel.compile.cache import CompileCache
from accel.engine import Engine
from accel.families.flux2 import PATCH_SIZE, POSITIONS, Flux2Inputs
from accel.lora.stack import LoraStack
from accel.memory.budgets import PoolBudgets
from accel.memory.cpu import HostMemory
from accel.observer import Silent
from accel.offload.plan import OffloadPlan
from accel.settings import EngineSettings, Quantization
from harness.tensor_files import write_tensors
from harness.tiny_flux2 import TinyFlux2Config, as_diffusers, tiny_flux2_state_dict
from harness.tiny_models import seeded_normal

CONFIG = TinyFlux2Config(guidance=True)
POOLS = PoolBudgets(2**26, 2**26, 2**26)
STRENGTH = 0.7


def normal(*shape, seed=0):
    return seeded_normal(seed, "inputs", shape)


def inputs_of(height=6, width=4, batch=1, text=20, references=0, dtype=torch.float32, **options):
    sizes = ((4, 6), (3, 5))[:references]
    return Flux2Inputs(
        normal(batch, 128, height, width).to(dtype),
        torch.full((batch,), 0.5),
        normal(batch, text, CONFIG.context, seed=1).to(dtype),
        torch.full((batch,), 4.0),
        references=[normal(1, 128, *size, seed=size[0]).expand(batch, -1, -1, -1).to(dtype) for size in sizes],
        **options,
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(write_tensors(tmp_path_factory.mktemp("flux2") / "flux2.safetensors", tiny_flux2_state_dict(CONFIG)))


@pytest.fixture(scope="module")
def spec(path):
    return inspect_checkpoint(path)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    """Of a fused linear of each kind, of a shared modulation, and of the last norm."""
    tensors = {}
    hidden, mlp = CONFIG.hidden, CONFIG.mlp
    for name, rows, columns in (
        ("double_blocks.0.img_attn.qkv", 3 * hidden, hidden), ("double_blocks.1.txt_mlp.0", 2 * mlp, hidden),
        ("single_blocks.0.linear1", 3 * hidden + 2 * mlp, hidden), ("single_blocks.1.linear2", hidden, hidden + mlp),
        ("double_stream_modulation_img.lin", 6 * hidden, hidden),
        ("final_layer.adaLN_modulation.1", 2 * hidden, hidden),
    ):  # fmt: skip
        tensors[f"diffusion_model.{name}.lora_A.weight"] = seeded_normal(3, f"{name}.A", (8, columns), columns**-0.5)
        tensors[f"diffusion_model.{name}.lora_B.weight"] = seeded_normal(3, f"{name}.B", (rows, 8), 0.3)
    return str(write_tensors(tmp_path_factory.mktemp("loras") / "lora.safetensors", tensors))


@pytest.fixture(scope="module")
def reference(spec, lora):
    """(inputs, strength) -> what diffusers' own model computes with the LoRA merged into its weights."""
    original = tiny_flux2_state_dict(CONFIG)
    changes = {}
    for name, matrices in _pairs(lora).items():
        changes[f"{name}.weight"] = matrices["B"] @ matrices["A"]
    model = Flux2Transformer2DModel(**spec.family.diffusers_config(spec.config)).eval()

    def compute(inputs, strength=0.0) -> Tensor:
        merged = {name: tensor + strength * changes.get(name, 0.0) for name, tensor in original.items()}
        model.load_state_dict(as_diffusers(spec, merged))
        placement = POSITIONS.place(
            inputs.latent, inputs.references, inputs.reference_method, inputs.encoder_hidden_states.shape[1]
        )
        images = [inputs.latent, *inputs.references]
        with torch.inference_mode():
            output = model(
                hidden_states=torch.cat([image.flatten(2).transpose(1, 2) for image in images], dim=1),
                encoder_hidden_states=inputs.encoder_hidden_states,
                timestep=inputs.timestep,
                guidance=inputs.guidance,
                img_ids=POSITIONS.image_ids(placement, torch.device("cpu")),
                txt_ids=POSITIONS.text_ids(placement, torch.device("cpu")),
                return_dict=False,
            )[0]
        rows, columns = inputs.latent.shape[2:]
        return output[:, : rows * columns].transpose(1, 2).unflatten(2, (rows, columns))

    return compute


def _pairs(lora):
    from safetensors.torch import load_file

    pairs = {}
    for key, tensor in load_file(lora).items():
        name, matrix, _ = key.removeprefix("diffusion_model.").rsplit(".", 2)
        pairs.setdefault(name, {})[matrix[-1]] = tensor
    return pairs


def engine_of(spec, mode="none", compile="off", dtype="fp32", observer=None, **options):
    settings = EngineSettings(dtype=dtype, compile=compile, quantization=Quantization(mode))
    engine = Engine(spec, settings, observer, POOLS, **options)
    engine.load()
    return engine


def close(output, expected, tolerance=1e-5):
    return (output.float() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("references", [0, 2])
def test_it_computes_what_diffusers_does_with_and_without_a_lora(spec, lora, reference, references):
    engine, inputs = engine_of(spec), inputs_of(batch=2, references=references)
    before = engine(inputs)
    assert close(before, reference(inputs))
    engine.swap(LoraStack().with_lora(engine.read_lora(lora), STRENGTH))
    changed = reference(inputs, STRENGTH)
    assert close(engine(inputs), changed)
    assert not close(before, changed, 0.05)
    engine.swap(LoraStack())
    assert torch.equal(engine(inputs), before)


def test_every_published_model_is_recognised_by_its_sizes(spec):
    family = spec.family
    for name, config in family.published.items():
        variant = name.removeprefix("flux2-").replace("-", " ").replace("b", "B")
        assert config.variant == variant
        layout = family.layout(config)
        parameters = sum(linear.out_features * linear.in_features for linear in layout.linears)
        assert parameters == pytest.approx({"dev": 32.2e9, "klein 9B": 9.08e9, "klein 4B": 3.88e9}[variant], rel=0.01)


class Listener(Silent):
    def __init__(self):
        self.regions = []

    def compiled(self, region, seconds, count, why):
        self.regions.append(region)


@pytest.mark.slow
def test_it_compiles_once_for_fifty_prompts_and_a_restart_compiles_nothing(spec, lora, reference, tmp_path):
    """Of every size, length, batch and number of references; another reference method is the one thing that is new."""
    listener = Listener()
    engine = engine_of(spec, compile="regional", observer=listener, compile_cache=CompileCache(str(tmp_path)))
    assert close(engine(inputs_of()), reference(inputs_of()))
    random = torch.Generator().manual_seed(5)
    stack = LoraStack().with_lora(engine.read_lora(lora), STRENGTH)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for number in range(50):
            height, width, batch, text, references, with_lora = (
                int(torch.randint(low, high, (), generator=random))
                for low, high in ((1, 9), (1, 9), (1, 4), (1, 40), (0, 3), (0, 2))
            )
            inputs = inputs_of(height, width, batch, text, references)
            engine.swap(stack if with_lora else LoraStack())
            output = engine(inputs)
            if number % 10 == 0:
                assert close(output, reference(inputs, STRENGTH * with_lora))
    assert listener.regions == ["double", "single"]
    engine.swap(LoraStack())
    inputs = inputs_of(references=2, reference_method="index_timestep_zero")
    modulated = engine(inputs)
    assert close(modulated, engine_of(spec)(inputs))
    assert listener.regions == ["double", "single"] * 2
    again = engine_of(spec, compile="regional", compile_cache=CompileCache(str(tmp_path)))
    assert close(again(inputs_of()), reference(inputs_of()))
    assert close(again(inputs), modulated)
    assert (again.compiler.count, again.compiler.failure) == (0, None)


@pytest.mark.slow
def test_all_blocks_compile_as_one_region(tmp_path):
    tensors = tiny_flux2_state_dict(TinyFlux2Config(depth=1, depth_single=1))
    small = inspect_checkpoint(write_tensors(tmp_path / "small.safetensors", tensors))
    listener, plain = Listener(), engine_of(small)
    engine = engine_of(small, compile="full", observer=listener)
    for references in (0, 1):
        assert close(engine(inputs_of(references=references)), plain(inputs_of(references=references)))
    assert listener.regions == ["whole"]


@pytest.mark.parametrize(("mode", "bound"), [("int8_weight_only", 0.05), ("fp8_weight_only", 0.12), ("nf4", 0.35)])
def test_its_blocks_are_quantized(spec, lora, reference, mode, bound):
    """bf16 alone is 0.02 away: the models are small, and random."""
    engine, inputs = engine_of(spec, mode, dtype="bf16"), inputs_of(dtype=torch.bfloat16)
    exact = inputs_of()
    before = engine(inputs)
    assert close(before, reference(exact), bound)
    engine.swap(LoraStack().with_lora(engine.read_lora(lora), STRENGTH))
    assert close(engine(inputs), reference(exact, STRENGTH), bound)
    engine.swap(LoraStack())
    assert torch.equal(engine(inputs), before)


@pytest.mark.parametrize("resident", range(4))
def test_its_blocks_are_streamed(spec, lora, resident):
    blocks = len(spec.layout.blocks)
    plan = OffloadPlan("stream", resident, blocks, 0, 0, "")
    streamed, whole = engine_of(spec, plan=plan, memory=HostMemory(10**9, flat=True)), engine_of(spec)
    for engine in (streamed, whole):
        engine.swap(LoraStack().with_lora(engine.read_lora(lora), STRENGTH))
    inputs = inputs_of(references=1)
    assert torch.equal(streamed(inputs), whole(inputs))
    assert streamed.device_bytes < whole.device_bytes or resident + 2 >= blocks


def test_one_patch_is_one_token():
    placement = POSITIONS.place(normal(1, 128, 3, 5), [normal(1, 128, 2, 2)], None, 7)
    ids = POSITIONS.image_ids(placement, torch.device("cpu"))
    assert PATCH_SIZE == 1
    assert ids.shape == (3 * 5 + 2 * 2, 4)
    assert ids[-1].tolist() == [10.0, 1.0, 1.0, 0.0]
    assert POSITIONS.text_ids(placement, torch.device("cpu"))[:, 3].tolist() == list(range(7))
