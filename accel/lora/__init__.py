"""LoRA files read, checked, stacked, and bound to a compiled model."""
