"""P10: every precondition of every public entry, broken one at a time, as refusals.py lists them.

The message names the function and the argument, what it got and what is accepted; the inputs stay untouched.
That the unchanged calls run is tested, too.
"""

import re

import flash_dmattn
import pytest
import torch

from cases import DTYPES, Case
from counters import count
from narrowing import fit
from refusals import ENTRIES, HKV, INT, SK, SQ, TABLE, B, D, H, R, good_func, zeros


def brief(value):
    return (
        f"{list(value.shape)}{str(value.dtype)[6:]}" if isinstance(value, torch.Tensor) else str(value)[:20]
    )


ROWS = [
    pytest.param(entry, *row, id=f"{entry}({', '.join(f'{k}={brief(v)}' for k, v in row[0].items())})")
    for entry, rows in TABLE.items()
    for row in rows
]


@pytest.mark.parametrize("entry", ENTRIES)
def test_the_unchanged_call_runs(entry):
    function, good = ENTRIES[entry]
    function(**good())


@pytest.mark.parametrize("entry, changes, exception, argument, got, accepted", ROWS)
def test_refused_with_the_right_words(entry, changes, exception, argument, got, accepted):
    function, good = ENTRIES[entry]
    arguments = good() | changes
    before = {
        name: value.clone()
        for name, value in arguments.items()
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.numel() < 2**20
    }
    with pytest.raises(exception) as caught:
        function(**arguments)
    name = re.escape(entry.split(",")[0])
    start = (
        "" if exception is R else "^"
    )  # PyTorch puts the C++ source location in front of an operator's message
    pattern = f"{start}{name}: (?:{argument}): got .*(?:{got}).*, expected .*(?:{accepted})"
    assert re.search(pattern, str(caught.value), re.DOTALL), f"got: {caught.value}\nwanted: {pattern}"
    for key, value in before.items():
        if value.layout == torch.strided:
            assert torch.equal(arguments[key], value), f"{key} was changed"
    count("refusal")


@pytest.mark.parametrize("name", ["tpu", "CPU", "native"])
def test_an_unknown_backend_in_the_environment(name, monkeypatch):
    monkeypatch.setenv("FLASH_DMATTN_BACKEND", name)
    with pytest.raises(
        ValueError, match=f"flash_dmattn_func: FLASH_DMATTN_BACKEND: got '{name}', expected one of .*cpu"
    ):
        flash_dmattn.flash_dmattn_func(**good_func())
    count("refusal")


def test_a_backend_that_does_not_take_the_call_says_who_does():
    dense = good_func() | dict(attn_bias=zeros(B, HKV, SQ, SK))
    with pytest.raises(NotImplementedError) as caught:
        flash_dmattn.flash_dmattn_func_auto("flex")(**dense)
    message = str(caught.value)
    for words in ("flash_dmattn_func", "'flex'", "key-only", "'cpu' or 'reference'", "cuda: ", "flex: "):
        assert words in message, message
    meta = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in good_func().items()
    }
    with pytest.raises(NotImplementedError, match="meta"):
        flash_dmattn.flash_dmattn_func(**meta)
    query = zeros(B, SQ, H, D).requires_grad_()
    with pytest.raises(NotImplementedError, match="backward"):
        flash_dmattn.flash_dmattn_func_auto("flex")(**(good_func() | dict(query=query)))
    count("refusal", 3)


def test_double_backward_is_refused_clearly():
    leaves = {
        name: torch.randn(value.shape).requires_grad_()
        for name, value in good_func().items()
        if name != "is_causal"
    }
    out = flash_dmattn.flash_dmattn_func(**leaves, is_causal=True)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves["query"], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward"):
        grad.sum().backward()
    count("refusal")


@pytest.mark.parametrize("sizes", [(2**28, 2**29), (2**20, 2**30)])
def test_shapes_beyond_any_memory(sizes):
    """Expanded from one element; the result would not fit anywhere."""
    batch, length = sizes
    query = zeros(1).expand(batch, length, H, D)
    with pytest.raises((RuntimeError, MemoryError, ValueError)) as caught:
        flash_dmattn.flash_dmattn_func(query, query[:, :, :HKV], query[:, :, :HKV], is_causal=True)
    assert len(str(caught.value)) > 20
    with pytest.raises((RuntimeError, MemoryError, ValueError)):
        flash_dmattn.select_keys(zeros(1).expand(batch, HKV, length), 3)
    count("refusal", 2)


def test_bad_expiry_is_safe_without_validation(kernel):
    """Any int32 is: results are those of the clamped value."""
    dtype = DTYPES[fit(Case(), kernel).dtype]
    query = torch.randn(B, SQ, H, D, device=kernel.device).to(dtype)
    key = torch.randn(B, SK, HKV, D, device=kernel.device).to(dtype)
    wild = torch.tensor([-(2**31), -1, 0, 3, SK, SK + 1, 2**31 - 1], dtype=INT, device=kernel.device).expand(
        B, HKV, SK
    )
    tame = wild.clamp(0, SK)
    no_packing = (None, None)
    for causal in (True, False):
        last = (*no_packing, 0, 1.0, causal)  # keep_window, scale, is_causal
        results, gradients = {}, {}
        for name, expiry in (("wild", wild), ("tame", tame)):
            inputs = (query, key, key, None, None, expiry, None, None)
            results[name] = kernel.ops.forward(*inputs, *last)
            gradients[name] = kernel.ops.backward(
                query, None, *inputs, *results[name], *last, True, True, True, False
            )
        for tensors in (results, gradients):
            for first, second in zip(tensors["wild"], tensors["tame"]):
                assert torch.equal(first, second)
                count("bitwise")
