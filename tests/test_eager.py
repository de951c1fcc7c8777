"""Does eager attention read int8 where it is what int8 attention computes, and restored states where it is not?"""

import ast
import copy
import functools
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.t5 import modeling_t5

from quantcache import FallbackError, QuantizedInt8Cache
from quantcache.layers import routing
from quantcache.layers.eager import honoured_by
from tests.architectures import ARCHITECTURES
from tests.cases import PROMPT, Case, int8_layers, same_reading, tokens

NAMED = {one.name: one for one in ARCHITECTURES}

UNKNOWN = {
    "inkling2": "sinks for each token",
    "modernbert_decoder": "it cannot do without a mask",
    "vjepa2": "it knows no mask",
}
"""Models whose eager functions compute something else than int8 attention, and what."""


def eager_bodies() -> Iterator[tuple[str, list[str]]]:
    """What the functions named ``eager_attention_forward`` in transformers say, each once, and who says it."""
    found: dict[str, list[str]] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = path.read_text(encoding="utf-8")
        start = source.find("\ndef eager_attention_forward(")
        if start >= 0:
            end = source.find("\n\n\n", start)
            (function,) = ast.parse(source[start:end]).body
            assert isinstance(function, ast.FunctionDef)
            found.setdefault("\n".join(map(ast.unparse, function.body)), []).append(path.stem.removeprefix("modeling_"))
    yield from found.items()


def test_every_eager_function_of_transformers_is_known_or_is_unknown_for_a_reason() -> None:
    honoured: dict[str, tuple[str, ...] | None] = {}
    bodies = list(eager_bodies())
    for body, models in bodies:
        module = importlib.import_module(f"transformers.models.{models[0]}.modeling_{models[0]}")
        honoured[models[0]] = honoured_by(module.eager_attention_forward)
        if honoured[models[0]] is not None:
            assert ("sinks" in honoured[models[0]]) == ("module.sinks" in body), models
            assert ("softcap" in honoured[models[0]]) == ("tanh" in body), models
            assert ("position_bias" in honoured[models[0]]) == ("+ position_bias" in body), models
    unknown = {model for model, known in honoured.items() if known is None}
    assert unknown <= set(UNKNOWN), "say why it is unknown, or let quantcache/layers/eager.py ask for what it does"
    assert len(bodies) > 15


def test_a_function_is_known_by_what_it_computes() -> None:
    assert honoured_by(modeling_llama.eager_attention_forward) == ()
    assert honoured_by(modeling_gemma2.eager_attention_forward) == ("softcap",)
    assert honoured_by(modeling_gpt_oss.eager_attention_forward) == ("sinks",)
    assert honoured_by(modeling_t5.eager_attention_forward) == ("position_bias",)


def plain(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float) -> Any:
    """Attention, as the functions below would compute it without their differences."""
    logits = query @ key.transpose(2, 3) * scaling
    weights = (logits if attention_mask is None else logits + attention_mask).softmax(-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def scaled_twice(module, query, key, value, attention_mask, scaling, **kwargs):  # type: ignore[no-untyped-def]
    return plain(module, query, key, value, attention_mask, scaling * scaling)


def repeats_otherwise(module, query, key, value, attention_mask, scaling, **kwargs):  # type: ignore[no-untyped-def]
    key, value = (states.repeat(1, module.num_key_value_groups, 1, 1) for states in (key, value))
    return plain(module, query, key, value, attention_mask, scaling)


def looks_at_options(module, query, key, value, attention_mask, scaling, **kwargs):  # type: ignore[no-untyped-def]
    return plain(module, query, key, value * kwargs.get("gain", 1.0), attention_mask, scaling)


def looks_at_its_layer(module, query, key, value, attention_mask, scaling, **kwargs):  # type: ignore[no-untyped-def]
    return plain(module, query, key, value * module.gain, attention_mask, scaling)


def has_an_option(module, query, key, value, attention_mask, scaling, head_mask=None):  # type: ignore[no-untyped-def]
    return plain(module, query, key, value, attention_mask, scaling)


def has_other_names(layer, q, k, v, attention_mask, scaling, **kwargs):  # type: ignore[no-untyped-def]
    return plain(layer, q, k, v, attention_mask, scaling)


@pytest.mark.parametrize(
    "function",
    [
        *(scaled_twice, repeats_otherwise, looks_at_options, looks_at_its_layer, has_an_option, has_other_names),
        functools.wraps(plain)(lambda *args, **kwargs: plain(*args, **kwargs)),
        functools.partial(plain),
    ],
)
def test_a_function_that_computes_something_else_is_unknown(function: Any) -> None:
    assert honoured_by(plain) == ()
    assert honoured_by(function) is None


def test_a_function_is_asked_whatever_the_caller_has_set() -> None:
    def fresh(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):  # type: ignore[no-untyped-def]
        return plain(module, query, key, value, attention_mask, scaling)

    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert honoured_by(fresh) == ()


def filled(case: Case) -> Any:
    cache = case.cache()
    case.logits(tokens(PROMPT, 2), cache)
    return cache


@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "GPT-OSS", "T5", "GPT-BigCode"])
def test_it_reads_what_the_models_own_function_reads_of_restored_states(name: str) -> None:
    """One token, seven and a chunk, behind left padding, under sinks, softcap, a position bias or one KV head."""
    case = Case(NAMED[name], "eager")
    cache = filled(case)
    for step, length in enumerate((1, 7, 70)):
        same_reading(case, cache, tokens(length, 2, seed=step))
        assert {layer.read_log.reason for layer in int8_layers(cache)} == {None}


