"""What does serving refuse at the start, and does it say what is in the way?"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from quantcache import serving
from quantcache.cli.serve import try_out
from quantcache.serving import refusals
from tests.file_cases import gemma, lfm
from tests.serving_cases import greedy, llama, needs_known_host, pool, prompt

pytestmark = needs_known_host


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=31, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (gemma, "all layers must be full_attention, Gemma3ForCausalLM has sliding_attention in layers 0, 2. Use"),
        (lfm, r"Lfm2ForCausalLM has conv in layer"),
        (t5, "must be a decoder, T5ForConditionalGeneration has an encoder"),
        (lambda: llama(dtype=torch.float64), r"must be one of float16, bfloat16, float32, got torch\.float64"),
        (lambda: llama().model, "the model must generate text, LlamaModel does not"),
        (lambda: torch.nn.Linear(2, 2), "the model must be one of transformers, loaded, got Linear"),
    ],
    ids=["sliding", "hybrid", "encoder-decoder", "float64", "no head", "no model"],
)
def test_a_model_that_blocks_do_not_hold_is_refused_with_its_layers(make: Any, words: str) -> None:
    model = make()
    before = dict(vars(model))
    with pytest.raises((NotImplementedError, TypeError), match=words):
        serving.create_manager(model, pool())
    assert vars(model) == before


@pytest.mark.parametrize(
    ("config", "attributes", "words"),
    [
        (
            {"layer_types": ["full_attention", *["linear_attention"] * 9]},
            {},
            "linear_attention in layers 1, .*and 1 more",
        ),
        ({"layers_block_type": ["attention", "mamba"]}, {}, "has mamba in layer 1"),
        ({"sliding_window": 8, "num_hidden_layers": 2}, {}, "has sliding_attention in layers 0, 1"),
        (
            {"layer_types": ["full_attention"], "kv_lora_rank": 8},
            {},
            r"has compressed keys and values \(kv_lora_rank\)",
        ),
        ({"layer_types": ["full_attention"], "num_kv_shared_layers": 1}, {}, "has layers that share keys and values"),
        ({"layer_types": ["full_attention"]}, {"_is_stateful": True}, "has a recurrent state"),
        ({"layer_types": ["full_attention"]}, {"hf_device_map": {"a": 1, "b": "cpu"}}, "on one device.* is on 1, cpu"),
        (
            {"layer_types": ["full_attention"]},
            {"_supports_attention_backend": False},
            "has attention of its own, not transformers' AttentionInterface",
        ),
    ],
)
def test_each_kind_of_model_has_its_reason(config: dict[str, Any], attributes: dict[str, Any], words: str) -> None:
    text = SimpleNamespace(**config)
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: text),
        dtype=torch.float32,
        **{"_supports_attention_backend": True, **attributes},
    )
    with pytest.raises(NotImplementedError, match=words):
        refusals.check_model(model)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_blocks": 0}, r"num_blocks must be a whole number from 1, got 0\."),
        ({"num_blocks": 2.5}, r"num_blocks must be a whole number from 1, got 2\.5\."),
        ({"max_batch_tokens": 0}, r"max_batch_tokens must be a whole number from 1, got 0\."),
        ({"max_requests_per_batch": -1}, r"max_requests_per_batch must be a whole number from 1, got -1\."),
        (
            {"num_blocks": None, "max_memory_percent": 1.5},
            r"max_memory_percent must be above 0 and at most 1, got 1\.5",
        ),
        ({"num_blocks": None, "max_memory_percent": 1e-9}, r"must fit in the 0\.0 MiB that they may have, got \d"),
        ({"num_blocks": 10**9}, r"the pool and a step of .* tokens must fit in the .* MiB .*, got .*,.*,.* MiB"),
        ({"page_size": 256}, r"page_size must be 64, the tokens of an int8 page, got 256\."),
        ({"default_compile_level": 1}, "must not be compiled, got default_compile_level"),
        ({"use_cuda_graph": (True, True)}, r"use_cuda_graph must be \(False, \.\.\.\).*got \(True, True\)"),
        ({"cpu_offload_space": 1.0}, r"cpu_offload_space must be 0 for a model on a CPU, got 1\.0"),
    ],
)
def test_settings_that_do_not_work_are_refused(changes: dict[str, Any], words: str) -> None:
    model = llama()
    with pytest.raises((ValueError, NotImplementedError, MemoryError), match=words):
        serving.create_manager(model, pool(**changes))
    assert "_cached_continuous_batching_manager" not in vars(model)


def test_arguments_of_another_kind_are_named() -> None:
    model, config = llama(), pool()
    for call, words in (
        (lambda: serving.create_manager(model, {"page_size": 64}), "must be a ContinuousBatchingConfig, got dict"),
        (lambda: serving.create_manager(model, config, config), "must be a GenerationConfig, got ContinuousBatching"),
        (lambda: serving.generate_batch(model, [prompt(3)], config, max_new_token=2), "options .*, got max_new_token"),
        (lambda: serving.generate_batch(model, ["hello"], config), "a prompt must be a list of tokens, .* got 'hello'"),
        (lambda: serving.generate_batch(model, [5, 6], config), "a prompt must be a list of tokens, .* got 5"),
        (
            lambda: serving.generate_batch(model, [[5, 6.5]], config),
            r"a prompt must be a list of tokens.* got \[5, 6\.5",
        ),
    ):
        with pytest.raises(TypeError, match=words):
            call()
        assert "_cached_continuous_batching_manager" not in vars(model)
    with serving.int8_batching(model, config, greedy(2)) as manager:
        for words, options in (
            ("a prompt must be a list", {"input_ids": "hello"}),
            ("max_new_tokens must be a whole number, got '3'", {"input_ids": prompt(3), "max_new_tokens": "3"}),
        ):
            with pytest.raises(TypeError, match=words):
                manager.add_request(**options)
        assert not manager.is_running(), "nothing is queued"
        outputs = model.generate_batch([prompt(3), torch.tensor(prompt(4))])
        assert [len(output.generated_tokens) for output in outputs.values()] == [2, 2]


def test_a_model_with_a_table_of_positions_refuses_what_is_behind_them() -> None:
    """It would fail in the middle of a step, and the requests of that step with it."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=211, n_positions=64)).eval()
    prompts = [prompt(64), prompt(10), prompt(65), prompt(62)]
    outputs = serving.generate_batch(model, prompts, pool(), greedy(2)).values()
    words = "must fit the 64 positions of the model, got 64 and up to 2 new ones"
    assert [len(output.generated_tokens) for output in outputs] == [0, 2, 0, 2]
    assert words in str(next(iter(outputs)).error)
    one = serving.generate_batch(model, prompts[:1], pool(), greedy(1))["req_0"]
    assert len(one.generated_tokens) == 1, "the last token has no position"


