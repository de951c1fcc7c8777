"""Does every causal model type of transformers go with the cache, with its config and without, or say what it needs?

Two questions are told apart. With a ``residual_length`` that nothing reaches no page is closed, and every logit must be
that of ``DynamicCache(config=...)``: a wrong window, position or state moves it by as much as logits differ. With pages
closed the rest is the loss of int8, which is small.
"""

import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from packaging.version import parse
from torch import Tensor
from transformers import CONFIG_MAPPING, DynamicCache, GenerationMixin, LogitsProcessor, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from quantcache import QuantizedInt8Cache
from quantcache.layers import factory
from quantcache.layers._host import cache_argument
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.factory import WINDOW_LEFT_TO_CACHE
from quantcache.layers.releases import TESTED
from tests.cases import NEWEST
from tests.causal_models import (
    LEFT_OUT,
    NEEDS_CONFIG,
    NO_CONFIG_NEEDED,
    NO_FIXED_CAPACITY,
    OLDER_NO_FIXED_CAPACITY,
    VOCABULARY,
    WINDOW,
    Need,
    make,
    small_config,
)

pytestmark = pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")

SHORT = frozenset(
    {
        *("llama", "bloom", "deepseek_v3", "gpt_neo", "gemma3_text", "mimo_v2_flash", "dory", "cpmant"),
        *("mamba", "jamba", "falcon_h1", "recurrent_gemma", "deepseek_v32", "deepseek_v4", "minimax_m3_vl_text"),
        *("qwen4_exp_text", "moshi"),
    }
)
"""Model types of the short form, for each way into a cache at least one."""

TYPES = [
    pytest.param(model_type, marks=[] if model_type in SHORT else [pytest.mark.slow, pytest.mark.sweep])
    for model_type in sorted({*NO_CONFIG_NEEDED, *NEEDS_CONFIG})
]

IS_NEWEST = parse(transformers.__version__) == parse(TESTED["transformers"].newest)

PROMPT, STEPS = 150, 12
"""Three windows and more."""

NOTHING_CLOSES = 10_000
ROUNDING = 1e-4
"""Of the spread of the logits: float32 sums in another order."""
LOSS = 0.2
"""Of the spread of the logits, at the worst of 12 x 97 of them; another window moves them by more than the spread."""

IDS = torch.randint(2, VOCABULARY, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(2))


class _Forced(LogitsProcessor):
    """Has ``generate`` go on with ``IDS``, whatever the logits are."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, IDS[0, input_ids.shape[1]]] = 0
        return forced


def logits(model: Any, cache: Any, steps: int = STEPS) -> Tensor:
    """The logits of each of ``steps`` new tokens behind the prompt, (steps, vocab_size)."""
    ids = IDS[:, :PROMPT]
    output = GenerationMixin.generate(
        model,
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        use_cache=True,
        do_sample=False,
        disable_compile=True,
        output_logits=True,
        return_dict_in_generate=True,
        logits_processor=[_Forced()],
        **cache_argument(cache),
    )
    lengths = [int(layer.get_seq_length()) for layer in cache.layers if hasattr(layer, "get_seq_length")]
    assert not lengths or max(lengths) >= PROMPT + steps - 1, "the model went by another cache"
    return torch.cat(output.logits)


class Exact:
    """A model, and its logits with the cache that transformers makes for it."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type
        self.model = make(model_type)
        self.config = self.model.config
        cache = DynamicCache(config=self.config)
        self.has_windows = any(type(layer) is DynamicSlidingWindowLayer for layer in cache.layers)
        self.logits = logits(self.model, cache)
        self.spread = float(self.logits.std())
        assert self.spread > 1e-3

    def compare(self, cache: Any, bound: float) -> None:
        """Each logit with ``cache`` lies within ``bound`` spreads of the exact one."""
        error = (logits(self.model, cache) - self.logits).abs().max() / self.spread
        assert error <= bound, f"{self.model_type}: {float(error):.1e} of the spread, at most {bound} are right"

    def compare_both(self, config: Any, **options: Any) -> None:
        """As ``compare``, with no page closed, and with pages that reach into every window."""
        self.compare(QuantizedInt8Cache(config, residual_length=NOTHING_CLOSES, **options), ROUNDING)
        cache = QuantizedInt8Cache(config, residual_length=0, **options)
        self.compare(cache, LOSS)
        int8 = [layer for layer in cache.layers if isinstance(layer, BaseInt8Layer) and layer.get_seq_length()]
        assert all(layer.report(0).kernel not in ("none", "exact") for layer in int8)


@pytest.fixture(scope="module", params=TYPES)
def exact(request: pytest.FixtureRequest) -> Exact:
    """One model for all tests on it; none of them changes it."""
    if request.param not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {request.param}")
    try:
        return Exact(request.param)
    except ValueError as error:
        if IS_NEWEST:
            raise
        pytest.skip(f"transformers {transformers.__version__} does not run it with its own cache: {error}")


