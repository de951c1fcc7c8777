"""Is transformers still what this library takes it for? A test for each assumption, named for it.

When one fails with a newer transformers, its name says what was renamed, moved or left out; ``layers/_host.py`` is
where a name is put right.
"""

import inspect
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
    cache_utils,
    masking_utils,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from quantcache import QuantizedInt8Cache
from quantcache.files import host_states
from quantcache.layers import _host
from quantcache.layers import routing as attention
from quantcache.layers._host import CACHE_NAME, CACHE_NAMES, cache_argument, cache_of, feed, take_cache
from quantcache.layers.releases import TESTED, Releases, untested

ROOT = Path(__file__).parent.parent
LAYERS = 2


class Watched(DynamicCache):
    """Notes every call of ``update``."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.calls.append((args, kwargs))
        return super().update(*args, **kwargs)


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prompt(length: int = 12) -> Tensor:
    return torch.randint(2, 97, (1, length))


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_generate_hands_the_model_its_cache_under_the_name_in_cache_name(model: LlamaForCausalLM) -> None:
    handed: list[Any] = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: handed.append(kwargs), with_kwargs=True)
    cache = DynamicCache(config=model.config)
    model.generate(prompt(), max_new_tokens=3, do_sample=False, **cache_argument(cache))
    hook.remove()
    assert len(handed) == 3
    assert all(kwargs.get(CACHE_NAME) is cache for kwargs in handed), (CACHE_NAME, [list(kwargs) for kwargs in handed])


def test_generate_keeps_the_cache_it_is_given_and_returns_it(model: LlamaForCausalLM) -> None:
    cache = QuantizedInt8Cache()
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(prompt(), **cache_argument(cache), **options)
    assert cache_of(output) is cache
    assert cache.get_seq_length() == 12 + 2


def test_generate_marks_a_given_cache_as_user_defined(model: LlamaForCausalLM) -> None:
    cache = QuantizedInt8Cache()
    model.generate(prompt(), max_new_tokens=2, do_sample=False, **cache_argument(cache))
    assert cache._is_user_defined


def test_the_forward_of_a_model_names_its_cache_in_its_signature() -> None:
    assert CACHE_NAME in parameters(LlamaForCausalLM.forward)
    assert next(iter(cache_argument(None, LlamaForCausalLM(LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
    ))))) == CACHE_NAME  # fmt: skip


@pytest.mark.parametrize("kind", [BaseModelOutputWithPast, CausalLMOutputWithPast])
def test_an_output_holds_its_cache_under_the_name_in_cache_name(kind: Any) -> None:
    cache = DynamicCache()
    assert cache_of(kind(**cache_argument(cache))) is cache
    assert cache_of(kind()) is None


def test_masks_are_made_for_a_cache_under_the_name_in_cache_name() -> None:
    assert CACHE_NAME in parameters(masking_utils.create_causal_mask)


def test_every_layer_calls_update_once_a_forward_pass_with_keys_values_and_its_index(model: LlamaForCausalLM) -> None:
    cache = Watched(config=model.config)
    model.generate(prompt(), max_new_tokens=3, do_sample=False, **cache_argument(cache))
    assert len(cache.calls) == 3 * LAYERS, "update is not called any more"
    for place, (args, _) in enumerate(cache.calls):
        key, value, layer_idx = args[:3]
        assert key.shape == value.shape == (1, 2, 12 if place < LAYERS else 1, 8)
        assert layer_idx == place % LAYERS


def test_what_update_returns_reaches_the_attention_function_as_it_is(model: LlamaForCausalLM) -> None:
    returned: list[Any] = []

    class Returns(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            returned.append(super().update(*args, **kwargs))
            return returned[-1]

    got: list[Any] = []
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        got.append((key, value, kwargs))
        return original(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("sdpa", watch)
    try:
        with torch.no_grad():
            feed(model, prompt(), Returns(config=model.config))
    finally:
        AttentionInterface.register("sdpa", original)
    assert len(got) == len(returned) == LAYERS
    for (key, value, kwargs), (kept_key, kept_value) in zip(got, returned, strict=True):
        assert key is kept_key
        assert value is kept_value
        assert "scaling" in kwargs


def test_attention_functions_are_registered_under_the_names_that_are_routed() -> None:
    assert set(attention.ROUTED) <= set(AttentionInterface._global_mapping) | {"flash_attention_4"}
    assert "sdpa" in AttentionInterface._global_mapping


def test_models_take_their_attention_function_from_the_registry() -> None:
    attention.install()
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is attention._wrapped["sdpa"][1]
    assert ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None) is attention._wrapped["sdpa"][1]


def test_every_model_generates_by_the_generate_of_generation_mixin() -> None:
    assert LlamaForCausalLM.generate is GenerationMixin.generate
    assert parameters(GenerationMixin.generate)[:2] == ["self", "inputs"]


def test_a_cache_is_made_of_layers_or_of_a_class_to_replicate() -> None:
    assert {"layers", "layer_class_to_replicate"} <= set(parameters(Cache.__init__))
    cache = Cache(layer_class_to_replicate=cache_utils.DynamicLayer)
    assert cache.layers == []
    cache.update(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8), 1)
    assert len(cache.layers) == 2, "a layer is made for every index up to the one that is updated"


def test_the_abstract_methods_of_a_layer_are_these() -> None:
    assert CacheLayerMixin.__abstractmethods__ <= {
        *("lazy_initialization", "update", "get_mask_sizes", "get_seq_length", "get_max_length"),
        *("get_max_cache_shape",),
    }


def test_an_encoder_decoder_cache_is_a_pair_with_these_names() -> None:
    pair = EncoderDecoderCache(QuantizedInt8Cache(), DynamicCache())
    assert isinstance(pair.self_attention_cache, QuantizedInt8Cache)
    assert type(pair.cross_attention_cache) is DynamicCache


def test_the_config_says_which_kind_each_layer_is() -> None:
    config = LlamaConfig(num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=64)
    dynamic = [type(layer).__name__ for layer in DynamicCache(config=config).layers]
    static = [type(layer).__name__ for layer in StaticCache(config=config, max_cache_len=128).layers]
    assert dynamic == ["DynamicSlidingWindowLayer", "DynamicLayer"]
    assert static == ["StaticSlidingWindowLayer", "StaticLayer"]


def test_steps_are_prepared_by_a_method_that_takes_what_is_looked_at() -> None:
    """A number of new tokens that is not passed, and a cache that is left out, would otherwise go unnoticed."""
    taken = parameters(GenerationMixin.prepare_inputs_for_generation)
    assert {"next_sequence_length", "attention_mask", "inputs_embeds", "is_first_iteration", CACHE_NAME} <= set(taken)
    assert taken[:3] == ["self", "input_ids", "next_sequence_length"]


def test_rejected_drafts_are_taken_back_by_crop_with_a_negative_number(model: LlamaForCausalLM) -> None:
    taken: list[int] = []

    class Crops(DynamicCache):
        def crop(self, tokens_to_remove: int) -> None:
            taken.append(int(tokens_to_remove))
            super().crop(tokens_to_remove)

    text = prompt().repeat(1, 3)
    cache = Crops(config=model.config)
    model.generate(text, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=4, **cache_argument(cache))
    assert taken, "crop is not called any more"
    assert all(tokens <= 0 for tokens in taken), taken
    assert any(tokens < 0 for tokens in taken), taken


def test_beams_are_put_in_order_by_reorder_cache(model: LlamaForCausalLM) -> None:
    orders: list[Tensor] = []

    class Reorders(DynamicCache):
        def reorder_cache(self, beam_idx: Tensor) -> None:
            orders.append(beam_idx)
            super().reorder_cache(beam_idx)

    model.generate(
        prompt(), max_new_tokens=4, num_beams=2, do_sample=False, **cache_argument(Reorders(config=model.config))
    )
    assert orders, "reorder_cache is not called any more"


# What this library does with a host that is not as assumed.


def test_either_name_is_taken_and_two_caches_are_refused() -> None:
    cache, other = DynamicCache(), DynamicCache()
    for name in CACHE_NAMES:
        arguments = {name: cache, "use_cache": True}
        assert take_cache("place", arguments) is cache
        assert arguments == {"use_cache": True}
    assert take_cache("place", dict.fromkeys(CACHE_NAMES, cache)) is cache
    assert take_cache("place", {}) is None
    with pytest.raises(ValueError, match=r"^place: one of cache and past_key_values must be given, got both"):
        take_cache("place", {"cache": cache, "past_key_values": other})


def test_a_cache_under_an_unknown_name_is_not_passed_over() -> None:
    with pytest.raises(TypeError, match=r"^place: the cache must come as cache or past_key_values, got it as state"):
        take_cache("place", {"state": DynamicCache()})


def test_a_model_that_passes_over_its_cache_is_found_out(model: LlamaForCausalLM) -> None:
    class Deaf(nn.Module):
        def forward(self, ids: Tensor, **kwargs: Any) -> Any:
            kwargs.pop(CACHE_NAME)
            return model(ids, **kwargs)

    with pytest.raises(RuntimeError, match=r"^feed: Deaf must take its cache as cache or past_key_values"):
        feed(Deaf(), prompt(), DynamicCache())


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_a_model_of_its_own_is_called_by_the_name_it_knows(name: str) -> None:
    class Newest(nn.Module):
        def forward(self, ids: Tensor, cache: Any = None, **kwargs: Any) -> Any: ...

    class Older(nn.Module):
        def forward(self, ids: Tensor, past_key_values: Any = None, **kwargs: Any) -> Any: ...

    known = Newest() if name == "cache" else Older()
    assert cache_argument(None, known) == {name: None}


def pins(file: str) -> dict[str, str]:
    """Versions by package, of a file of constraints."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return dict(line.split(" ")[0].split("==") for line in lines if line and not line.startswith("#"))