class Older(LlamaForCausalLM):
    """Its code looks for what a paged cache does not have."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise AttributeError("no get_seq_length")


def test_a_model_that_cannot_be_batched_says_so_for_each_request() -> None:
    model = Older(llama().config).eval()
    words = "the model must be one that transformers batches continuously, Older fails: no get_seq_length"
    outputs = serving.generate_batch(model, [prompt(3), prompt(4)], pool(), greedy(2))
    assert [words in str(output.error) for output in outputs.values()] == [True, True]
    with serving.int8_batching(model, pool(), greedy(2)) as manager, pytest.raises(ValueError, match=words):
        try_out(manager)


def test_trying_a_model_leaves_nothing_behind() -> None:
    with serving.int8_batching(llama(), pool(), greedy(2)) as manager:
        try_out(manager)
        assert manager.report().blocks_used == 0
        assert manager.get_result(timeout=0.1) is None


def test_offloading_and_asynchronous_batches_do_not_come_together() -> None:
    config = pool(cpu_offload_space=1.0, use_async_batching=True)
    with pytest.raises(NotImplementedError, match="cpu_offload_space and use_async_batching must not come together"):
        refusals.check_config(config, torch.device("cuda"))
    refusals.check_config(pool(cpu_offload_space=1.0), torch.device("cuda"))


@pytest.mark.parametrize(("changes", "name"), [({"num_beams": 2}, "num_beams"), ({"max_time": 2.0}, "max_time")])
def test_ways_to_generate_that_would_be_passed_over_are_refused(changes: dict[str, Any], name: str) -> None:
    model = llama()
    with pytest.raises(NotImplementedError, match=f"generation_config must have no {name}, .* got "):
        serving.create_manager(model, pool(), greedy(**changes))
    with (
        serving.int8_batching(model, pool(), greedy(2)),
        pytest.raises(NotImplementedError, match=f"must have no {name}"),
    ):
        model.generate_batch([prompt(3)], generation_config=greedy(**changes))
    refusals.check_generation(GenerationConfig())
    refusals.check_generation(GenerationConfig(num_beams=1))


def test_a_model_has_one_manager() -> None:
    model = llama()
    with serving.int8_batching(model, pool(), greedy(2)):
        with pytest.raises(ValueError, match="a model must have one manager, LlamaForCausalLM has one"):
            serving.create_manager(model, pool())
        with pytest.raises(ValueError, match="must have one manager"):
            serving.check(model)
        assert len(model.generate_batch([prompt(3)])) == 1
    serving.check(model)
    own = model.init_continuous_batching(greedy(2), ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=64))
    model._cached_continuous_batching_manager = own
    with pytest.raises(ValueError, match="must have one manager"):
        serving.create_manager(model, pool())
    serving.remove_manager(model)  # which is not ours to remove
    assert model._cached_continuous_batching_manager is own
    model.destroy_cached_continuous_batching_manager()


def test_options_of_attention_that_blocks_do_not_cover_are_named() -> None:
    from quantcache.serving.attention import attend_blocks

    store = SimpleNamespace(attend=lambda *args: None)
    states = torch.zeros(3, 1, 1, 1, 1)
    for option, value in (("position_bias", torch.zeros(1)), ("sliding_window", 4), ("dropout", 0.5)):
        with pytest.raises(NotImplementedError, match=f"attention must have no {option}"):
            attend_blocks(torch.nn.Module(), *states, None, int8_store=store, **{option: value})
    module = torch.nn.Module()
    module.layer_idx = 0
    attend_blocks(module, *states, None, int8_store=store, sliding_window=None, dropout=0.0)


def test_layers_out_of_turn_or_missing_are_noticed() -> None:
    model = llama()
    with serving.int8_batching(model, pool(), greedy(2)) as manager:
        allocator = manager._allocator()
        states = torch.zeros(1, 2, 1, 16)
        with pytest.raises(
            RuntimeError, match="layer 1 must attend in its turn and once in a forward pass, but layer 0"
        ):
            allocator.attend(1, states, states, states, {}, None)
        allocator._attended = 1
        with pytest.raises(RuntimeError, match=r"all 2 layers must attend .*, 1 did"):
            allocator.end_pass()
        assert len(model.generate_batch([prompt(3)])) == 1


def test_the_public_names_are_these() -> None:
    assert serving.__all__ == [
        "Int8BatchingManager",
        "ServingReport",
        "check",
        "create_manager",
        "generate_batch",
        "int8_batching",
        "remove_manager",
    ]
    for name in serving.__all__:
        assert getattr(serving, name).__doc__
    assert dir(serving) == serving.__all__
    with pytest.raises(AttributeError, match=r"module 'quantcache\.serving' has no attribute 'nothing'"):
        serving.nothing  # noqa: B018
