"""Which cases of the suite a kernel is tested on, if not all: a case of a type that it does not take is drawn
in one that it takes, and what would take it too long is left out."""

import dataclasses

import pytest

from cases import DTYPES, Case
from probe import LARGEST_WINDOW, Probe

# The suites that judge a kernel's operators. The others go through the public functions, whatever the
# kernel; test_decode fits its cases itself, and its long caches would take an emulated kernel minutes.
SUITES = (
    "test_attention test_bitwise test_concurrency test_dense test_errors test_fuzz test_layouts "
    "test_non_finite test_plan test_poison test_probe test_properties test_reductions test_selection"
).split()
# Of these, what an emulated kernel is not run on: what goes through the public functions, what concerns no
# CUDA kernel, what would take minutes.
NOT_EMULATED = {
    "test_backward_on_another_thread_than_forward",
    "test_dataloader_workers",
    "test_every_subset_of_requires_grad",
    "test_few_rows_of_a_long_sequence",
    "test_identities_on_a_long_sequence",
    "test_identities_on_a_million_tokens",
    "test_large_numbers_in_uninitialised_memory",
    "test_more_heads_than_a_grid_has_rows",
    "test_numbers_of_threads",
    "test_the_gradient_of_a_bias_has_its_type",
    "test_the_gradient_of_a_sum_is_expanded",
    "test_the_quick_start_of_the_original",
}
# Their types are those of scores: float32 is always taken.
OF_SCORES = ("test_plan", "test_selection")
INSTEAD = {"f32": "bf16", "f64": "f16"}
LARGEST_HEAD_DIM = 256  # of kernels that take no float32


def work(case) -> int:
    """Multiply-adds of a product of queries and keys, about."""
    lengths = getattr(case, "lengths", None) or [(case.seqlen_q, case.seqlen_k)] * case.batch
    tile = 128
    reach = case.keep_window + tile if case.keep_window is not None else 1 << 31
    return sum(case.heads_q * q * min(k, reach) for q, k in lengths) * max(64, case.head_dim)


def fitted(value, dtypes, largest_work):
    """The value of a parameter, in a type among dtypes; None: to be left out."""
    if isinstance(value, (Case, Probe)):
        if value.dtype not in dtypes:
            value = dataclasses.replace(value, dtype=INSTEAD[value.dtype])
        if isinstance(value, Probe) and value.keep_window > LARGEST_WINDOW[value.dtype]:
            value = dataclasses.replace(value, dtype="f16")
        for name in ("score_dtype", "dense_dtype"):
            if getattr(value, name, None) == "f64" and "f64" not in dtypes:
                value = dataclasses.replace(value, **{name: "f32"})
        too_wide = "f32" not in dtypes and value.head_dim > LARGEST_HEAD_DIM
        return None if too_wide or work(value) > largest_work else value
    if isinstance(value, str) and value in DTYPES and value not in dtypes:
        return INSTEAD[value]
    return value


def fit(case, kernel):
    """The case in a type that the kernel takes."""
    return fitted(case, kernel.dtypes, float("inf"))


def narrow(definition, module: str, kernels) -> None:
    """Rewrites the parametrize marks of a test function for the kernels that it will be run on."""
    if module not in SUITES:
        return
    dtypes = {dtype for kernel in kernels for dtype in kernel.dtypes}
    if module in OF_SCORES:
        dtypes.add("f32")
    dtypes.update(getattr(definition.module, "ALSO_TAKEN", ()))
    largest_work = max(getattr(kernel, "largest_work", float("inf")) for kernel in kernels)
    for index, mark in enumerate(definition.own_markers):
        if mark.name != "parametrize" or not isinstance(mark.args[0], str) or "," in mark.args[0]:
            continue
        name, values = mark.args
        narrowed = []
        for value in values:
            identity = getattr(value, "id", None) if hasattr(value, "marks") else None
            plain = value.values[0] if hasattr(value, "marks") else value
            new = fitted(plain, dtypes, largest_work)
            if new is None or any(new == known for known, _ in narrowed):
                continue
            if identity and new != plain:
                identity = identity.replace(plain.id, new.id)
            narrowed.append((new, identity))
        params = [pytest.param(new, id=identity) if identity else new for new, identity in narrowed]
        definition.own_markers[index] = pytest.mark.parametrize(name, params, **mark.kwargs).mark