def test_the_tested_releases_are_those_that_are_pinned_and_required() -> None:
    newest, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    assert newest["transformers"] == TESTED["transformers"].newest
    assert {name: oldest[name] for name in TESTED} == {name: tested.oldest for name, tested in TESTED.items()}
    required = {r.name: r.specifier for r in map(Requirement, metadata.requires("quantcache") or [])}
    for name, tested in TESTED.items():
        oldest_minor = Version(tested.oldest)
        assert tested.oldest in required[name]
        assert f"{oldest_minor.major}.{oldest_minor.minor - 1}.0" not in required[name]
        assert tested.newest in required[name]
        newest_minor = Version(tested.newest)
        assert f"{newest_minor.major}.{newest_minor.minor + 1}.0" in required[name], "a pin hides a newer host"


def test_a_newer_host_is_said_to_be_untested(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {name: metadata.version(name) for name in ("torch", "transformers")}
    for name, version in here.items():
        release = Version(str(version)).base_version
        for tested in TESTED:
            monkeypatch.setitem(TESTED, tested, Releases("0.1", "99.0"))
        assert untested() == []
        monkeypatch.setitem(TESTED, name, Releases("0.1", release))
        assert untested() == []
        monkeypatch.setitem(TESTED, name, Releases("0.1", "0.2"))
        assert untested() == [f"{name} {version} is untested: it is newer than 0.2, the newest that was tested."]
        monkeypatch.setitem(TESTED, name, Releases("98.0", "99.0"))
        assert untested() == [f"{name} {version} is not supported: it is older than 98.0, the oldest that is."]


def test_the_name_of_the_cache_is_read_off_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CACHE_NAMES:
        made = eval(f"lambda self, input_ids, {name}=None, **kwargs: None")
        monkeypatch.setattr(GenerationMixin, "prepare_inputs_for_generation", made)
        assert _host._host_cache_name() == name


@pytest.mark.parametrize("name", host_states.KINDS)
def test_layers_that_files_hold_have_the_states_they_are_read_by(name: str) -> None:
    """Their classes under their names, and the attributes of a fresh one, which ``files/host_states.py`` reads."""
    if Version(transformers.__version__) < Version(TESTED["transformers"].newest):
        pytest.skip("older releases lack some of them")
    kind, made = host_states.KINDS[name], getattr(cache_utils, name)
    options: dict[str, Any] = {"sliding_window": 8} if kind.has_window else {}
    accepted = parameters(made.__init__)
    layer = made(**{option: value for option, value in options.items() if option in accepted or "kwargs" in accepted})
    missing = [state for state in kind.axes if not hasattr(layer, state)]
    assert not missing
    if kind.has_states:
        for state in (*host_states._STATES, "has_previous_state", "conv_kernel_size", "number_of_states"):
            assert hasattr(layer, state), state
