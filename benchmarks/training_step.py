"""A training step of a small language model: tokens per second and peak memory with dynamic-mask attention,
with dense causal attention, and without any.

    python benchmarks/training_step.py --out benchmarks/results/training_step.json             on a GPU
    python benchmarks/training_step.py --device cpu --dtype float32 --hidden 256 --heads 4 --heads-kv 2 \\
        --window 128 --seqlens 1024

The models differ in what mixes the tokens, and in nothing else: "dynamic mask" is the layer of the library,
selection and gradient of the score included; "dense" is PyTorch's scaled_dot_product_attention over all keys
before; "none" adds a token's query, key and value, so that the projections stay: what a step takes without it
is the price of attention. A step is forward, loss, backward and AdamW, on random tokens.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import environment
from flash_dmattn.nn import DynamicMaskAttention
from measure import statistic
from run import write
from timing import timed

VOCABULARY = 256


class OtherAttention(DynamicMaskAttention):
    """The layer with another way to mix the tokens; its score is not used."""

    def forward(self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        query = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, self.head_dim))
        key, value = (
            project(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim))
            for project in (self.k_proj, self.v_proj)
        )
        query, key = (self._rotate(x, *position_embeddings) for x in (query, key))
        return self.o_proj(self.mix(query, key, value).flatten(-2))

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError


class DenseAttention(OtherAttention):
    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        heads_first = (x.transpose(1, 2) for x in (query, key, value))
        grouped = self.num_heads != self.num_kv_heads
        out = functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=grouped)
        return out.transpose(1, 2)


class NoAttention(OtherAttention):
    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return query + (key + value).repeat_interleave(self.num_heads // self.num_kv_heads, dim=2)


ATTENTION = {"dynamic mask": DynamicMaskAttention, "dense": DenseAttention, "none": NoAttention}


class Block(nn.Module):
    def __init__(self, attention: nn.Module, hidden: int):
        super().__init__()
        width = 64 * round(hidden * 8 / 3 / 64)
        self.attention_norm = nn.RMSNorm(hidden)
        self.attention = attention
        self.mlp_norm = nn.RMSNorm(hidden)
        self.gate_up = nn.Linear(hidden, 2 * width, bias=False)
        self.down = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


class Model(nn.Module):
    def __init__(self, attention: type[DynamicMaskAttention], options: argparse.Namespace):
        super().__init__()
        hidden = options.hidden
        self.embedding = nn.Embedding(VOCABULARY, hidden)
        self.blocks = nn.ModuleList(
            Block(attention(hidden, options.heads, options.heads_kv, keep_window_size=options.window), hidden)
            for _ in range(options.layers)
        )
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)
        for block in self.blocks:
            nn.init.normal_(block.attention.A, std=options.score_spread)

    def forward(self, tokens: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, rotary)
        return self.head(self.norm(x))


def make_step(name: str, seqlen: int, options: argparse.Namespace) -> Callable[[], Tensor]:
    """A training step that returns the loss."""
    torch.manual_seed(options.seed)
    dtype = getattr(torch, options.dtype)
    model = Model(ATTENTION[name], options).to(options.device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=options.device == "cuda")
    tokens = torch.randint(VOCABULARY, (1, seqlen + 1), device=options.device)
    head_dim = options.hidden // options.heads
    frequency = 10000.0 ** -(torch.arange(0, head_dim, 2, device=options.device) / head_dim)
    angle = (torch.arange(seqlen, device=options.device)[:, None] * frequency).repeat(1, 2)
    rotary = (angle.cos().to(dtype), angle.sin().to(dtype))

    def step() -> Tensor:
        logits = model(tokens[:, :-1], rotary)
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def peak_bytes(step: Callable[[], Tensor], device: str) -> int | None:
    """Of everything that is allocated during a step; not known on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def measure(name: str, seqlen: int, options: argparse.Namespace) -> dict[str, object]:
    """Seconds of a step in a block of runs; the models are too large to stay side by side."""
    step = make_step(name, seqlen, options)
    for _ in range(max(options.warmup, 1)):
        loss = step()
    if not torch.isfinite(loss):
        raise RuntimeError(f"{name} at {seqlen} tokens: the loss is {loss}")

    def work(mark: Callable[[str], None]) -> None:
        step()
        mark("step")

    seconds = [timed(options.device, work)["step"] for _ in range(options.runs)]
    return {"seconds": seconds, "peak_bytes": peak_bytes(step, options.device)}


def measure_length(seqlen: int, options: argparse.Namespace) -> dict[str, object]:
    samples: dict[str, list[float]] = {name: [] for name in ATTENTION}
    peaks: dict[str, int | None] = {}
    for _ in range(options.rounds):
        for name in ATTENTION:
            found = measure(name, seqlen, options)
            samples[name] += found["seconds"]
            peaks[name] = found["peak_bytes"]
            gc.collect()
    seconds = {name: statistic(samples[name]) for name in ATTENTION}
    return {"seqlen": seqlen, "seconds": seconds, "peak_bytes": peaks}


def lines(entry: dict) -> list[str]:
    found = []
    without = entry["seconds"]["none"]["median"]
    for name, seconds in entry["seconds"].items():
        median, peak = seconds["median"], entry["peak_bytes"][name]
        memory = "" if peak is None else f"  {peak / 2**30:7.2f} GiB"
        found.append(
            f"{entry['seqlen']:>8}  {name:<12} {1e3 * median:10.2f} ms"
            f"  {entry['seqlen'] / median:11.0f} tokens/s"
            f"  attention {max(0.0, 1 - without / median):4.0%}{memory}"
        )
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seqlens", type=int, nargs="+", default=[16384, 32768, 131072])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--heads-kv", type=int, default=4)
    parser.add_argument("--window", type=int, default=1024, help="keys that a query keeps")
    spread = "of the initial A; at 0 all scores tie, as in the layer"
    parser.add_argument("--score-spread", type=float, default=1.0, help=spread)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each model")
    parser.add_argument("--runs", type=int, default=5, help="steps in a turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, at least 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; --device cpu does without")
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "seqlens")}
    found: dict = {"environment": environment.describe(), "options": settings, "lengths": []}
    print("\n".join(f"{name}: {value}" for name, value in found["environment"].items()))
    for seqlen in options.seqlens:
        found["lengths"].append(measure_length(seqlen, options))
        print("\n".join(lines(found["lengths"][-1])), flush=True)
        write(options.out, found)


if __name__ == "__main__":
    main()
