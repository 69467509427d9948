"""From the path that a user chose to the files that hold the tensors."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from ..errors import CheckpointError, FileError
from ..files import FileIdentity
from . import wording

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")
GGUF_SUFFIX = ".gguf"
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl")
INDEX_SUFFIX = ".safetensors.index.json"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.(safetensors|sft)$")
# What `save_pretrained` of diffusers writes.
DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMER_FOLDER = "transformer"


@dataclass(frozen=True)
class Located:
    """The files of one checkpoint.

    Attributes:
        path: what was chosen: a file, an index or a folder.
        files: the files that hold tensors, one or several shards.
        weight_map: of shards, the shard (by its file name) of each tensor; None without an index.
        index: the index file, if there is one.
        config: the `config.json` of a diffusers folder, if there is one.
    """

    path: Path
    files: tuple[Path, ...]
    weight_map: Mapping[str, str] | None = None
    index: Path | None = None
    config: Path | None = None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.path.name

    def identity(self) -> FileIdentity:
        """The state of every file that counts.

        Raises:
            FileError: one of them is gone.
        """
        if self.index is None and self.config is None:
            return FileIdentity.of(self.files[0])
        extra = [file for file in (self.index, self.config) if file is not None]
        return FileIdentity.of_all(self.path, [*extra, *self.files])


def identify(path: str | os.PathLike[str]) -> FileIdentity:
    """What tells one state of a checkpoint from another; cheap: no header is read.

    Raises:
        FileError: it is not there, or its shards are not.
        CheckpointError: an index or a folder is not what it should be.
    """
    return locate(path).identity()


def locate(path: str | os.PathLike[str]) -> Located:
    """Find the files of a checkpoint: a file, an index of shards, a diffusers model's folder or a pipeline's.

    Raises:
        FileError: nothing is there, it is a pickle, a shard is missing, or an index names a file outside its folder.
        CheckpointError: a folder without a transformer, a single shard, or an index that is none.
    """
    path = Path(path)
    if path.is_dir():
        return _in_folder(path)
    FileIdentity.of(path)  # says what is wrong when nothing is there
    if path.name.endswith(INDEX_SUFFIX):
        return _shards(path, path, path.with_name("config.json"))
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise FileError(
            f"'{path.name}' is a pickle ({path.suffix}), which can run code when it is opened; expected .safetensors, "
            ".sft, .gguf or a diffusers folder. Download the safetensors version, or convert it."
        )
    if SHARD.search(path.name):
        index = _index_beside(path)
        choose = f"choose '{index.name}' or its folder" if index else "get the complete model with its index file"
        raise CheckpointError(f"'{path.name}' is one shard of a model, not all of it: {choose}.")
    return Located(path, (path,))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileError: it cannot be read, or is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise FileError(f"'{path.name}' in '{path.parent.name}' is not readable JSON ({exc}). Get it again.") from exc
    if not isinstance(content, dict):
        raise FileError(f"'{path.name}' in '{path.parent.name}' is no JSON object. Get it again.")
    return content


def _in_folder(folder: Path) -> Located:
    inside = folder
    if (folder / TRANSFORMER_FOLDER).is_dir():
        inside = folder / TRANSFORMER_FOLDER
    elif (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"'{folder.name}' is a diffusers pipeline without a '{TRANSFORMER_FOLDER}' folder: not a "
            f"{wording.names()} pipeline, or not downloaded completely. Choose another one."
        )
    config = inside / "config.json"
    indices = sorted(inside.glob(f"*{INDEX_SUFFIX}"))
    index = _only(indices, f"{DIFFUSERS_STEM}{INDEX_SUFFIX}", folder)
    if index is not None:
        return _shards(folder, index, config)
    candidates = [file for file in inside.iterdir() if file.suffix.lower() in SAFETENSORS_SUFFIXES]
    shards = [file for file in candidates if SHARD.search(file.name)]
    if shards:
        raise CheckpointError(
            f"'{folder.name}' holds shards such as '{min(shards).name}', but no *{INDEX_SUFFIX} that names them: get "
            "the complete folder."
        )
    file = _only(sorted(candidates), f"{DIFFUSERS_STEM}.safetensors", folder)
    if file is None:
        raise CheckpointError(
            f"'{folder.name}' holds no *.safetensors: it is not a diffusers model, or not downloaded completely. "
            f"Choose the folder of a {wording.names()} pipeline or its '{TRANSFORMER_FOLDER}' folder."
        )
    return Located(folder, (file,), config=config if config.is_file() else None)


def _only(files: list[Path], preferred: str, folder: Path) -> Path | None:
    for file in files:
        if file.name == preferred:
            return file
    if len(files) > 1:
        names = ", ".join(f"'{file.name}'" for file in files)
        raise CheckpointError(f"'{folder.name}' holds several models ({names}): choose one of these files.")
    return files[0] if files else None


def _shards(path: Path, index: Path, config: Path) -> Located:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"'{index.name}' has no 'weight_map': it is not an index of shards. Get it again.")
    names = list(dict.fromkeys(weight_map.values()))
    for name in names:
        _check_inside(index, name)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileError(
            f"'{index.name}': {len(missing)} of {len(names)} shards are missing beside it, such as '{missing[0]}'. Its "
            "download did not finish: get the rest."
        )
    files = tuple(index.parent / name for name in names)
    return Located(path, files, weight_map, index, config if config.is_file() else None)


def _check_inside(index: Path, name: object) -> None:
    # A plain name on every system: neither folders, nor drives, nor "..".
    plain = isinstance(name, str) and name not in ("", ".", "..")
    if not plain or PurePosixPath(name).name != name or PureWindowsPath(name).name != name:
        raise FileError(
            f"'{index.name}' names {name!r}, which is no file in its own folder: it is refused. Expected plain names "
            "such as 'diffusion_pytorch_model-00001-of-00003.safetensors'; get the index from its original source."
        )


def _index_beside(shard: Path) -> Path | None:
    for index in sorted(shard.parent.glob(f"*{INDEX_SUFFIX}")):
        weight_map = read_json(index).get("weight_map")
        if isinstance(weight_map, dict) and shard.name in weight_map.values():
            return index
    return None