def test_every_causal_model_type_of_transformers_is_run_or_left_out_for_a_reason() -> None:
    known = [*NO_CONFIG_NEEDED, *NEEDS_CONFIG, *LEFT_OUT]
    assert len(known) == len(set(known))
    here = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert here <= set(known), "run them, or leave them out and say why: tests/causal_models.py"
    if IS_NEWEST:
        assert here == set(known)


def test_with_its_config_a_model_gives_the_logits_of_an_exact_cache(exact: Exact) -> None:
    exact.compare_both(exact.config)


def test_windows_in_int8_show_what_transformers_own_show(exact: Exact, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exact.has_windows:
        pytest.skip("no layer has a window alone")
    monkeypatch.setattr(factory, "MAX_NATIVE_WINDOW", WINDOW - 1)
    exact.compare_both(exact.config)


def test_without_its_config_a_model_gives_the_same_or_is_refused_at_the_first_call(exact: Exact) -> None:
    need = NEEDS_CONFIG.get(exact.model_type)
    if need is None:
        exact.compare_both(None)
        return
    if not IS_NEWEST:  # models called their caches in another order
        need = Need("", (AttributeError, IndexError, ValueError), r"QuantizedInt8Cache\(model\.config\)")
    with pytest.raises(need.error, match=need.match):
        logits(exact.model, QuantizedInt8Cache(), steps=1)


def test_a_fixed_capacity_gives_the_same_wherever_transformers_own_does(exact: Exact) -> None:
    capacity = PROMPT + STEPS + 32
    refused = (NO_FIXED_CAPACITY if NEWEST else NO_FIXED_CAPACITY | OLDER_NO_FIXED_CAPACITY).get(exact.model_type)
    if refused is None:
        exact.compare_both(exact.config, max_cache_len=capacity)
        return
    with pytest.raises((ValueError, TypeError, RuntimeError), match=refused):
        exact.compare_both(exact.config, max_cache_len=capacity)
    if exact.model_type in NO_FIXED_CAPACITY:
        with pytest.raises((KeyError, RuntimeError, AssertionError)):
            exact.compare(StaticCache(config=exact.config, max_cache_len=capacity), ROUNDING)


def test_eager_attention_reads_what_the_models_own_reads_of_restored_states(exact: Exact) -> None:
    """One token and a draft; and where int8 is not read, a report says why."""
    model = exact.model
    if not hasattr(sys.modules[type(model).__module__], "eager_attention_forward"):
        pytest.skip("its eager attention is no function that could be routed")
    if exact.model_type == "recurrent_gemma":
        pytest.skip("it keeps recurrent states in the model, so that a second run goes on from others")
    if exact.model_type.startswith("qwen4_exp") and not NEWEST:
        pytest.skip("in older transformers it does not continue from a cache that was converted")
    used = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        cache = QuantizedInt8Cache(exact.config, residual_length=0)
        with torch.no_grad():
            model(IDS[:, : PROMPT - 8], **cache_argument(cache), use_cache=True)
            for start, stop in ((PROMPT - 8, PROMPT - 7), (PROMPT - 7, PROMPT)):
                restored, ids = cache.to_dynamic(), IDS[:, start:stop]
                ours = model(ids, **cache_argument(cache), use_cache=True).logits
                theirs = model(ids, **cache_argument(restored), use_cache=True).logits
                assert (ours - theirs).abs().max() <= 10 * ROUNDING * theirs.std()
        rows = [row for row in cache.report().layers if row.storage.startswith("int8")]
        assert all(row.reason or row.kernel != "restored" for row in rows)
    finally:
        model.set_attn_implementation(used)


@pytest.mark.skipif(not IS_NEWEST, reason="says so of the newest transformers that was tested")
@pytest.mark.parametrize("model_type", sorted(LEFT_OUT))
def test_what_is_left_out_cannot_be_run(model_type: str) -> None:
    if model_type == "gemma3n" and find_spec("timm"):
        pytest.skip("timm is here")
    with pytest.raises((AssertionError, AttributeError, ImportError, StrictDataclassError, ValueError)):
        Exact(model_type)


@pytest.mark.parametrize("model_type", sorted(WINDOW_LEFT_TO_CACHE))
def test_a_window_left_to_the_cache_stays_transformers_own_at_any_size(model_type: str) -> None:
    config = small_config(CONFIG_MAPPING[model_type], sliding_window=2 * factory.MAX_NATIVE_WINDOW)
    layers = QuantizedInt8Cache(config).layers
    assert {type(layer) for layer in layers} == {DynamicSlidingWindowLayer}
    with pytest.raises(ValueError, match=f"max_cache_len needs a model that masks its window itself, .*{model_type}"):
        QuantizedInt8Cache(config, max_cache_len=100)


def test_a_window_left_to_the_cache_is_refused_a_plain_call_without_a_config() -> None:
    model = make("moshi")
    with torch.no_grad(), pytest.raises(ValueError, match=r"a moshi model leaves its window of \d+ tokens to"):
        model(IDS[:, :PROMPT], **cache_argument(QuantizedInt8Cache()))


def test_a_cache_of_transformers_is_given_to_any_model() -> None:
    model = make("moshi")
    QuantizedInt8Cache()  # from now on generate is watched
    logits(model, DynamicCache(), steps=1)
