"""Which tensor of a LoRA file does what: every key gets a module and a role, or an error names it. Reads no values."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from ..errors import LoraError
from ..files import FLOAT_DTYPES, TensorFile
from ..layout import LoraTarget, VectorWeight
from ..spec import ModelSpec
from .kinds import Change, check_change
from .shapes import INSTEAD, Piece

# The end of a key, from one of its last dots on -> role, see `kinds`.
ROLES: Mapping[str, str] = {
    ".lora_down.weight": "A",  # sd-scripts, LyCORIS, OneTrainer, ComfyUI
    ".lora_up.weight": "B",
    ".lora_A.weight": "A",  # PEFT, diffusers, ai-toolkit, SimpleTuner
    ".lora_B.weight": "B",
    ".lora_A": "A",  # the matrices themselves as parameters
    ".lora_B": "B",
    ".lora.down.weight": "A",  # diffusers before PEFT
    ".lora.up.weight": "B",
    "_lora.down.weight": "A",
    "_lora.up.weight": "B",
    ".lora_linear_layer.down.weight": "A",
    ".lora_linear_layer.up.weight": "B",
    ".down.weight": "A",  # XLabs
    ".up.weight": "B",
    ".lora_mid.weight": "mid",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",  # PEFT's DoRA
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_B.bias": "up_bias",  # PEFT with lora_bias, BFL
    **{f".hada_{part}": f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{part}": f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
    ".oft_blocks": "oft_blocks",
    ".rescale": "rescale",
    ".diff_b": "diff_b",
    ".diff": "diff",
    ".set_weight": "set_weight",
    ".reshape_weight": "reshape_weight",
    **{f".{part}.weight": part for part in ("a1", "a2", "b1", "b2")},
    **{f".oft_R{end}": "oft_R" for end in (".weight", ".scaled_oft")},
    ".on_input": "ia3",
    ".w_norm": "w_norm",
    ".b_norm": "b_norm",
    ".weight": "weight",
}
# PEFT's own names of what it adds to a layer, with the adapter's name in the middle ("default" if nobody gave it one).
ADAPTER_NAME = re.compile(r"^(\.(?:lora_A|lora_B|lora_magnitude_vector|oft_R))\.[^.]+(\.weight|\.bias|)$")
# What may stand behind the name of a norm -> whether it replaces its scale, or is added to it.
NORM_ENDS: Mapping[str, bool] = {
    ".diff": False,
    ".weight.diff": False,
    ".scale.diff": False,
    ".w_norm": False,
    ".set_weight": True,
    ".scale": True,  # BFL's control LoRAs
    ".scale.set_weight": True,
}
TEXT_ENCODER_PREFIXES = ("lora_te", "text_encoder", "clip_l.", "t5xxl.", "t5.")
# What trainers store beside the weights and no loader reads -> what it is.
ASIDE: Mapping[str, str] = {
    "bundle_emb.": "of trained embeddings, which ComfyUI reads from files of their own",  # OneTrainer
    "emb_params": "of a trained embedding, which ComfyUI reads from a file of its own",  # ai-toolkit
}
# The end of an entry that configures a module of ComfyUI's model (from about 0.40): which attention kernel it prefers.
CONFIG_END = ".config"
CONFIG = "which ask for an attention kernel; choose it in Accelerated Flux Loader"
# Parts of names that LoRAs for other models or in other programs' own formats carry, for the message only.
OTHER_MODELS: Mapping[str, str] = {
    "distilled_guidance_layer.": "Chroma",
    "double_stream_modulation_": "FLUX.2",
    "img_attn_qkv": "HunyuanVideo",
    "mlp_fc1.": "FLUX.1, converted for Nunchaku: get the file that it was made of",
    "processor.q_loras.": "FLUX.1, EasyControl",
    "oft_unet_": "FLUX.1, sd-scripts' OFT, which no loader reads",
    "lora_unet_input_blocks_": "Stable Diffusion XL",
    "lora_unet_output_blocks_": "Stable Diffusion XL",
    "lora_unet_down_blocks_": "Stable Diffusion 1.5 or XL",
    "unet.down_blocks.": "Stable Diffusion 1.5 or XL",
    "lora_unet_joint_blocks_": "Stable Diffusion 3",
    "diffusion_model.joint_blocks.": "Stable Diffusion 3",
    "diffusion_model.blocks.": "Wan",
    "diffusion_model.layers.": "Z-Image or Lumina",
    "transformer.transformer_blocks.0.img_mod.": "Qwen-Image",
}


@dataclass(frozen=True)
class VectorChange:
    """A key that changes the scale of a norm.

    Attributes:
        key: in the file.
        parameter: the diffusers parameter.
        replaces: whether the value stands in its place, or is added to it.
    """

    key: str
    parameter: str
    replaces: bool


@dataclass(frozen=True)
class FileKeys:
    """A file's keys, all accounted for.

    Attributes:
        changes: of linears and their biases, in the file's order.
        vectors: of norms.
        text_encoder: keys for CLIP or T5.
        unused: what nothing can use -> how many keys that is.
    """

    changes: tuple[Change, ...]
    vectors: tuple[VectorChange, ...]
    text_encoder: tuple[str, ...]
    unused: Mapping[str, int]


def account(file: TensorFile, spec: ModelSpec) -> FileKeys:
    """Find out what every key of a file is for, and check every shape and dtype.

    Raises:
        LoraError: a key without a place, a missing half, a wrong shape, or nothing for this model.
    """
    names, norms = spec.family.lora_aliases(spec.config), spec.family.lora_norms(spec.config)
    absent = spec.family.lora_absent(spec.config)
    modules: dict[str, dict[str, Piece]] = defaultdict(dict)
    vectors: list[VectorChange] = []
    text_encoder, unknown = [], []
    unused: Counter[str] = Counter()
    source = f"LoRA '{file.name}'"
    for key, info in file.tensors.items():
        if key.startswith(TEXT_ENCODER_PREFIXES):
            text_encoder.append(key)
        elif found := _module(key, names):
            module, role = found
            if role in modules[module]:
                raise LoraError(f"{source}: '{key}' and '{modules[module][role].key}' say the same thing twice.")
            modules[module][role] = Piece(key, info.shape)
        elif vector := _norm(file, key, norms):
            vectors.append(vector)
        elif aside := next((what for prefix, what in ASIDE.items() if key.startswith(prefix)), None):
            unused[aside] += 1
        elif key.endswith(CONFIG_END):
            unused[CONFIG] += 1
        elif lacking := _module(key, absent):
            unused[absent[lacking[0]]] += 1
        else:
            unknown.append(key)
    _check_control(file, names, modules)
    if unknown or not (modules or vectors or text_encoder):
        raise LoraError(_unknown_message(file, spec, unknown, bool(modules or vectors), unused))
    _check_double(source, [(names[name].parts, name) for name in modules])
    _check_double(source, [(vector.parameter, vector.key) for vector in vectors])
    changes = tuple(check_change(source, name, names[name], pieces) for name, pieces in modules.items())
    for change in changes:
        for role, piece in change.pieces.items():
            dtype = file.tensors[piece.key].dtype
            if role != "alpha" and dtype not in (*FLOAT_DTYPES, torch.float64):
                raise LoraError(f"{source}: '{piece.key}' is stored as {dtype}, expected a float type.")
    return FileKeys(changes, tuple(vectors), tuple(text_encoder), unused)


def name_format(file: TensorFile) -> str:
    """The format of a file as a person knows it, from the trainer's own note in it or from its names."""
    metadata = file.metadata
    for trainer, sign in (("ai-toolkit", '"ai-toolkit"'), ("OneTrainer", "OneTrainer"), ("SimpleTuner", "SimpleTuner")):
        if any(sign in value for value in metadata.values()):
            return trainer
    for name, prefix, part in (
        ("LyCORIS", "lycoris_", ""),
        ("OneTrainer", "lora_transformer_", ""),
        ("Kohya sd-scripts", "lora_unet_", ""),
        ("XLabs", "", ".processor."),
        ("fal", "base_model.model.", "_blocks.0."),
        ("SimpleTuner", "diffusion_model.", "transformer_blocks."),
        ("ComfyUI", "diffusion_model.", ""),
        ("OneTrainer", "transformer.double_blocks.", ""),
        ("OneTrainer", "transformer.single_blocks.", ""),
        ("diffusers / PEFT", "transformer.", ""),
        ("Black Forest Labs", "double_blocks.", ""),
        ("Black Forest Labs", "single_blocks.", ""),
        ("DiffSynth", "transformer_blocks.", ""),
        ("DiffSynth", "single_transformer_blocks.", ""),
    ):
        if any(key.startswith(prefix) and part in key for key in file.tensors):
            return name
    return "names without a prefix"


