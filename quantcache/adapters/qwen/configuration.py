"""``QWenConfig``: the released ``config.json`` files, those of the first release included."""

from typing import Any, Final

import torch
from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from quantcache.adapters.qwen import gptq, parallel
from quantcache.layers._host import CACHE_NAMES

DTYPE_SWITCHES: Final = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""The original's way to name a dtype, in config.json and as arguments of ``from_pretrained``."""


@strict
class QWenConfig(PreTrainedConfig):
    """The config of a Qwen v1 model.

    ``seq_length`` is the training length in tokens and has no default worth relying on: it decides where dynamic NTK
    and log-n scaling begin. ``intermediate_size`` is twice the feed-forward width, as released.
    ``use_cache_quantization`` makes ``generate`` and ``chat`` use ``QuantizedInt8Cache``; ``use_cache_kernel`` says
    what reads it: False plain torch, True or None the fused kernels, and plain torch where there are none. The False of
    a file is the original's written-out default and counts as None.
    ``use_flash_attn`` is accepted with any value and changes nothing. ``bf16``, ``fp16`` and ``fp32`` stand for
    ``dtype`` where that is not given.

    Raises:
        ValueError: the config of Qwen-VL or Qwen-Audio, or more than one of ``bf16``, ``fp16`` and ``fp32``.
        NotImplementedError: see ``gptq.adopt``.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = [*CACHE_NAMES]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
        "attn_pdrop": "attn_dropout_prob",
        "embd_pdrop": "emb_dropout_prob",
    }

    base_model_tp_plan = {  # noqa: RUF012
        "h.*.attn.c_attn": parallel.PACKED_QKV,
        "h.*.attn.c_proj": "rowwise",
        "h.*.mlp.w1": "colwise",
        "h.*.mlp.w2": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    }

    vocab_size: int = 151936
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int = 128
    intermediate_size: int = 22016
    seq_length: int | None = None
    max_position_embeddings: int = 8192
    layer_norm_epsilon: float = 1e-6
    initializer_range: float = 0.02
    rotary_pct: float = 1.0
    rotary_emb_base: float | int = 10000
    use_dynamic_ntk: bool = True
    use_logn_attn: bool = True
    use_flash_attn: bool | str | None = "auto"
    use_cache_quantization: bool = False
    use_cache_kernel: bool | None = None
    softmax_in_fp32: bool = False
    no_bias: bool = True
    use_cache: bool = True
    scale_attn_weights: bool = True
    emb_dropout_prob: float | int = 0.0
    attn_dropout_prob: float | int = 0.0
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for key in ("visual", "audio"):
            if key in kwargs:
                raise ValueError(
                    f"QWenConfig: the config must be that of a text model, got the key {key!r} of Qwen-VL or "
                    "Qwen-Audio, which quantcache.adapters.qwen does not implement."
                )
        for old, new in self.attribute_map.items():
            if old in kwargs:
                setattr(self, new, kwargs.pop(old))
        switched = [switch for switch in DTYPE_SWITCHES if getattr(self, switch)]
        if len(switched) > 1:
            raise ValueError(f"QWenConfig: only one of bf16, fp16 and fp32 may be true, got {' and '.join(switched)}.")
        kwargs.pop("auto_map", None)  # the code it names is replaced by this package, also after save_pretrained
        if isinstance(kwargs.get("quantization_config"), dict):
            kwargs["quantization_config"] = gptq.adopt(kwargs["quantization_config"])
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if switched and self.dtype is None:
            self.dtype = DTYPE_SWITCHES[switched[0]]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the host's; ``bf16=True`` and its like, given as arguments, go before all that the file says of dtypes."""
        if config_dict.get("use_cache_kernel") is False:
            # The original writes all its defaults into what it saves; only an argument is a choice.
            config_dict = {**config_dict, "use_cache_kernel": None}
        given = {switch: kwargs.pop(switch) for switch in DTYPE_SWITCHES if switch in kwargs}
        if any(given.values()):
            unsaid = ("dtype", "torch_dtype", *DTYPE_SWITCHES)
            config_dict = {key: value for key, value in config_dict.items() if key not in unsaid}
        return super().from_dict({**config_dict, **given}, **kwargs)
