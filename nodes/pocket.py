"""The small trained model that comes with this pack, beside the user's own files in ComfyUI's lists."""

from __future__ import annotations

from pathlib import Path

import folder_paths

MODELS = Path(__file__).resolve().parent.parent / "pocket" / "models"


def add_pocket_folders() -> None:
    """Let ComfyUI's loaders find the files in `pocket/models`, after the user's own folders.

    A user who deletes the folder, or a file in it, no longer sees it.
    """
    if not MODELS.is_dir():
        return
    for folder in sorted(MODELS.iterdir()):
        if folder.is_dir():
            folder_paths.add_model_folder_path(folder.name, str(folder))
