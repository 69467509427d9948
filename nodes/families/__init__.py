"""What ComfyUI's side knows about each family of models; `accel.families` holds the other half.

One folder per family, `base` for what every one supplies, `registry` for the table of them. The rest of `nodes` asks
through these and names no model.
"""
