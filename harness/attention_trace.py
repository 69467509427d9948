"""Child process of tests/test_attention.py: compile a block with each attention backend for an H100, and describe it.

    python -m harness.attention_trace FOLDER

FOLDER holds stand-ins, see `attention_packages`. Prints JSON. There is no GPU: tensors are FakeTensors, and the code of
TorchInductor is read, not run.
"""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from accel.attention import BACKENDS, Attention
from accel.families.flux1 import Flux1
from accel.families.flux1.blocks import single_block
from benchmarks.block_variants import without_lora_layers
from benchmarks.families.flux1 import one_of_each
from benchmarks.generated_code import crossings
from benchmarks.pretend_h100 import pretend

HIDDEN_SIZE = 256
TOKENS = 333
COMPILED = ("cudnn", "flash_2", "flash_4", "flex")
# Attention in generated code: operators of PyTorch, of the libraries and ours, and TorchInductor's own template.
KERNEL = re.compile(
    r"torch\.ops\.(aten\._scaled_dot_product_\w+|flux_hotswap\.attention_\w+|flash_attn\w*\._flash_attn_forward)\.default\("
    r"|(triton_tem_fused)\w*\.run\("
)
# Triton kernels of everything else.
OTHER = re.compile(r"triton_(?!tem_)[a-z0-9_]+\.run\(")


class _GeneratedError(Exception):
    """Ends a compile when its code is there: nothing can run it."""


def main() -> None:
    """Print the JSON."""
    sys.path.insert(0, sys.argv[1])
    warnings.filterwarnings("ignore")
    pretend()
    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False
    # As the engine's compiler has it: a norm's eps would be an input that lies on the host otherwise.
    torch._dynamo.config.specialize_float = True
    # Both would try something on the GPU.
    torch._inductor.config.shape_padding = False
    torch._inductor.config.joint_graph_constant_folding = False
    from torch._subclasses.fake_tensor import FakeTensorMode

    with torch.device("meta"):
        model = nn.Module.to(Flux1().build(one_of_each(HIDDEN_SIZE)), torch.bfloat16).eval().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), torch.device("cuda"):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=torch.bfloat16)
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)
                    torch._dynamo.mark_static(module._parameters[name])
        block = model.single_transformer_blocks[0]
        found = {name: _generate(BACKENDS[name].make(), block) for name in COMPILED}
        found["sdpa"] = {"dynamo": _traced(BACKENDS["sdpa"].make(), block)}
    print(json.dumps(found))


def _compiled(attention: Attention, backend: Any) -> Callable:
    torch._dynamo.reset()
    bare = without_lora_layers(single_block)
    return torch.compile(
        lambda block, *inputs: bare(block, *inputs, None, attention), backend=backend, fullgraph=True, dynamic=True
    )


def _inputs() -> tuple[torch.Tensor, ...]:
    # Batch 2: of batch 1, tracing would make a constant; the engine marks it.
    hidden_states = torch.empty(2, TOKENS, HIDDEN_SIZE, dtype=torch.bfloat16)
    return hidden_states, torch.empty(2, HIDDEN_SIZE, dtype=torch.bfloat16), torch.empty(2, 1, 1, TOKENS, 64)


def _generate(attention: Attention, block: nn.Module) -> dict[str, Any]:
    from torch._inductor.graph import GraphLowering

    original, codes = GraphLowering.codegen, []

    def codegen(self: GraphLowering) -> None:
        code = original(self)[0]
        codes.append(getattr(code, "value", code))
        raise _GeneratedError

    GraphLowering.codegen = codegen
    try:
        _compiled(attention, "inductor")(block, *_inputs())
    except Exception:
        if len(codes) != 1:
            raise
    finally:
        GraphLowering.codegen = original
    code = codes[0]
    call = code[code.index("def call(") :]
    kernels = list(KERNEL.finditer(call))
    first, last = kernels[0].start(), kernels[-1].end()
    product = call.find("extern_kernels.", last)
    return {
        "kernels": [match[1] or match[2] for match in kernels],
        "triton_before": len(OTHER.findall(call[:first])),
        "triton_after": len(OTHER.findall(call[last:product])),
        "symbols": sorted(set(re.findall(r"\bs\d+\b", call))),
        "crossings": sum(crossings(call).values()),
    }


def _traced(attention: Attention, block: nn.Module) -> list[str]:
    graphs = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list) -> Callable:
        graphs.append(graph)
        return graph.forward

    _compiled(attention, backend)(block, *_inputs())
    (graph,) = graphs
    names = (getattr(node.target, "__name__", "") for node in graph.graph.nodes if node.op == "call_function")
    return [name for name in names if "attention" in name]


if __name__ == "__main__":
    main()
