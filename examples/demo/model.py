"""A small byte-level transformer on dynamic-mask attention, laid out to learn a lot in a minute of CPU time.

Each byte enters as the sum of its own embedding and those of the three bytes before it, so that the layers
deal with short words from the first step on. Then blocks of attention (rotary positions, grouped-query heads)
and SwiGLU, an RMSNorm before each; the output shares the embedding's weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from corpus import VOCABULARY
from flash_dmattn.nn import DynamicMaskAttention


@dataclass(frozen=True)
class ModelConfig:
    keep_window: int = 256
    width: int = 128
    layers: int = 2
    heads: int = 4
    heads_kv: int = 2
    mlp_width: int = 344
    previous_bytes: int = 3


class Selection(NamedTuple):
    score: Tensor  # [B, Hkv, S]
    expiry: Tensor


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = DynamicMaskAttention(
            config.width,
            config.heads,
            config.heads_kv,
            keep_window_size=config.keep_window,
            qk_norm=True,
        )
        self.mlp_norm = nn.RMSNorm(config.width)
        self.gate_up = nn.Linear(config.width, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)


class ByteModel(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embeddings = nn.ModuleList(
            nn.Embedding(VOCABULARY, config.width) for _ in range(1 + config.previous_bytes)
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.RMSNorm(config.width)
        for embedding in self.embeddings:
            nn.init.normal_(embedding.weight, std=0.1)
        for name, weight in self.blocks.named_parameters():
            if name.endswith(("o_proj.weight", "down.weight")):
                nn.init.zeros_(weight)  # a block starts as the identity
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte, [B, S, 256], for tokens [B, S]."""
        x, rotary = self._embed(tokens)
        for block in self.blocks:
            x = block(x, rotary)
        return self.final_norm(x) @ self.embeddings[0].weight.T

    @torch.no_grad()
    def selections(self, tokens: Tensor) -> list[Selection]:
        """Of every layer: which positions see each key."""
        x, rotary = self._embed(tokens)
        found = []
        for block in self.blocks:
            found.append(Selection(*block.attention.selection(block.attention_norm(x))))
            x = block(x, rotary)
        return found

    @torch.no_grad()
    def generate(
        self, prompt: Tensor, length: int, context: int, temperature: float, generator: torch.Generator
    ) -> Tensor:
        """prompt [S] and `length` sampled bytes. The model sees the last `context` bytes, without a cache."""
        text = prompt
        for _ in range(length):
            logits = self(text[None, -context:])[0, -1]
            probabilities = torch.softmax(logits / temperature, 0)
            text = torch.cat((text, torch.multinomial(probabilities, 1, generator=generator)))
        return text

    def _embed(self, tokens: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x = self.embeddings[0](tokens)
        for distance, embedding in enumerate(self.embeddings[1:], start=1):
            x = x + embedding(functional.pad(tokens, (distance, -distance)))
        head_dim, seqlen = self.config.width // self.config.heads, tokens.shape[1]
        frequency = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        angle = (torch.arange(seqlen)[:, None] * frequency).repeat(1, 2)  # [S, head_dim]
        return functional.rms_norm(x, (self.config.width,)), (angle.cos(), angle.sin())
