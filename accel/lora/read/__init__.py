"""From a LoRA file, or another node's patches, to an adapter."""
