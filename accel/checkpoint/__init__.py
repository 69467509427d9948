"""Checkpoints: found on disk, recognised by their headers, then read tensor by tensor.

```
path → locate → SafetensorsCheckpoint (one file or shards) | GgufCheckpoint    names, shapes, types
     → recognise (prefix, layout, scales) → ModelSpec                          where each tensor of the model lies
     → read_weights                                                            one tensor after another, dequantized
```
"""

from __future__ import annotations

from .locate import identify
from .read import LinearWeights, VectorWeights, read_weights
from .recognise import inspect_checkpoint

__all__ = ["LinearWeights", "VectorWeights", "identify", "inspect_checkpoint", "read_weights"]
