"""LoRA loaders of other packs, as rgthree's Power Lora Loader, LoRA Manager and others call ComfyUI's API."""

import comfy.lora
import comfy.sd
import comfy.utils
import folder_paths

_cached = {}  # file -> its tensors


class ProbePowerLoraLoader:
    """Reads the file anew each time, and applies it to the model alone through load_lora_for_models."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "execute", "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {
            "model": ("MODEL",),
            "lora_name": (folder_paths.get_filename_list("loras"),),
            "strength_model": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0}),
        }}

    def execute(self, model, lora_name, strength_model):
        tensors = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", lora_name), safe_load=True)
        model, _ = comfy.sd.load_lora_for_models(model, None, tensors, strength_model, 0)
        return (model,)


class ProbeCachedLoraLoader(ProbePowerLoraLoader):
    """Keeps the files' tensors, and patches with the same ones each time."""

    def execute(self, model, lora_name, strength_model):
        if lora_name not in _cached:
            path = folder_paths.get_full_path("loras", lora_name)
            _cached[lora_name] = comfy.utils.load_torch_file(path, safe_load=True)
        model, _ = comfy.sd.load_lora_for_models(model, None, _cached[lora_name], strength_model, 0)
        return (model,)


class ProbeAddPatches(ProbePowerLoraLoader):
    """Calls add_patches itself."""

    @classmethod
    def INPUT_TYPES(cls):
        return {**super().INPUT_TYPES(), "optional": {"keep": ("FLOAT", {"default": 1.0})}}

    def execute(self, model, lora_name, strength_model, keep=1.0):
        tensors = comfy.utils.load_torch_file(folder_paths.get_full_path("loras", lora_name), safe_load=True)
        keys = comfy.lora.model_lora_keys_unet(model.model, {})
        patched = model.clone()
        taken = patched.add_patches(comfy.lora.load_lora(tensors, keys), strength_model, keep)
        if not taken:
            raise ValueError("no key was taken")
        return (patched,)
