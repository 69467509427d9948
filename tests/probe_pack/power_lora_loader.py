"""A LoRA loader of another pack, as rgthree's Power Lora Loader and LoRA Manager call ComfyUI's API."""

import comfy.sd
import comfy.utils
import folder_paths


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
