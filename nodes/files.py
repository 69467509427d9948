"""Find the files that a user chose in a node."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import folder_paths

from ..accel.checkpoint import identify
from ..accel.checkpoint.locate import GGUF_SUFFIX, INDEX_SUFFIX, SAFETENSORS_SUFFIXES, SHARD, TRANSFORMER_FOLDER
from ..accel.errors import FileError
from ..accel.files import FileIdentity

CATEGORY = "Flux Hotswap"
# Where transformers lie, the first folder first; all-in-one checkpoints are in the second.
MODEL_FOLDERS = ("diffusion_models", "checkpoints")
# ComfyUI's own folder for diffusers pipelines, of which it lists nothing but folders.
DIFFUSERS_FOLDER = "diffusers"
# A name for extra_model_paths.yaml, and of the folder in models/ without it.
CACHE_FOLDER = "flux_hotswap_cache"


def find_file(folder: str, name: str) -> str:
    """The path of a file in one of ComfyUI's model folders.

    Raises:
        FileError: it is not there (any more).
    """
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise _not_found(name, folder)
    return path


def fingerprint(folder: str, name: str) -> tuple[int, int]:
    """What makes ComfyUI run a node again: the file's mtime in nanoseconds and its size in bytes.

    Zeros where there is no such file, about which the node itself speaks, or where the name comes through a link, which
    ComfyUI follows by itself: an exception would run the node anew at each prompt.
    """
    if not isinstance(name, str):
        return 0, 0
    try:
        identity = FileIdentity.of(find_file(folder, name))
    except FileError:
        return 0, 0
    return identity.mtime_ns, identity.size_bytes


def model_files() -> list[str]:
    """What a transformer can be loaded from, as the loader lists it.

    The files of `diffusion_models`, then of `checkpoints`, with the .gguf files, the indices of shards and the
    diffusers folders (which end in a slash) that ComfyUI's own lists leave out. A name that both folders have means
    the first one's.
    """
    names: dict[str, None] = {}
    for folder in MODEL_FOLDERS:
        found = [*folder_paths.get_filename_list(folder), *_unlisted(folder)]
        names |= dict.fromkeys(sorted(name for name in found if not SHARD.search(name)))
    names |= dict.fromkeys(sorted(name for name in _unlisted(DIFFUSERS_FOLDER) if name.endswith("/")))
    return list(names)


def find_model(name: str) -> str:
    """The path of what `model_files` lists: a file, an index or a folder.

    Raises:
        FileError: it is not there (any more).
    """
    inside = os.path.relpath(os.path.join(os.sep, name), os.sep)  # ".." ends at the model folder
    for folder in (*MODEL_FOLDERS, DIFFUSERS_FOLDER):
        for base in _bases(folder):
            path = os.path.join(base, inside)
            if os.path.isdir(path) if name.endswith("/") else os.path.isfile(path):
                return path
    raise _not_found(name, *MODEL_FOLDERS)


def fingerprint_model(name: str) -> tuple[int, int]:
    """As `fingerprint`, for what `model_files` lists: every shard and description counts."""
    if not isinstance(name, str):
        return 0, 0
    try:
        identity = identify(find_model(name))
    except FileError:
        return 0, 0
    parts = identity.parts or (identity,)
    return hash(tuple(part.mtime_ns for part in parts)), identity.size_bytes


def cache_folder() -> str:
    """Where the pack keeps what it made, such as quantized weights.

    The first of the user's own folders of that name, or one in models/.
    """
    configured = folder_paths.folder_names_and_paths.get(CACHE_FOLDER)
    return configured[0][0] if configured and configured[0] else os.path.join(folder_paths.models_dir, CACHE_FOLDER)


def _unlisted(folder: str) -> Iterator[str]:
    for base in _bases(folder):
        files, _ = folder_paths.recursive_search(base, excluded_dir_names=[".git"])
        yield from (name for name in files if name.lower().endswith((GGUF_SUFFIX, INDEX_SUFFIX)))
        yield from _diffusers_folders(files)


def _diffusers_folders(files: list[str]) -> Iterator[str]:
    """Folders that hold a pipeline with a transformer, or one model with its config.json; names end in a slash."""
    paths = [Path(name) for name in files]
    weights = {path.parent for path in paths if path.name.endswith((*SAFETENSORS_SUFFIXES, INDEX_SUFFIX))}
    pipelines = {path.parent for path in paths if path.name == "model_index.json"}
    for pipeline in pipelines:
        if pipeline / TRANSFORMER_FOLDER in weights:
            yield f"{pipeline.as_posix()}/"
    for folder in {path.parent for path in paths if path.name == "config.json"} & weights:
        # the parts of a pipeline are not listed a second time
        if folder.parent not in pipelines and folder != Path():
            yield f"{folder.as_posix()}/"


def _bases(folder: str) -> list[str]:
    return folder_paths.get_folder_paths(folder) if folder in folder_paths.folder_names_and_paths else []


def _not_found(name: str, *folders: str) -> FileError:
    searched = ", ".join(base for folder in folders for base in _bases(folder))
    return FileError(
        f"'{name}' is not in the folder '{folders[0]}' (any more); searched {searched}. Put it back, or press R to "
        "refresh the lists and choose another file."
    )
