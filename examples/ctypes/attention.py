"""Dynamic-mask attention through the C interface, without PyTorch: scores -> expiry -> attention, compared with the
definition. Needs a shared flash_dmattn (cmake -DBUILD_SHARED_LIBS=ON) and the standard library.

python attention.py libflash_dmattn.so
"""

import ctypes
import math
import random
import sys

FLOAT32, INT32 = 2, 5  # flash_dmattn_dtype


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("shape", ctypes.c_int64 * 4),
        ("strides", ctypes.c_int64 * 4),
    ]


INT64 = ctypes.c_int64


class SelectArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        *((name, Tensor) for name in ("score", "cu_seqlens", "expiry")),
        *((name, INT64) for name in ("keep_window", "causal", "num_sinks", "local_window", "num_queries")),
    ]


class ForwardArgs(ctypes.Structure):
    _fields_ = [
        ("struct_size", ctypes.c_uint64),
        *((name, Tensor) for name in ("query", "key", "value", "bias", "mask", "expiry", "score")),
        ("keep_window", INT64),
        *((name, Tensor) for name in ("plan", "cu_seqlens_q", "cu_seqlens_k", "out", "lse")),
        ("scale", ctypes.c_double),
        ("causal", INT64),
    ]


def contiguous(array, dtype, *shape):
    """A tensor of the ctypes array, which must outlive it."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    int64s = INT64 * 4
    return Tensor(ctypes.addressof(array), dtype, len(shape), int64s(*shape), int64s(*strides))


def load(path):
    library = ctypes.CDLL(path)
    library.flash_dmattn_last_error.restype = ctypes.c_char_p
    library.flash_dmattn_version.restype = ctypes.c_char_p
    return library


def call(library, name, args):
    """Runs flash_dmattn_<name> on the CPU, in this thread, in a workspace of the size that it asks for."""
    args.struct_size = ctypes.sizeof(args)
    function = getattr(library, f"flash_dmattn_{name}")
    measure = getattr(library, f"flash_dmattn_{name}_workspace_bytes")
    size = ctypes.c_size_t()
    status = measure(ctypes.byref(args), None, ctypes.byref(size))
    if status == 0:
        status = function(ctypes.byref(args), None, ctypes.create_string_buffer(size.value), size)
    if status != 0:
        raise ValueError(library.flash_dmattn_last_error().decode())


def main():
    library = load(sys.argv[1])
    tokens, head_dim, window = 50, 4, 6
    generator = random.Random(0)

    def floats(count):
        return (ctypes.c_float * count)(*(generator.gauss(0, 1) for _ in range(count)))

    query, key, value = (floats(tokens * head_dim) for _ in range(3))
    score, out, expiry = floats(tokens), floats(tokens * head_dim), (ctypes.c_int32 * tokens)()
    rows = (1, tokens, 1, head_dim)

    select = SelectArgs(keep_window=window, causal=1)
    select.score = contiguous(score, FLOAT32, 1, 1, tokens)
    select.expiry = contiguous(expiry, INT32, 1, 1, tokens)
    call(library, "select", select)

    forward = ForwardArgs(bias=select.score, expiry=select.expiry, scale=0.5, causal=1)
    forward.query, forward.key = contiguous(query, FLOAT32, *rows), contiguous(key, FLOAT32, *rows)
    forward.value, forward.out = contiguous(value, FLOAT32, *rows), contiguous(out, FLOAT32, *rows)
    call(library, "forward", forward)

    worst = 0.0
    for i in range(tokens):
        kept = sorted(range(i + 1), key=lambda j: (score[j], j))[-window:]
        assert kept and all((j in kept) == (expiry[j] > i) for j in range(i + 1)), "another selection"
        row = range(i * head_dim, (i + 1) * head_dim)
        logits = {j: score[j] + 0.5 * sum(query[c] * key[c + (j - i) * head_dim] for c in row) for j in kept}
        total = sum(map(math.exp, logits.values()))
        for c in row:
            want = sum(math.exp(s) / total * value[c + (j - i) * head_dim] for j, s in logits.items())
            worst = max(worst, abs(out[c] - want))
    assert worst < 1e-5, worst

    select.keep_window = 0
    try:
        call(library, "select", select)
    except ValueError as error:
        assert str(error) == "flash_dmattn::select: keep_window: got 0, expected at least 1", error
    else:
        raise AssertionError("a window of 0 was accepted")
    print(f"flash_dmattn {library.flash_dmattn_version().decode()}: {tokens} rows, largest error {worst:.1e}")


if __name__ == "__main__":
    main()
