"""Is each message right, number included, and the cache afterwards exactly what it was?"""

import copy
import pickle
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM, LlamaConfig, LlamaForCausalLM

from quantcache import FallbackError, FallbackWarning, QuantizedInt8Cache
from quantcache.layers._host import cache_argument, cache_of
from quantcache.layers.factory import LayerFactory
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization.options import AttentionOptions
from quantcache.store import reads, writes
from quantcache.store.growing import Int8Pages
from tests.strategies import random_states

SHAPE = (2, 3, 150, 16)


@pytest.fixture
def cache() -> QuantizedInt8Cache:
    """Two layers of 150 tokens: one closed page, a tail of 86."""
    cache = QuantizedInt8Cache()
    for layer_idx in range(2):
        cache.update(*random_states(*SHAPE, seed=layer_idx), layer_idx)
    return cache


def fingerprint(cache: QuantizedInt8Cache) -> list[object]:
    """Everything a cache is: lengths, memory, every stored byte, what it says of itself."""
    facts: list[object] = [repr(cache), str(cache.report()), len(cache), cache.nbytes]
    for layer in cache.layers:
        assert isinstance(layer.pages, Int8Pages)
        parts = [part for segment in layer.pages.segments for part in segment]
        facts += [part.tolist() for part in (*parts, layer.pages.key_tail, layer.pages.value_tail)]
    return facts


def assert_refused(
    cache: QuantizedInt8Cache, error: type[Exception], message: str, action: Callable[[], object]
) -> None:
    before = fingerprint(cache)
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        action()
    assert fingerprint(cache) == before


