"""The shape of a model's cache, read from the config as the hub stores it, without transformers.

The rules are transformers' own (``get_layer_types_and_kwargs`` and the config classes of 5.23); the tests compare them
with the caches of its models.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from quantcache.planning.weights import count_parameters
from quantcache.quantization.scheme import MAX_NATIVE_WINDOW

DTYPE_BYTES: Final = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
STATE_BYTES: Final = 4
"""Recurrent states are float32 whatever the model's dtype is."""


class GeometryError(ValueError):
    """A config does not tell how large its cache is; the message says what is missing."""


@dataclass(frozen=True)
class LayerGeometry:
    """What one decoder layer keeps for each sequence.

    Attributes:
        kind: "int8", or "native" where transformers' own layer keeps keys and values.
        num_kv_heads: 0 for a layer without keys and values.
        head_dim: of keys.
        v_head_dim: of values.
        window: tokens a query sees, None for all.
        conv_elements: of convolution states, in the model's dtype.
        state_elements: of recurrent states, float32.
    """

    kind: str = "int8"
    num_kv_heads: int = 0
    head_dim: int = 0
    v_head_dim: int = 0
    window: int | None = None
    conv_elements: int = 0
    state_elements: int = 0


@dataclass(frozen=True)
class Geometry:
    """What decides the memory of a model and its cache.

    Attributes:
        name: for people.
        layers: the decoder layers.
        dtype: of the model, a key of ``DTYPE_BYTES``.
        max_positions: tokens the model was made for, None if it does not say.
        num_params: weights in all, None if unknown.
        num_embedding_params: those of them that quantisers leave as they are: embeddings, and an output layer of its
            own.
    """

    name: str
    layers: tuple[LayerGeometry, ...]
    dtype: str
    max_positions: int | None
    num_params: int | None
    num_embedding_params: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], name: str = "model") -> "Geometry":
        """The geometry of the decoder that a ``config.json`` describes.

        Args:
            config: the parsed file; that of a multimodal model has its decoder's in ``text_config``.
            name: for people.

        Raises:
            GeometryError: a size is missing, or the layers are of a kind whose memory is not known here.
        """
        outer = config
        while isinstance(config.get("text_config"), Mapping):
            config = {**{key: outer[key] for key in ("dtype", "torch_dtype") if key in outer}, **config["text_config"]}
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        if dtype not in DTYPE_BYTES:
            raise GeometryError(f"Geometry: dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}.")
        layers = tuple(_layer(config, index, kind) for index, kind in enumerate(_layer_types(config)))
        counted = count_parameters(config)
        positions = _first(config, "max_position_embeddings", "n_positions", "seq_length")
        return cls(name, layers, dtype, positions, *(counted or (None, 0)))


def _size(config: Mapping[str, Any], *names: str) -> int:
    """The first of several spellings of a size."""
    value = _first(config, *names)
    if value is None:
        raise GeometryError(f"Geometry: the config must have {' or '.join(names)}, got neither. Is it a decoder's?")
    return value


def _first(config: Mapping[str, Any], *names: str) -> int | None:
    found = map(config.get, names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), None)


def _layer_types(config: Mapping[str, Any]) -> list[str]:
    """The kind of each layer, by transformers' names."""
    count = _size(config, "num_hidden_layers", "n_layer", "n_layers", "num_layers")
    given, model_type = config.get("layer_types"), str(config.get("model_type"))
    if isinstance(given, list):
        if len(given) < count:
            raise GeometryError(f"Geometry: layer_types must have {count} entries, got {len(given)}.")
        return [str(kind) for kind in given[:count]]
    layers = range(count)
    if model_type in ("gemma3_text", "cohere2", "gemma3", "exaone4"):
        period = config.get("sliding_window_pattern", 4 if model_type in ("cohere2", "exaone4") else 6)
        if isinstance(period, str):  # "LLLG": local, local, local, global
            return ["sliding_attention" if period[i % len(period)] == "L" else "full_attention" for i in layers]
        return ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in layers]
    if model_type in ("gemma2", "gpt_oss"):
        return ["full_attention" if i % 2 else "sliding_attention" for i in layers]
    if model_type in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"):
        period = config.get("full_attention_interval", 4)
        return ["full_attention" if (i + 1) % period == 0 else "linear_attention" for i in layers]
    if model_type in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"):
        first = config.get("max_window_layers", 0)
        slides = bool(config.get("use_sliding_window")) and config.get("sliding_window") is not None
        return ["sliding_attention" if slides and i >= first else "full_attention" for i in layers]
    if model_type == "lfm2":
        full = config.get("full_attn_idxs") or layers
        return ["full_attention" if i in full else "conv" for i in layers]
    if model_type == "llama4_text":
        rope = config.get("no_rope_layers") or [int((i + 1) % 4 != 0) for i in layers]
        return ["chunked_attention" if rope[i] else "full_attention" for i in layers]
    if model_type == "jamba":
        period, offset = config.get("attn_layer_period", 8), config.get("attn_layer_offset", 4)
        return ["full_attention" if i % period == offset else "mamba" for i in layers]
    if model_type == "falcon_h1":
        return ["hybrid"] * count
    if any("mamba" in key or "ssm" in key or "linear_attn" in key or "hybrid" in key for key in config):
        raise _unknown("the layers of a hybrid model must be of a kind known here", f"model_type {model_type!r}")
    return ["sliding_attention" if config.get("sliding_window") is not None else "full_attention"] * count


