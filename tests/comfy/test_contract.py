"""What the pack relies on in ComfyUI: it is there, and where something is not, only what needs it is gone.

In this process, with ComfyUI's real modules; what stands for its server is made here, because a real one has a port.
"""

import ast
import asyncio
import inspect
import logging
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from harness.lora_files import lora_state_dict
from harness.paths import REPO

NODES = {"FluxAccelLoader", "FluxQuantizeTransformer", "FluxOffloadConfig", "FluxHotswapLora", "FluxStepCache",
         "FluxTextEncoderLoader", "FluxTinyVaeLoader", "FluxAccelReport"}  # fmt: skip
TAKES_THE_MODEL = {"FluxAccelLoader", "FluxHotswapLora", "FluxStepCache", "FluxAccelReport"}
LORA = "folder/one.safetensors"


@pytest.fixture
def server(monkeypatch) -> SimpleNamespace:
    """ComfyUI's server, as far as nodes use it, with one prompt that runs and one that waits."""
    graph = {"4": {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "lora_name": LORA}}}
    entries = ([(0, "prompt", graph)], [(2, "third", {}), (1, "second", {"1": {"class_type": "Waiting"}})])
    server = SimpleNamespace(texts=[], prompt_queue=SimpleNamespace(get_current_queue_volatile=lambda: entries))
    server.send_progress_text = lambda text, node_id, sid=None: server.texts.append((node_id, text))
    module = ModuleType("server")
    module.PromptServer = SimpleNamespace(instance=server)
    monkeypatch.setitem(sys.modules, "server", module)
    return server


@pytest.fixture
def contract(core, server):
    module = core("nodes.contract")
    module.mismatches.cache_clear()
    yield module
    module.mismatches.cache_clear()


@pytest.fixture
def node(core):
    """Code runs as if in this node of the running prompt."""
    from comfy_execution.utils import CurrentNodeContext

    with CurrentNodeContext("prompt", "4"):
        yield


def node_names(core) -> set[str]:
    return {node.__name__ for node in asyncio.run(core("nodes.extension").FluxHotswapExtension().get_node_list())}


def without(monkeypatch, core, where):
    """Take a thing away, as a version of ComfyUI would that does not have it."""
    module, _, path = where.partition(":")
    owner = sys.modules[module]
    *path, last = path.split(".")
    for name in path:
        owner = getattr(owner, name)
    monkeypatch.delattr(owner, last)


def test_it_holds(core, contract):
    assert list(contract.describe()) == []
    assert node_names(core) == NODES


def uses() -> set[str]:
    """What the pack's sources name of ComfyUI, as "module:name"."""
    found = set()
    for path in (REPO / "nodes").rglob("*.py"):
        for part in ast.walk(ast.parse(path.read_text())):
            if isinstance(part, ast.ImportFrom) and not part.level and part.module.startswith(("comfy.", "comfy_exec")):
                found |= {f"{part.module}:{alias.name}" for alias in part.names}
            elif isinstance(part, ast.Attribute) and re.fullmatch(r"comfy(\.\w+)+", ast.unparse(part)):
                names = ast.unparse(part).split(".")
                modules = [".".join(names[:end]) for end in range(len(names) + 1)]
                module = next(module for module in reversed(modules) if module in sys.modules)
                if rest := ast.unparse(part)[len(module) + 1 :]:
                    found.add(f"{module}:{rest.partition('.')[0]}")
    return found


def test_everything_that_the_pack_names_of_comfyui_is_listed(core, contract):
    node_names(core)  # imports them
    listed = set()
    for reliance in contract.RELIANCES:
        module, _, path = reliance.where.partition(":")
        listed.add(f"{module}:{path.partition('.')[0]}")
    found = uses()
    assert len(found) > 30
    assert "comfy.text_encoders.t5:T5" in found
    assert found - listed == set()


def test_every_family_has_its_half_for_comfyui(core, contract):
    registry = core("nodes.families.registry")
    assert set(registry.FOLDERS) == {family.name for family in core("accel.families.registry").FAMILIES}
    assert all(family.name == name for name, family in registry.families().items())
    assert set(registry.reliances()) < set(contract.RELIANCES)
    assert dict(registry.nameless_weights()) == {name: [] for name in registry.FOLDERS}


