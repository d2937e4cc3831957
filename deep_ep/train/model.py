"""A small decoder-only transformer over bytes whose feed-forward layers are expert-parallel MoE layers.

The residual stream, the norms, the router and all weights are FP32. Attention and the other dense products
run in FP32 on a CPU and in bf16 on a GPU. Each sequence is computed on its own, so how sequences are spread
over ranks changes rounding only.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from deep_ep.nn import MoE
from deep_ep.train.config import TrainConfig
from deep_ep.train.launch import World

VOCAB = 256
_ROTARY_BASE = 10_000.0


def _weight(rows: int, columns: int, generator: torch.Generator, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns)))


def rotary_table(seq: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, FP32 [seq, head_dim / 2], of RoFormer's rotary embedding (base 10000)."""
    rates = _ROTARY_BASE ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (x[i], x[i + d/2]) of x [..., seq, d] by the angles of their position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions. FP32 [batch, seq, hidden] to the same."""

    def __init__(self, config: TrainConfig, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = config.heads
        self.dtype = dtype
        self.qkv = _weight(3 * config.hidden, config.hidden, generator)
        self.out = _weight(config.hidden, config.hidden, generator, gain=(2 * config.layers) ** -0.5)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        batch, seq, hidden = x.shape
        qkv = F.linear(x.to(self.dtype), self.qkv.to(self.dtype))
        q, k, v = qkv.view(batch, seq, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = rotate(q.float(), cos, sin).to(self.dtype), rotate(k.float(), cos, sin).to(self.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, seq, hidden)
        return F.linear(mixed, self.out.to(self.dtype)).float()


class DenseMLP(nn.Module):
    """SwiGLU on every rank alike, as wide as the experts a token visits in an MoE layer."""

    def __init__(self, config: TrainConfig, generator: torch.Generator, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        width = config.topk * config.intermediate
        self.gate_up = _weight(2 * width, config.hidden, generator)
        self.down = _weight(config.hidden, width, generator, gain=(2 * config.layers) ** -0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x.to(self.dtype), self.gate_up.to(self.dtype)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down.to(self.dtype)).float()


class Block(nn.Module):
    """Pre-norm attention and MoE (or dense) feed-forward, both added to the residual stream."""

    def __init__(
        self,
        config: TrainConfig,
        layer: int,
        precision: str,
        generator: torch.Generator,
        world: World,
    ) -> None:
        super().__init__()
        dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        self.attention_norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.attention = Attention(config, generator, dtype)
        self.ffn_norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.ffn: nn.Module
        if layer < config.dense_layers:
            self.ffn = DenseMLP(config, generator, dtype)
        else:
            self.ffn = MoE(
                config.hidden,
                config.intermediate,
                config.experts,
                config.topk,
                group=world.group,
                precision=precision,
                bias_update_rate=config.bias_update_rate,
                seed=config.seed * 1009 + layer,
                device=world.device,
            )

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + cast(torch.Tensor, self.ffn(self.ffn_norm(x)))


class ByteTransformer(nn.Module):
    """Bytes in, next-byte logits out. A collective call: every rank runs it at the same time on its own
    sequences.

    Weights are drawn from `config.seed` alone (experts by their global number), so any rank count starts from
    the same model. `precision` is that of the MoE layers' dispatch and GEMMs.
    """

    def __init__(self, config: TrainConfig, precision: str, world: World) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        self.embedding = nn.Parameter(torch.randn(VOCAB, config.hidden, generator=generator))
        self.blocks = nn.ModuleList(Block(config, layer, precision, generator, world) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=1e-6)
        # A small head starts the loss at ln 256, the uniform guess.
        self.head = _weight(VOCAB, config.hidden, generator, gain=0.1)
        self.head_dtype = torch.bfloat16 if world.device.type == "cuda" else torch.float32
        cos, sin = rotary_table(config.seq, config.hidden // config.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.to(world.device)

    @property
    def moe_layers(self) -> list[MoE]:
        return [block.ffn for block in self.blocks if isinstance(block, Block) and isinstance(block.ffn, MoE)]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens int64 [batch, seq] -> logits FP32 [batch, seq, 256]."""
        cos = cast(torch.Tensor, self.cos)[: tokens.shape[1]]
        sin = cast(torch.Tensor, self.sin)[: tokens.shape[1]]
        x = F.embedding(tokens, self.embedding)
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.linear(self.norm(x).to(self.head_dtype), self.head.to(self.head_dtype)).float()