def _layer(config: Mapping[str, Any], index: int, kind: str) -> LayerGeometry:
    """One layer of a kind, as ``QuantizedInt8Cache(config)`` makes it."""
    if kind in ("moe", "mlp", "dummy"):
        return LayerGeometry("native")
    if kind in ("conv", "linear_attention", "mamba"):
        conv, state = _states(config)
        return LayerGeometry("native", conv_elements=conv, state_elements=state)
    num_q_heads = _size(config, "num_attention_heads", "n_head", "num_heads")
    num_kv_heads = _kv_heads(config, num_q_heads)
    if (rank := _first(config, "kv_lora_rank")) is not None:
        # transformers hands the cache the latent as one head of keys, and the rotated part as its values.
        return LayerGeometry("int8", 1, rank, _size(config, "qk_rope_head_dim"))
    head_dim = _first(config, "head_dim", "kv_channels") or _size(config, "hidden_size", "n_embd") // num_q_heads
    if kind == "full_attention":
        return LayerGeometry("int8", num_kv_heads, head_dim, head_dim)
    if kind == "hybrid":
        conv, state = _states(config)
        return LayerGeometry("native", num_kv_heads, head_dim, head_dim, None, conv, state)
    if kind in ("sliding_attention", "chunked_attention"):
        window = _size(config, "sliding_window" if kind == "sliding_attention" else "attention_chunk_size")
        made = "int8" if window > MAX_NATIVE_WINDOW else "native"
        return LayerGeometry(made, num_kv_heads, head_dim, head_dim, window)
    raise _unknown(f"layer {index} must be of a kind whose memory is known here", repr(kind))


def _kv_heads(config: Mapping[str, Any], num_q_heads: int) -> int:
    """KV heads, in the spellings of older models."""
    if config.get("model_type") == "falcon":
        if config.get("new_decoder_architecture"):
            return _size(config, "num_kv_heads")
        return 1 if config.get("multi_query", True) else num_q_heads
    return _first(config, "num_key_value_heads", "num_kv_heads", "multi_query_group_num") or num_q_heads


def _states(config: Mapping[str, Any]) -> tuple[int, int]:
    """Elements of the convolution and of the recurrent state of a sequence."""
    model_type = config.get("model_type")
    if model_type in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"):
        key = _size(config, "linear_num_key_heads") * _size(config, "linear_key_head_dim")
        value = _size(config, "linear_num_value_heads") * _size(config, "linear_value_head_dim")
        kernel = _size(config, "linear_conv_kernel_dim")
        return (2 * key + value) * kernel, value * _size(config, "linear_key_head_dim")
    if model_type == "lfm2":
        return _size(config, "hidden_size") * _size(config, "conv_L_cache"), 0
    if model_type == "jamba":
        inner = _size(config, "mamba_expand") * _size(config, "hidden_size")
        return inner * _size(config, "mamba_d_conv"), inner * _size(config, "mamba_d_state")
    if model_type == "falcon_h1":
        inner = _first(config, "mamba_d_ssm") or _size(config, "mamba_expand") * _size(config, "hidden_size")
        groups = 2 * _size(config, "mamba_n_groups") * _size(config, "mamba_d_state")
        return (inner + groups) * _size(config, "mamba_d_conv"), inner * _size(config, "mamba_d_state")
    raise _unknown("the states of a layer must be of a kind known here", f"model_type {model_type!r}")


def _unknown(rule: str, got: str) -> GeometryError:
    return GeometryError(f"Geometry: {rule}, got {got}. Measure it instead: cache.nbytes after a prompt.")
