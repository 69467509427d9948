"""Pocket FLUX and Pocket FLUX.2: transformers small enough for a repository, really trained, on drawn pictures.

`draw` makes pictures with prompts, `train` makes `models/` from them, `evaluate` measures what the files draw. What the
two models differ in is data, in `flux1` and `flux2`; see `kind`. Nothing here is needed to use them: they are ordinary
files for the nodes of this pack and of ComfyUI.
"""
