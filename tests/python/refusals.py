"""The table of test_errors.py: what every public entry refuses, and in which words.

A row is: what is changed about a good call, the exception, and what its message must say: the argument, what
it got, what is accepted.
"""

import flash_dmattn
import torch
from flash_dmattn import nn as dmattn_nn

B, SQ, SK, H, HKV, D = 2, 5, 7, 4, 2, 8


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def cu(*bounds, dtype=torch.int32):
    return torch.tensor(bounds, dtype=dtype)


def good_func():
    return dict(
        query=zeros(B, SQ, H, D), key=zeros(B, SK, HKV, D), value=zeros(B, SK, HKV, D), is_causal=True
    )


def good_varlen():
    return dict(
        query=zeros(5, H, D),
        key=zeros(7, HKV, D),
        value=zeros(7, HKV, D),
        is_causal=True,
        cu_seqlens_q=cu(0, 2, 2, 5),
        cu_seqlens_k=cu(0, 3, 4, 7),
    )


def good_select():
    return dict(attn_score=zeros(B, HKV, SK), keep_window_size=3)


def good_ops_select():
    return dict(
        score=zeros(B, HKV, SK), keep_window=3, is_causal=True, num_sinks=0, local_window=0, cu_seqlens=None
    )


def good_ops_forward(packed=False):
    base = dict(
        bias=None, mask=None, expiry=None, score=None, plan=None, cu_seqlens_q=None, cu_seqlens_k=None,
        keep_window=0, scale=1.0, is_causal=True,
    )  # fmt: skip
    return base | (good_varlen() if packed else good_func())


def good_ops_backward(packed=False):
    forward = good_ops_forward(packed)
    lse = zeros(H, 5) if packed else zeros(B, H, SQ)
    return (
        dict(
            grad_out=forward["query"],
            grad_lse=None,
            out=torch.zeros_like(forward["query"]),
            lse=lse,
            need_dq=True,
            need_dk=True,
            need_dv=True,
            need_dbias=False,
        )
        | forward
    )


def good_module():
    return dict(hidden_size=32, num_heads=4, num_kv_heads=2, keep_window_size=8)


def module_call(**changes):
    layer = dmattn_nn.DynamicMaskAttention(**good_module())
    return layer(**(dict(hidden_states=zeros(2, 6, 32)) | changes))


OPS = torch.ops.flash_dmattn
ENTRIES = {  # name in messages: (callable, arguments of a good call)
    "flash_dmattn_func": (flash_dmattn.flash_dmattn_func, good_func),
    "flash_dmattn_varlen_func": (flash_dmattn.flash_dmattn_varlen_func, good_varlen),
    "select_keys": (flash_dmattn.select_keys, good_select),
    "explain": (flash_dmattn.explain, good_func),
    "explain, packed": (flash_dmattn.explain, good_varlen),
    "flash_dmattn_func_auto": (flash_dmattn.flash_dmattn_func_auto, lambda: dict(backend="reference")),
    "DynamicMaskAttention": (dmattn_nn.DynamicMaskAttention, good_module),
    "DynamicMaskAttention, call": (module_call, dict),
    "flash_dmattn::select": (lambda **kw: OPS.select(**kw), good_ops_select),
    "flash_dmattn::forward": (lambda **kw: OPS.forward(**kw), good_ops_forward),
    "flash_dmattn::forward, packed": (lambda **kw: OPS.forward(**kw), lambda: good_ops_forward(True)),
    "flash_dmattn::backward": (lambda **kw: OPS.backward(**kw), good_ops_backward),
    "flash_dmattn::backward, packed": (lambda **kw: OPS.backward(**kw), lambda: good_ops_backward(True)),
}
V, T, R = ValueError, TypeError, RuntimeError
INT = torch.int32
FP8 = torch.float8_e4m3fn

