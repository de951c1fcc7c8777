"""What breaks when transformers, torch or accelerate change what ``layers/_host.py`` touches of them?"""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoTokenizer,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicSlidingWindowLayer, QuantizedLayer
from transformers.distributed import tensor_parallel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import tokenization_auto
from transformers.quantizers import AutoQuantizationConfig, auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from quantcache.layers import _host
from tests.file_cases import llama, prompt


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    """What a test registers is taken back."""
    tables = (
        AttentionInterface._global_mapping,
        tokenization_auto.REGISTERED_TOKENIZER_CLASSES,
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING,
        auto.AUTO_QUANTIZER_MAPPING,
        tensor_parallel.ALL_PARALLEL_STYLES._global_mapping,
    )
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)


def test_attention_functions_can_be_looked_up_and_replaced() -> None:
    calls, original = [], _host.attention_function("sdpa")
    assert original is not None
    assert _host.attention_function("no such function") is None

    def replaced(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    AttentionInterface.register("sdpa", replaced)
    assert _host.attention_function("sdpa") is replaced
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is replaced
    model = llama(attn_implementation="sdpa")
    model(prompt(3))
    assert len(calls) == model.config.num_hidden_layers


def test_models_with_eager_attention_ask_for_it_by_their_own_function() -> None:
    asked, model = [], llama(attn_implementation="eager")
    own = sys.modules[type(model).__module__].eager_attention_forward

    def route(function: Any) -> Any:
        asked.append(function)
        return function

    _host.route_eager(route)
    _host.route_eager(route)
    model(prompt(3))
    assert asked == [own] * model.config.num_hidden_layers
    llama(attn_implementation="sdpa")(prompt(3))
    assert _host.unroute_eager() == []
    model(prompt(3))
    assert len(asked) == model.config.num_hidden_layers


@pytest.mark.parametrize("asked", ["argument", "config", None])
def test_attention_functions_can_tell_whether_their_weights_are_collected(asked: str | None) -> None:
    seen, model = [], llama(attn_implementation="eager")
    _host.route_eager(lambda function: (seen.append(_host.wants_weights()), function)[1])
    try:
        model.config.output_attentions = asked == "config"
        model(prompt(3), **({"output_attentions": True} if asked == "argument" else {}))
    finally:
        _host.unroute_eager()
    assert seen == [asked is not None] * model.config.num_hidden_layers
    assert not _host.wants_weights()


class Watcher:
    """Notes what it is asked and told."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache
        self.steps: list[_host.Step] = []
        self.used: list[Any] = []

    def prepare(self, step: _host.Step) -> None:
        self.steps.append(step)

    def end(self, used: Any) -> None:
        self.used.append(used)


def test_a_wrapped_generate_is_the_one_that_models_call() -> None:
    seen: list[tuple[Any, Any]] = []

    def begin(model: Any, inputs: Any, arguments: Any) -> Watcher | None:
        given = _host.caches_in(arguments)
        if not given:
            return None
        seen.append((given[0], inputs))
        return Watcher(model, given[0])

    model, cache, ids = llama(), DynamicCache(), prompt(3)
    _host.watch_generate(begin)
    _host.watch_generate(begin)
    model.generate(ids, **_host.cache_argument(cache), max_new_tokens=1)
    model.generate(input_ids=ids, max_new_tokens=1)
    assert [(one is cache, given is ids) for one, given in seen] == [(True, True)]
    assert _host.unwatch_generate() == []
    model.generate(ids, **_host.cache_argument(DynamicCache()), max_new_tokens=1)
    assert len(seen) == 1


@pytest.mark.parametrize("stored", [0, 4])
def test_a_watched_call_prepares_every_pass_but_decoding_steps(stored: int) -> None:
    """What ``prepare_inputs_for_generation`` is called with, by ``generate`` and by models that override it."""
    model, cache, ids = llama(), DynamicCache(), prompt(9)
    if stored:
        model(ids[:, :stored], **_host.cache_argument(cache))
    watcher = Watcher(model, cache)
    _host.watch_generate(lambda *_: watcher)
    options = {"do_sample": False, "return_dict_in_generate": True, "max_new_tokens": 3}
    model.generate(ids, **_host.cache_argument(cache), **options)
    first = [(step.cache is cache, step.fed, step.new_tokens) for step in watcher.steps]
    assert first in ([], [(True, 9, 9 - stored)], [(True, 9, None)] if not stored else [])
    assert watcher.used == [cache]

    watcher.steps.clear()
    model.generate(ids, **_host.cache_argument(cache := DynamicCache()), **options, use_cache=False)
    assert [step.fed for step in watcher.steps if step.new_tokens is None] == [10, 11] or [
        step.fed for step in watcher.steps
    ] == [9, 10, 11]
    _host.unwatch_generate()


def test_a_model_that_wants_a_new_cache_prepares_its_step_without_one() -> None:
    class Drops(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            kwargs[_host.CACHE_NAME] = None
            return super().prepare_inputs_for_generation(input_ids=input_ids, **kwargs)

    fed: list[tuple[int, Any]] = []
    model, cache = Drops(llama().config).eval(), DynamicCache()

    class Keeps(Watcher):
        def prepare(self, step: _host.Step) -> None:
            assert step.cache is None
            step.cache, step.new_tokens = DynamicCache(), None

    model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append((kwargs["input_ids"].shape[1], kwargs[_host.CACHE_NAME])), with_kwargs=True
    )
    _host.watch_generate(lambda *_: Keeps(model, cache))
    model.generate(prompt(5), **_host.cache_argument(cache), do_sample=False, max_new_tokens=3)
    _host.unwatch_generate()
    assert [length for length, _ in fed] == [5, 6, 7]
    assert all(isinstance(used, DynamicCache) and used is not cache for _, used in fed)


def test_generate_marks_the_cache_that_it_was_given() -> None:
    seen: list[Any] = []

    class Marked(DynamicCache):
        _is_user_defined = _host.given_to_generate(seen.append)

    cache = Marked()
    assert cache._is_user_defined is False
    llama().generate(prompt(3), **_host.cache_argument(cache), max_new_tokens=1)
    assert seen
    assert all(one is cache for one in seen)
    assert cache._is_user_defined is True


def test_a_model_tells_that_it_computes_activations_again() -> None:
    model = llama()
    assert not _host.is_checkpointing(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert _host.is_checkpointing(model)


def test_a_model_tells_how_many_ranks_share_it() -> None:
    model = llama()
    assert hasattr(PreTrainedModel, "_tp_size")
    assert hasattr(PreTrainedModel, "_device_mesh")
    assert model.tp_size is None
    assert _host.tensor_parallel_mesh(model) is None
    assert _host.tensor_parallel_mesh(None) is None


def test_weights_that_accelerate_brings_tell_where_they_go() -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Waiting(hooks.AlignDevicesHook):
        def init_hook(self, module: torch.nn.Module) -> torch.nn.Module:
            return module  # nothing is moved, so that no GPU is needed

    for place, device in ((0, "cuda:0"), ("cpu", "cpu"), (torch.device("cpu"), "cpu")):
        module = torch.nn.Linear(2, 2)
        assert _host.brought_to(module) is None
        hooks.add_hook_to_module(module, Waiting(execution_device=place))
        assert _host.brought_to(module) == torch.device(device)


def test_iteration_over_a_cache_gives_the_window_of_each_layer() -> None:
    cache = DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(7)]
    cache.update(*torch.randn(2, 1, 1, 3, 4), 0)
    _host.note_window(cache.layers[0], 5)
    ((_, _, window),) = cache
    assert window == 5


def test_an_address_can_be_marked_as_staying() -> None:
    tensor = torch.zeros(3)
    _host.mark_static_address(tensor)
    assert tensor._dynamo_static_input_type is not None


def test_a_quantized_layer_of_the_host_gives_its_states() -> None:
    class Doubled(QuantizedLayer):
        def _quantize(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
            return tensor / 2

        def _dequantize(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor * 2

    layer, (key, value) = Doubled(residual_length=4), torch.randn(2, 1, 1, 9, 4)
    for start, stop in ((0, 6), (6, 7), (7, 9)):
        layer.update(key[:, :, start:stop], value[:, :, start:stop])
        for found, expected in zip(_host.quantized_states(layer), (key, value), strict=True):
            assert torch.equal(found, expected[:, :, :stop])
    assert _host.quantized_states(DynamicSlidingWindowLayer(7)) is None


def test_a_registered_tokenizer_comes_before_the_checkpoints_own() -> None:
    class HostTokenizer(PreTrainedTokenizerFast):
        pass

    _host.register_tokenizer(HostTokenizer)
    assert tokenization_auto.tokenizer_class_from_name("HostTokenizer") is HostTokenizer
    assert AutoTokenizer is tokenization_auto.AutoTokenizer


def test_a_tokenizer_encodes_and_decodes_through_what_the_qwen_adapter_overrides() -> None:
    for name in ("_encode_plus", "_decode", "_add_tokens", "_save_pretrained"):
        assert hasattr(PreTrainedTokenizerFast, name), name


def test_a_registered_quantizer_is_found_by_its_method() -> None:
    class HostConfig(QuantizationConfigMixin):
        def __init__(self, **kwargs: Any) -> None:
            self.quant_method = "of a test"

    class HostQuantizer:
        def __init__(self, config: HostConfig, **kwargs: Any) -> None:
            self.config = config

    _host.register_quantizer("of a test", HostConfig, HostQuantizer)
    config = AutoQuantizationConfig.from_dict({"quant_method": "of a test"})
    assert type(config) is HostConfig
    assert type(auto.AutoHfQuantizer.from_config(config)) is HostQuantizer


def test_a_registered_style_of_parallelism_is_found_by_its_name() -> None:
    style = object()
    _host.register_parallel_style("of a test", style)
    assert tensor_parallel.ALL_PARALLEL_STYLES["of a test"] is style
