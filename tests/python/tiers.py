"""How far from the exact answer a result may be: the suite's tolerances for attention, all of them.

Tier A (probe.py) compares structure exactly. Tier B holds every element against its own bound, |x - ref| <=
u_o |ref| + Z sigma + floor, with sigma from the oracle's terms. Tier C holds the error of a whole tensor
against the sum of the variances. A kernel is judged by the rule of its input type and, if it keeps P and dS
in float32 although its inputs are narrower, by the tighter rule that this earns as well.
"""

from dataclasses import dataclass

import torch

from cases import accumulation
from counters import count, record_worst
from oracle import FLOAT16_SUBNORMAL, FLOAT32, Answer, Expected

UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: FLOAT32, torch.float64: 2.0**-53}
SMALLEST = {
    torch.bfloat16: 2.0**-133,
    torch.float16: 2.0**-24,
    torch.float32: 2.0**-149,
    torch.float64: 2.0**-1074,
}
# A weight below this may vanish: float32 exponentials may flush subnormals, and their products underflow.
VANISHES = {torch.float64: 2.0**-1000, torch.float32: 2.0**-100}
CONTIGUOUS = ("out", "lse", "dq", "dk", "dv", "dbias")
DBIAS_UNIT = 2.0**-22  # float32 dbias is a float32 sum of float32 terms
# Of the absolute sum, in float64; more where logits beyond 64 lose digits of the exponential.
FLOAT64_RTOL = 1e-12


@dataclass(frozen=True)
class Rule:
    name: str
    matrix: float  # h of the matrix operands P and dS
    logit: float  # h of float32 logits
    output: float  # u_o of the stored output
    subnormal: float = 0.0  # h of the matrix operands that become float16 subnormals


@dataclass
class Failure:
    check: str  # "tier B (float32 P)", "shape", ...
    tensor: str
    detail: str

    def __str__(self) -> str:
        return f"{self.check}: {self.tensor}: {self.detail}"


def rules(dtype: torch.dtype, largest_logit: float, keeps_float32: bool) -> list[Rule]:
    single = FLOAT32 * (8 + 2 * largest_logit)
    if dtype == torch.float64:
        return [Rule("float64", FLOAT64_RTOL * max(1.0, largest_logit / 64), 0.0, UNIT[dtype])]
    if dtype == torch.float32:
        return [Rule("float32", single / 2, single / 2, UNIT[dtype])]
    rounded = ((UNIT[dtype] / 2) ** 2 + single**2) ** 0.5
    subnormal = FLOAT16_SUBNORMAL / 2 if dtype == torch.float16 else 0.0
    result = [Rule(f"{str(dtype).removeprefix('torch.')} P", rounded, single / 2, UNIT[dtype], subnormal)]
    if keeps_float32:
        result.append(Rule("float32 P", single / 2, single / 2, UNIT[dtype]))
    return result


def variance(answer: Answer, rule: Rule) -> torch.Tensor:
    return (
        rule.matrix**2 * answer.matrix
        + rule.subnormal**2 * answer.subnormal
        + (rule.output / 2) ** 2 * answer.output
        + rule.logit**2 * answer.logit
        + answer.exact
    )


def output_unit(tensor: str, dtype: torch.dtype) -> float:
    return DBIAS_UNIT if tensor == "dbias" and dtype == torch.float32 else UNIT[dtype]


def bound(tensor: str, answer: Answer, dtype: torch.dtype, rule: Rule) -> torch.Tensor:
    """The largest |x - ref| that each element may show; dtype is that of x."""
    ref = answer.value.abs()
    if tensor == "lse":  # its terms are those of the logits, which may cancel
        if rule.name == "float64":
            return rule.matrix * (1 + ref + answer.terms)
        return 1e-5 + 2.0**-20 * ref + 2.0**-22 * answer.terms
    # Where nothing is added up, nothing can vanish: the gradient of an unseen key is exactly 0.
    arithmetic = torch.float64 if rule.name == "float64" else torch.float32
    vanished = VANISHES[arithmetic] * (answer.terms > 0).double()
    if rule.name == "float64":
        stored = 0.0 if dtype == torch.float64 else UNIT[dtype] * ref + SMALLEST[dtype] / 2
        return rule.matrix * (answer.terms + answer.exact.sqrt() / (8 * FLOAT32)) + vanished + stored
    z = 6.0 if ref.numel() <= 10**7 else 7.0
    floor = 4 * FLOAT32 * answer.terms + SMALLEST[dtype] / 2 + vanished
    return output_unit(tensor, dtype) * ref + z * variance(answer, rule).sqrt() + floor


