"""The least time that a step can take on a GPU, from what its kernels read, write and compute: a bound.

Each kernel takes at least its bytes over the memory's bandwidth, and at least its operations over the peak of the
tensor cores; kernels follow one another. Nothing here is measured, and no kernel reaches both peaks. The peaks are the
fastest that a card has for operands of a width, whatever it accumulates in, at the clock of its data sheet: a card that
is clocked higher has higher ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .families.base import Config, Tokens
from .families.registry import of
from .lora_bytes import WIDTH, Linears, linears_bytes


@dataclass(frozen=True)
class Gpu:
    """Peaks of a GPU.

    Attributes:
        name: for a reader.
        bandwidth: bytes per second of its memory.
        flops: dense operations per second by the bytes of an operand's element, 2 for bfloat16 and 1 for float8, with
            the accumulator that is fastest.
    """

    name: str
    bandwidth: float
    flops: Mapping[int, float]

    def seconds(self, work: Work) -> float:
        """The bound of one kernel."""
        return max(work.bytes / self.bandwidth, work.flops / self.flops[work.width])


@dataclass(frozen=True)
class Work:
    """One kernel: bytes read and written, operations, and bytes of an element of what it multiplies."""

    bytes: float
    flops: float = 0
    width: int = 2


# H100 SXM: NVIDIA H100 Tensor Core GPU datasheet, dense (half of the figures with sparsity); one rate for both
# accumulators. RTX 4090: NVIDIA Ada GPU architecture whitepaper, appendix A, dense. Its float8 products are twice as
# fast with float16 accumulation (660.6) as with float32 (330.3, what torch's kernels use); bfloat16 accumulates in
# float32 alone.
GPUS = {
    "h100": Gpu("H100 SXM", 3.35e12, {2: 989e12, 1: 1979e12}),
    "rtx4090": Gpu("RTX 4090", 1.008e12, {2: 165.2e12, 1: 660.6e12}),
}


def linears_work(linears: Linears, rank: int, fused: bool) -> Work:
    """One call of linears, its LoRA included."""
    rows, in_features, out = linears.rows, linears.in_features, sum(linears.out_features)
    flops = 2 * rows * in_features * out
    if rank:
        flops += 2 * rows * rank * (in_features * len(linears.out_features) + out)
    return Work(linears_bytes(linears, rank, fused), flops, linears.weight_width)


def rest(config: Config, tokens: Tokens) -> list[Work]:
    """The linears outside the blocks, which are not quantized: on image tokens, on text tokens, or once per picture."""
    rows = {"x_embedder": tokens.image, "proj_out": tokens.image, "context_embedder": tokens.text}
    return [
        linears_work(Linears(rows.get(module, 1), [linear.in_features], [linear.out_features], WIDTH), 0, False)
        for module, linear in of(config).family.layout(config).by_module.items()
        if not linear.quantizable
    ]


def step_ms(
    gpu: Gpu, config: Config, double: Iterable[Work], single: Iterable[Work], others: Iterable[Work]
) -> float:
    """The bound of one step: all blocks, and what is around them."""
    times = [sum(map(gpu.seconds, works)) for works in (double, single, others)]
    return 1e3 * (config.depth * times[0] + config.depth_single * times[1] + times[2])
