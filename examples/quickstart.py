"""Attention in which each query sees the 1024 keys of highest score before it, forward and backward.

Then the same function as it was written before: a mask and a bias of N x N, made by top-k and scatter_.
"""

import torch

from flash_dmattn import flash_dmattn_func, get_available_backends

cuda = "cuda" in get_available_backends()
device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)

query, key, value = (
    torch.randn(2, 4096, 16, 128, device=device, dtype=dtype, requires_grad=True) for _ in range(3)
)
score = torch.randn(2, 16, 4096, device=device, requires_grad=True)  # one number per key and key/value head

out = flash_dmattn_func(query, key, value, attn_bias=score, is_causal=True, keep_window_size=1024)
out.mean().backward()
print(f"out {list(out.shape)}, gradient of the score {list(score.grad.shape)}; mask: none, 4 bytes per key")

# The dense form, on the first 512 positions: 8 million elements. On all 4096 it would take 64 times as many.
N, w = 512, 128
q, k, v, s = query[:, :N], key[:, :N], value[:, :N], score[..., :N]
future = torch.ones(N, N, dtype=torch.bool, device=device).triu(1)
bias = s[:, :, None, :].masked_fill(future, -torch.inf)  # [2, 16, N, N]
top = bias.topk(w, dim=-1).indices
mask = torch.zeros_like(bias, dtype=torch.bool).scatter_(-1, top, True)
dense = flash_dmattn_func(q, k, v, attn_mask=mask, attn_bias=bias, is_causal=True)

by_key = flash_dmattn_func(q, k, v, attn_bias=s, is_causal=True, keep_window_size=w)
torch.testing.assert_close(by_key, dense, rtol=1e-2 if cuda else 1e-4, atol=1e-2 if cuda else 1e-5)
print(f"the dense form agrees: largest difference {(by_key - dense).abs().max():.1e}")