def tier_b(tensor: str, actual: torch.Tensor, answer: Answer, rule: Rule) -> Failure | None:
    check, x, ref = f"tier B ({rule.name})", actual.detach().cpu().double(), answer.value
    finite = torch.isfinite(ref)
    strange = ((x != ref) & ~(x.isnan() & ref.isnan())) & (~finite | ~torch.isfinite(x))
    if strange.any():
        return Failure(
            check,
            tensor,
            f"{int(strange.sum())} elements are not finite where they should be, or are "
            f"where they should not; first {_element(x, ref, int(strange.flatten().int().argmax()))}",
        )
    count("tier B", x.numel())
    if x.numel() == 0:
        return None
    allowed = bound(tensor, answer, actual.dtype, rule)
    error = (x - ref).abs().where(finite, torch.zeros(()).double())
    bad = error > allowed
    excess = error / allowed.clamp(min=2.0**-1074)
    worst = int(excess.flatten().argmax())
    record_worst(tensor, float(excess.flatten()[worst]))
    if not bad.any():
        return None
    return Failure(
        check,
        tensor,
        f"{int(bad.sum())} of {bad.numel()} elements beyond their bound; worst "
        f"{_element(x, ref, worst)}, error {error.flatten()[worst]:.3g}, "
        f"allowed {allowed.flatten()[worst]:.3g}",
    )


def aggregate_limit(tensor: str, answer: Answer, query_rows: int) -> float:
    """1, and more where few independent errors are summed: their mean square then scatters around its
    expectation.

    A row's weights reach all of its channels, and through delta so does the rounding of its output: there are
    about as many independent errors as query rows. In dbias even the rows may add up alike, where they see
    the same keys.
    """
    independent = 1 if tensor == "dbias" else min(query_rows, answer.value.numel())
    return max(1.0, (0.75 * (1 + 7 * (2 / max(1, independent)) ** 0.5)) ** 0.5)


def tier_c(tensor: str, actual: torch.Tensor, answer: Answer, rule: Rule, limit: float) -> Failure | None:
    """Float64 results and lse have no variance to be held against: tier B alone judges them."""
    if rule.name == "float64" or tensor == "lse" or actual.numel() == 0:
        return None
    x, ref = actual.detach().cpu().double(), answer.value
    if not (torch.isfinite(x) & torch.isfinite(ref)).all():
        return None  # tier B's matter
    rounding = output_unit(tensor, actual.dtype) * ref / 2
    summation = FLOAT32 * answer.terms  # partial sums are rounded, and may be as large as that
    budget = (variance(answer, rule) + rounding**2 + summation**2 + (SMALLEST[actual.dtype] / 2) ** 2).sum()
    ratio = float((((x - ref) ** 2).sum() / budget).sqrt()) if budget > 0 else float((x - ref).abs().max())
    count("tier C")
    if ratio <= limit:
        return None
    return Failure(
        f"tier C ({rule.name})", tensor, f"aggregate error is {ratio:.3g} of its budget, allowed {limit:.3g}"
    )


def contract(
    results: dict[str, torch.Tensor],
    dtype: torch.dtype,
    expected: Expected,
    contiguous: tuple[str, ...],
) -> list[Failure]:
    """Shape, dtype and strides of every result; lse comes in the accumulation type, as dbias does unless the
    bias is dense."""
    others = {"lse": accumulation(dtype), "dbias": expected.dbias_dtype}
    failures = []
    for tensor, actual in results.items():
        wanted = (tuple(expected.tensors[tensor].value.shape), others.get(tensor, dtype))
        if (tuple(actual.shape), actual.dtype) != wanted:
            failures.append(
                Failure(
                    "contract",
                    tensor,
                    f"is {tuple(actual.shape)} {actual.dtype}, should be {wanted[0]} {wanted[1]}",
                )
            )
        elif tensor in contiguous and not actual.is_contiguous():
            failures.append(
                Failure("contract", tensor, f"has strides {actual.stride()}, should be contiguous")
            )
    return failures


def judge(
    results: dict[str, torch.Tensor],
    expected: Expected,
    dtype: torch.dtype,
    keeps_float32: bool,
    contiguous: tuple[str, ...] = CONTIGUOUS,
    least_limit: float = 1.0,
) -> list[Failure]:
    """Everything that is wrong with results: tensors named as in expected.tensors; some may be absent.

    contiguous: the tensors that have to be. least_limit: of tier C, for problems whose error a few large
    weights may dominate.
    """
    failures = contract(results, dtype, expected, contiguous)
    broken = {failure.tensor for failure in failures if "should be (" in failure.detail}
    query_rows = expected.tensors["lse"].value.numel()
    for tensor, actual in results.items():
        if tensor in broken:
            continue
        answer = expected.tensors[tensor]
        limit = max(least_limit, aggregate_limit(tensor, answer, query_rows))
        for rule in rules(dtype, expected.largest_logit, keeps_float32):
            failures += [tier_b(tensor, actual, answer, rule), tier_c(tensor, actual, answer, rule, limit)]
    return [failure for failure in failures if failure is not None]


def _element(x: torch.Tensor, ref: torch.Tensor, flat: int) -> str:
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), x.shape))
    return f"{list(index)}: got {x[index]:.9g}, reference {ref[index]:.9g}"