LACKS = {
    "comfy.model_patcher:ModelPatcher.partially_load": (["left out", "Text Encoder"], TAKES_THE_MODEL | {
        "FluxTextEncoderLoader"}),
    "comfy.patcher_extension:get_all_wrappers": (["Accelerated Flux Loader"], TAKES_THE_MODEL),
    "comfy.sd:CLIP.encode_from_tokens": (["Flux Text Encoder Loader is left out"], {"FluxTextEncoderLoader"}),
    "comfy.text_encoders.llama:Llama2_": (["loads no text encoder of FLUX.2"], set()),
    "comfy.weight_adapter:OFTAdapter": (["use Hotswap LoRA"], set()),
    "comfy.lora:model_lora_keys_clip": (["changes no text encoder"], set()),
    "comfy.model_management:MAX_PINNED_MEMORY": (["not page-locked"], set()),
    "server:PromptServer.instance.prompt_queue": (["named by their content", "not prepared ahead"], set()),
    "server:PromptServer.instance.send_progress_text": (["below running nodes"], set()),
}


@pytest.mark.parametrize("where", LACKS)
def test_what_is_gone_costs_what_needs_it_and_one_line(core, contract, monkeypatch, where):
    words, gone = LACKS[where]
    assert node_names(core) == NODES  # imports what is taken away
    contract.mismatches.cache_clear()
    without(monkeypatch, core, where)
    [line] = contract.describe()
    assert f"has no {where}" in line
    assert "unlike ComfyUI 0.18.2 to" in line
    for word in words:
        assert word in line
    assert node_names(core) == NODES - gone


def test_a_parameter_that_is_gone_is_named(core, contract, monkeypatch):
    import comfy.model_patcher

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "use_ejected", lambda self, skip=False: None)
    [line] = contract.describe()
    assert "has a comfy.model_patcher:ModelPatcher.use_ejected without skip_and_inject_on_exit_only" in line
    assert node_names(core) == NODES - TAKES_THE_MODEL


def test_an_attribute_that_is_gone_is_named(contract, monkeypatch):
    import comfy.model_patcher

    construct = comfy.model_patcher.ModelPatcher.__init__

    def __init__(self, *args, **kwargs):
        construct(self, *args, **kwargs)
        del self.patches_uuid

    monkeypatch.setattr(comfy.model_patcher.ModelPatcher, "__init__", __init__)
    [line] = contract.describe()
    assert "has a ModelPatcher without patches_uuid" in line


def test_a_model_whose_weights_have_no_names_is_noticed(core, contract, monkeypatch):
    """As with dynamic VRAM, if the pack did not make its own linears."""
    import comfy.memory_management
    import comfy.model_management
    import comfy.ops

    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy.model_management, "WINDOWS", True)  # a further condition before 0.30
    assert list(contract.describe()) == []
    contract.mismatches.cache_clear()
    monkeypatch.setattr(core("nodes.families.streams.skeleton"), "EagerOperations", comfy.ops.disable_weight_init)
    [line] = contract.describe()
    assert "weights have no name, such as 'img_in.weight'" in line
    assert "use Hotswap LoRA" in line


@pytest.mark.parametrize(
    ("lacking", "gone"),
    [("comfy.text_encoders.t5", {"FluxTextEncoderLoader"}), ("comfy.patcher_extension", {"FluxAccelLoader"})],
)
def test_a_node_that_cannot_be_imported_is_left_out(core, contract, pack, monkeypatch, caplog, lacking, gone):
    """Also where it is not in the contract: a module that is gone, or a library that breaks when it is imported."""
    monkeypatch.setattr(contract, "RELIANCES", ())
    for name in [name for name in sys.modules if name.startswith(f"{pack.__name__}.nodes.")]:
        if not name.endswith((".contract", ".extension", ".reliance")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, lacking, None)  # what makes `import` fail
    with caplog.at_level(logging.ERROR):
        assert node_names(core) == NODES - gone
    lines = [record.message for record in caplog.records]
    assert len(lines) == len(gone)
    for name, line in zip(sorted(gone), sorted(lines), strict=True):
        assert f"the node {name} is left out" in line
        assert lacking in line


def test_the_running_node_names_its_lora(core, server, node, monkeypatch):
    import folder_paths

    native_lora, prompts, progress = core("nodes.native_lora"), core("nodes.prompts"), core("nodes.progress")
    monkeypatch.setattr(folder_paths, "get_full_path", lambda folder, name: name if name == LORA else None)
    assert native_lora.chosen_lora() == LORA
    assert [list(graph) for graph in prompts.graphs()] == [["4"], ["1"], []]
    progress.show_text("done")
    assert server.texts == [("4", "done")]


