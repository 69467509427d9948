"""FLUX.2 in ComfyUI. Nothing is imported here: `contract` loads where the others may not."""
