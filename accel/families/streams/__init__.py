"""What transformers of double and single blocks share.

Double blocks have weights for text tokens and others for image tokens, single blocks read both as one sequence. A
family adds its blocks, what conditions them, and its names.
"""
