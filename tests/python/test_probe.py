"""Tier A: the exact probe over shapes, windows and types."""

import pytest

from judge import require
from probe import Probe, count_exactly, make_probe, tier_a

SHAPES = [
    dict(keep_window=16, seqlen_q=130, seqlen_k=130),
    dict(keep_window=64, seqlen_q=65, seqlen_k=333, heads_q=6, heads_kv=2, head_dim=32),
    dict(keep_window=64, seqlen_q=300, seqlen_k=300, heads_q=7, heads_kv=1, head_dim=24, batch=1),
    dict(keep_window=256, seqlen_q=700, seqlen_k=700, heads_q=2, heads_kv=1, head_dim=64, batch=1),
    dict(keep_window=1, seqlen_q=40, seqlen_k=70, head_dim=128),
    dict(keep_window=32, seqlen_q=100, seqlen_k=150, causal=False),
    dict(keep_window=128, seqlen_q=2400, seqlen_k=2400, heads_q=2, heads_kv=1, head_dim=16, batch=1),
]
PROBES = [
    Probe(dtype=dtype, run=run, **shape)
    for shape in SHAPES
    for dtype in ("f64", "f32", "bf16", "f16")
    for run in (1, 2)
]
PROBES += [
    Probe(dtype=dtype, run=run, keep_window=2048, seqlen_q=600, seqlen_k=2500, heads_q=2, heads_kv=1, batch=1)
    for dtype in ("f32", "f16")
    for run in (1, 2)
]


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: probe.id)
def test_structure_is_exact(kernel, probe):
    if probe.dtype not in kernel.dtypes:
        pytest.skip(f"{kernel.name} takes no {probe.dtype}")
    problem = make_probe(probe)
    failures = tier_a(
        kernel.run(problem.to(kernel.device)), count_exactly(problem), probe, kernel.keeps_float32
    )
    require(
        failures, f"""python -m pytest "tests/python/test_probe.py" -k "{probe.id}" --kernel {kernel.name}"""
    )
