"""Error bounds, derived, and the assertion that reports a miss in units of the scale."""

import torch
from torch import Tensor


def assert_within(actual: Tensor, expected: Tensor, bound: Tensor, unit: Tensor) -> None:
    """Raise unless ``|actual - expected| <= bound`` everywhere, in float64; NaN never passes."""
    error = (actual.double() - expected.double()).abs()
    good = error <= bound.double()
    if not bool(good.all()):
        worst = torch.where(good, -torch.inf, (error / unit.double()).nan_to_num(torch.inf)).flatten().argmax()
        place = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
        steps = (error / unit.double()).flatten()[worst]
        raise AssertionError(f"{steps:.4f} scale at {place}: {actual[place]!r} for {expected[place]!r}")


def cast_bound(states: Tensor, half_scale: Tensor) -> Tensor:
    """Largest ``|restored - states|`` when restoring to ``states.dtype``: half a scale, plus the final cast."""
    out = torch.finfo(states.dtype)
    magnitude = states.double().abs()
    return half_scale.double() + 0.5 * out.eps * (magnitude + half_scale.double() + out.smallest_normal)


def attention_bound(
    query: Tensor, softmax_scale: float, key_scale: Tensor, value_scale: Tensor, value: Tensor
) -> float:
    """Largest change of an attention output by quantising its keys and values.

    A logit moves by at most ``delta = 0.5 * sum_d |softmax_scale * query_d| * key_scale_d``; the output by at most
    ``expm1(2 * delta) * max|value| + 0.5 * max(value_scale)``, as weights change by a factor within exp(+-2 delta).

    Args:
        query: (batch, num_q_heads, query_len, head_dim).
        softmax_scale: factor on the logits.
        key_scale: (P, batch, num_kv_heads, head_dim).
        value_scale: any shape.
        value: exact values.
    """
    group = query.shape[1] // key_scale.shape[2]
    largest = key_scale.double().amax(dim=0).repeat_interleave(group, dim=1)[:, :, None]
    delta = 0.5 * (softmax_scale * query.double().abs() * largest).sum(-1).amax()
    change = torch.expm1(2 * delta) * value.double().abs().amax() + 0.5 * value_scale.double().amax()
    return float(change)


def truncation_bound(states: Tensor, scale: Tensor) -> Tensor:
    """Largest ``|restored - states|`` by Qwen v1's rule: a step for truncation, and its arithmetic in ``states.dtype``.

    With unit roundoff u, a quotient of magnitude ``|states| / scale`` is rounded, then a sum of at most 255, which may
    truncate to the next code; restoring rounds a difference and a product of at most ``|states| / scale`` + 1 steps.
    The rounding of the zero point cancels, as both ways use the rounded one.

    Args:
        states: (batch, num_heads, seq_len, head_dim), what was quantised.
        scale: (batch, num_heads, seq_len, 1), finite.
    """
    u = 0.5 * torch.finfo(states.dtype).eps
    steps = states.double().abs() / scale.double()
    return scale.double() * (1 + u * (steps + 255) + 2 * u * (steps + 1) * (1 + u) + 4 * u * (steps + 1))


def head_bound(hidden: Tensor, change: float, projection: Tensor, norm: Tensor, head: Tensor, eps: float) -> Tensor:
    """Largest change of logits when every element of an attention output changes by at most ``change``.

    For one layer without an MLP: logits = head @ (norm * h / r) with r = sqrt(mean(h**2) + eps) and
    h = x + projection @ output. ``h_i`` moves by at most ``d_i = change * sum_j |projection_ij|``, and r, which is a
    norm, by at most ``sqrt(mean(d**2))``.

    Args:
        hidden: (..., hidden_size), h of the exact cache.
        change: see ``attention_bound``.
        projection: (hidden_size, width).
        norm: (hidden_size,).
        head: (vocab_size, hidden_size).
        eps: of the norm.

    Returns:
        (..., vocab_size), float64.
    """
    hidden = hidden.double()
    moved = change * projection.double().abs().sum(-1)
    root = (hidden.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    spread = moved.pow(2).mean().sqrt()
    least = (root - spread).clamp_min(eps**0.5)
    normed = norm.double().abs() * (moved / least + hidden.abs() * (1 / least - 1 / (root + spread)))
    return normed @ head.double().abs().T