@pytest.mark.parametrize("option", ["argument", "config"])
@pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")
def test_weights_are_still_the_models_own(option: str) -> None:
    for name in ("GPT-OSS", "GPT-2", "Whisper"):
        case = Case(NAMED[name], "eager")
        cache, ids = filled(case), tokens(1, 2, seed=4)
        exact = copy.deepcopy(cache)
        case.config.output_attentions = option == "config"
        with torch.no_grad():
            arguments = case.named(ids) | ({"output_attentions": True} if option == "argument" else {})
            ours = case.model(**arguments, **routing._host.cache_argument(cache), use_cache=True)
            assert {layer.read_log.kernel for layer in int8_layers(cache)} == {"restored"}
            assert {layer.read_log.reason for layer in int8_layers(cache)} == {"eager: the option output_attentions"}
            routing.uninstall()
            theirs = case.model(**arguments, **routing._host.cache_argument(exact), use_cache=True)
        named = "decoder_attentions" if NAMED[name].is_encoder_decoder else "attentions"
        for have, want in zip(getattr(ours, named), getattr(theirs, named), strict=True):
            assert have.shape[-1] == PROMPT + 1 or "GPT-OSS" in name
            assert torch.equal(have, want)


class Layer(torch.nn.Module):
    """As much of an attention layer as Llama's function needs."""

    def __init__(self) -> None:
        super().__init__()
        self.num_key_value_groups = 2
        self.eval()


@pytest.mark.parametrize(
    ("options", "mask", "reason"),
    [
        ({"scaling": 0.3, "dropout": 0.5}, None, "eager: the option dropout"),
        ({"scaling": 0.3, "output_attentions": True}, None, "eager: the option output_attentions"),
        ({"scaling": torch.tensor(0.3)}, None, "eager: the scaling Tensor"),
        ({"scaling": 0.3}, torch.ones(1, 1, 1, 301, dtype=torch.bool), "eager: a mask that is not a float"),
        ({"scaling": 0.3}, torch.zeros(1, 301), "eager: a mask that is not a float"),
    ],
)
def test_what_is_not_covered_is_named_and_given_restored_states(options: Any, mask: Any, reason: str) -> None:
    cache = QuantizedInt8Cache(strict=True)
    states = torch.randn(2, 2, 300, 16)
    cache.update(states, states, 0)
    pair = cache.update(states[:, :, :1], states[:, :, :1], 0)
    layer = Layer().train("dropout" in options)
    function = ALL_ATTENTION_FUNCTIONS.get_interface("eager", modeling_llama.eager_attention_forward)
    with pytest.raises(FallbackError, match=reason):
        function(layer, torch.randn(2, 4, 1, 16), *pair, mask, **options)


def test_unknown_functions_and_unnamed_options_get_restored_states() -> None:
    states, query = torch.randn(2, 2, 300, 16), torch.randn(2, 4, 1, 16)
    cache = QuantizedInt8Cache()
    cache.update(states, states, 0)
    pair = cache.update(states[:, :, :1], states[:, :, :1], 0)
    own = modeling_llama.eager_attention_forward
    dense = own(Layer(), query, *(each.restore() for each in pair), None, 0.3)[0]
    log = cache.layers[0].read_log
    with pytest.warns(match="eager: options without their names"):
        ours = ALL_ATTENTION_FUNCTIONS.get_interface("eager", own)(Layer(), query, *pair, None, 0.3)[0]
    torch.testing.assert_close(ours, dense)
    assert log.kernel == "restored"

    def other(layer, q, k, v, **kwargs):  # type: ignore[no-untyped-def]
        return own(layer, q, k, v, None, 0.3)

    routed = ALL_ATTENTION_FUNCTIONS.get_interface("eager", other)
    torch.testing.assert_close(routed(Layer(), q=query, k=pair[0], v=pair[1])[0], dense)
    assert log.reason == f"eager: unknown is what {__name__}.{other.__qualname__} computes"


def test_uninstall_gives_models_their_own_function_again() -> None:
    before, own = AttentionInterface.get_interface, modeling_llama.eager_attention_forward
    QuantizedInt8Cache()
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", own) is not own
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", own) is ALL_ATTENTION_FUNCTIONS["sdpa"]
    routing.install()
    routing.uninstall()
    assert AttentionInterface.get_interface is before
    assert ALL_ATTENTION_FUNCTIONS.get_interface("eager", own) is own
