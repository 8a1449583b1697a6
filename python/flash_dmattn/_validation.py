"""Checks of single arguments. The rules for their messages are in _arguments.py."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_POSITION = 2**31 - 1  # expiry is int32


def refuse(
    function: str, argument: str, got: str, expected: str, kind: type[Exception] = ValueError
) -> NoReturn:
    raise kind(f"{function}: {argument}: got {got}, expected {expected}")


def check_tensor(function: str, name: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        refuse(function, name, kind_of(tensor), "a torch.Tensor", TypeError)
    if tensor.layout != torch.strided or tensor.is_nested:
        refuse(
            function, name, f"a {'nested' if tensor.is_nested else tensor.layout} tensor", "a strided tensor"
        )


def check_dtype(function: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        refuse(function, name, str(tensor.dtype), "torch.float64, float32, bfloat16 or float16")


def check_bool(function: str, name: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        refuse(function, name, kind_of(flag), "True or False", TypeError)


def check_count(function: str, name: str, count: Any, minimum: int) -> int:
    if isinstance(count, bool) or not isinstance(count, int):
        refuse(function, name, kind_of(count), f"an int of at least {minimum}", TypeError)
    if count < minimum:
        refuse(function, name, str(count), f"an int of at least {minimum}")
    return count if count < MAX_POSITION else MAX_POSITION  # no more keys than that can be told apart


def too_long(length: int) -> bool:
    # Not asked while traced: it would put a guard on every dynamic length.
    return not torch.compiler.is_compiling() and length > MAX_POSITION


def check_cu_seqlens(function: str, name: str, cu_seqlens: Any, rows: Tensor, validate: bool) -> None:
    expected = "an int32 tensor [sequences + 1]"
    check_tensor(function, name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32:
        refuse(function, name, str(cu_seqlens.dtype), expected)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        refuse(function, name, shape_of(cu_seqlens), expected)
    if cu_seqlens.device != rows.device:
        refuse(
            function, name, f"a tensor on {cu_seqlens.device}", f"the other tensors' device, {rows.device}"
        )
    if validate or values_are_at_hand(cu_seqlens):
        expected = f"values that start at 0, never decrease and end at {rows.shape[0]}, the number of rows"
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != rows.shape[0]:
            refuse(function, name, f"values from {bounds[0]} to {bounds[-1]}", expected)
        for index in range(1, len(bounds)):
            if bounds[index] < bounds[index - 1]:
                refuse(
                    function, name, f"{bounds[index - 1]} and then {bounds[index]} at index {index}", expected
                )


def check_sequences(
    function: str,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlens: dict[str, int | None],
    is_causal: bool,
) -> None:
    """Looks at the values; cu_seqlens are known to be well-formed."""
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    for (name, limit), longest in zip(
        max_seqlens.items(), (max(lengths_q, default=0), max(lengths_k, default=0))
    ):
        if limit is not None and limit < longest:
            refuse(function, name, str(limit), f"at least {longest}, the length of the longest sequence")
    if is_causal:
        for sequence, (length_q, length_k) in enumerate(zip(lengths_q, lengths_k)):
            if length_q > length_k:
                got = f"{length_q} queries beside {length_k} keys in sequence {sequence} with is_causal=True"
                refuse(function, "cu_seqlens_q", got, "at most as many queries as keys in every sequence")


def values_are_at_hand(tensor: Tensor) -> bool:
    """Whether looking at the values costs no synchronisation: on the CPU, and not traced, fake or wrapped."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def check_expiry_values(function: str, expiry: Tensor, cu_seqlens_k: Tensor | None) -> None:
    if cu_seqlens_k is None:
        limit = torch.tensor(expiry.shape[-1])
    else:
        bounds = cu_seqlens_k.long()
        limit = torch.repeat_interleave(bounds[1:] - bounds[:-1], bounds[1:] - bounds[:-1]).unsqueeze(1)
    wrong = (expiry < 0) | (expiry > limit.to(expiry.device))
    if bool(wrong.any()):
        got = f"{expiry[wrong][0].item()} at index {wrong.nonzero()[0].tolist()}"
        refuse(
            function, "expiry", got, "values from 0 (visible to nobody) to the number of keys (never evicted)"
        )


def kind_of(value: Any) -> str:
    if value is None:
        return "None"
    kind, shown = type(value).__name__, repr(value)
    return f"{shown} ({kind})" if len(shown) <= 40 else f"an object of type {kind}"


def shape_of(tensor: Tensor) -> str:
    return f"shape {list(tensor.shape)}"
