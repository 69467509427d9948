"""Pocket FLUX: a FLUX.1 transformer small enough for a repository, really trained, on pictures that a program draws.

`draw` makes pictures with prompts, `train` makes `models/` from them, `evaluate` measures what the files draw.
Nothing here is needed to use them: they are ordinary files for the nodes of this pack and of ComfyUI.
"""