# entry: rows of (changes, exception, argument, what it got, what is accepted)
ATTENTION = [
    (dict(query=None), T, "query", "None", "Tensor"),
    (dict(query=[1.0]), T, "query", r"\[1.0\] \(list\)", "Tensor"),
    (dict(key=3), T, "key", "3", "Tensor"),
    (dict(value="v"), T, "value", "'v'", "Tensor"),
    (dict(is_causal=1), T, "is_causal", "1", "True or False"),
    (dict(return_lse="yes"), T, "return_lse", "'yes'", "True or False"),
    (dict(validate=None), T, "validate", "None", "True or False"),
    (dict(scale="big"), T, "scale", "'big'", "number"),
    (dict(scale=True), T, "scale", "True", "number"),
    (dict(scale=float("nan")), V, "scale", "nan", "finite"),
    (dict(scale=float("inf")), V, "scale", "inf", "finite"),
    (dict(keep_window_size=2), V, "keep_window_size", "2", "attn_score or a key-only attn_bias"),
    (dict(attn_mask=1), T, "attn_mask", "1", "Tensor"),
    (dict(attn_bias=1.0), T, "attn_bias", "1.0", "Tensor"),
    (dict(attn_score=[1.0]), T, "attn_score", "list", "Tensor"),
    (dict(expiry=4), T, "expiry", "4", "Tensor"),
]
FUNC = [
    *ATTENTION,
    (dict(query=zeros(B, SQ, D)), V, "query", r"\[2, 5, 8\]", r"\[B, Sq, H, D\]"),
    (dict(key=zeros(B, SK, HKV, D, 1)), V, "key", r"\[2, 7, 2, 8, 1\]", r"\[B, Sk, Hkv, D\]"),
    (dict(value=zeros(SK, HKV, D)), V, "value", r"\[7, 2, 8\]", r"\[B, Sk, Hkv, D\]"),
    (dict(query=zeros(B, SQ, H, D).to_sparse()), V, "query", "sparse", "strided"),
    (
        dict(query=zeros(B, SQ, H, D, dtype=torch.int64)),
        V,
        "query",
        "int64",
        "float64, float32, bfloat16 or float16",
    ),
    (dict(query=zeros(B, SQ, H, D, dtype=torch.complex64)), V, "query", "complex64", "float16"),
    (dict(query=zeros(B, SQ, H, D).to(FP8)), V, "query", "float8_e4m3fn", "float16"),
    (
        dict(key=zeros(B, SK, HKV, D, dtype=torch.float16)),
        V,
        "key",
        "float16",
        "query's dtype, torch.float32",
    ),
    (dict(value=zeros(B, SK, HKV, D, dtype=torch.float64)), V, "value", "float64", "query's dtype"),
    (dict(key=zeros(B, SK, HKV, D).to("meta")), V, "key", "meta", "query's device, cpu"),
    (dict(value=zeros(B, SK, HKV, D).to("meta")), V, "value", "meta", "query's device"),
    (dict(key=zeros(B, SK, HKV, 9), value=zeros(B, SK, HKV, 9)), V, "key", "9", "head dim, 8"),
    (
        dict(query=zeros(B, SQ, H, 0), key=zeros(B, SK, HKV, 0), value=zeros(B, SK, HKV, 0)),
        V,
        "query",
        "0",
        "at least 1",
    ),
    (dict(value=zeros(B, SK, 1, D)), V, "value", r"\[2, 7, 1, 8\]", r"\[2, 7, 2, 8\]"),
    (dict(value=zeros(B, SK, HKV, 4)), V, "value", r"\[2, 7, 2, 4\]", r"key's shape"),
    (dict(query=zeros(B, SQ, 5, D)), V, "query", "5 heads", "multiple"),
    (dict(key=zeros(B, SK, 0, D), value=zeros(B, SK, 0, D)), V, "query", "4 heads beside 0", "multiple"),
    (dict(query=zeros(3, SQ, H, D)), V, "key", r"\[2, 7, 2, 8\]", "batch size, 3"),
    (dict(query=zeros(B, 8, H, D)), V, "query", "8 queries beside 7 keys", "at most as many"),
    (
        dict(key=zeros(1).expand(B, 2**31, HKV, D), value=zeros(1).expand(B, 2**31, HKV, D)),
        V,
        "query, key",
        "2147483648 keys",
        "at most 2147483647",
    ),
    (dict(q=zeros(B, SQ, H, D)), T, "query", "query and its alias q", "one of the two"),
    (dict(k=zeros(B, SK, HKV, D)), T, "key", "alias k", "one of the two"),
    (dict(v=zeros(B, SK, HKV, D)), T, "value", "alias v", "one of the two"),
    (
        dict(attn_bias=zeros(SQ, SK)),
        V,
        "attn_bias",
        r"\[5, 7\]",
        r"\[B, Hkv, Sk\].*\[B, H or Hkv, Sq, Sk\].*Sk 7",
    ),
    (dict(attn_bias=zeros(B, HKV, 6)), V, "attn_bias", r"\[2, 2, 6\]", r"\[B, Hkv, Sk\]"),
    (dict(attn_bias=zeros(B, H, SK)), V, "attn_bias", r"\[2, 4, 7\]", r"Hkv 2"),
    (dict(attn_bias=zeros(3, HKV, SK)), V, "attn_bias", r"\[3, 2, 7\]", r"B 2"),
    (dict(attn_bias=zeros(B, 3, SQ, SK)), V, "attn_bias", r"\[2, 3, 5, 7\]", "H or Hkv"),
    (dict(attn_bias=zeros(B, HKV, 4, SK)), V, "attn_bias", r"\[2, 2, 4, 7\]", "Sq 5"),
    (dict(attn_bias=zeros(B, HKV, SK, dtype=torch.bool)), V, "attn_bias", "bool", "attn_mask"),
    (dict(attn_bias=zeros(B, HKV, SK, dtype=INT)), V, "attn_bias", "int32", "float16"),
    (dict(attn_bias=zeros(B, HKV, SK).to("meta")), V, "attn_bias", "meta", "query's device"),
    (dict(attn_mask=zeros(SK)), V, "attn_mask", r"\[7\]", r"\[B, Sk\]"),
    (dict(attn_mask=zeros(B, SQ, dtype=torch.bool)), V, "attn_mask", r"\[2, 5\]", r"\[B, Sk\]"),
    (dict(attn_mask=zeros(B, HKV, SQ, 6, dtype=torch.bool)), V, "attn_mask", r"\[2, 2, 5, 6\]", "Sk 7"),
    (dict(attn_mask=zeros(B, SK) + 2), V, "attn_mask", "other values", "0 and 1.*attn_bias"),
    (dict(attn_mask=zeros(B, SK) - torch.inf), V, "attn_mask", "other values", "0 and 1"),
    (dict(attn_score=zeros(B, HKV, SK)), V, "attn_score", "without keep_window_size", "keep_window_size"),
    (
        dict(attn_score=zeros(B, H, SQ, SK), keep_window_size=2),
        V,
        "attn_score",
        r"\[2, 4, 5, 7\]",
        r"\[B, Hkv, Sk\]",
    ),
    (dict(attn_score=zeros(B, HKV, SK, dtype=INT), keep_window_size=2), V, "attn_score", "int32", "float16"),
    (dict(attn_score=zeros(B, SK), keep_window_size=2), V, "attn_score", r"\[2, 7\]", r"\[B, Hkv, Sk\]"),
    (dict(attn_score=zeros(B, HKV, SK), keep_window_size=0), V, "keep_window_size", "0", "at least 1"),
    (dict(attn_score=zeros(B, HKV, SK), keep_window_size=-3), V, "keep_window_size", "-3", "at least 1"),
    (dict(attn_score=zeros(B, HKV, SK), keep_window_size=2.0), T, "keep_window_size", "2.0", "an int"),
    (dict(attn_score=zeros(B, HKV, SK), keep_window_size=True), T, "keep_window_size", "True", "an int"),
    (
        dict(attn_bias=zeros(B, HKV, SQ, SK), keep_window_size=2),
        V,
        "attn_bias",
        "one row per query",
        "select_keys",
    ),
    (
        dict(attn_bias=zeros(B, H, 1, SK), keep_window_size=2),
        V,
        "attn_bias",
        r"\[2, 4, 1, 7\]",
        "select_keys",
    ),
    (
        dict(
            attn_mask=zeros(B, H, SQ, SK, dtype=torch.bool), attn_score=zeros(B, HKV, SK), keep_window_size=2
        ),
        V,
        "attn_mask",
        "one row per query",
        "expiry=select_keys",
    ),
    (
        dict(expiry=zeros(B, HKV, SK, dtype=INT), attn_score=zeros(B, HKV, SK), keep_window_size=2),
        V,
        "keep_window_size",
        "beside expiry",
        "one of the two",
    ),
    (dict(expiry=zeros(B, HKV, SK, dtype=torch.int64)), V, "expiry", "int64", "int32"),
    (dict(expiry=zeros(B, H, SK, dtype=INT)), V, "expiry", r"\[2, 4, 7\]", r"\[B, Hkv, Sk\]"),
    (dict(expiry=zeros(B, HKV, 1, SK, dtype=INT)), V, "expiry", r"\[2, 2, 1, 7\]", r"\[B, Hkv, Sk\]"),
    (
        dict(expiry=zeros(B, HKV, SK, dtype=INT) + 8, validate=True),
        V,
        "expiry",
        "8 at index",
        "number of keys",
    ),
    (dict(expiry=zeros(B, HKV, SK, dtype=INT) - 1, validate=True), V, "expiry", "-1 at index", "0"),
]
VARLEN = [
    *ATTENTION,
    (dict(query=zeros(1, 5, H, D)), V, "query", r"\[1, 5, 4, 8\]", r"\[total_q, H, D\]"),
    (dict(key=zeros(7, D)), V, "key", r"\[7, 8\]", r"\[total_k, Hkv, D\]"),
    (dict(value=zeros(6, HKV, D)), V, "value", r"\[6, 2, 8\]", "key's shape"),
    (dict(query=zeros(5, 3, D)), V, "query", "3 heads", "multiple"),
    (dict(cu_seqlens_q=None), T, "cu_seqlens_q", "None", "Tensor"),
    (dict(cu_seqlens_k=[0, 7]), T, "cu_seqlens_k", "list", "Tensor"),
    (dict(cu_seqlens_q=cu(0, 2, 2, 5, dtype=torch.int64)), V, "cu_seqlens_q", "int64", "int32"),
    (dict(cu_seqlens_q=cu(0, 2, 2, 5)[None]), V, "cu_seqlens_q", r"\[1, 4\]", r"\[sequences \+ 1\]"),
    (dict(cu_seqlens_q=cu()), V, "cu_seqlens_q", r"\[0\]", r"\[sequences \+ 1\]"),
    (dict(cu_seqlens_k=cu(0, 3, 4, 7).to("meta")), V, "cu_seqlens_k", "meta", "device, cpu"),
    (dict(cu_seqlens_q=cu(1, 2, 2, 5)), V, "cu_seqlens_q", "1", "start at 0"),
    (dict(cu_seqlens_q=cu(0, 3, 2, 5)), V, "cu_seqlens_q", "3 and then 2", "never decrease"),
    (dict(cu_seqlens_k=cu(0, 3, 4, 6)), V, "cu_seqlens_k", "6", "end at 7"),
    (dict(cu_seqlens_k=cu(0, 3, 4, 8)), V, "cu_seqlens_k", "8", "end at 7"),
    (dict(cu_seqlens_k=cu(0, -3, 4, 7)), V, "cu_seqlens_k", "-3", "never decrease"),
    (dict(cu_seqlens_k=cu(0, 7)), V, "cu_seqlens_k", r"\[2\].*\[4\]", "one entry per sequence"),
    (
        dict(cu_seqlens_q=cu(0, 4, 4, 5)),
        V,
        "cu_seqlens_q",
        "4 queries beside 3 keys in sequence 0",
        "at most as many",
    ),
    (dict(max_seqlen_q=2), V, "max_seqlen_q", "2", "at least 3"),
    (dict(max_seqlen_k=-1), V, "max_seqlen_k", "-1", "at least 0"),
    (dict(max_seqlen_k="7"), T, "max_seqlen_k", "'7'", "an int"),
    (dict(attn_bias=zeros(HKV, 7)), V, "attn_bias", r"\[2, 7\]", r"\[total_k, Hkv\].*7"),
    (dict(attn_bias=zeros(1, HKV, 7)), V, "attn_bias", r"\[1, 2, 7\]", r"\[total_k, Hkv\]"),
    (dict(attn_bias=zeros(1, H, 5, 7)), V, "attn_bias", r"\[1, 4, 5, 7\]", r"\[total_k, Hkv\]"),
    (dict(attn_mask=zeros(5, dtype=torch.bool)), V, "attn_mask", r"\[5\]", r"\[total_k\]"),
    (dict(attn_score=zeros(7), keep_window_size=2), V, "attn_score", r"\[7\]", r"\[total_k, Hkv\]"),
    (dict(expiry=zeros(7, H, dtype=INT)), V, "expiry", r"\[7, 4\]", r"\[total_k, Hkv\]"),
    (dict(expiry=zeros(7, HKV, dtype=INT) + 4, validate=True), V, "expiry", "4 at index", "number of keys"),
    (dict(query=zeros(5, H, D), q=zeros(5, H, D)), T, "query", "alias q", "one of the two"),
]
SELECT = [
    (dict(attn_score=None), T, "attn_score", "None", "Tensor"),
    (dict(attn_score=zeros(HKV, SK)), V, "attn_score", r"\[2, 7\]", r"\[B, Hkv, Sk\]"),
    (dict(attn_score=zeros(B, HKV, 1, SK)), V, "attn_score", r"\[2, 2, 1, 7\]", r"\[B, Hkv, Sk\]"),
    (dict(attn_score=zeros(B, HKV, SK, dtype=INT)), V, "attn_score", "int32", "float16"),
    (dict(attn_score=zeros(1).expand(1, 1, 2**31)), V, "attn_score", "2147483648", "at most 2147483647"),
    (dict(keep_window_size=0), V, "keep_window_size", "0", "at least 1"),
    (dict(keep_window_size=-(2**70)), V, "keep_window_size", "-118", "at least 1"),
    (dict(keep_window_size=None), T, "keep_window_size", "None", "an int"),
    (dict(keep_window_size=1.5), T, "keep_window_size", "1.5", "an int"),
    (dict(is_causal="no"), T, "is_causal", "'no'", "True or False"),
    (dict(num_sinks=-1), V, "num_sinks", "-1", "at least 0"),
    (dict(num_sinks=0.0), T, "num_sinks", "0.0", "an int"),
    (dict(local_window=-1), V, "local_window", "-1", "at least 0"),
    (dict(local_window=3, is_causal=False), V, "local_window", "3 with is_causal=False", "0 unless causal"),
    (dict(validate=1), T, "validate", "1", "True or False"),
    (dict(cu_seqlens=cu(0, 7)), V, "attn_score", r"\[2, 2, 7\]", r"\[total_k, Hkv\]"),
    (dict(attn_score=zeros(7, HKV), cu_seqlens=[0, 7]), T, "cu_seqlens", "list", "Tensor"),
    (dict(attn_score=zeros(7, HKV), cu_seqlens=cu(0, 6)), V, "cu_seqlens", "6", "end at 7"),
    (dict(attn_score=zeros(7, HKV), cu_seqlens=cu(0, 5, 3, 7)), V, "cu_seqlens", "3", "never decrease"),
]
AUTO = [
    (dict(backend="tpu"), V, "backend", "'tpu'", "cuda, cpu, flex, reference"),
    (dict(backend=3), (T, V), "backend", "3", "reference"),
]
EXPLAIN = [row for row in FUNC if "validate" not in row[0]] + AUTO[:1]
MODULE = [
    (dict(hidden_size=0), V, "hidden_size", "0", "at least 1"),
    (dict(num_heads=0), V, "num_heads", "0", "at least 1"),
    (dict(num_heads="4"), T, "num_heads", "'4'", "an int"),
    (dict(num_kv_heads=3), V, "num_kv_heads", "3", "divisor of num_heads, 4"),
    (dict(num_kv_heads=0), V, "num_kv_heads", "0", "at least 1"),
    (dict(hidden_size=30), V, "hidden_size", "30", "multiple of num_heads, 4"),
    (dict(head_dim=0), V, "head_dim", "0", "at least 1"),
    (dict(keep_window_size=0), V, "keep_window_size", "0", "at least 1"),
    (dict(keep_window_size=None), T, "keep_window_size", "None", "an int"),
    (dict(score_function="tanh"), V, "score_function", "'tanh'", "'exp' or 'linear'"),
    (dict(num_sinks=-1), V, "num_sinks", "-1", "at least 0"),
    (dict(local_window=-1), V, "local_window", "-1", "at least 0"),
    (dict(qk_norm=1), T, "qk_norm", "1", "True or False"),
    (dict(qkv_bias=None), T, "qkv_bias", "None", "True or False"),
]
MODULE_CALL = [
    (dict(hidden_states=None), T, "hidden_states", "None", "Tensor"),
    (dict(hidden_states=zeros(6, 32)), V, "hidden_states", r"\[6, 32\]", r"\[B, S, 32\]"),
    (dict(hidden_states=zeros(2, 6, 31)), V, "hidden_states", r"\[2, 6, 31\]", r"\[B, S, 32\]"),
    (
        dict(hidden_states=zeros(2, 6, 32), cu_seqlens=cu(0, 6)),
        V,
        "hidden_states",
        r"\[2, 6, 32\]",
        r"\[total, 32\]",
    ),
    (dict(attn_mask=zeros(2, 5)), V, "attn_mask", r"\[2, 5\]", r"\[2, 6\]"),
    (dict(attn_mask=zeros(2, 1, 6)), V, "attn_mask", r"\[2, 1, 6\]", r"\[2, 6\]"),
    (
        dict(position_embeddings=(zeros(6, 8), zeros(6, 9))),
        V,
        r"position_embeddings \(sin\)",
        r"\[6, 9\]",
        r"\[6, 8\]",
    ),
    (
        dict(position_embeddings=(zeros(5, 8), zeros(6, 8))),
        V,
        r"position_embeddings \(cos\)",
        r"\[5, 8\]",
        r"\[6, 8\]",
    ),
]
OPS_SELECT = [
    (dict(keep_window=0), R, "keep_window", "0", "at least 1"),
    (dict(keep_window=-(2**63)), R, "keep_window", "-9223372036854775808", "at least 1"),
    (dict(num_sinks=-1), R, "num_sinks", "-1", "at least 0"),
    (dict(local_window=-1), R, "local_window", "-1", "at least 0"),
    (dict(local_window=1, is_causal=False), R, "local_window", "1", "0"),
    (dict(score=zeros(HKV, SK)), R, "score", r"\[2, 7\]", r"\[B, Hkv, Sk\]"),
    (dict(num_queries=-2), R, "num_queries", "-2", "0 to Sk = 7"),
    (dict(num_queries=8), R, "num_queries", "8", "0 to Sk = 7"),
    (dict(num_queries=3, is_causal=False), R, "num_queries", "3 without causal", "-1"),
    (
        dict(score=zeros(7, 2), cu_seqlens=cu(0, 7), num_queries=3),
        R,
        "num_queries",
        "3 with cu_seqlens",
        "-1",
    ),
    (dict(score=zeros(B, HKV, SK, dtype=INT)), R, "score", "int32", "float64"),
    (dict(score=zeros(B, HKV, SK, dtype=torch.int64)), R, "score", "(Long|int64)", "float64"),
    (dict(score=zeros(1, 1, 1, 1, SK)), R, "score", "5 dimensions", "1 to 4"),
    (dict(cu_seqlens=cu(0, 7)), R, "score", r"\[2, 2, 7\]", r"\[total_k, Hkv\]"),
    (dict(score=zeros(7, 2), cu_seqlens=cu(0, 8)), R, "cu_seqlens", "8", "7"),
    (dict(score=zeros(7, 2), cu_seqlens=cu(0, 5, 4, 7)), R, "cu_seqlens", "4 at index 2", "at least 5"),
    (dict(score=zeros(7, 2), cu_seqlens=cu(2, 7)), R, "cu_seqlens", "2 at index 0", "0"),
    (
        dict(score=zeros(7, 2), cu_seqlens=cu(0, 7, dtype=torch.int64)),
        R,
        "cu_seqlens",
        "(Long|int64)",
        "int32",
    ),
    (dict(score=zeros(7, 2), cu_seqlens=cu()), R, "cu_seqlens", r"\[0\]", "sequences"),
]
SELECTED = dict(expiry=zeros(B, HKV, SK, dtype=INT), keep_window=3)
OPS_SHARED = [
    (dict(query=zeros(B, SQ, D)), R, "query", r"\[2, 5, 8\]", r"\[B, Sq, H, D\]"),
    (dict(key=zeros(B, SK, HKV, 9)), R, "key", r"\[2, 7, 2, 9\]", "D = 8"),
    (dict(key=zeros(3, SK, HKV, D)), R, "key", r"\[3, 7, 2, 8\]", "B = 2"),
    (dict(value=zeros(B, 6, HKV, D)), R, "value", r"\[2, 6, 2, 8\]", "Sk = 7"),
    (dict(key=zeros(B, SK, 3, D), value=zeros(B, SK, 3, D)), R, "key", "Hkv = 3", "H = 4"),
    (dict(key=zeros(B, SK, HKV, D, dtype=torch.float64)), R, "key", "float64", "float32"),
    (dict(value=zeros(B, SK, HKV, D, dtype=torch.float16)), R, "value", "float16", "float32"),
    (dict(query=zeros(B, SQ, H, D, dtype=INT)), R, "query", "int32", "float64"),
    (dict(key=zeros(B, 4, HKV, D), value=zeros(B, 4, HKV, D)), R, "query", "Sq = 5", "at most Sk = 4"),
    (dict(bias=zeros(B, HKV, SK, dtype=torch.float64)), R, "bias", "float64", "float32"),
    (dict(bias=zeros(B, H, SK)), R, "bias", r"\[2, 4, 7\]", "Hkv = 2"),
    (dict(bias=zeros(B, HKV, 4, SK)), R, "bias", r"\[2, 2, 4, 7\]", "Sq = 5 or 1"),
    (dict(bias=zeros(B, 3, SQ, SK)), R, "bias", r"\[2, 3, 5, 7\]", "H = 4, 2 or 1"),
    (dict(bias=zeros(B, H, SQ, 1)), R, "bias", r"\[2, 4, 5, 1\]", "Sk = 7"),
    (dict(bias=zeros(B, H, SQ, SK, dtype=torch.uint8)), R, "bias", "bool", "float16"),
    (dict(mask=zeros(B, HKV, SK, dtype=torch.bool)), R, "mask", r"\[2, 2, 7\]", r"\[B, H, Sq, Sk\]"),
    (dict(mask=zeros(3, H, SQ, SK, dtype=torch.bool)), R, "mask", r"\[3, 4, 5, 7\]", "B = 2 or 1"),
    (dict(mask=zeros(B, H, SQ, SK)), R, "mask", "float32", "bool"),
    (dict(mask=zeros(B, H, SQ, SK, dtype=torch.int64)), R, "mask", "(Long|int64)", "bool for mask"),
    (dict(expiry=zeros(B, HKV, SK)), R, "expiry", "float32", "int32"),
    (dict(expiry=zeros(B, HKV, 6, dtype=INT)), R, "expiry", r"\[2, 2, 6\]", "Sk = 7"),
    (dict(score=zeros(B, HKV, SK)), R, "score", "a tensor without expiry", "none"),
    (dict(keep_window=2), R, "keep_window", "2 without expiry", "0"),
    (dict(keep_window=-1), R, "keep_window", "-1", "at least 0"),
    (dict(SELECTED, score=zeros(B, HKV, SK, dtype=INT)), R, "score", "int32", "float64"),
    (dict(SELECTED, score=zeros(B, HKV, 6)), R, "score", r"\[2, 2, 6\]", "Sk = 7"),
    (dict(plan=zeros(2, 3, dtype=INT)), R, "plan", r"\[2, 3\]", r"\[n\]"),
    (dict(plan=zeros(4)), R, "plan", "float32", "int32"),
    (dict(plan=zeros(8, dtype=INT)[::2]), R, "plan", r"strides \[2\]", "contiguous"),
    (dict(scale=float("nan")), R, "scale", "nan", "finite"),
    (dict(scale=float("-inf")), R, "scale", "inf", "finite"),
    (dict(cu_seqlens_q=cu(0, 5)), R, "query", r"\[2, 5, 4, 8\]", r"\[total_q, H, D\]"),
]
OPS_PACKED = [
    (dict(cu_seqlens_k=None), R, "cu_seqlens_k", "no tensor", "sequences"),
    (dict(cu_seqlens_q=None), R, "cu_seqlens_q", "no tensor", "sequences"),
    (dict(cu_seqlens_q=cu(0, 2, 2, 4)), R, "cu_seqlens_q", "4 at the end", "5"),
    (dict(cu_seqlens_k=cu(0, 5, 4, 7)), R, "cu_seqlens_k", "4 at index 2", "at least 5"),
    (dict(cu_seqlens_k=cu(0, 7)), R, "cu_seqlens_k", "2 elements", "4"),
    (dict(cu_seqlens_q=cu(0, 4, 4, 5)), R, "cu_seqlens_q", "4 rows in sequence 0", "3 keys"),
    (dict(bias=zeros(HKV, 7)), R, "bias", r"\[2, 7\]", r"\[total_k, Hkv\]"),
    (dict(bias=zeros(1, H, 5, 7)), R, "bias", r"\[1, 4, 5, 7\]", r"\[total_k, Hkv\]"),
    (dict(mask=zeros(1, H, 5, 7, dtype=torch.bool)), R, "mask", "with cu_seqlens", "none"),
]
OPS_BACKWARD = [
    (dict(grad_out=zeros(B, SQ, H, 9)), R, "d?out|grad_out", r"\[2, 5, 4, 9\]", "D = 8"),
    (dict(grad_out=zeros(B, SQ, H, D, dtype=torch.float64)), R, "d?out|grad_out", "float64", "float32"),
    (dict(grad_lse=zeros(B, SQ, H)), R, "dlse|grad_lse", r"\[2, 5, 4\]", "H = 4"),
    (dict(out=zeros(B, SQ, HKV, D)), R, "out", r"\[2, 5, 2, 8\]", "H = 4"),
    (dict(lse=zeros(B, H, SQ, dtype=torch.float64)), R, "lse", "float64", "float32"),
    (dict(lse=zeros(B, SQ, H)), R, "lse", r"\[2, 5, 4\]", "H = 4"),
    (dict(need_dbias=True), R, "need_dbias", "True", "False"),
]
TABLE = {
    "flash_dmattn_func": FUNC,
    "flash_dmattn_varlen_func": VARLEN,
    "select_keys": SELECT,
    "explain": EXPLAIN,
    "explain, packed": [
        row for row in VARLEN if "cu_seqlens" in str(row[2]) or row[2] in ("query", "attn_bias")
    ],
    "flash_dmattn_func_auto": AUTO,
    "DynamicMaskAttention": MODULE,
    "DynamicMaskAttention, call": MODULE_CALL,
    "flash_dmattn::select": OPS_SELECT,
    "flash_dmattn::forward": OPS_SHARED,
    "flash_dmattn::forward, packed": OPS_PACKED,
    "flash_dmattn::backward": OPS_SHARED + OPS_BACKWARD,
    "flash_dmattn::backward, packed": OPS_PACKED,
}
