"""The ComfyUI boundary: schemas, file look-ups, and the adapter that makes an engine a native MODEL."""