@pytest.mark.parametrize("lacking", ["queue", "look", "instance", "module"])
def test_a_server_without_queue_names_nothing_and_breaks_nothing(core, contract, server, node, monkeypatch, lacking):
    native_lora, prompts, progress = core("nodes.native_lora"), core("nodes.prompts"), core("nodes.progress")
    if lacking == "queue":
        del server.prompt_queue
    elif lacking == "look":
        del server.prompt_queue.get_current_queue_volatile
    elif lacking == "instance":
        del sys.modules["server"].PromptServer.instance
    else:
        monkeypatch.delitem(sys.modules, "server")
    assert native_lora.chosen_lora() == ""
    assert list(prompts.graphs()) == []
    progress.show_text("done")
    assert bool(server.texts) == (lacking in ("queue", "look"))


def test_text_goes_nowhere_where_it_would_break(core, contract, server, node):
    server.send_progress_text = lambda message: server.texts.append(message)
    core("nodes.progress").show_text("done")
    assert server.texts == []


def overrides(core):
    """(class, name, function) of everything of ours that stands in for something of core's."""
    made = [
        core("nodes.patcher").AcceleratedModelPatcher,
        core("nodes.families.flux1.model").AcceleratedFlux,
        core("nodes.families.flux1.clip").FluxClip,
        core("nodes.encoders").EncodersPatcher,
    ]
    for class_ in made:
        ours = [base for base in class_.__mro__ if base.__module__.startswith(core("nodes").__name__)]
        theirs = [base for base in class_.__mro__ if base.__module__.startswith("comfy.")]
        for base in ours:
            for name, function in vars(base).items():
                if inspect.isfunction(function) and any(name in vars(each) for each in theirs):
                    yield base, name, function


def test_every_override_takes_what_core_may_add(core):
    """`ModelPatcher.__init__` and `clone` grew a keyword in 0.37, and nothing worked any more."""
    # Only this pack constructs these.
    own = {(class_, "__init__") for class_ in ("RememberingClip", "FluxClip", "AcceleratedModel", "AcceleratedFlux")}
    found = {(class_.__name__, name): function for class_, name, function in overrides(core)}
    assert len(found) > 30
    assert own <= found.keys()
    narrow = []
    for (class_, name), function in found.items():
        kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
        if (class_, name) not in own and not {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds:
            narrow.append(f"{class_}.{name}")
    assert narrow == []


@pytest.fixture
def native_loras(core):
    from harness.tiny_models import TinyFluxConfig

    families = core("accel.families.flux1")
    sizes = TinyFluxConfig()
    config = families.Flux1Config(
        sizes.hidden, sizes.depth, sizes.depth_single, sizes.in_channels, sizes.out_channels, sizes.context,
        sizes.pooled, sizes.mlp, sizes.guidance,
    )  # fmt: skip
    family = families.Flux1()
    scale_names = core("nodes.families.registry").families()[family.name].scale_names
    return core("nodes.native_lora").NativeLoras(family, config, scale_names, None)


NAME = "diffusion_model.double_blocks.0.img_attn.proj"


def patches(core, **further):
    """What ComfyUI's loader makes of one layer of a LoRA file."""
    from comfy.weight_adapter import LoRAAdapter

    tensors = lora_state_dict("native", rank=4)
    return {f"{NAME}.weight": LoRAAdapter.load(NAME, tensors, None, None, set()), **further}


def test_configs_of_modules_are_covered_and_dropped(core, native_loras, caplog):
    """ComfyUI hands a LoRA's `.config` entries over as patches, from about 0.40 on."""
    config = f"{NAME}.config", ("config", (torch.zeros(4, dtype=torch.uint8),))
    plain, _ = native_loras.read(patches(core))
    with caplog.at_level(logging.INFO):
        weights, keys = native_loras.read(patches(core, **dict([config])))
    assert keys == [f"{NAME}.weight", config[0]]
    assert weights.identity == plain.identity
    assert f"1 entries of a LoRA ask for an attention kernel, such as '{config[0]}'" in caplog.text
    with pytest.raises(core("accel.errors").LoraError, match="found no key"):
        native_loras.read(dict([config]))


def test_an_adapter_with_more_values_is_refused_in_words(core, native_loras):
    """Stock ComfyUI would use what this pack does not know."""
    found = patches(core)
    adapter = found[f"{NAME}.weight"]
    adapter.weights = (*adapter.weights, None)
    native_loras.read(found)
    adapter.weights = (*adapter.weights[:-1], torch.ones(1))
    with pytest.raises(core("accel.errors").LoraError, match=r"LoRAAdapter with 7 values.*Use Hotswap LoRA"):
        native_loras.read(found)
