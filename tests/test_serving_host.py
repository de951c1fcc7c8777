"""What breaks when transformers changes what ``serving/_host.py`` touches of its continuous batching?"""

import inspect
import pickle
import threading
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, ContinuousBatchingConfig, GenerationConfig

from tests.serving_cases import VOCAB, greedy, llama, needs_known_host, pool, prompt, tokenizer_of_pieces

pytestmark = needs_known_host

if not needs_known_host.args[0]:
    from transformers.generation.continuous_batching import cache as host_cache
    from transformers.generation.continuous_batching import continuous_api, initialization, input_outputs
    from transformers.generation.continuous_batching.cache_allocators import FullAttentionCacheAllocator
    from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus

    from quantcache.serving import _host, attention
    from quantcache.serving.pool import Int8Allocator, MemoryHandler


@pytest.fixture
def manager() -> Any:
    """transformers' own, of a model that attends by a function that notes what it gets."""
    model = llama()
    seen: list[dict[str, Any]] = []

    def note(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        table = _host.block_table_of(kwargs, 0)
        seen.append(
            {
                "mask": mask,
                "batch": query.shape[0],
                "store": _host.store_of(module, kwargs),
                "lengths": [lengths.tolist() for lengths in _host.lengths_of(kwargs)],
                "dtypes": {lengths.dtype for lengths in _host.lengths_of(kwargs)},
                "table": None if table is None else table.clone(),  # the next batch writes into it
            }
        )
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("of_a_test", note)

    class Manager(_host.Manager):
        def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
            model.set_attn_implementation("of_a_test")

    made = Manager(model, greedy(3), pool(max_blocks_per_request=8))
    made.seen = seen
    yield made
    made.destroy()
    AttentionInterface._global_mapping.pop("of_a_test")


def run(manager: Any, prompts: list[list[int]]) -> Any:
    """Its processor after it has served the prompts in this thread."""
    manager.continuous_batching_config.max_blocks_per_request = 8
    with _host.making_caches_of(Int8Allocator, MemoryHandler):
        manager.batch_processor = processor = manager._create_batch_processor()
    _host.hand_stores_to_layers(processor.cache)
    for index, tokens in enumerate(prompts):
        processor.input_queue.put(RequestState(request_id=f"{index}", initial_tokens=tokens, max_new_tokens=3))
    while processor.prepare_next_batch():
        assert _host.tokens_in_batch(processor) > 0
        manager._generation_step()
        processor.update_batch()
    return processor


def test_a_cache_is_made_of_the_classes_that_are_put_in_place_and_in_this_thread_alone() -> None:
    assert host_cache.ATTN_TYPE_TO_ALLOCATOR["full_attention"] is FullAttentionCacheAllocator
    made: dict[str, Any] = {}

    def make(name: str) -> None:
        model = llama()
        made[name] = continuous_api.ContinuousBatchingManager(model, greedy(), pool())._create_batch_processor().cache

    with _host.making_caches_of(Int8Allocator, MemoryHandler):
        assert host_cache.ATTN_TYPE_TO_ALLOCATOR["full_attention"].supports_block_table
        make("here")
        thread = threading.Thread(target=make, args=("elsewhere",))
        thread.start()
        thread.join()
    assert type(made["here"].cache_allocators["full_attention"]) is Int8Allocator
    assert type(made["elsewhere"].cache_allocators["full_attention"]) is FullAttentionCacheAllocator
    assert host_cache.ATTN_TYPE_TO_ALLOCATOR["full_attention"] is FullAttentionCacheAllocator
    assert host_cache.PagedAttentionMemoryHandler is _host.MemoryHandler
    # The same bytes, to a sector, which hold more blocks.
    here, there = (made[name].cache_allocators["full_attention"] for name in ("here", "elsewhere"))
    assert 0 <= here.num_blocks * here.bytes_per_block - there.num_blocks * there.bytes_per_block < 2 * 128 * 1024
    assert here.num_blocks > 1.8 * there.num_blocks


def test_allocators_have_the_methods_that_are_overridden() -> None:
    for name in (
        "get_bytes_per_page",
        "register_cache_tensor",
        "_compute_blocks_needed",
        "get_read_indices",
        "get_write_indices",
        "fill_block_table",
        "free_all_requests",
    ):
        ours, theirs = (inspect.signature(getattr(cls, name)) for cls in (Int8Allocator, FullAttentionCacheAllocator))
        assert list(ours.parameters) == list(theirs.parameters), name
    for name in ("num_attention_masks", "kv_heads_at_peak", "io_multiplier", "num_groups"):
        assert f"self.{name}" in inspect.getsource(_host.MemoryHandler), name
    assert isinstance(_host.MemoryHandler.bytes_per_cache_token, property)


def test_managers_have_the_methods_that_are_overridden_or_called() -> None:
    for name in (
        "switch_to_cb_friendly_attn",
        "_create_batch_processor",
        "_generation_step",
        "warmup",
        "start",
        "stop",
        "destroy",
        "add_request",
        "add_requests",
        "is_running",
    ):
        assert callable(getattr(_host.Manager, name)), name
    source = inspect.getsource(_host.Manager)
    for name in (
        "_generation_thread",
        "_original_attn_impl",
        "_request_counter",
        "batch_processor",
        "distributed_helper",
    ):
        assert f"self.{name}" in source, name
    assert callable(continuous_api.OutputRouter.fail_and_deliver)


def test_a_batch_tells_its_lengths_and_its_blocks(manager: Any) -> None:
    processor = run(manager, [prompt(70), prompt(5)])
    allocator, layers = _host.allocator_of(processor), 2
    first, second = manager.seen[0], manager.seen[layers]
    for call in manager.seen:
        assert call["store"] is allocator
        assert call["mask"] is None
        assert call["batch"] == 1
        assert call["dtypes"] == {torch.int32}
    assert first["lengths"] == [[0, 70, 75], [0, 70, 75]]
    assert first["table"] is None
    assert second["lengths"] == [[0, 1, 2], [0, 71, 77]]
    assert (second["table"].shape, second["table"].dtype) == ((2, 8), torch.int32)
    assert [int((row >= 0).sum()) for row in second["table"]] == [5, 4]  # 71 and 6 tokens in float32


def test_outside_of_a_batch_there_is_no_store() -> None:
    assert _host.store_of(None, {}) is None
    assert _host.block_table_of({}, 0) is None


def test_a_request_that_is_started_again_tells_its_prompt() -> None:
    class Processor:
        class scheduler:  # noqa: N801 - as the attribute is called
            active_requests: dict[str, RequestState] = {}  # noqa: RUF012
            waiting_requests: dict[str, RequestState] = {}  # noqa: RUF012

    state = RequestState(request_id="a", initial_tokens=[1, 2, 3], max_new_tokens=9)
    Processor.scheduler.active_requests["a"] = state
    assert _host.prompt_len(Processor, "a") is None
    assert _host.prompt_len(Processor, "b") is None
    state.generated_tokens = [4, 5]
    again = state.create_equivalent_initial_request()
    Processor.scheduler.active_requests["a"] = again
    assert again.initial_tokens == [1, 2, 3, 4, 5]
    assert _host.prompt_len(Processor, "a") == 3
    again.generated_tokens = [6]
    Processor.scheduler.active_requests["a"] = again.create_equivalent_initial_request()
    assert _host.prompt_len(Processor, "a") == 3
    assert _host.has_request(Processor, "a")
    assert not _host.has_request(Processor, "b")


def test_a_scheduler_has_its_requests_by_name(manager: Any) -> None:
    scheduler = run(manager, []).scheduler
    assert scheduler.active_requests == scheduler.waiting_requests == {}


def test_a_model_takes_the_manager_that_it_has() -> None:
    model, asked = llama(), []

    class Manager(_host.Manager):
        pass

    manager = Manager(model, greedy(2), pool())

    def begin(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return manager

    own, calls = greedy(2), []

    @contextmanager
    def calling(*args: Any) -> Any:
        calls.append(args)
        yield args[0] or own

    assert _host.cached_manager(model) is None
    _host.cache_manager(model, manager, begin, calling)
    assert _host.cached_manager(model) is manager
    assert len(model.generate_batch([prompt(3)])) == 1
    assert asked[0][1]["generation_config"] is own
    given = greedy(3)
    model.generate_batch([prompt(3)], given, stop_strings=["a"], tokenizer="b")
    assert asked[1][1]["generation_config"] is given
    assert calls == [(None, None, None), (given, ["a"], "b")]
    assert set(asked[0][1]) == {"generation_config", "continuous_batching_config", "workload_hints"}
    _host.forget_manager(model)
    assert _host.cached_manager(model) is None
    assert model.generate_batch.__func__ is type(model).generate_batch


def test_a_failed_request_is_finished() -> None:
    router = continuous_api.OutputRouter()
    router.fail_and_deliver(_host.new_state("a", [1, 2]), ValueError("of a test"))
    output = router.output_queue.get_nowait()
    assert (output.request_id, output.prompt_ids, output.error) == ("a", [1, 2], "of a test")
    assert output.status == RequestStatus.FAILED
    assert output.is_finished()


def test_answers_are_named_as_transformers_names_them() -> None:
    assert _host.names_of_answers("a", 3) == ["a__child#0", "a__child#1", "a"]
    source = inspect.getsource(continuous_api.ContinuousMixin.generate_batch)
    assert 'f"{request_id}__child#{i}"' in source


def test_stop_strings_go_with_a_request_wherever_it_goes() -> None:
    state = RequestState("a", [1, 2, 3], max_new_tokens=9, logit_processor_kwargs={_host.STOP_STRINGS: ("x", "y")})
    state.generated_tokens = [4, 5]
    forked, again = state.fork("b"), state.create_equivalent_initial_request()
    sent = pickle.loads(pickle.dumps(again))
    for each in (forked, again, sent):
        assert each.logit_processor_kwargs[_host.STOP_STRINGS] == ("x", "y")
    assert forked._eos_token_ids is not state._eos_token_ids
    for each in (state, again, sent):
        assert list(_host.tokens_before(each, with_prompt=True)) == [5, 4, 3, 2, 1]
        assert list(_host.tokens_before(each, with_prompt=False)) == [5, 4]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_new_token_is_looked_at_before_its_request_is_updated(manager: Any, asynchronous: bool) -> None:
    kinds = (input_outputs.ContinuousBatchingIOs, input_outputs.ContinuousBatchingAsyncIOs)
    tokens, names, asked = [7, 8, 9, 6], ["a", "b", "c", "d"], []
    states = [RequestState(name, [1], logit_processor_kwargs={_host.STOP_STRINGS: ("x",)}) for name in names]
    for state in states:
        state.status = RequestStatus.DECODING
    states[2].status = RequestStatus.PENDING  # it has lost its blocks
    states.append(RequestState("e", [1]))
    states[4].status = RequestStatus.PREFILLING
    futures = [FutureRequestState(state, state is not states[4], {}, 1) for state in states]

    class Batches(kinds[asynchronous]):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def prepare_batch_update(self) -> Any:
            return futures, tokens, None

    processor = run(manager, [])
    active = {state.request_id: state for state in states if state.request_id != "d"}  # which was cancelled
    watched = SimpleNamespace(
        inputs_and_outputs=Batches(),
        scheduler=SimpleNamespace(active_requests=active),
        logit_processor=processor.logit_processor,
    )
    for _ in range(2):  # as often as the loop starts
        _host.watch_new_tokens(watched, lambda state, token: asked.append((state.request_id, token)) or token == 8)
    assert watched.inputs_and_outputs.prepare_batch_update() == (futures, tokens, None)
    assert asked == [("a", 7), ("b", 8)]
    assert states[3].status == RequestStatus.FINISHED
    assert not states[0].update_and_check_completion(7, None)
    assert states[1].update_and_check_completion(8, None)
    assert states[1].generated_tokens == [8]
    watched.logit_processor.check_kwargs({_host.STOP_STRINGS: ("x",)})
    with pytest.raises(ValueError, match=r"Unknown logit_processor_kwargs: \{'other'\}"):
        watched.logit_processor.check_kwargs({_host.STOP_STRINGS: ("x",), "other": 1})
    for kind in kinds:
        assert list(inspect.signature(kind.prepare_batch_update).parameters) == ["self"]
    source = inspect.getsource(continuous_api.ContinuousBatchProcessor)
    for name in ("self.inputs_and_outputs.prepare_batch_update()", "self.logit_processor.check_kwargs("):
        assert name in source, name


def test_a_token_has_the_text_that_generate_looks_at() -> None:
    tokenizer = tokenizer_of_pieces()
    texts = _host.text_of_tokens(tokenizer)
    assert texts.keys() == set(range(VOCAB))
    assert texts[0] == b"<s>"
    assert texts[2] + texts[3] == "é".encode()
    spelt = next(token for token, text in texts.items() if len(text) == 4 and token)
    assert texts[spelt].decode() == tokenizer.decode([spelt])


def test_settings_are_where_they_are_read_and_set() -> None:
    config, source = ContinuousBatchingConfig(), inspect.getsource(initialization)
    for name in (
        "page_size",
        "use_cuda_graph",
        "use_async_batching",
        "max_blocks_per_request",
        "cpu_offload_space",
        "varlen_compile_config",
        "decode_compile_config",
        "default_compile_level",
    ):
        assert hasattr(config, name), name
    for name in ("use_cuda_graph", "use_async_batching", "max_blocks_per_request"):
        assert f"cb_config.{name} = " in source, name
    config.use_cuda_graph = (False, True)
    assert config.cuda_graph_booleans == (False, True)
    assert GenerationConfig().eos_token_id is None


def test_the_name_of_the_attention_makes_no_masks_and_fetches_nothing() -> None:
    from transformers.generation.continuous_batching.utils import attn_mask_is_needed
    from transformers.utils.generic import is_flash_attention_requested

    attention.register()
    model = llama()
    model.set_attn_implementation(attention.NAME)
    assert model.config._attn_implementation == attention.NAME
    assert not attn_mask_is_needed(model.config)
    assert not is_flash_attention_requested(model.config)


def test_forward_passes_can_be_told_apart(manager: Any) -> None:
    processor = run(manager, [prompt(5)])
    assert processor.inputs_and_outputs.use_block_table
    assert processor.cache.max_decode_fast_path_length == 8 * 64
    assert processor.cache.max_blocks_per_request == 8
