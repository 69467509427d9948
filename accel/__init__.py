"""A compiled FLUX transformer that switches LoRAs by binding other tensors. Usable without ComfyUI."""
