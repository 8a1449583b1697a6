"""Which implementation serves a call: an ordered table, each entry with a why_not.

Unless one is asked for, the native kernels run or nothing does. The others run on request only: nobody gets a
slow path unawares.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import _ops, _select, reference
from ._arguments import Problem, SelectProblem
from ._validation import refuse

__all__ = ["BACKENDS", "attend", "available", "check_name", "explain", "select"]

ENVIRONMENT_VARIABLE = "FLASH_DMATTN_BACKEND"


class Backend(NamedTuple):
    name: str
    unavailable: Callable[[], str]  # why it serves no call in this process, or ""
    why_not: Callable[[Problem], str]  # why it does not take this problem, or ""
    attend: Callable[[Problem], tuple[Tensor, Tensor]]
    select: Callable[[SelectProblem], Tensor]


def attend(problem: Problem, name: str | None) -> tuple[Tensor, Tensor]:
    """out and lse, by the backend of this name or by the first that takes the problem."""
    backend = _choose(problem, name)
    if problem.score is not None:
        expiry = backend.select(
            SelectProblem(
                function=problem.function,
                score=problem.score,
                keep_window_size=problem.keep_window_size,
                is_causal=problem.is_causal,
                num_sinks=0,
                local_window=0,
                cu_seqlens=problem.cu_seqlens_k,
                num_queries=problem.query.shape[1] if problem.is_causal and not problem.is_packed else -1,
            )
        )
        score = problem.score
        if expiry.shape != problem.key_sizes:
            expiry, score = expiry.expand(problem.key_sizes), score.expand(problem.key_sizes)
        problem = problem._replace(expiry=expiry, score=score)
    return backend.attend(problem)


def select(problem: SelectProblem) -> Tensor:
    """expiry, by the native kernel; in tensor operations on devices that have none."""
    device, name = problem.score.device.type, _requested(problem.function, None)
    if name in ("flex", "reference"):
        return _BY_NAME[name].select(problem)
    if name is not None and name != device:
        raise NotImplementedError(f"{problem.function}: backend {name!r} takes no tensors on {device}")
    reason = why_no_kernels(device)
    if not reason and device == "cuda":
        reason = _gpu_why_not(problem.score.device)
    if not reason:
        return _native_select(problem)
    if load_error and (name is not None or device == "cpu"):
        raise ImportError(load_error)
    if name is not None:
        raise NotImplementedError(f"{problem.function}: backend {name!r}: {reason}")
    return _tensor_select(problem)


def available() -> list[str]:
    return [backend.name for backend in BACKENDS if not backend.unavailable()]


def check_name(function: str, argument: str, name: str) -> None:
    if name not in _BY_NAME:
        refuse(function, argument, repr(name), f"one of {', '.join(_BY_NAME)}")


def explain(problem: Problem, name: str | None) -> str:
    """One line per backend: what would run, and why each other one would not."""
    try:
        chosen = _choose(problem, name).name
    except (NotImplementedError, ImportError):
        chosen = None
    lines = []
    for backend in BACKENDS:
        if backend.name != chosen:
            lines.append(f"{backend.name}: {backend.why_not(problem) or 'not asked for'}")
        elif backend.attend is not _native_attend:
            lines.append(f"{backend.name}: runs")
        else:
            lines += _explain_kernels(backend.name, _ops.native.explain(*_native_arguments(problem)))
    return "\n".join(lines)


def _explain_kernels(name: str, answer: str) -> list[str]:
    """The backend's line and one for each kernel that would come before the one that runs.

    answer: one line per kernel, "<kernel>: runs" or "<kernel>: <why not>", or what is wrong with the call.
    """
    refused = []
    for line in answer.splitlines():
        kernel, _, verdict = line.partition(": ")
        if verdict == "runs":
            return [f"{name}: runs" + (f", kernel {kernel}" if kernel != name else ""), *refused]
        refused.append(f"  {line}")
    return [f"{name}: no kernel takes this call", *refused]


def _requested(function: str, name: str | None) -> str | None:
    if name is not None:
        return name
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    if name:
        check_name(function, ENVIRONMENT_VARIABLE, name)
    return name or None


def _choose(problem: Problem, name: str | None) -> Backend:
    name = _requested(problem.function, name)
    for candidate in ("cuda", "cpu") if name is None else (name,):
        if not _BY_NAME[candidate].why_not(problem):
            return _BY_NAME[candidate]

    raise _no_backend(problem, name)


def _no_backend(problem: Problem, name: str | None) -> Exception:
    device = problem.query.device.type
    if name in (None, "cpu") and device == "cpu" and load_error:
        return ImportError(load_error)
    reasons = {backend.name: backend.why_not(problem) for backend in BACKENDS}
    what = f"there are no kernels for {device} tensors"
    if device in reasons:
        what = f"backend {device!r}: {reasons[device]}"
    if name is not None:
        what = f"backend {name!r} does not take this call"
    if willing := " or ".join(repr(other) for other, reason in reasons.items() if not reason):
        what += f", ask for {willing} through flash_dmattn_func_auto or {ENVIRONMENT_VARIABLE}"
    listed = "; ".join(f"{other}: {reason or 'would run'}" for other, reason in reasons.items())
    return NotImplementedError(f"{problem.function}: {what} ({listed})")


# The native kernels: one set of operators, which PyTorch dispatches by device.

try:
    from . import _library

    _library.load()
    _ops.register()
    load_error = ""
except ImportError as error:
    load_error = str(error)

_NO_KERNELS = {
    device: "the native library is not loaded"
    if load_error
    else (
        ""
        if torch._C._dispatch_has_kernel_for_dispatch_key("flash_dmattn::forward", device.upper())
        else f"this build has no {device.upper()} kernels"
    )
    for device in ("cuda", "cpu")
}


DEVICES = frozenset(device for device, reason in _NO_KERNELS.items() if not reason)  # with native kernels


def why_no_kernels(device: str) -> str:
    """Why there are no native kernels for this device, or ""."""
    return _NO_KERNELS.get(device, f"there are no kernels for {device}")


def _cuda_unavailable() -> str:
    if reason := why_no_kernels("cuda"):
        return reason
    if not torch.cuda.is_available():
        return "this machine has no CUDA device"
    reasons = [_gpu_why_not(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    return "" if "" in reasons else reasons[0]


def _gpu_why_not(device: torch.device) -> str:
    if torch.compiler.is_compiling():  # the kernels say it when they run
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major >= 8 else f"needs compute capability 8.0 or higher, this GPU has {major}.{minor}"


def _native_why_not(device: str, problem: Problem) -> str:
    if problem.query.device.type != device:
        return why_no_kernels(device) or f"the tensors are on {problem.query.device.type}"
    if reason := why_no_kernels(device):
        return reason
    if device == "cuda" and (reason := _gpu_why_not(problem.query.device)):
        return reason
    query, bias = problem.query, problem.dense_bias
    if torch.compiler.is_compiling() or type(query) not in (Tensor, torch.nn.Parameter):
        return ""  # the kernels say it when they run
    bias_dtype = None if bias is None else bias.dtype
    has_mask = problem.dense_mask is not None
    return _kernels_why_not(query.device, query.dtype, query.shape[-1], bias_dtype, has_mask)


@lru_cache(maxsize=1024)
def _kernels_why_not(
    device: torch.device, dtype: torch.dtype, head_dim: int, bias_dtype: torch.dtype | None, has_mask: bool
) -> str:
    """What the library says to a small call of this kind: why no kernel takes it, or ""."""
    query = torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device)
    bias = None if bias_dtype is None else torch.empty(1, 1, 1, 1, dtype=bias_dtype, device=device)
    mask = torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device) if has_mask else None
    answer = _ops.native.explain(
        query, query, query, bias, mask, None, None, None, None, None, 0, 1.0, False
    )  # fmt: skip
    reasons = [line.partition(": ")[2] for line in answer.splitlines()]
    return "" if "runs" in reasons else "; ".join(reasons)


def _ranked_natively(score: Tensor | None) -> bool:
    return score is not None and (score.dtype != torch.float64 or score.device.type == "cpu")


def _native_arguments(problem: Problem, plan: Tensor | None = None) -> tuple:
    is_ranked = problem.expiry is not None and _ranked_natively(problem.score)
    return (
        problem.query,
        problem.key,
        problem.value,
        problem.bias if problem.dense_bias is None else problem.dense_bias,
        problem.dense_mask,
        problem.expiry,
        problem.score if is_ranked else None,
        plan,
        problem.cu_seqlens_q,
        problem.cu_seqlens_k,
        problem.keep_window_size if is_ranked else 0,
        problem.scale,
        problem.is_causal,
    )


def _native_attend(problem: Problem) -> tuple[Tensor, Tensor]:
    return _ops.native.forward(*_native_arguments(problem, _plan_of_both_passes(problem)))


def _plan_of_both_passes(problem: Problem) -> Tensor | None:
    """The bits of a mask and a dense bias, kept for the backward: it need not read the two once more for them."""
    if not (problem.is_dense and problem.needs_grad and problem.query.is_cuda) or problem.query.numel() == 0:
        return None
    if torch.compiler.is_compiling():  # which would have to know the plan's size
        return None
    bias = problem.bias if problem.dense_bias is None else problem.dense_bias
    bias = None if bias is None else bias.detach()
    return _ops.native.plan(
        problem.expiry, None, bias, None, None, problem.query.shape[1], 0, problem.is_causal,
        problem.dense_mask,
    )  # fmt: skip


def _native_select(problem: SelectProblem) -> Tensor:
    if not _ranked_natively(problem.score):
        return _tensor_select(problem)
    return _ops.native.select(
        problem.score,
        problem.keep_window_size,
        problem.is_causal,
        problem.num_sinks,
        problem.local_window,
        problem.cu_seqlens,
        problem.num_queries,
    )


# FlexAttention is imported when it is first used: not every build of PyTorch has it.


def _flex_unavailable() -> str:
    try:
        from . import flex  # noqa: F401
    except ImportError as error:
        return f"this PyTorch has no FlexAttention ({error})"
    return ""


def _flex_why_not(problem: Problem) -> str:
    if reason := _flex_unavailable():
        return reason
    from . import flex

    return flex.why_not(problem)


def _flex_attend(problem: Problem) -> tuple[Tensor, Tensor]:
    from . import flex

    return flex.attention(problem)


def _tensor_select(problem: SelectProblem) -> Tensor:
    return _select.select_keys(*problem[1:-1])


def _reference_attend(problem: Problem) -> tuple[Tensor, Tensor]:
    if problem.is_packed:
        return reference.attention_varlen(
            problem.query,
            problem.key,
            problem.value,
            problem.cu_seqlens_q,
            problem.cu_seqlens_k,
            problem.bias,
            problem.expiry,
            problem.scale,
            problem.is_causal,
        )
    return reference.attention(
        problem.query,
        problem.key,
        problem.value,
        problem.bias,
        problem.expiry,
        problem.dense_bias,
        problem.dense_mask,
        problem.scale,
        problem.is_causal,
    )


def _reference_why_not(problem: Problem) -> str:
    return "takes no meta tensors" if problem.query.is_meta else ""


def _reference_select(problem: SelectProblem) -> Tensor:
    return reference.select_keys(*problem[1:-1])


BACKENDS = (
    Backend("cuda", _cuda_unavailable, partial(_native_why_not, "cuda"), _native_attend, _native_select),
    Backend(
        "cpu", partial(why_no_kernels, "cpu"), partial(_native_why_not, "cpu"), _native_attend, _native_select
    ),
    Backend("flex", _flex_unavailable, _flex_why_not, _flex_attend, _tensor_select),
    Backend("reference", lambda: "", _reference_why_not, _reference_attend, _reference_select),
)

_BY_NAME = {backend.name: backend for backend in BACKENDS}
