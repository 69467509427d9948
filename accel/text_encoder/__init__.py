"""Text encoders: files of a T5, a CLIP-L or a language model, of any width, quantized while they are read."""
