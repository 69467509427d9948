"""Patches between blocks, as other nodes write them for ComfyUI's models, as hooks of the engine's forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from ....accel.families.streams.inputs import AttentionHook, BlockHook, BlockState, EmbeddingHook, Hooks

# Entries of `transformer_options["patches"]`.
ATTENTION_PATCHES = ("attn1_patch", "attn1_output_patch")


class Vec(Protocol):
    """What ComfyUI's model gives a block's patch as "vec", and takes back, for a family's conditioning."""

    def of(self, conditioning: Any, kind: str) -> Any:
        """The vec of a "double" or "single" block."""

    def changed(self, conditioning: Any, vec: Any, kind: str) -> Any:
        """The conditioning with what a patch made of the vec."""


def hooks_of(options: dict[str, Any], config: Any, vec: Vec) -> Hooks:
    """What `patches["post_input"]`, `patches_replace["dit"]` and the patches of attention ask for.

    Args:
        options: ComfyUI's transformer options.
        config: of the model: a block's patch is told how many blocks of its kind there are.
        vec: the family's.
    """
    after_embedding = [_embedding_hook(patch, options) for patch in options.get("patches", {}).get("post_input", ())]
    around_block = {}
    totals = {"double_block": config.depth, "single_block": config.depth_single}
    for (name, index), patch in options.get("patches_replace", {}).get("dit", {}).items():
        if name in totals:
            kind = name.removesuffix("_block")
            known = {**options, "block_type": kind, "block_index": index, "total_blocks": totals[name]}
            around_block[kind, index] = _block_hook(patch, known, vec)
    return Hooks(after_embedding, around_block, _attention_hook(options, totals))


def _embedding_hook(patch: Callable, options: dict[str, Any]) -> EmbeddingHook:
    """Let a `patches["post_input"]` function change image and text tokens and their positions, see `Hooks`."""

    def hook(image: Tensor, text: Tensor, image_ids: Tensor, text_ids: Tensor) -> tuple[Tensor, ...]:
        out = patch(
            {"img": image, "txt": text, "img_ids": image_ids, "txt_ids": text_ids, "transformer_options": options}
        )
        return out["img"], out["txt"], out["img_ids"], out["txt_ids"]

    return hook


class AttentionPatches:
    """The `attn1_patch` and `attn1_output_patch` of other nodes; see `InsideAttention`."""

    def __init__(self, before: Sequence[Callable], after: Sequence[Callable], options: dict[str, Any]) -> None:
        """Keep what each of them is called with."""
        self._before = before
        self._after = after
        self._options = options

    def before(
        self, query: Tensor, key: Tensor, value: Tensor, rotary: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """See `InsideAttention`. A patch that looks at "pe" sees the rotary table of `Positions.rotary_table`."""
        given = {"q": query, "k": key, "v": value, "pe": rotary, "attn_mask": mask}
        for patch in self._before:
            heads = (given[name] for name in "qkv")
            given |= patch(*heads, pe=given["pe"], attn_mask=given["attn_mask"], extra_options=self._options)
        return given["q"], given["k"], given["v"], given["pe"], given["attn_mask"]

    def after(self, attended: Tensor) -> Tensor:
        """See `InsideAttention`."""
        for patch in self._after:
            attended = patch(attended, self._options)
        return attended


def _attention_hook(options: dict[str, Any], totals: dict[str, int]) -> AttentionHook | None:
    """Let other nodes change what attention reads and gives."""
    before, after = (options.get("patches", {}).get(name, ()) for name in ATTENTION_PATCHES)
    if not before and not after:
        return None

    def hook(state: BlockState, kind: str, index: int) -> AttentionPatches:
        image_tokens = state.hidden_states.shape[1]
        tokens = image_tokens if state.encoder_hidden_states is None else state.text_tokens + image_tokens
        known = {"block_type": kind, "block_index": index, "total_blocks": totals[f"{kind}_block"]}
        return AttentionPatches(before, after, {**options, **known, "img_slice": [state.text_tokens, tokens]})

    return hook


def _block_hook(patch: Callable, options: dict[str, Any], vec: Vec) -> BlockHook:
    """Let a `patches_replace["dit"]` function run around one block, with the arguments of ComfyUI's model.

    Shapes are those of `BlockState`: in a single block "img" is all tokens, text first, and "img_slice" says which of
    them are the image's.
    """
    kind = options["block_type"]

    def hook(state: BlockState, run: Callable[[BlockState], BlockState]) -> BlockState:
        given = vec.of(state.conditioning, kind)

        def with_(args: dict[str, Any]) -> BlockState:
            conditioning = state.conditioning
            if args["vec"] is not given:
                conditioning = vec.changed(conditioning, args["vec"], kind)
            return dataclasses.replace(
                state,
                hidden_states=args["img"],
                encoder_hidden_states=args.get("txt"),
                conditioning=conditioning,
                rotary=args["pe"],
                mask=args.get("attn_mask"),
            )

        def original_block(args: dict[str, Any]) -> dict[str, Tensor]:
            return _as_output(run(with_(args)))

        known = options
        if state.encoder_hidden_states is None:
            known = {**options, "img_slice": [state.text_tokens, state.hidden_states.shape[1]]}
        args = {
            "img": state.hidden_states,
            "vec": given,
            "pe": state.rotary,
            "attn_mask": state.mask,
            "transformer_options": known,
        }
        if state.encoder_hidden_states is not None:
            args["txt"] = state.encoder_hidden_states
        out = patch(args, {"original_block": original_block})
        return with_({**args, **out})

    return hook


def _as_output(state: BlockState) -> dict[str, Tensor]:
    out = {"img": state.hidden_states}
    if state.encoder_hidden_states is not None:
        out["txt"] = state.encoder_hidden_states
    return out
