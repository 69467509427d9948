"""The model's linears: their module, the operators that compute them, and what is bound to them.

A family's blocks are written with `layers` (several linears over one input) and `inputs` (what a linear reads, as a
recipe). Below them: `operators` are what compiled code calls; `product` is one matrix product with its bias, LoRA and
activation; `kernels` and `triton_kernel` are the fused way to compute it, `autotune` says where that is faster;
`float8`, `dynamic` and `packed` are products of weights that are stored otherwise. `slot` is what a LoRA binds to one
linear, `kronecker` its Kronecker products. Importing this package imports none of them.
"""