def _module(key: str, names: Mapping[str, LoraTarget]) -> tuple[str, str] | None:
    for module, end in _ends(key):
        if module in names and (role := ROLES.get(end) or ROLES.get(ADAPTER_NAME.sub(r"\1\2", end))):
            return module, role
    return None


def _ends(key: str) -> Iterator[tuple[str, str]]:
    """The ways to cut a key: at each of its last four dots, and before a final `_lora.…`."""
    dot = len(key)
    for _ in range(4):
        dot = key.rfind(".", 0, dot)
        if dot < 0:
            break
        yield key[:dot], key[dot:]
    module, found, end = key.rpartition("_lora.")
    if found:
        yield module, found + end


def _norm(file: TensorFile, key: str, norms: Mapping[str, VectorWeight]) -> VectorChange | None:
    for module, end in _ends(key):
        if module in norms and end in NORM_ENDS:
            vector, info = norms[module], file.tensors[key]
            if info.numel != vector.size or info.dtype not in FLOAT_DTYPES:
                raise LoraError(
                    f"LoRA '{file.name}': '{key}' is {info.shape} of {info.dtype}, expected ({vector.size},) of a "
                    "float type: this file is for a model of another size or kind."
                )
            return VectorChange(key, vector.parameter, NORM_ENDS[end])
    return None


