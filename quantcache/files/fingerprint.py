"""What tells one model's cache from another's. Loads no torch until weights are read."""

import hashlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

FIELDS: Final = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_size",
    "head_dim",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "vocab_size",
    "sliding_window",
    "layer_types",
    "rope_parameters",
)
"""Of the decoder's config: what shapes the keys and values, and what is in them."""

DTYPE: Final = "dtype"
WEIGHTS: Final = "weights_sha256"


def of_config(config: "PreTrainedConfig") -> dict[str, Any]:
    """The fields of ``FIELDS`` that the config has, as JSON keeps them."""
    decoder = config.get_text_config(decoder=True)
    found = {name: _field(decoder, name) for name in FIELDS}
    return {name: _plain(value) for name, value in found.items() if value is not None}


def of_model(model: Any, digest_weights: bool = False) -> dict[str, Any]:
    """``of_config`` of a model, its dtype, and if wanted a digest of all its weights.

    Args:
        model: a model of transformers.
        digest_weights: read every weight, which tells fine-tuned models from their base.
    """
    made = {**of_config(model.config), DTYPE: str(model.dtype).removeprefix("torch.")}
    if digest_weights:
        made[WEIGHTS] = weights_digest(model)
    return made


def differences(stored: Mapping[str, Any], model: Mapping[str, Any]) -> list[str]:
    """A phrase for each field that both know and that is not the same."""
    return [
        f"{name} {_short(stored[name])} in the file and {_short(model[name])} in the model"
        for name in stored
        if name in model and stored[name] != model[name]
    ]


def weights_digest(model: "torch.nn.Module") -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all weights, one weight in memory at a time.

    Where several processes share the weights, each takes part and gets the digest that one process would.
    """
    import torch

    from quantcache.layers.parallel import whole_tensor

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = whole_tensor(tensor.detach()).cpu().contiguous().view(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _field(config: Any, name: str) -> Any:
    """A field of a config; a list of one for each layer where transformers gives no one for all, since they differ."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return [getattr(layer, name, None) for layer in config.per_layer_config]


def _plain(value: Any) -> Any:
    """As JSON gives it back; what JSON does not know, numbers that are not finite among it, as its text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
