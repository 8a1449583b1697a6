"""One case through one kernel: selection and all tiers. A failing check prints how to run it again:

    cd tests/python && python -c "from judge import *; check('cpu', Case(keep_window=8))"

KERNELS names what can be tested.
"""

import tiers
from cases import DTYPES, INT32_MAX, Case, Problem, make
from counters import count
from emulated import EmulatedKernel
from kernels import OpsKernel, PublicKernel
from oracle import Expected, expected

__all__ = ["Case", "INT32_MAX", "KERNELS", "check", "failures_of", "kernel_of", "require"]

ALL = tuple(DTYPES)
KERNELS = {
    "cpu": OpsKernel("cpu", "cpu", ALL, keeps_float32=True),
    "cuda-emulated": EmulatedKernel(
        "cuda-emulated", "cpu", ("bf16", "f16"), keeps_float32=False, namespace="flash_dmattn_emulated"
    ),
    "cuda": OpsKernel("cuda", "cuda", ("bf16", "f16"), keeps_float32=False),
    "public-cuda": PublicKernel("public-cuda", "cuda", ("bf16", "f16"), keeps_float32=False),
    "public-cpu": PublicKernel("public-cpu", "cpu", ALL, keeps_float32=True),
    "reference-cpu": PublicKernel(
        "reference-cpu", "cpu", ALL, keeps_float32=False, backend="reference", contiguous=("out", "lse")
    ),
    "flex-cpu": PublicKernel("flex-cpu", "cpu", ALL, keeps_float32=False, backend="flex", has_backward=False),
}


def kernel_of(kernel):
    return KERNELS[kernel] if isinstance(kernel, str) else kernel


def reproduction(kernel, case: Case) -> str:
    return f"""cd tests/python && python -c "from judge import *; check('{kernel.name}', {case!r})\""""


def failures_of(kernel, problem: Problem, answer: Expected, least_limit: float = 1.0) -> list[tiers.Failure]:
    """Everything that the checks find wrong with the kernel on this problem."""
    failures = []
    expiry = kernel.select(problem)
    if expiry is not None and problem.score is not None:
        wrong = (expiry.cpu() != answer.expiry).nonzero()
        count("selection", expiry.numel())
        if len(wrong):
            at = tuple(wrong[0].tolist())
            failures.append(
                tiers.Failure(
                    "selection",
                    "expiry",
                    f"{len(wrong)} of {expiry.numel()} differ from the "
                    f"heap; first {list(at)}: got {expiry[at]}, reference {answer.expiry[at]}",
                )
            )
    results = kernel.run(problem)
    return failures + tiers.judge(
        results, answer, problem.query.dtype, kernel.keeps_float32, kernel.contiguous, least_limit
    )


def require(failures: list[tiers.Failure], how: str) -> None:
    if failures:
        lines = "\n  ".join(str(failure) for failure in failures)
        raise AssertionError(f"{len(failures)} checks failed\n  {lines}\n  reproduce: {how}")


def check(kernel, case: Case) -> None:
    kernel = kernel_of(kernel)
    problem = make(case)
    require(failures_of(kernel, problem.to(kernel.device), expected(problem)), reproduction(kernel, case))
