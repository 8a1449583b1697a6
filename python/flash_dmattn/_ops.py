"""What PyTorch has to know about the native operators: shapes (fake kernels) and derivatives (autograd).

The operators themselves are in the native library, see bindings/torch. Autocast is dealt with before they are
called: _arguments.py casts query, key and value, and leaves bias and score as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["native", "register"]

native = torch.ops.flash_dmattn


def register(namespace: str = "flash_dmattn") -> None:
    """Once per process, after the library that defines the operators of this namespace was loaded."""
    torch.library.register_fake(f"{namespace}::select", _select_fake)
    torch.library.register_fake(f"{namespace}::plan", _plan_fake)
    torch.library.register_fake(f"{namespace}::forward", _forward_fake)
    torch.library.register_fake(f"{namespace}::backward", _backward_fake)

    backward = getattr(torch.ops, namespace).backward

    def backward_formula(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple:
        query, key, value, bias, *visibility, out, lse, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        needed = ctx.needs_input_grad[:4]
        if grad_out is None:
            grad_out = out.new_zeros(()).expand(out.shape)
        grads = backward(
            grad_out, grad_lse, query, key, value, bias, *visibility, out, lse, cu_seqlens_q, cu_seqlens_k,
            ctx.keep_window, ctx.scale, ctx.is_causal, *needed,
        )  # fmt: skip
        return *(grad if need else None for grad, need in zip(grads, needed)), *(None,) * 9

    torch.library.register_autograd(
        f"{namespace}::forward", backward_formula, setup_context=_save_for_backward
    )
    torch.library.register_autograd(f"{namespace}::backward", _refuse_double_backward)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, cu_seqlens_q, cu_seqlens_k, ctx.keep_window, ctx.scale, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.set_materialize_grads(False)  # a grad_lse that nobody asks for stays None


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "flash_dmattn: double backward (create_graph=True) is not implemented by the native kernels; "
        "the backend 'reference' supports it"
    )


def _select_fake(
    score: Tensor,
    keep_window: int,
    is_causal: bool,
    num_sinks: int,
    local_window: int,
    cu_seqlens: Tensor | None,
    num_queries: int = -1,
) -> Tensor:
    return torch.empty(score.shape, dtype=torch.int32, device=score.device)


def _plan_fake(
    expiry: Tensor | None,
    score: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    num_queries: int,
    keep_window: int,
    is_causal: bool,
    mask: Tensor | None = None,
) -> Tensor:
    num_elements = torch.library.get_ctx().new_dynamic_size()  # only the library knows
    device = next(tensor.device for tensor in (expiry, bias, mask) if tensor is not None)
    return torch.empty(num_elements, dtype=torch.int32, device=device)


def _forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    expiry: Tensor | None,
    score: Tensor | None,
    plan: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    keep_window: int,
    scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor]:
    *batch, seqlen_q, heads_q, _ = query.shape
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((*batch, heads_q, seqlen_q), dtype=_accumulation_dtype(query), device=query.device)
    return out, lse


def _backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    expiry: Tensor | None,
    score: Tensor | None,
    plan: Tensor | None,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    keep_window: int,
    scale: float,
    is_causal: bool,
    need_dq: bool,
    need_dk: bool,
    need_dv: bool,
    need_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def grad(tensor: Tensor | None, needed: bool, dtype: torch.dtype) -> Tensor:
        shape = tensor.shape if needed and tensor is not None else (0,)
        return torch.empty(shape, dtype=dtype, device=query.device)

    dtype = query.dtype
    dense = bias is not None and bias.dim() == 4
    dbias = grad(bias, need_dbias, bias.dtype if dense else _accumulation_dtype(query))
    return grad(query, need_dq, dtype), grad(key, need_dk, dtype), grad(value, need_dv, dtype), dbias


def _accumulation_dtype(query: Tensor) -> torch.dtype:
    return torch.float64 if query.dtype == torch.float64 else torch.float32
