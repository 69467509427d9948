"""Text encoders: T5 and CLIP-L files as users have them, of any width, quantized while they are read."""