def _check_double(source: str, named: Sequence[tuple[Hashable, str]]) -> None:
    """Refuse two LoRAs in one file: of two names for one layer, each program reads another one, or both."""
    seen: dict[Hashable, str] = {}
    for layer, name in named:
        other = seen.setdefault(layer, name)
        if other != name:
            raise LoraError(
                f"{source} holds two LoRAs: '{other}' and '{name}' are the same layer of the model, and programs "
                "differ in which one they read. Get a file that holds one, or save the wanted half by itself."
            )


def _check_control(file: TensorFile, names: Mapping[str, LoraTarget], modules: Mapping[str, dict[str, Piece]]) -> None:
    """Say what a control LoRA is before its wide input is called a wrong shape."""
    for name, pieces in modules.items():
        if not name.endswith(("img_in", "x_embedder")) or "A" not in pieces:
            continue
        shape, expected = pieces["A"].shape, names[name].in_features
        plain = names[name].narrow or expected
        if len(shape) == 2 and shape[1] != expected and shape[1] in (2 * plain, 6 * plain):
            raise LoraError(
                f"LoRA '{file.name}': '{pieces['A'].key}' is {shape}, expected (rank, {expected}): it is a control "
                f"LoRA (BFL's Canny, Depth or Fill) for an input of {shape[1]} channels; this model reads {expected}. "
                f"A compiled model keeps its shape: choose the whole control model instead. {INSTEAD}"
            )


def _hint(keys: Sequence[str]) -> str:
    for part, model in OTHER_MODELS.items():
        if any(part in key for key in keys):
            return f" (by its names: {model})"
    return ""


def _unknown_message(
    file: TensorFile,
    spec: ModelSpec,
    unknown: list[str],
    some_fit: bool,
    unused: Mapping[str, int],
) -> str:
    model = spec.family.name
    if not unknown:
        found = ", ".join(f"{count} keys {what}" for what, count in unused.items())
        return (
            f"LoRA '{file.name}' holds nothing for the {model} transformer: {found}. Choose a file with a LoRA for it."
        )
    layout = spec.family.layout(spec.config)
    for whole in (layout, layout.separate()):
        if len(whole.expected_shapes().keys() & file.tensors.keys()) > len(file.tensors) // 2:
            return (
                f"LoRA '{file.name}' is a whole {model} checkpoint, with '{unknown[0]}' for example. Put it into the "
                "folder 'diffusion_models', and choose it in Accelerated Flux Loader; choose a LoRA here."
            )
    if some_fit and 2 * len(unknown) > len(file.tensors):
        return (
            f"LoRA '{file.name}': {len(unknown)} of {len(file.tensors)} keys have no place in this {model} model, such "
            f"as '{unknown[0]}': it is for another model, whose layers are named alike{_hint(unknown)}. Choose a LoRA "
            f"for {model}."
        )
    if some_fit:
        return (
            f"LoRA '{file.name}': {len(unknown)} of {len(file.tensors)} keys have no place in this {model} model, such "
            f"as '{unknown[0]}'. Applying only the rest would not be this LoRA: choose a file without "
            f"them{_hint(unknown)}."
        )
    return (
        f"LoRA '{file.name}' does not fit {model}{_hint(unknown)}: none of its {len(file.tensors)} keys has a place in "
        f"the model, such as '{unknown[0]}'. Expected names like "
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight, "
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight or "
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight."
    )
