"""Rotary embedding, dynamic NTK and log-n scaling of Qwen v1.

Factors are computed in Python's float64 and rounded once to float32, as the original does, so that logits agree with
it bit for bit.
"""

import math

import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import rotate_half

from quantcache.adapters.qwen.configuration import QWenConfig


def ntk_alpha(seq_len: int, seq_length: int) -> int:
    """Dynamic NTK's factor for a prompt of ``seq_len`` tokens: 1 up to ``seq_length``, 3 up to twice that, then 7."""
    return max(int(2 ** math.ceil(math.log(max(seq_len, 1) / seq_length, 2) + 1)) - 1, 1)


def prompt_alphas(config: QWenConfig, seq_length: int, attention_mask: Tensor | None, prompt_len: int) -> list[int]:
    """One NTK factor for all rows, or one a row where a padding mask makes a difference.

    Args:
        config: says whether there is dynamic NTK.
        seq_length: training length in tokens.
        attention_mask: (batch, kv_len), 0 for padding; masks of another rank say nothing of padding.
        prompt_len: tokens of the prompt, padding included.
    """
    if not config.use_dynamic_ntk or prompt_len <= seq_length:
        return [1]
    if attention_mask is None or attention_mask.dim() != 2:
        return [ntk_alpha(prompt_len, seq_length)]
    padding: list[int] = (attention_mask[:, :prompt_len] == 0).sum(-1).tolist()
    return [ntk_alpha(prompt_len - pads, seq_length) for pads in padding]


def rotary_embedding(positions: Tensor, alphas: list[int], config: QWenConfig) -> tuple[Tensor, Tensor]:
    """Cos and sin in float32, each (rows, 1, query_len, rotary_dim).

    Args:
        positions: (query_len,), counted from 0, padding included.
        alphas: an NTK factor for each of ``rows``, the batch or 1.
        config: gives rotary_dim and the base.
    """
    dim = int(config.kv_channels * config.rotary_pct)
    bases = [config.rotary_emb_base * alpha ** (dim / (dim - 2)) for alpha in alphas]
    exponent = torch.arange(0, dim, 2, device=positions.device).float() / dim
    inv_freq = 1.0 / torch.stack([base**exponent for base in bases])
    angles = positions.float()[None, :, None] * inv_freq[:, None, :]
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos(), angles.sin()


def apply_rotary(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first rotary_dim channels of ``states`` (batch, heads, query_len, head_dim) in float32."""
    dim = cos.shape[-1]
    rotated = states[..., :dim].float()
    rotated = rotated * cos + rotate_half(rotated) * sin
    return torch.cat((rotated.to(states.dtype), states[..., dim:]), dim=-1)


def logn_factors(
    config: QWenConfig, seq_length: int, past_len: int, kv_len: int, device: torch.device
) -> Tensor | None:
    """What queries are multiplied by, float32 (1, 1, query_len, 1), or None where nothing is scaled.

    ``max(1, log(position + 1) / log(seq_length))`` as soon as there are more than ``seq_length`` keys. The original
    has a table of 32,767 positions and fails beyond it; here the rule goes on.
    """
    if not config.use_logn_attn or kv_len <= seq_length:
        return None
    factors = [math.log(place, seq_length) if place > seq_length else 1.0 for place in range(past_len + 1, kv_len + 1)]
    return torch.tensor(factors, device=device)[None, None, :, None]
