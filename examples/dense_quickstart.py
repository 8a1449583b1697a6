"""Dense masks and biases, as code for Flash-DMA has them, and the same attention from one score per key.

Takes the name of a backend, one of get_available_backends(); without it the library chooses.
"""

import argparse
import math

import torch

from flash_dmattn import flash_dmattn_func, flash_dmattn_func_auto, get_available_backends, select_keys

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("backend", nargs="?", choices=get_available_backends())
backend = parser.parse_args().backend
cuda = "cuda" in get_available_backends() and backend in (None, "cuda")
device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)

B, N, H, Hkv, D, w = 1, 1024, 4, 2, 64, 256
torch.manual_seed(0)
query, key, value = (torch.randn(B, N, heads, D, device=device, dtype=dtype) for heads in (H, Hkv, Hkv))
score = torch.randn(B, Hkv, N, device=device, requires_grad=True)  # float32: bfloat16 would make some equal

# As written for Flash-DMA: a bias [B, H, N, N] and the mask of its top w. Mind the underscore of scatter_:
# scatter returns its result, and a mask that it was called on stays all zero.
bias = score.repeat_interleave(H // Hkv, 1).unsqueeze(2).repeat(1, 1, N, 1)
mask = torch.zeros_like(bias)
mask.scatter_(-1, bias.topk(w, dim=-1).indices, 1.0)
attend = flash_dmattn_func_auto(backend=backend)
dense = attend(query, key, value, attn_mask=mask, attn_bias=bias, scale=1 / math.sqrt(D), is_causal=True)
(dense_gradient,) = torch.autograd.grad(dense.float().square().sum(), score)

# The same attention, without anything of N x N. The top w of whole rows are w fixed keys per head.
expiry = select_keys(score, w, is_causal=False)
by_key = flash_dmattn_func(query, key, value, attn_bias=score, expiry=expiry, is_causal=True)
(gradient,) = torch.autograd.grad(by_key.float().square().sum(), score)
for first, second in ((by_key, dense), (gradient, dense_gradient)):
    torch.testing.assert_close(first, second, rtol=2e-2 if cuda else 1e-4, atol=2e-2 if cuda else 1e-4)

# What to write instead: the keys up to a query compete for its w places, and no later ones take any.
out = flash_dmattn_func(query, key, value, attn_bias=score, keep_window_size=w, is_causal=True)

print(f"mask and bias {mask.nbytes + bias.nbytes} bytes, score and expiry {score.nbytes + expiry.nbytes}")
print(f"the two agree: largest difference {(by_key - dense).abs().max():.1e}")
seen, seen_instead = mask.tril().sum(-1).mean(), torch.arange(1, N + 1).clamp(max=w).float().mean()
print(f"keys that a query sees, on average: {seen:.0f}; with keep_window_size={w}: {seen_instead:.0f}")
print(f"out {list(out.shape)}")
