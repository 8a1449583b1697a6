"""The forms in which masks, biases, scores and expiry are accepted, brought into few.

Key-only forms, one value per key, become [B | 1, Hkv | 1, Sk], packed [total_k, Hkv | 1]. Dense forms, one
row per query, stay [B | 1, 1 | Hkv | H, Sq | 1, Sk]. With a head axis of H and a query axis of 1 a form is
dense: the query heads of a group may differ.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ._validation import check_dtype, check_tensor, refuse, shape_of, values_are_at_hand

__all__ = ["KeyForms"]


class KeyForms:
    def __init__(self, function: str, query: Tensor, key: Tensor, packed: bool):
        self.function, self.packed, self.device = function, packed, query.device
        self.seqlen_q, self.heads_q = query.shape[-3:-1]
        self.seqlen_k, self.heads_kv = key.shape[-3:-1]
        self.batch = 1 if packed else query.shape[0]
        self.sizes = (self.seqlen_k, self.heads_kv) if packed else (self.batch, self.heads_kv, self.seqlen_k)

    def parse_bias(self, bias: Any) -> tuple[Tensor | None, Tensor | None]:
        """(key-only form, dense form) of attn_bias."""
        if bias is None:
            return None, None
        self._check("attn_bias", bias)
        if bias.dtype == torch.bool:
            refuse(self.function, "attn_bias", "a bool tensor", "floating point (attn_mask takes masks)")
        check_dtype(self.function, "attn_bias", bias)
        return self._split("attn_bias", bias)

    def parse_mask(self, mask: Any, validate: bool) -> tuple[Tensor | None, Tensor | None]:
        """(key-only form, dense form) of attn_mask, as bool."""
        if mask is None:
            return None, None
        self._check("attn_mask", mask)
        if mask.dtype != torch.bool:
            if (validate or values_are_at_hand(mask)) and not bool(((mask == 0) | (mask == 1)).all()):
                expected = "bool (True = visible) or 0 and 1; what is added to the logits goes into attn_bias"
                refuse(self.function, "attn_mask", f"other values than 0 and 1 in {mask.dtype}", expected)
            mask = mask != 0
        if mask.dim() == len(self.sizes) - 1:  # padding, the same for every head
            if not self._is_key_only(mask.unsqueeze(1)):
                self._refuse_shape("attn_mask", mask)
            return mask.unsqueeze(1), None
        return self._split("attn_mask", mask)

    def parse_score(self, score: Any) -> Tensor | None:
        if score is None:
            return None
        self._check("attn_score", score)
        check_dtype(self.function, "attn_score", score)
        key_only, dense = self._split("attn_score", score)
        if dense is not None:
            self._refuse_shape("attn_score", score)
        return key_only

    def parse_expiry(self, expiry: Any) -> Tensor | None:
        if expiry is None:
            return None
        self._check("expiry", expiry)
        if expiry.dtype != torch.int32:
            refuse(self.function, "expiry", str(expiry.dtype), "torch.int32, as select_keys returns it")
        if expiry.dim() != len(self.sizes) or not self._is_key_only(expiry):
            self._refuse_shape("expiry", expiry)
        return expiry

    def hide_masked(self, expiry: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Folds a key-only mask into expiry: 0 for a masked key, for others what it was, or never evicted."""
        if mask is None:
            return None if expiry is None else self.expand(expiry)
        if expiry is None:  # packed: total_k is beyond the end of every sequence
            return self.expand(mask.to(torch.int32) * self.seqlen_k)
        return self.expand(expiry).masked_fill(~mask, 0)

    def expand(self, tensor: Tensor) -> Tensor:
        return tensor if tensor.shape == self.sizes else tensor.expand(self.sizes)

    def _check(self, name: str, tensor: Any) -> None:
        check_tensor(self.function, name, tensor)
        if tensor.device != self.device:
            refuse(self.function, name, f"a tensor on {tensor.device}", f"query's device, {self.device}")

    def _split(self, name: str, tensor: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if tensor.dim() == len(self.sizes):
            if self._is_key_only(tensor):
                return tensor, None
        elif tensor.dim() == 4 and not self.packed:
            batch, heads, queries, keys = tensor.shape
            if queries == 1 and self._is_key_only(tensor.squeeze(2)):
                return tensor.squeeze(2), None
            if (
                (batch == 1 or batch == self.batch)
                and (heads == 1 or heads == self.heads_kv or heads == self.heads_q)
                and (queries == 1 or queries == self.seqlen_q)
                and keys == self.seqlen_k
            ):
                return None, tensor
        self._refuse_shape(name, tensor)

    def _is_key_only(self, tensor: Tensor) -> bool:
        heads = tensor.shape[1]
        if not (heads == 1 or heads == self.heads_kv):
            return False
        if self.packed:
            return tensor.shape[0] == self.seqlen_k
        batch, _, keys = tensor.shape
        return (batch == 1 or batch == self.batch) and keys == self.seqlen_k

    def _refuse_shape(self, name: str, tensor: Tensor) -> NoReturn:
        sizes = (
            f"B {self.batch}, Hkv {self.heads_kv}, H {self.heads_q}, Sq {self.seqlen_q}, Sk {self.seqlen_k}"
        )
        dense = "[B, H or Hkv, Sq, Sk]"
        forms = {
            "attn_bias": f"[B, Hkv, Sk], [B, Hkv, 1, Sk] or {dense}",
            "attn_mask": f"[B, Sk], [B, Hkv, Sk], [B, Hkv, 1, Sk] or {dense}",
            "attn_score": "[B, Hkv, Sk] or [B, Hkv, 1, Sk]",
            "expiry": "[B, Hkv, Sk]",
        }[name] + f", B and heads possibly 1, where {sizes}"
        if self.packed:
            forms = "[total_k] or [total_k, Hkv]" if name == "attn_mask" else "[total_k, Hkv]"
            forms += f" where total_k {self.seqlen_k}, Hkv {self.heads_kv}"
        refuse(self.function, name, shape_of(tensor), forms)
