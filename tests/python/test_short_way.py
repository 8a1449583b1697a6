"""The short way to the operators: taken by the common calls, refused by all others, and equal to the long way
bit for bit."""

import flash_dmattn
import pytest
import torch
from flash_dmattn import _short, flash_dmattn_func, interface
from torch.autograd import forward_ad

from cases import Case, make
from counters import count
from kernels import bit_for_bit, forced

NAMES = ("query", "key", "value", "attn_bias")
SELECTIONS = {
    "window": lambda p: dict(keep_window_size=8),
    "window, all queries": lambda p: dict(keep_window_size=8, is_causal=False),
    "window of scores": lambda p: dict(keep_window_size=8, attn_bias=None, attn_score=p.bias),
    "expiry": lambda p: dict(expiry=flash_dmattn.select_keys(p.bias, 8)),
    "plain": lambda p: dict(attn_bias=None),
    "scale": lambda p: dict(scale=0.25),
}


@pytest.fixture
def problem():
    return make(Case(batch=2, seqlen_q=20, seqlen_k=33, head_dim=16))


def arguments_of(problem, **changes):
    tensors = dict(zip(NAMES, (problem.query, problem.key, problem.value, problem.bias)))
    return tensors | dict(is_causal=True) | changes


def takes_the_short_way(arguments):
    names = (
        "query",
        "key",
        "value",
        "attn_bias",
        "scale",
        "is_causal",
        "keep_window_size",
        "attn_score",
        "expiry",
    )
    return _short.attend(*(arguments.get(name) for name in names)) is not None


def gradients(arguments):
    leaves = {
        name: arguments[name].detach().clone().requires_grad_()
        for name in NAMES
        if arguments[name] is not None
    }
    out, lse = flash_dmattn_func(**(arguments | leaves), return_lse=True)
    return out, lse, *torch.autograd.grad((out, lse), list(leaves.values()), (out.detach(), lse.detach()))


@pytest.mark.parametrize("selection", SELECTIONS)
def test_common_calls_take_it(problem, selection, monkeypatch):
    arguments = arguments_of(problem, **SELECTIONS[selection](problem))

    def results():
        with torch.inference_mode():
            inferred = flash_dmattn_func(**arguments)
        return inferred, *flash_dmattn_func(**arguments, return_lse=True), *gradients(arguments)

    with monkeypatch.context() as patch:
        patch.setattr(interface, "padded_problem", None)
        short = results()
    with monkeypatch.context() as patch:
        patch.setattr(_short, "attend", lambda *_: None)
        long = results()
    for first, second in zip(short, long, strict=True):
        assert bit_for_bit(first, second) and first.requires_grad == second.requires_grad
        count("bitwise")


@pytest.mark.parametrize(
    "changes",
    [
        dict(attn_bias=torch.zeros(2, 2, 33, dtype=torch.bfloat16)),
        dict(attn_bias=torch.zeros(1, 2, 33)),
        dict(attn_bias=torch.zeros(2, 1, 33)),
        dict(attn_bias=torch.zeros(2, 2, 1, 33)),
        dict(attn_bias=torch.zeros(2, 2, 33, device="meta")),
        dict(keep_window_size=True),
        dict(keep_window_size=0),
        dict(keep_window_size=3, attn_bias=None),
        dict(keep_window_size=3, attn_score=torch.zeros(2, 2, 33)),
        dict(keep_window_size=3, expiry=torch.zeros(2, 2, 33, dtype=torch.int32)),
        dict(attn_score=torch.zeros(2, 2, 33)),
        dict(expiry=torch.zeros(1, 2, 33, dtype=torch.int32)),
        dict(scale=1),
        dict(is_causal=1),
        dict(key=torch.zeros(2, 33, 2, 16, device="meta")),
        dict(query=torch.nn.Parameter(torch.zeros(2, 20, 4, 16))),
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_other_calls_take_the_long_way(problem, changes):
    assert takes_the_short_way(arguments_of(problem))
    assert not takes_the_short_way(arguments_of(problem, **changes))
    count("property", 2)


def test_what_the_surroundings_ask_for_takes_the_long_way(problem):
    arguments = arguments_of(problem)
    with torch.autocast("cpu"):
        assert not takes_the_short_way(arguments)
    with forced("reference"):
        assert not takes_the_short_way(arguments)
    with forward_ad.dual_level():
        assert not takes_the_short_way(arguments)
    assert takes_the_short_way(arguments)
    count("property", 4)