def states(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


GOOD = states(2, 3, 1, 16)
REFUSED_UPDATES = {
    "not_floating": (
        states(2, 3, 1, 16, dtype=torch.int64),
        GOOD,
        TypeError,
        "Int8Layer.update: key_states must be float16, bfloat16, float32 or float64, got torch.int64.",
    ),
    "float8": (
        GOOD,
        states(2, 3, 1, 16, dtype=torch.float8_e4m3fn),
        TypeError,
        "Int8Layer.update: value_states must be float16, bfloat16, float32 or float64, got torch.float8_e4m3fn.",
    ),
    "not_a_tensor": (GOOD, [1.0], TypeError, "Int8Layer.update: value_states must be a tensor, got list."),
    "three_axes": (
        states(2, 3, 16),
        GOOD,
        ValueError,
        "Int8Layer.update: key_states must be (batch, num_kv_heads, query_len, head_dim), got (2, 3, 16).",
    ),
    "disagree_in_batch": (
        GOOD,
        states(1, 3, 1, 16),
        ValueError,
        "Int8Layer.update: key_states and value_states must agree in batch, num_kv_heads and query_len, "
        "got (2, 3, 1, 16) and (1, 3, 1, 16).",
    ),
    "disagree_in_heads": (
        GOOD,
        states(2, 1, 1, 16),
        ValueError,
        "Int8Layer.update: key_states and value_states must agree in batch, num_kv_heads and query_len, "
        "got (2, 3, 1, 16) and (2, 1, 1, 16).",
    ),
    "disagree_in_length": (
        GOOD,
        states(2, 3, 2, 16),
        ValueError,
        "Int8Layer.update: key_states and value_states must agree in batch, num_kv_heads and query_len, "
        "got (2, 3, 1, 16) and (2, 3, 2, 16).",
    ),
    "disagree_in_dtype": (
        GOOD,
        states(2, 3, 1, 16, dtype=torch.float16),
        TypeError,
        "Int8Layer.update: key_states and value_states must have one dtype, got torch.float32 and torch.float16.",
    ),
    "disagree_in_device": (
        GOOD,
        GOOD.to("meta"),
        ValueError,
        "Int8Layer.update: key_states and value_states must be on one device, got cpu and meta.",
    ),
    "other_batch": (
        states(4, 3, 1, 16),
        states(4, 3, 1, 16),
        ValueError,
        "Int8Layer.update: key_states must have the batch the layer holds, 2, got 4. "
        "Use batch_repeat_interleave(2) to continue each stored sequence 2 times, or reset() for new sequences.",
    ),
    "other_heads": (
        states(2, 6, 1, 16),
        states(2, 6, 1, 16),
        ValueError,
        "Int8Layer.update: key_states must have the num_kv_heads the layer holds, 3, got 6. "
        "Use reset() for new sequences.",
    ),
    "other_head_dim": (
        states(2, 3, 1, 16),
        states(2, 3, 1, 8),
        ValueError,
        "Int8Layer.update: value_states must have the head_dim the layer holds, 16, got 8. "
        "Use reset() for new sequences.",
    ),
    "other_dtype": (
        GOOD.half(),
        GOOD.half(),
        TypeError,
        "Int8Layer.update: key_states must have the dtype the layer holds, torch.float32, got torch.float16.",
    ),
    "other_device": (
        GOOD.to("meta"),
        GOOD.to("meta"),
        ValueError,
        "Int8Layer.update: key_states must be on the layer's device, cpu, got meta.",
    ),
    "empty_batch": (
        states(0, 3, 1, 16),
        states(0, 3, 1, 16),
        ValueError,
        "Int8Layer.update: batch, num_kv_heads and head_dim must be at least 1, got (0, 3, 1, 16) and (0, 3, 1, 16).",
    ),
}


@pytest.mark.parametrize("case", REFUSED_UPDATES)
@pytest.mark.parametrize("layer_idx", [1, 5], ids=["a_filled_layer", "a_new_layer"])
def test_a_refused_update_changes_nothing(cache: QuantizedInt8Cache, case: str, layer_idx: int) -> None:
    key_states, value_states, error, message = REFUSED_UPDATES[case]
    if layer_idx == 5 and case.startswith("other"):
        pytest.skip("a new layer takes any shape")
    assert_refused(cache, error, message, lambda: cache.update(key_states, value_states, layer_idx))


def test_an_update_that_runs_out_of_memory_changes_nothing(
    cache: QuantizedInt8Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    key_states, value_states = random_states(2, 3, 100, 16)
    monkeypatch.setattr(writes, "store_pages", out_of_memory)
    assert_refused(cache, torch.OutOfMemoryError, "no memory", lambda: cache.update(key_states, value_states, 0))


def test_a_crop_says_what_it_takes(cache: QuantizedInt8Cache) -> None:
    assert_refused(
        cache,
        ValueError,
        "Int8Layer.crop: tokens_to_remove must be zero or negative, got 7. Use -7 to remove the newest 7 tokens.",
        lambda: cache.crop(7),
    )
    assert_refused(
        cache,
        ValueError,
        "Int8Layer.crop: at most the 150 tokens stored can be removed, got 151.",
        lambda: cache.crop(-151),
    )


def test_a_crop_refused_by_one_layer_crops_none() -> None:
    cache = QuantizedInt8Cache()
    cache.update(*random_states(*SHAPE), 0)
    cache.update(*random_states(2, 3, 100, 16), 1)
    assert_refused(
        cache,
        ValueError,
        "Int8Layer.crop: at most the 100 tokens stored can be removed, got 120.",
        lambda: cache.crop(-120),
    )


def test_indices_outside_the_batch_change_nothing(cache: QuantizedInt8Cache) -> None:
    before = fingerprint(cache)
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([0, 2]))
    assert fingerprint(cache) == before


def test_a_layer_that_the_config_lacks_is_named() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    cache = QuantizedInt8Cache(config)
    for layer_idx in (2, -1):
        with pytest.raises(
            IndexError,
            match=rf"^QuantizedInt8Cache.update: layer_idx must be from 0 to 1, got {layer_idx}. "
            r"Is the config that of another model\?$",
        ):
            cache.update(GOOD, GOOD, layer_idx)


@pytest.mark.parametrize(
    ("residual_length", "error", "message"),
    [
        (-1, ValueError, "QuantizedInt8Cache: residual_length must be at least 0, got -1."),
        (10**30, ValueError, f"QuantizedInt8Cache: residual_length must be at most {1 << 30}, got {10**30}."),
        (1.5, TypeError, "QuantizedInt8Cache: residual_length must be an int, got float."),
        (True, TypeError, "QuantizedInt8Cache: residual_length must be an int, got bool."),
    ],
)
def test_a_bad_residual_length_is_refused_at_once(
    residual_length: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        QuantizedInt8Cache(residual_length=residual_length)


def test_legacy_tuples_are_told_how_to_convert() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            eos_token_id=None, pad_token_id=0,
        )
    ).eval()  # fmt: skip
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        kept = cache_of(model(ids[:, :-1], use_cache=True))
    legacy = tuple((layer.keys, layer.values) for layer in kept.layers)

    with pytest.raises(
        TypeError,
        match=re.escape(
            "QuantizedInt8Cache: config must be the model's config (model.config) or None, got tuple. "
            "For legacy key and value tuples use QuantizedInt8Cache.from_legacy_cache(past_key_values)."
        ),
    ):
        QuantizedInt8Cache(legacy)
    # generate() itself refuses a tuple before any cache sees it.
    with pytest.raises(ValueError, match="Please use a `Cache` instance"):
        model.generate(ids, max_new_tokens=2, **cache_argument(legacy))
    converted = QuantizedInt8Cache.from_legacy_cache(legacy)
    assert converted.get_seq_length() == 9
    output = model.generate(ids, max_new_tokens=5, do_sample=False, **cache_argument(converted))
    assert torch.equal(output, model.generate(ids, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize(
    ("entry", "what"), [((GOOD,), "tuple of length 1 for layer 1"), (GOOD, "Tensor of length 2 for layer 1")]
)
def test_a_legacy_layer_that_is_no_pair_is_named(entry: object, what: str) -> None:
    with pytest.raises(ValueError, match=rf"each layer must be a pair \(key_states, value_states\), got {what}\."):
        QuantizedInt8Cache.from_legacy_cache([(GOOD, GOOD), entry])


def test_a_wrong_config_is_refused() -> None:
    with pytest.raises(TypeError, match=r"config must be the model's config \(model.config\) or None, got dict\."):
        QuantizedInt8Cache({"num_hidden_layers": 2})


def test_unknown_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'nbits'"):
        QuantizedInt8Cache(nbits=4)


@pytest.mark.filterwarnings("ignore")
def test_a_hybrid_model_without_config_says_so() -> None:
    config = Lfm2Config(
        vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention", "conv"], block_multiple_of=16,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = Lfm2ForCausalLM(config).eval()
    ids = torch.randint(2, 97, (1, 150))
    cache = QuantizedInt8Cache()
    with pytest.raises(
        ValueError,
        match=r"a hybrid model, whose layers hold more than keys and values, needs a cache made from its config, "
        r"got config=None\. Use QuantizedInt8Cache\(model\.config\)\.$",
    ):
        model.generate(ids, max_new_tokens=2, **cache_argument(cache))
    assert len(cache) == 0

    cache = QuantizedInt8Cache(config)
    model.generate(ids, max_new_tokens=20, do_sample=False, **cache_argument(cache))
    assert [row.storage for row in cache.report().layers] == ["LinearAttentionLayer", "int8", "LinearAttentionLayer"]


def test_a_first_layer_that_stores_nothing_is_refused_without_a_config() -> None:
    cache = QuantizedInt8Cache()
    with pytest.raises(
        ValueError,
        match=re.escape(
            "QuantizedInt8Cache.update: without a config the first layer must store tokens first, got layer 2 in a "
            "cache of none. Use QuantizedInt8Cache(model.config)."
        ),
    ):
        cache.update(GOOD, GOOD, 2)
    assert len(cache) == 0
    cache.update(GOOD, GOOD, 0)
    cache.update(GOOD, GOOD, 2)  # a layer further behind may store nothing
    assert [layer.get_seq_length() for layer in cache.layers] == [1, 0, 1]


@pytest.mark.parametrize("again", [lambda cache: cache, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_layers_looked_up_before_there_are_any_are_told_to_come_from_a_config(
    again: Callable[[QuantizedInt8Cache], QuantizedInt8Cache],
) -> None:
    cache = again(QuantizedInt8Cache())
    with pytest.raises(
        IndexError,
        match=re.escape(
            "QuantizedInt8Cache.layers: a model that looks into the layers before their first tokens needs a cache "
            "made from its config, got layer 3 of none. Use QuantizedInt8Cache(model.config)."
        ),
    ):
        cache.layers[3]
    assert cache.get_seq_length(3) == 0
    assert list(cache.layers) == cache.layers[:] == []
    cache.update(GOOD, GOOD, 0)
    assert type(cache.layers) is list


@pytest.mark.parametrize("capacity", [None, 64])
def test_a_layer_asked_for_more_than_keys_and_values_names_the_config(capacity: int | None) -> None:
    layer = LayerFactory(max_cache_len=capacity)()
    assert not hasattr(layer, "update_index")
    with pytest.raises(
        AttributeError,
        match=re.escape(
            f"{type(layer).__name__}.update_index: an int8 layer holds keys and values alone, and has no update_index. "
            "A model that asks for it needs a cache made from its config: QuantizedInt8Cache(model.config)."
        ),
    ):
        layer.update_index  # noqa: B018


def test_a_layer_alone_refuses_as_the_cache_does() -> None:
    layer = Int8Layer()
    layer.update(*random_states(*SHAPE))
    before = copy.deepcopy(layer)
    with pytest.raises(ValueError, match="must have the batch the layer holds, 2, got 4"):
        layer.update(states(4, 3, 1, 16), states(4, 3, 1, 16))
    assert layer.get_seq_length() == before.get_seq_length()


QUERY = states(2, 6, 1, 16)
REFUSED_ATTENTION = {
    "query_shape": (
        states(2, 4, 1, 16),
        {},
        ValueError,
        "ops.attention: query must be (batch, num_q_heads, query_len, head_dim) with batch 2, head_dim 16 and "
        "num_q_heads a multiple of 3, got (2, 4, 1, 16).",
    ),
    "query_dtype": (
        QUERY.half(),
        {},
        TypeError,
        "ops.attention: query must have the dtype of the cached states, torch.float32 and torch.float32, "
        "got torch.float16.",
    ),
    "mask_shape": (
        QUERY,
        {"attn_mask": torch.ones(2, 1, 1, 149, dtype=torch.bool)},
        ValueError,
        "ops.attention: attn_mask must broadcast to (batch, num_q_heads, query_len, kv_len) = (2, 6, 1, 150), "
        "got (2, 1, 1, 149).",
    ),
    "mask_dtype": (
        QUERY,
        {"attn_mask": torch.ones(2, 1, 1, 150, dtype=torch.int64)},
        TypeError,
        "ops.attention: attn_mask must be bool or floating point, got torch.int64.",
    ),
    "window": (QUERY, {"window": 0}, ValueError, "ops.attention: window must be at least 1 token, got 0."),
    "softcap": (QUERY, {"softcap": -2.0}, ValueError, "ops.attention: softcap must be positive, got -2.0."),
    "sinks": (
        QUERY,
        {"sinks": states(3)},
        ValueError,
        "ops.attention: sinks must be one number per query head, (6,), got (3,).",
    ),
}


@pytest.mark.parametrize("case", REFUSED_ATTENTION)
def test_attention_says_what_does_not_fit(cache: QuantizedInt8Cache, case: str) -> None:
    query, options, error, message = REFUSED_ATTENTION[case]
    asked = AttentionOptions(**options)
    assert_refused(cache, error, message, lambda: reads.attention(query, cache.layers[0].pages.view(), asked))


def test_a_crop_beyond_what_a_window_keeps_is_refused() -> None:
    cache = QuantizedInt8Cache()
    cache.layers = [Int8Layer(), Int8SlidingLayer(64)]
    for layer_idx in range(2):
        cache.update(*random_states(1, 2, 300, 8, seed=layer_idx), layer_idx)
    # 300 - 63 - 32 = 205 tokens are out of reach, three pages of which are let go.
    assert_refused(
        cache,
        ValueError,
        "Int8SlidingLayer.crop: at most 45 of 300 tokens can be removed once the window of 64 is full, got 46. "
        "Call activate_past_recording() before the update that may be taken back.",
        lambda: cache.crop(-46),
    )
    cache.crop(-45)
    assert cache.get_seq_length(1) == 255


def test_a_recurrent_state_says_that_it_cannot_go_back() -> None:
    from transformers.cache_utils import LinearAttentionLayer

    cache = QuantizedInt8Cache()
    cache.update(*random_states(1, 2, 100, 8), 0)
    linear = LinearAttentionLayer()
    linear.update_recurrent_state(torch.ones(1, 4))
    cache.layers.append(linear)
    message = (
        "QuantizedInt8Cache.crop: layer 1, a LinearAttentionLayer, keeps a recurrent state that cannot forget tokens; "
        "go back to a copy.deepcopy of the cache, got -1."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        cache.crop(-1)
    assert cache.get_seq_length() == 100


def test_a_config_that_transformers_cannot_cache_is_refused_at_once() -> None:
    config = LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "telepathy"]
    message = (
        "QuantizedInt8Cache: config must be that of a decoder whose layers transformers can cache, got LlamaConfig: "
        "KeyError: 'telepathy'."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        QuantizedInt8Cache(config)


def test_only_a_dynamic_cache_is_converted(cache: QuantizedInt8Cache) -> None:
    with pytest.raises(TypeError, match=r"from_dynamic: cache must be a DynamicCache, got QuantizedInt8Cache\.$"):
        QuantizedInt8Cache.from_dynamic(cache)


def test_strict_refuses_gradients_through_restored_pages_alone() -> None:
    key, value = (states.requires_grad_() for states in random_states(1, 2, 90, 8))
    cache = QuantizedInt8Cache(strict=True)
    cache.update(key, value, 0)
    with pytest.warns(
        FallbackWarning, match=r"stop at the tokens of earlier calls, which the cache holds as constants"
    ):
        cache.update(key, value, 0)  # nothing is quantised yet
    with pytest.raises(FallbackError, match="got gradients are enabled, and stop at the tokens of earlier calls"):
        cache.update(key, value, 0)


def test_layers_of_transformers_that_kept_no_past_are_named_before_any_layer_is_cropped() -> None:
    from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

    window, convolution = DynamicSlidingWindowLayer(32), LinearAttentionLayer()
    window.update(*random_states(1, 2, 100, 8))
    window.update(*random_states(1, 2, 1, 8))
    convolution.update_conv_state(torch.ones(1, 4, 3))
    for layer, message in (
        (window, "a DynamicSlidingWindowLayer, does not hold the window before them; call activate_past_recording() "),
        (convolution, "a LinearAttentionLayer, kept no past; call activate_past_recording() before the update that "),
    ):
        cache = QuantizedInt8Cache()
        cache.update(*random_states(1, 2, 101, 8), 0)
        cache.layers.append(layer)
        with pytest.raises(ValueError, match=re.escape(f"QuantizedInt8Cache.crop: layer 1, {message}")):
            cache.crop(-1)
        cache.crop(0)
        assert cache.get_seq_length() == 101


def test_a_model_that_insists_on_its_own_cache_is_refused_at_once() -> None:
    from transformers import MiniMaxConfig

    message = (
        "QuantizedInt8Cache: config must be that of a model that takes a cache of transformers' general kind, got "
        "MiniMaxConfig, whose model insists on its MiniMaxCache."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        QuantizedInt8Cache(MiniMaxConfig(num_hidden_layers=2))


def test_a_window_of_fixed_capacity_says_what_it_cannot_do() -> None:
    config = LlamaConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=32)
    cache = QuantizedInt8Cache(config, max_cache_len=256)
    layer = "layer 0, a StaticSlidingWindowLayer"
    for action, message in (
        (lambda: cache.crop(-1), f"crop: {layer}, has a fixed capacity and cannot forget tokens; use a cache without"),
        (lambda: cache.batch_repeat_interleave(2), f"batch_repeat_interleave: {layer} of fixed capacity, keeps"),
        (lambda: cache.batch_select_indices(torch.tensor([0])), f"batch_select_indices: {layer} of fixed capacity,"),
    ):
        with pytest.raises(ValueError, match=re.escape(f"QuantizedInt8Cache.{message}")):
            action()
    cache.crop(0)
