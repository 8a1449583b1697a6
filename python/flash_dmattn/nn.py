"""The attention layer of a dynamic-mask transformer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._validation import check_bool, check_count, check_tensor, refuse, shape_of
from .interface import flash_dmattn_func, flash_dmattn_varlen_func, select_keys

__all__ = ["DynamicMaskAttention"]


class DynamicMaskAttention(nn.Module):
    """Causal self-attention in which each query sees the keep_window_size keys that a learned score ranks
    highest.

    The score of a key is made from the values of all key/value heads at its token, v_flat. It serves twice:
    it ranks the keys, and it is added to the logits, through which dt_proj and A get their gradients.

        dt = dt_proj(v_flat);    score = exp(A * softplus(dt))      score_function="exp", Shi et al. 2025
                                 score = A * softplus(dt)           score_function="linear", a later variant

    A starts at 0: all scores tie at first, and each query sees the last keep_window_size tokens. Scores are
    computed in float32 whatever the dtype of the layer and under autocast, since bfloat16 would tie many of
    them.

    Args:
        hidden_size: size of the hidden states.
        num_heads: query heads.
        num_kv_heads: key/value heads, a divisor of num_heads; default num_heads.
        head_dim: default hidden_size // num_heads.
        keep_window_size: keys kept per query.
        score_function: "exp" or "linear".
        qkv_bias, dt_bias, out_bias: whether q_proj, k_proj and v_proj, dt_proj, o_proj have a bias.
        qk_norm: RMSNorm of queries and keys per head, before the rotation.
        num_sinks: the first num_sinks tokens stay visible for ever, on top of the window.
        local_window: each token stays visible to this many positions at least, on top of the window.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        keep_window_size: int,
        score_function: str = "exp",
        qkv_bias: bool = False,
        dt_bias: bool = False,
        out_bias: bool = False,
        qk_norm: bool = False,
        num_sinks: int = 0,
        local_window: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.hidden_size = _count("hidden_size", hidden_size)
        self.num_heads = _count("num_heads", num_heads)
        self.num_kv_heads = self.num_heads if num_kv_heads is None else _count("num_kv_heads", num_kv_heads)
        if self.num_heads % self.num_kv_heads != 0:
            refuse(_NAME, "num_kv_heads", str(num_kv_heads), f"a divisor of num_heads, {num_heads}")
        if head_dim is None and hidden_size % num_heads != 0:
            refuse(
                _NAME, "hidden_size", str(hidden_size), f"a multiple of num_heads, {num_heads}, or a head_dim"
            )
        self.head_dim = hidden_size // num_heads if head_dim is None else _count("head_dim", head_dim)
        self.keep_window_size = _count("keep_window_size", keep_window_size)
        if score_function not in ("exp", "linear"):
            refuse(_NAME, "score_function", repr(score_function), "'exp' or 'linear'")
        self.score_function = score_function
        self.num_sinks = _count("num_sinks", num_sinks, minimum=0)
        self.local_window = _count("local_window", local_window, minimum=0)
        flags = {"qkv_bias": qkv_bias, "dt_bias": dt_bias, "out_bias": out_bias, "qk_norm": qk_norm}
        for name, flag in flags.items():
            check_bool(_NAME, name, flag)

        factory = {"device": device, "dtype": dtype}
        size_q, size_kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, size_q, bias=qkv_bias, **factory)
        self.k_proj = nn.Linear(hidden_size, size_kv, bias=qkv_bias, **factory)
        self.v_proj = nn.Linear(hidden_size, size_kv, bias=qkv_bias, **factory)
        self.dt_proj = nn.Linear(size_kv, self.num_kv_heads, bias=dt_bias, **factory)
        self.A = nn.Parameter(torch.zeros(self.num_kv_heads, **factory))
        self.q_norm = nn.RMSNorm(self.head_dim, **factory) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, **factory) if qk_norm else None
        self.o_proj = nn.Linear(size_q, hidden_size, bias=out_bias, **factory)

    def reset_parameters(self) -> None:
        for module in self.children():
            module.reset_parameters()
        nn.init.zeros_(self.A)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attn_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: [B, S, hidden_size]; with cu_seqlens, packed sequences [total, hidden_size].
            position_embeddings: (cos, sin) of the rotary embedding, each [S, head_dim] or [B, S, head_dim],
                packed [total, head_dim]; the two halves of the head dim are rotated against each other.
            attn_mask: [B, S], packed [total]; bool or 0 and 1. False marks padding: tokens that nobody sees.
            cu_seqlens: int32 [sequences + 1], as in flash_dmattn_varlen_func.

        Returns:
            Like hidden_states.
        """
        value = self._project_value(hidden_states, cu_seqlens)
        query = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_dim))
        key = self.k_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if position_embeddings is not None:
            query, key = self._rotate(query, *position_embeddings), self._rotate(key, *position_embeddings)
        score, expiry = self._score_and_select(value, attn_mask, cu_seqlens)
        if cu_seqlens is None:
            out = flash_dmattn_func(query, key, value, attn_bias=score, expiry=expiry, is_causal=True)
        else:
            out = flash_dmattn_varlen_func(
                query,
                key,
                value,
                attn_bias=score,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                expiry=expiry,
                is_causal=True,
            )
        return self.o_proj(out.flatten(-2))

    def selection(
        self, hidden_states: Tensor, attn_mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(score, expiry) of forward, [B, num_kv_heads, S], packed [total, num_kv_heads]: what each head
        keeps, to inspect or to draw. See select_keys for the meaning of expiry."""
        value = self._project_value(hidden_states, cu_seqlens)
        return self._score_and_select(value, attn_mask, cu_seqlens)

    def extra_repr(self) -> str:
        parts = [
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}",
            f"keep_window_size={self.keep_window_size}, score_function={self.score_function!r}",
        ]
        if self.num_sinks:
            parts.append(f"num_sinks={self.num_sinks}")
        if self.local_window:
            parts.append(f"local_window={self.local_window}")
        return ", ".join(parts)

    def _project_value(self, hidden_states: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        layout = f"[B, S, {self.hidden_size}]" if cu_seqlens is None else f"[total, {self.hidden_size}]"
        check_tensor(_NAME, "hidden_states", hidden_states)
        if (
            hidden_states.dim() != (3 if cu_seqlens is None else 2)
            or hidden_states.shape[-1] != self.hidden_size
        ):
            refuse(_NAME, "hidden_states", shape_of(hidden_states), layout)
        return self.v_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))

    def _score_and_select(
        self, value: Tensor, attn_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(value.dtype, torch.float32)
        with torch.autocast(value.device.type, enabled=False):
            bias = None if self.dt_proj.bias is None else self.dt_proj.bias.to(dtype)
            dt = functional.linear(value.flatten(-2).to(dtype), self.dt_proj.weight.to(dtype), bias)
            score = self.A.to(dtype) * functional.softplus(dt)  # [B, S, Hkv]
            if self.score_function == "exp":
                score = torch.exp(score)
        ranking = score.detach()
        if attn_mask is not None:
            layout = f"{list(value.shape[:-2])}, one entry per token"
            check_tensor(_NAME, "attn_mask", attn_mask)
            if attn_mask.shape != value.shape[:-2]:
                refuse(_NAME, "attn_mask", shape_of(attn_mask), layout)
            ranking = ranking.masked_fill((attn_mask == 0).unsqueeze(-1), -math.inf)
        if cu_seqlens is None:
            score, ranking = score.transpose(1, 2), ranking.transpose(1, 2)
        expiry = select_keys(
            ranking,
            self.keep_window_size,
            num_sinks=self.num_sinks,
            local_window=self.local_window,
            cu_seqlens=cu_seqlens,
        )
        return score, expiry

    def _rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [..., S, heads, head_dim]; cos and sin without the axis of heads."""
        for name, angle in (("cos", cos), ("sin", sin)):
            check_tensor(_NAME, f"position_embeddings ({name})", angle)
            if angle.shape[-1] != self.head_dim or angle.shape[-2] != x.shape[-3]:
                expected = f"[{x.shape[-3]}, {self.head_dim}], one row per token"
                refuse(_NAME, f"position_embeddings ({name})", shape_of(angle), expected)
        first, second = x.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
        return (x * cos.unsqueeze(-2) + rotated * sin.unsqueeze(-2)).to(x.dtype)


_NAME = "DynamicMaskAttention"


def _count(name: str, count: int, minimum: int = 1) -> int:
    return check_count(_NAME, name, count, minimum)
