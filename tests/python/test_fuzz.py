"""Shapes, types, windows, scores and layouts drawn by hypothesis, each judged by selection and tiers B and C.

The profile "ci" draws the same small set every time; --hypothesis-profile long draws thousands.
"""

from hypothesis import given
from hypothesis import strategies as st

from cases import DTYPES, INT32_MAX, SCORES, Case, make
from counters import count
from judge import failures_of, reproduction, require
from narrowing import fit
from oracle import expected
from test_layouts import FORMS, INPUTS

TIER_C = 3.0  # a drawn problem may be so small or so uneven that one weight's error is the whole error
LARGEST = 60_000  # elements of the score matrix, over heads: an example takes some ten milliseconds
KINDS = [kind for kind in SCORES if kind != "tiny"]
LENGTHS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129]), st.integers(0, 300)
)
FORMS_OF_DENSE = st.tuples(
    st.sampled_from("B1"), st.sampled_from(["H", "Hkv", "1"]), st.sampled_from(["Sq", "1"])
).map(lambda axes: " ".join((*axes, "Sk")))
WINDOWS = st.sampled_from([1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1024, INT32_MAX])


@st.composite
def cases(draw, packed=False):
    heads_kv, group = draw(st.sampled_from([1, 2, 3, 8])), draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8, 16]))
    causal = draw(st.booleans())
    lengths = []
    for _ in range(draw(st.integers(0, 6)) if packed else 1):
        k = draw(LENGTHS)
        q = min(draw(LENGTHS), k) if causal else draw(LENGTHS)
        while q * k * heads_kv * group > LARGEST:
            q = q // 2
        lengths.append((q, k))
    longest = max((k for _, k in lengths), default=0)
    keep_window = draw(st.one_of(st.none(), WINDOWS, st.integers(-1, 1).map(lambda d: max(1, longest + d))))
    shape = (
        dict(lengths=tuple(lengths))
        if packed
        else dict(batch=draw(st.integers(0, 3)), seqlen_q=lengths[0][0], seqlen_k=lengths[0][1])
    )
    forms = st.one_of(st.none(), st.none(), FORMS_OF_DENSE)
    dense = {} if packed else dict(dense_bias=draw(forms), mask=draw(forms))
    return Case(
        **shape,
        **dense,
        dense_dtype=draw(st.sampled_from([None, *DTYPES])),
        visible=draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])),
        heads_kv=heads_kv,
        heads_q=heads_kv * group,
        head_dim=draw(st.sampled_from([1, 3, 8, 16, 20, 32, 64, 65, 128])),
        dtype=draw(st.sampled_from(list(DTYPES))),
        keep_window=keep_window,
        causal=causal,
        score=draw(st.sampled_from(KINDS)),
        score_dtype=draw(st.sampled_from([None, *DTYPES])),
        bias=draw(st.sampled_from(["score", "separate", "none"])),
        scale=draw(st.sampled_from([None, None, 0.0, 1.0, -0.5])),
        logit=draw(st.sampled_from([1.0, 1.0, 20.0, 1000.0])),
        dlse=draw(st.booleans()),
        num_sinks=draw(st.sampled_from([0, 0, 0, 1, 5])),
        local_window=draw(st.sampled_from([0, 0, 0, 3, 40])) if causal else 0,
        seed=draw(st.integers(0, 2**31)),
    )


def judged(kernel, case, layouts=()):
    case = fit(case, kernel)
    problem = make(case)
    answer = expected(problem)
    forms = dict(zip(INPUTS, layouts))
    changed = {
        name: FORMS[form](getattr(problem, name))
        for name, form in forms.items()
        if getattr(problem, name) is not None and form in FORMS
    }
    require(
        failures_of(kernel, problem.replace(**changed).to(kernel.device), answer, TIER_C),
        reproduction(kernel, case) + (f"  with {forms}" if layouts else ""),
    )
    count("fuzz")


@given(case=cases())
def test_batches(kernel, case):
    judged(kernel, case)


@given(case=cases(packed=True))
def test_packed_sequences(kernel, case):
    judged(kernel, case)


@given(case=cases(), layouts=st.tuples(*[st.sampled_from(["as is", *FORMS])] * len(INPUTS)))
def test_strides(kernel, case, layouts):
    judged(kernel, case, layouts)
