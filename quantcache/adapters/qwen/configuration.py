"""``QWenConfig``: the released ``config.json`` files, those of the first release included."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class QWenConfig(PreTrainedConfig):
    """The config of a Qwen v1 model.

    ``seq_length`` is the training length in tokens and has no default worth relying on: it decides where dynamic NTK
    and log-n scaling begin. ``intermediate_size`` is twice the feed-forward width, as released.
    ``use_cache_quantization`` makes ``generate`` and ``chat`` use ``QuantizedInt8Cache``. ``use_cache_kernel`` and
    ``use_flash_attn`` are accepted with any value and change nothing: the backend and the attention are chosen by what
    is there.

    Raises:
        ValueError: the config of Qwen-VL or Qwen-Audio, or no ``seq_length``.
    """

    model_type = "qwen"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {  # noqa: RUF012
        "n_embd": "hidden_size",
        "n_head": "num_attention_heads",
        "n_layer": "num_hidden_layers",
        "n_positions": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
        "attn_pdrop": "attn_dropout_prob",
        "embd_pdrop": "emb_dropout_prob",
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
    use_cache_kernel: bool = False
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
        kwargs.pop("auto_map", None)  # the code it names is replaced by this package, also after save_pretrained
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
