"""Whatever the library touches of transformers, torch and accelerate that is private to them or patched.

Each function has a test in ``tests/test_host.py``, named for what breaks when the host changes. Not here are the
names, private ones among them, that every model and tokenizer of transformers defines or reads; see ``adapters/qwen``.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig
from transformers.models.auto import tokenization_auto
from transformers.quantizers import auto as quantizers_auto

_GIVEN: Final = "_is_user_defined"

PromptCheck = Callable[[Any, Any], None]
"""Called with the cache and the prompt that ``generate`` was given, each None where there is none."""

_lock = threading.Lock()
_generate: tuple[Callable[..., Any], Callable[..., Any]] | None = None
"""The original ``generate`` and the one that was put in its place."""


def attention_function(name: str) -> Callable[..., Any] | None:
    """The attention function that models find under ``name``, or None; ``AttentionInterface.register`` replaces it."""
    from transformers.modeling_utils import AttentionInterface

    function: Callable[..., Any] | None = AttentionInterface._global_mapping.get(name)
    return function


def attention_implementation(config: PreTrainedConfig | None) -> str | None:
    """The name of the attention function that the decoder of ``config`` uses, None where nobody has decided."""
    decoder = None if config is None else config.get_text_config(decoder=True)
    return getattr(decoder, "_attn_implementation", None)


def watch_generate(check: PromptCheck) -> None:
    """Have ``generate`` of every model call ``check`` before it begins; once, however often this is called."""
    global _generate
    with _lock:
        original = GenerationMixin.generate
        if _generate is not None and original is _generate[1]:
            return

        @functools.wraps(original)
        def generate(self: Any, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            check(kwargs.get("past_key_values"), kwargs.get("input_ids", inputs))
            return original(self, inputs, *args, **kwargs)

        GenerationMixin.generate = generate  # type: ignore[method-assign]
        _generate = original, generate


def unwatch_generate() -> None:
    """Put the original ``generate`` back; one that someone wrapped again since stays."""
    global _generate
    with _lock:
        if _generate is not None and GenerationMixin.generate is _generate[1]:
            GenerationMixin.generate = _generate[0]  # type: ignore[method-assign]
        _generate = None


def given_to_generate(check: Callable[[Any], None]) -> property:
    """The attribute ``_is_user_defined``, which ``generate`` sets on a cache it is given; ``check`` may refuse it."""

    def was_given(cache: Any) -> bool:
        return bool(vars(cache).get(_GIVEN, False))

    def give(cache: Any, value: bool) -> None:
        check(cache)
        cache.__dict__[_GIVEN] = value

    return property(was_given, give)


def tensor_parallel_mesh(model: Any) -> Any:
    """The device mesh of the ranks that share ``model`` by its ``tp_plan``, None for a model in one process."""
    if (getattr(model, "_tp_size", None) or 1) < 2:
        return None
    mesh = model._device_mesh
    return mesh["tp"] if mesh.ndim > 1 else mesh


def brought_to(module: torch.nn.Module) -> torch.device | None:
    """Where accelerate brings the weights of ``module`` when they are needed; None where they stay."""
    place = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return torch.device("cuda", place) if isinstance(place, int) else None if place is None else torch.device(place)


def note_window(layer: Any, sliding_window: int) -> None:
    """Have iteration over a cache give the window of ``layer`` behind its keys and values."""
    layer._sliding_window_tensor = torch.tensor(sliding_window)


def mark_static_address(tensor: Tensor) -> None:
    """Tell torch.compile that a tensor stays where it is, without which a step that writes it is no CUDA graph."""
    torch._dynamo.mark_static_address(tensor)


def quantized_states(layer: Any) -> tuple[Tensor, Tensor] | None:
    """Dense keys and values of a layer of transformers' ``QuantizedCache``, None for one of another kind."""
    if getattr(layer, "_quantized_keys", None) is None:
        return None
    found = []
    for held, newest in ((layer._quantized_keys, layer.keys), (layer._quantized_values, layer.values)):
        restored = layer._dequantize(held)
        found.append(torch.cat([restored, newest], dim=-2) if newest.numel() else restored)
    return found[0], found[1]


def register_tokenizer(tokenizer: type[Any]) -> None:
    """Have ``AutoTokenizer`` take this class, by its name, in place of a checkpoint's own.

    ``AutoTokenizer.register`` would still run the checkpoint's own tokenizer under ``trust_remote_code=True``.
    """
    tokenization_auto.REGISTERED_TOKENIZER_CLASSES[tokenizer.__name__] = tokenizer


def register_quantizer(method: str, config: Any, quantizer: Any) -> None:
    """Have ``from_pretrained`` load checkpoints whose ``quant_method`` is ``method`` with these classes."""
    quantizers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[method] = config
    quantizers_auto.AUTO_QUANTIZER_MAPPING[method] = quantizer


def register_parallel_style(name: str, style: Any) -> None:
    """Let the ``tp_plan`` of a model name ``style``."""
    from transformers.distributed import tensor_parallel

    tensor_parallel.ALL_PARALLEL_STYLES.register(name, style)  # type: ignore[attr-defined]
