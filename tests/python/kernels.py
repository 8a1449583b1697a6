"""What is under test, behind one interface: `run(problem)` gives the tensors that tiers.py judges, by name.

OpsKernel calls the torch operators of a library as the Python package does: select, forward, backward.
PublicKernel goes through `flash_dmattn_func` and autograd, with a backend chosen by name. A kernel says on
which device its tensors live, which dtypes it takes and whether it keeps P and dS in float32; the suite has
no other knowledge of it.
"""

import os
from contextlib import contextmanager
from dataclasses import dataclass

import flash_dmattn
import torch

from cases import Problem
from tiers import CONTIGUOUS


@dataclass(frozen=True)
class OpsKernel:
    name: str
    device: str
    dtypes: tuple[str, ...]
    keeps_float32: bool  # P and dS are not rounded to the input type before the products
    namespace: str = "flash_dmattn"
    contiguous: tuple[str, ...] = CONTIGUOUS

    @property
    def ops(self):
        return getattr(torch.ops, self.namespace)

    def select_keys(
        self, score, keep_window, causal=True, num_sinks=0, local_window=0, cu_seqlens=None, num_queries=-1
    ):
        return self.ops.select(score, keep_window, causal, num_sinks, local_window, cu_seqlens, num_queries)

    def select(self, problem: Problem) -> torch.Tensor | None:
        return selection_of(self, problem)

    @staticmethod
    def selection(problem: Problem, expiry: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """(mask, expiry, score, plan): the score where expiry is its plain selection."""
        score = problem.ranked_score() if OpsKernel.keep_window(problem, expiry) else None
        return problem.mask, expiry, score, None

    @staticmethod
    def keep_window(problem: Problem, expiry: torch.Tensor | None) -> int:
        edited = problem.num_sinks or problem.local_window
        return 0 if expiry is None or problem.score is None or edited else problem.keep_window

    def forward(self, problem: Problem, expiry: torch.Tensor | None) -> dict[str, torch.Tensor]:
        out, lse = self.ops.forward(
            problem.query,
            problem.key,
            problem.value,
            problem.bias,
            *self.selection(problem, expiry),
            problem.cu_seqlens_q,
            problem.cu_seqlens_k,
            self.keep_window(problem, expiry),
            problem.scale,
            problem.causal,
        )
        return {"out": out, "lse": lse}

    def backward(
        self, problem: Problem, expiry, out, lse, needs=(True, True, True, True)
    ) -> dict[str, torch.Tensor]:
        dq, dk, dv, dbias = self.ops.backward(
            problem.dout,
            problem.dlse,
            problem.query,
            problem.key,
            problem.value,
            problem.bias,
            *self.selection(problem, expiry),
            out,
            lse,
            problem.cu_seqlens_q,
            problem.cu_seqlens_k,
            self.keep_window(problem, expiry),
            problem.scale,
            problem.causal,
            *needs[:3],
            needs[3] and problem.bias is not None,
        )
        grads = {"dq": dq, "dk": dk, "dv": dv, "dbias": dbias}
        wanted = dict(zip(grads, needs)) | {"dbias": needs[3] and problem.bias is not None}
        return {name: grad for name, grad in grads.items() if wanted[name]}

    def run(self, problem: Problem) -> dict[str, torch.Tensor]:
        expiry = self.select(problem)
        results = self.forward(problem, expiry)
        return results | self.backward(problem, expiry, results["out"], results["lse"])


@dataclass(frozen=True)
class PublicKernel:
    name: str
    device: str
    dtypes: tuple[str, ...]
    keeps_float32: bool
    backend: str | None = None  # None: the package decides
    has_backward: bool = True
    contiguous: tuple[str, ...] = (
        CONTIGUOUS  # the results that must be; not all of eager PyTorch's gradients are
    )

    def select_keys(self, score, keep_window, causal=True, num_sinks=0, local_window=0, cu_seqlens=None):
        packed = {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        with forced(self.backend):
            return flash_dmattn.select_keys(
                score, keep_window, is_causal=causal, num_sinks=num_sinks, local_window=local_window, **packed
            )

    def select(self, problem: Problem) -> torch.Tensor | None:
        return selection_of(self, problem)

    def call(self, problem: Problem, **changes):
        """The public function on the tensors as they are; (out, lse)."""
        edited = problem.num_sinks or problem.local_window
        arguments = dict(
            attn_bias=problem.bias,
            attn_mask=problem.mask,
            scale=problem.scale,
            is_causal=problem.causal,
            return_lse=True,
        )
        if problem.score is not None and not edited and not problem.is_dense:
            score = None if problem.score is problem.bias else problem.score
            arguments |= dict(keep_window_size=problem.keep_window, attn_score=score)
        else:
            arguments |= dict(expiry=self.select(problem))
        function = flash_dmattn.flash_dmattn_func
        if problem.cu_seqlens_q is not None:
            function = flash_dmattn.flash_dmattn_varlen_func
            arguments |= dict(cu_seqlens_q=problem.cu_seqlens_q, cu_seqlens_k=problem.cu_seqlens_k)
        with forced(self.backend):
            return function(problem.query, problem.key, problem.value, **(arguments | changes))

    def run(self, problem: Problem) -> dict[str, torch.Tensor]:
        leaves = {"dq": problem.query, "dk": problem.key, "dv": problem.value, "dbias": problem.bias}
        leaves = {
            name: leaf.detach().clone().requires_grad_() for name, leaf in leaves.items() if leaf is not None
        }
        shared = problem.score is problem.bias
        bias = leaves.get("dbias")
        score = bias if shared else problem.score
        out, lse = self.call(
            problem.replace(query=leaves["dq"], key=leaves["dk"], value=leaves["dv"], bias=bias, score=score)
        )
        results = {"out": out, "lse": lse}
        if not self.has_backward:
            return results
        outputs, grads = [out], [problem.dout]
        if problem.dlse is not None:
            outputs, grads = [out, lse], [problem.dout, problem.dlse]
        return results | dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), grads)))


def selection_of(kernel, problem: Problem) -> torch.Tensor | None:
    if problem.score is None:
        return problem.fixed_expiry
    return kernel.select_keys(
        problem.ranked_score(),
        problem.keep_window,
        problem.causal,
        problem.num_sinks,
        problem.local_window,
        problem.cu_seqlens_k,
    )


@contextmanager
def forced(backend: str | None):
    """The backend of this name for every call inside; None: the package decides."""
    before = os.environ.get("FLASH_DMATTN_BACKEND")
    if backend is not None:
        os.environ["FLASH_DMATTN_BACKEND"] = backend
    try:
        yield
    finally:
        if backend is not None:
            os.environ.pop("FLASH_DMATTN_BACKEND")
            if before is not None:
                os.environ["FLASH_DMATTN_BACKEND"] = before


def bit_for_bit(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Equal bits: -0 is not +0, and a NaN equals itself."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    as_bytes = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (first, second)]
    return torch.equal(*as_bytes)
