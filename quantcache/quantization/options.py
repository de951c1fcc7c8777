"""``AttentionOptions``: what an attention call asks for besides queries, keys and values."""

from typing import Final, NamedTuple

from torch import Tensor


class AttentionOptions(NamedTuple):
    """The rules of one attention call, from the attention functions of transformers down to the kernels.

    Attributes:
        attn_mask: broadcastable to (batch, num_q_heads, query_len, kv_len). Bool: True attends. Float: added.
        is_causal: hide keys newer than the query; the last query sits on the last key.
        softmax_scale: factor on the logits; ``head_dim ** -0.5`` if None.
        window: hide keys ``window`` or more positions older than the query.
        softcap: bound of the logits by ``softcap * tanh(logits / softcap)``, before masks.
        sinks: (num_q_heads,), one more logit per head that takes probability and returns nothing
            (https://arxiv.org/abs/2309.17453, as gpt-oss uses it).
    """

    attn_mask: Tensor | None = None
    is_causal: bool = False
    softmax_scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def scale(self, head_dim: int) -> float:
        """The factor on the logits of queries of ``head_dim``."""
        return float(head_dim) ** -0.5 if self.softmax_scale is None else self.softmax_scale

    def up_to(self, kv_len: int) -> "AttentionOptions":
        """These for the first ``kv_len`` keys, where the mask may be of more."""
        return self if self.attn_mask is None else self._replace(attn_mask=mask_up_to(kv_len, self.attn_mask))


def mask_up_to(kv_len: int, mask: Tensor) -> Tensor:
    """``mask`` (..., keys) for the first ``kv_len`` keys; itself where it is of no more."""
    return mask if mask.shape[-1] <= kv_len else mask[..., :kv_len]


SCHEMA: Final = "Tensor? attn_mask, bool is_causal, float? softmax_scale, int? window, float? softcap, Tensor? sinks"
"""The options as the last arguments of a registered operation."""

PLAIN: Final = AttentionOptions()
"""Every query sees every key."""
