"""What a prompt cache says besides its tensors: each field of the header's description with its type and range.

Nothing else may stand there. A field that a later version adds changes what an older one would have to compare, so it
comes with a new layout. Loads no torch.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from quantcache.files import fingerprint, host_states
from quantcache.quantization.scheme import MAX_RESIDUAL_LENGTH, PAGE_SIZE

MAX_LAYERS: Final = 4096
"""More than any model has, and few enough for a list of them to stay small."""

MAX_TOKENS: Final = (1 << 31) - 1
"""Kernels count tokens in int32; no head, channel or word of a vocabulary is above it either."""

MAX_CHARACTERS: Final = 256

_FLOAT8: Final = {f"float8_{kind}" for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")}

DTYPE_NAMES: Final = frozenset(
    {f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)}
    | {"float16", "bfloat16", "float32", "float64", "complex64", "complex128", "bool", "float4_e2m1fn_x2", *_FLOAT8}
)
"""What torch calls the dtypes that a model may be in."""

PLAIN_DEPTH: Final = 3
"""Of RoPE parameters: for each layer type some parameters, of which some are lists."""

Refuse = Callable[[str, object], Exception]
"""Makes the error out of what must hold and what came."""


class Rule(NamedTuple):
    """What a value must be, in words and as a question."""

    says: str
    holds: Callable[[Any], bool]


def _whole(low: int, high: int) -> Rule:
    return Rule(f"an int from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_CHARACTERS and value.isprintable()


def _is_plain(value: object, depth: int) -> bool:
    """Whether it is of what JSON knows, without numbers out of range, and nested no deeper than ``depth``."""
    if isinstance(value, (dict, list)):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return depth > 0 and len(value) <= MAX_LAYERS and all(_is_plain(part, depth - 1) for part in parts)
    if isinstance(value, float):
        return math.isfinite(value)
    if type(value) is int:
        return abs(value) < 1 << 63
    return value is None or isinstance(value, bool) or _is_text(value)


def _are_counts(value: object) -> bool:
    """A number, -1 where a config has that for none, or one for each layer."""
    if isinstance(value, list):
        return len(value) <= MAX_LAYERS and all(count is None or _COUNT.holds(count) for count in value)
    return _COUNT.holds(value)


_COUNT: Final = _whole(-1, MAX_TOKENS)
_COUNTS: Final = Rule(f"{_COUNT.says}, or a list of such, one for each layer", _are_counts)
_TEXT: Final = Rule(f"a text of at most {MAX_CHARACTERS} characters", _is_text)

MODEL: Final[dict[str, Rule]] = {
    **dict.fromkeys(fingerprint.FIELDS, _COUNTS),
    "model_type": _TEXT,
    "layer_types": Rule(
        f"a list of at most {MAX_LAYERS} names",
        lambda value: isinstance(value, list) and len(value) <= MAX_LAYERS and all(map(_is_text, value)),
    ),
    "rope_parameters": Rule(
        f"an object of finite numbers, texts and lists, nested {PLAIN_DEPTH} deep at most",
        lambda value: isinstance(value, dict) and _is_plain(value, PLAIN_DEPTH),
    ),
    fingerprint.DTYPE: Rule("the name of a dtype", lambda value: isinstance(value, str) and value in DTYPE_NAMES),
    fingerprint.WEIGHTS: Rule(
        "64 hex digits", lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
    ),
}
"""Of the fingerprint."""

_ALWAYS: Final = {"model_type", fingerprint.DTYPE}

_STORAGES: Final = ("int8", "empty", *host_states.KINDS)

LAYER: Final[dict[str, Rule]] = {
    "storage": Rule(f"one of {', '.join(_STORAGES)}", lambda value: isinstance(value, str) and value in _STORAGES),
    "sliding_window": _whole(1, MAX_TOKENS),
    "first_page": _whole(0, MAX_TOKENS // PAGE_SIZE),
}
"""Of a layer; the last two are those of a window in int8."""

FIELDS: Final[dict[str, Rule]] = {
    "layout": _whole(1, MAX_TOKENS),
    "quantcache": _TEXT,
    "page_size": Rule(str(PAGE_SIZE), lambda value: type(value) is int and value == PAGE_SIZE),
    "residual_length": _whole(0, MAX_RESIDUAL_LENGTH),
    "from_config": Rule("true or false", lambda value: isinstance(value, bool)),
    "model": Rule("null or an object", lambda value: value is None or isinstance(value, dict)),
    "layers": Rule(
        f"a list of 1 to {MAX_LAYERS} layers", lambda value: isinstance(value, list) and 1 <= len(value) <= MAX_LAYERS
    ),
}
"""Of the whole."""


def check(told: Mapping[str, Any], refuse: Refuse) -> None:
    """Hold a description against its schema.

    Args:
        told: what a file says, or will say.
        refuse: makes the error.

    Raises:
        Exception: from ``refuse``: a field that is missing, unknown, of another type or out of range.
    """
    _check_fields("the description", told, FIELDS, FIELDS.keys(), refuse)
    if told["model"] is not None:
        _check_fields("the model", told["model"], MODEL, _ALWAYS, refuse)
    for layer_idx, layer in enumerate(told["layers"]):
        where = f"layer {layer_idx}"
        if not isinstance(layer, dict):
            raise refuse(f"{where} must be an object", _shown(layer))
        has_window = "sliding_window" in layer or "first_page" in layer
        _check_fields(where, layer, LAYER, LAYER if has_window else {"storage"}, refuse)
        if has_window and layer["storage"] not in ("int8", "empty"):
            raise refuse(f"{where} must be int8 to have a window of its own", layer["storage"])


def _check_fields(where: str, told: Mapping[str, Any], rules: Mapping[str, Rule], needed: Any, refuse: Refuse) -> None:
    for name in needed:
        if name not in told:
            raise refuse(f"{where} must have {name!r}", "none")
    for name, value in told.items():
        if name not in rules:
            raise refuse(f"{where} must have no fields but {', '.join(rules)}", _shown(name))
        if not rules[name].holds(value):
            raise refuse(f"{name!r} of {where} must be {rules[name].says}", _shown(value))


def _shown(value: object) -> str:
    return repr(value)[:80]
