"""Is the page about what is supported what the tests say, and does each model store and read as it says?"""

from contextlib import nullcontext

import pytest
import torch

from quantcache import FallbackWarning, QuantizedInt8Cache
from quantcache.backends import dispatch
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from tests.architectures import ARCHITECTURES, Architecture
from tests.cases import NEWEST, PROMPT, Case, host_warnings, int8_layers, parts, quiet_flex, tokens
from tests.supported import PAGE, page, reading_here


def name(value: object) -> str:
    return value.name if isinstance(value, Architecture) else str(value)


def test_the_page_is_what_the_matrix_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.supported"


def kind(layer: object) -> str:
    if isinstance(layer, BaseInt8Layer):
        return "int8 window" if isinstance(layer, Int8SlidingLayer) else "int8"
    return "shared" if type(layer).__name__ == "DummyLayer" else type(layer).__name__


@host_warnings
@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=name)
def test_each_layer_is_stored_as_the_page_says(architecture: Architecture) -> None:
    # Before 5.23 transformers has no layers for shared states.
    expected = [storage for storage in architecture.storage if NEWEST or storage != "shared"]
    assert [kind(layer) for layer in QuantizedInt8Cache(architecture.make_config()).layers] == expected


@host_warnings
@pytest.mark.parametrize(
    ("architecture", "implementation"),
    [(one, implementation) for one in ARCHITECTURES for implementation in one.implementations],
    ids=name,
)
def test_attention_reads_as_the_page_says_and_warns_only_where_more_was_wanted(
    architecture: Architecture, implementation: str
) -> None:
    case = Case(architecture, implementation)
    expected = reading_here(architecture, implementation)
    cache = case.cache()
    with quiet_flex() if implementation == "flex_attention" else nullcontext():
        case.logits(tokens(PROMPT), cache)
        with pytest.warns(FallbackWarning) if expected == "restored" else nullcontext():
            case.logits(tokens(1), cache)
    kernels = {layer.read_log.kernel for layer in int8_layers(cache)}
    backend = dispatch.choose_backend(torch.device("cpu"))
    assert kernels == {"int8": {backend}, "restored": {"restored"}, "own": set()}[expected]
    for part in parts(cache):
        for row, layer in zip(part.report().layers, part.layers, strict=True):
            if isinstance(layer, BaseInt8Layer):
                assert row.storage.startswith("int8")
                assert (row.reason is None) == (expected == "int8")
            else:
                assert row.storage == kind(layer)
                assert row.kernel == "native"


def test_a_read_that_restores_warns_once() -> None:
    case = Case(next(one for one in ARCHITECTURES if one.name == "Bloom"), "eager")
    for cache in (QuantizedInt8Cache(), QuantizedInt8Cache(case.config)):
        case.logits(tokens(PROMPT), cache)
        with pytest.warns(FallbackWarning, match="on cached states"):
            case.logits(tokens(1), cache)
        case.logits(tokens(1), cache)  # warnings are errors
