"""Stand-ins for attention libraries: their names, versions and signatures, with PyTorch's SDPA inside.

The libraries need a GPU, and wheels for just this torch. What can be tested without either is whether the pack calls
them as they are declared; so the declarations below are copied, parameter by parameter, from the versions that they
name, and nothing else is. That the real kernels compute the same is what the pack itself checks when it loads one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

# Every function here gets (B, N, heads, head_dim). Calls are recorded, to see what was handed over.
COMMON = '''
import torch

CALLS = []


def attend(q, k, v):
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous(), "a copy would be needed"
    CALLS.append((q.data_ptr(), tuple(q.shape), q.dtype))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).contiguous()
'''

# flash-attn 2.8.3.post1, flash_attn/flash_attn_interface.py; the operator since 2.7.0.
FLASH_2 = COMMON + '''

@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), device_types=("cuda", "cpu"))
def _flash_attn_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dropout_p: float, softmax_scale: float, causal: bool,
    window_size_left: int, window_size_right: int, softcap: float, alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
    assert alibi_slopes is None and not return_softmax and abs(softmax_scale - q.shape[-1] ** -0.5) < 1e-9
    return attend(q, k, v), q.new_empty(0), q.new_empty(0), q.new_empty(0)


@_flash_attn_forward.register_fake
def _(q, k, v, *rest):
    return torch.empty_like(q), q.new_empty(0), q.new_empty(0), q.new_empty(0)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):
    return _flash_attn_forward(q, k, v, dropout_p, q.shape[-1] ** -0.5, causal, -1, -1, softcap, None, False)[0]
'''

# flash-attn 2.6.3: the same function, no operator.
FLASH_2_OLD = COMMON + '''

def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):
    return attend(q, k, v)
'''

# flash_attn_3 3.0.0, hopper/flash_attn_interface.py at commit 0251105 (August 2026).
FLASH_3 = COMMON + '''

@torch.library.custom_op("flash_attn_3::_flash_attn_forward", mutates_args=(), device_types=("cuda", "cpu"))
def _flash_attn_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, k_new: torch.Tensor | None = None,
    v_new: torch.Tensor | None = None, qv: torch.Tensor | None = None, out_: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None, cu_seqlens_k: torch.Tensor | None = None,
    cu_seqlens_k_new: torch.Tensor | None = None, seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    page_table: torch.Tensor | None = None, kv_batch_idx: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None, rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None, seqlens_rotary: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None, k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None, softmax_scale: float | None = None, causal: bool = False,
    window_size_left: int = -1, window_size_right: int = -1, attention_chunk: int = 0, softcap: float = 0.0,
    rotary_interleaved: bool = True, scheduler_metadata: torch.Tensor | None = None, num_splits: int = 1,
    pack_gqa: bool | None = None, sm_margin: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    assert abs(softmax_scale - q.shape[-1] ** -0.5) < 1e-9 and not causal
    return attend(q, k, v), q.new_empty(0), q.new_empty(0), q.new_empty(0)


@_flash_attn_forward.register_fake
def _(q, k, v, *rest, **named):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(0), q.new_empty(0), q.new_empty(0)


def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0, return_attn_probs=False,
):
    return _flash_attn_forward(q, k, v, softmax_scale=q.shape[-1] ** -0.5)[0]
'''

# flash_attn_3 3.0.0b1 (2025): no operator of its own, and the log-sum-exp beside the result.
FLASH_3_OLD = COMMON + '''

def flash_attn_func(
    q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
    window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    sm_margin=0,
):
    return attend(q, k, v), q.new_empty(0)
'''

# flash-attn-4 4.0.0b36, flash_attn/cute/interface.py. Version 4.0.0b4 has fewer parameters, and returns a pair as well.
FLASH_4 = COMMON + '''

def flash_attn_func(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, qv=None, gather_kv_indices=None, softmax_scale=None,
    causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None,
    deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None,
    block_sparse_tensors=None, block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False,
    gather_bwd_token_chunk=None,
):
    return attend(q, k, v), None
'''

# sageattention 2.2.0, sageattention/core.py.
SAGE = COMMON + '''

def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    assert tensor_layout == "NHD" and not kwargs, (tensor_layout, kwargs)
    return attend(q, k, v)
'''

# xformers 0.0.32.post2, xformers/ops/fmha/__init__.py; the same in 0.0.29.post3 and 0.0.35.
XFORMERS = COMMON + '''

def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    return attend(query, key, value)
'''

# kernels 0.17.2, kernels/load.py.
KERNELS = '''
import types

from flash_attn_interface_of_the_hub import CALLS, flash_attn_func

ASKED = []


def get_kernel(
    repo_id, *, revision=None, version=None, backend=None, user_agent=None, trust_remote_code=False, check_arch=True
):
    if revision is None and version is None:
        raise ValueError("Either a revision or a version must be specified.")
    ASKED.append((repo_id, version))
    return types.SimpleNamespace(flash_attn_func=flash_attn_func)
'''

# Package -> (distribution, version, files)
PACKAGES: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "flash_2": ("flash-attn", "2.8.3.post1", {"flash_attn/__init__.py": FLASH_2}),
    "flash_2_old": ("flash-attn", "2.6.3", {"flash_attn/__init__.py": FLASH_2_OLD}),
    "flash_3": ("flash_attn_3", "3.0.0", {"flash_attn_interface.py": FLASH_3}),
    "flash_3_old": ("flash_attn_3", "3.0.0b1", {"flash_attn_interface.py": FLASH_3_OLD}),
    "flash_4": ("flash-attn-4", "4.0.0b36", {"flash_attn/cute/__init__.py": FLASH_4}),
    "sage": ("sageattention", "2.2.0", {"sageattention/__init__.py": SAGE}),
    "xformers": (
        "xformers", "0.0.32.post2", {"xformers/__init__.py": "", "xformers/ops/__init__.py": XFORMERS},
    ),
    "kernels": (
        "kernels", "0.17.2",
        {"kernels/__init__.py": KERNELS, "flash_attn_interface_of_the_hub.py": FLASH_3_OLD},
    ),
}  # fmt: skip


def write_package(
    folder: Path, package: str, version: str | None = None, changes: Mapping[str, str] | None = None
) -> Path:
    """Write a stand-in as pip would install it.

    Args:
        folder: to be put on `sys.path`.
        package: a key of `PACKAGES`.
        version: another one than that of the signatures.
        changes: pieces of the source and what they become, to break it; each must be there.

    Returns:
        The folder.
    """
    distribution, own_version, files = PACKAGES[package]
    version = version or own_version
    changes = dict(changes or {})
    for name, source in files.items():
        for old in [old for old in changes if old in source]:
            source = source.replace(old, changes.pop(old))
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    if changes:
        raise ValueError(f"not in the sources of {package}: {', '.join(changes)}")
    information = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    information.mkdir(parents=True, exist_ok=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    return folder
