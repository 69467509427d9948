"""What ComfyUI's models of double and single blocks share. Nothing is imported here."""
