"""Everything that runs the pack inside a real ComfyUI: set-up, a server process, a client, the demo.

`setup`, `comfyui` and `paths` use the standard library only, because they run before anything is installed.
"""
