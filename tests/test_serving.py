"""Does continuous batching over int8 blocks give what ``generate`` gives, and lose no request and no block?"""

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quantcache import serving
from quantcache.layers._host import cache_argument
from quantcache.quantization import reference
from quantcache.serving import versions
from tests.conftest import skip_without_gpu
from tests.serving_cases import (
    VOCAB,
    check_ledger,
    generated,
    greedy,
    llama,
    needs_known_host,
    pool,
    prompt,
    serve,
    top_of,
)

pytestmark = needs_known_host

LENGTHS = (1, 5, 63, 64, 65, 128, 200, 457, 1000)
PROMPTS = [prompt(length) for length in LENGTHS]


@pytest.fixture(autouse=True, scope="module")
def little_garbage() -> Iterator[None]:
    """transformers collects garbage whenever a manager stops, which takes a second with all of its modules loaded."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def expected(model: Any) -> list[list[int]]:
    return [generated(model, tokens, 70) for tokens in PROMPTS]


@pytest.fixture
def calls(model: Any) -> Iterator[list[int]]:
    """New tokens of each forward pass."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield seen
    hook.remove()


def tokens_of(outputs: dict[str, Any]) -> list[list[int]]:
    assert [output.error for output in outputs.values()] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs.values()]


def test_tokens_are_those_of_generate_for_prompts_of_any_length_in_one_pool(
    model: Any, expected: list[list[int]], calls: list[int]
) -> None:
    exact = model.generate(torch.tensor([PROMPTS[-2]]), **cache_argument(DynamicCache()), generation_config=greedy(70))
    assert exact[0, LENGTHS[-2] :].tolist() != expected[-2]  # so that equality says something of int8
    calls.clear()
    outputs = serving.generate_batch(model, PROMPTS, pool(), greedy(70))
    assert tokens_of(outputs) == expected
    assert calls == [sum(LENGTHS), *[len(LENGTHS)] * 69]  # one batch of prompts, then the block table


def test_a_pool_too_small_for_all_starts_requests_again_and_changes_no_token(
    model: Any, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.generation.continuous_batching.requests import RequestState

    again: list[str] = []
    original = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState,
        "create_equivalent_initial_request",
        lambda state: again.append(state.request_id) or original(state),  # type: ignore[func-returns-value]
    )
    with serve(model, pool(4, safety_margin=0.0), greedy(70)) as manager:
        assert manager.report().blocks < sum(LENGTHS[:8]) // 64 + 8 * 4
        assert tokens_of(model.generate_batch(PROMPTS[:8])) == expected[:8]
    assert len(again) > 1


def test_prompts_in_chunks_decode_beside_others_and_are_near(model: Any, expected: list[list[int]]) -> None:
    with serve(model, pool(max_batch_tokens=80), greedy(30)) as manager:
        outputs = tokens_of(model.generate_batch(PROMPTS))
        # What came in whole is the same; what came in chunks attended to int8 for its own prompt.
        assert outputs[:3] == [tokens[:30] for tokens in expected[:3]]
        assert [len(tokens) for tokens in outputs] == [30] * len(PROMPTS)
        assert manager.report().steps_mixed >= sum(LENGTHS) // 80


def test_a_prefix_is_stored_once_and_fed_once(model: Any, calls: list[int]) -> None:
    shared = prompt(200)
    with serve(model, pool(allow_block_sharing=True), greedy(4)) as manager:
        model.generate_batch([shared + prompt(7)])
        assert manager.report().blocks_kept == 3
        calls.clear()
        model.generate_batch([shared + prompt(9), shared + prompt(30)])
        # Three pages of 64 are there; the first pass feeds what is behind them.
        assert calls[0] == 200 + 9 + 200 + 30 - 2 * 192
        assert manager.report().blocks_kept == 3


def test_pages_have_the_bytes_of_the_specification() -> None:
    """Of the first layer, whose keys and values do not depend on what attention read, by prompt and by decoding."""
    model, tokens = llama(dtype=torch.bfloat16), prompt(130)
    with serve(model, pool(allow_block_sharing=True), greedy(80)) as manager:
        (new,) = tokens_of(model.generate_batch([tokens]))
        allocator = manager._allocator()
        blocks = list(allocator.ledger.hash_to_block.values())
        assert len(blocks) == (130 + 79) // 64
        exact = DynamicCache()
        model(torch.tensor([tokens]), **cache_argument(exact))
        for token in new[:-1]:
            model(torch.tensor([[token]]), **cache_argument(exact))
        layer = exact.layers[0]
        made = (
            *reference.quantize_key_pages(layer.keys[:, :, :192]),
            *reference.quantize_value_pages(layer.values[:, :, :192]),
        )
        for part, whole in zip(allocator.layout.parts(allocator._layers[0]), made, strict=True):
            assert torch.equal(part[blocks], whole[:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("device", "records"),
    [("cpu", False), *(pytest.param("cuda", on, marks=[pytest.mark.cuda, skip_without_gpu]) for on in (False, True))],
)
def test_tokens_in_16_bits_are_the_best_of_the_exact_model(dtype: torch.dtype, device: str, records: bool) -> None:
    """But for near ties; on a GPU by the kernels, in steps that are recorded and asynchronous or neither."""
    model = llama(dtype, head_dim=64, hidden_size=128, initializer_range=0.1).to(device)
    config = pool(use_cuda_graph=(False, records), max_batch_tokens=1024, max_requests_per_batch=8)
    with serve(model, config, greedy(70)) as manager:
        report = manager.report()
        assert report.records is records
        if device == "cuda":
            assert (report.backend, report.reason) == ("cuda", None)
        for prompts in (PROMPTS[:7], PROMPTS[2:5]):
            for tokens, new in zip(prompts, tokens_of(model.generate_batch(prompts)), strict=True):
                with torch.no_grad():
                    logits = (
                        model(torch.tensor([tokens + new[:-1]], device=device)).logits[0, len(tokens) - 1 :].float()
                    )
                chosen = logits.gather(1, torch.tensor(new, device=device)[:, None])[:, 0]
                assert float(((logits.amax(-1) - chosen) / logits.std(-1)).max()) < 0.15


@pytest.mark.parametrize("length", [1, 2, 65, 200])
def test_several_answers_share_the_prompt(model: Any, length: int) -> None:
    tokens = prompt(length)
    with serve(model, pool(allow_block_sharing=True), top_of(3)) as manager:
        outputs = tokens_of(model.generate_batch([tokens, tokens]))
        assert len(outputs) == 6
        if length < 64:  # the last token of a longer prompt, fed after the others, attends to int8
            assert outputs == [generated(model, tokens)] * 6
        again = tokens_of(model.generate_batch([tokens]))
        assert len(again) == 3
        assert manager.report().blocks_kept == (length + 23) // 64


def test_a_request_streams_and_the_loop_starts_by_itself(model: Any, expected: list[list[int]]) -> None:
    with serve(model, pool(), greedy(70)) as manager:
        assert not manager.is_running()
        for index in (3, 4):
            name = manager.add_request(PROMPTS[index], max_new_tokens=9, streaming=True)
            seen = [output.generated_tokens for output in manager.request_id_iter(name)]
            assert [len(tokens) for tokens in seen] == list(range(1, 10))
            assert seen[-1] == expected[index][:9]
        assert manager.is_running()
        manager.stop()
        assert tokens_of(model.generate_batch(PROMPTS[:2], max_new_tokens=5)) == [t[:5] for t in expected[:2]]


def test_generate_takes_the_pool_as_its_paged_cache(model: Any, expected: list[list[int]]) -> None:
    with serve(model, pool(), greedy(70)):
        for _ in range(2):
            output = model.generate(
                torch.tensor([PROMPTS[5]]), generation_config=greedy(12), cache_implementation="paged"
            )
            assert output[0, 0, LENGTHS[5] :].tolist() == expected[5][:12]


def test_each_request_can_sample_by_itself(model: Any, expected: list[list[int]]) -> None:
    config = greedy(30, do_sample=True, top_k=VOCAB - 1, temperature=2.0)
    with serve(model, pool(per_request_processors=True), config) as manager:
        names = [manager.add_request(PROMPTS[5], top_k=1), manager.add_request(PROMPTS[5])]
        outputs = dict.fromkeys(names)
        while not all(outputs.values()):
            if (output := manager.get_result(timeout=1)) is not None:
                outputs[output.request_id] = output.generated_tokens
        assert outputs[names[0]] == expected[5][:30]
        assert outputs[names[1]] != expected[5][:30]


def test_a_cancelled_request_gives_its_blocks_back_and_others_go_on(model: Any, expected: list[list[int]]) -> None:
    with serve(model, pool(), greedy(70)) as manager:
        long = manager.add_request(PROMPTS[6], max_new_tokens=2000, streaming=True)
        other = manager.add_request(PROMPTS[5], max_new_tokens=70)
        waiting = manager.get_result(timeout=20)
        assert waiting is not None
        assert waiting.request_id == long
        manager.cancel_request(long)
        while (output := manager.get_result(timeout=20)).request_id != other:
            assert output.request_id == long
        assert output.generated_tokens == expected[5]


def test_a_refused_request_leaves_the_others_going_on(model: Any, expected: list[list[int]]) -> None:
    with serve(model, pool(20), greedy(70)) as manager:
        most = manager.report().most_tokens
        bad = [[], prompt(most + 1), prompt(most - 60), [3, VOCAB], [-1]]
        outputs = list(model.generate_batch([PROMPTS[0], *bad, PROMPTS[5]]).values())
        assert [outputs[0].generated_tokens, outputs[-1].generated_tokens] == [expected[0], expected[5]]
        says = [
            "must have a token",
            f"must fit the pool, {most} tokens, got {most + 1}",
            "up to 70 new",
            "got 211",
            "got -1",
        ]
        for output, words in zip(outputs[1:-1], says, strict=True):
            assert words in output.error
            assert output.is_finished()
        name = manager.add_request(PROMPTS[5], max_new_tokens=60, streaming=True)
        for tokens, words in zip(bad, says, strict=True):
            with pytest.raises(ValueError, match=words):
                manager.add_request(tokens, max_new_tokens=70)
        manager.get_result(timeout=20)
        with pytest.raises(ValueError, match=f"a name of its own, got '{name}' again"):
            manager.add_request([1], request_id=name)
        *_, last = manager.request_id_iter(name)
        assert last.generated_tokens == expected[5][:60]
        # What just fits is served: the last token of an answer is not stored.
        (whole,) = tokens_of(model.generate_batch([prompt(most - 4)], max_new_tokens=5))
        assert len(whole) == 5


def test_a_refused_prompt_of_several_answers_gets_an_output_for_each(model: Any) -> None:
    with serve(model, pool(), top_of(3, 4)):
        outputs = model.generate_batch([[], prompt(3)])
        assert [output.error is not None for output in outputs.values()] == [True] * 3 + [False] * 3


def test_an_answer_without_a_limit_ends_where_there_is_no_more_room(model: Any) -> None:
    small = llama(max_position_embeddings=100)
    with serve(small, pool(), greedy(None)):
        assert [len(tokens) for tokens in tokens_of(small.generate_batch([prompt(90), prompt(97)]))] == [10, 3]
    with serve(model, pool(2), greedy(None)) as manager:
        (new,) = tokens_of(model.generate_batch([prompt(60)]))
        assert 60 + len(new) - 1 == manager.report().most_tokens
    with serve(model, pool(), greedy(None, max_length=40)):
        assert [len(tokens) for tokens in tokens_of(model.generate_batch([prompt(30)]))] == [10]


def test_the_model_has_its_own_attention_when_nothing_runs(model: Any, expected: list[list[int]]) -> None:
    with serve(model, pool(), greedy(70)) as manager:
        assert model.config._attn_implementation == "sdpa"
        assert generated(model, PROMPTS[5], 6) == expected[5][:6]
        model.generate_batch(PROMPTS[:1], max_new_tokens=2)
        assert generated(model, PROMPTS[5], 6) == expected[5][:6]
        manager.start()
        with pytest.raises(RuntimeError, match="must be left to its requests while they run"):
            model(torch.tensor([[1, 2]]))
    assert model.config._attn_implementation == "sdpa"
    for name in ("_cached_continuous_batching_manager", "generate_batch", "init_continuous_batching"):
        assert name not in vars(model)
    own = model.generate_batch(PROMPTS[:1], generation_config=greedy(3), continuous_batching_config=pool())
    assert len(tokens_of(own)) == 1  # by transformers' manager
    with pytest.raises(RuntimeError, match="it was closed"):
        manager.report()


def test_an_exception_in_the_context_ends_requests(model: Any) -> None:
    class OfTheUserError(Exception):
        pass

    before = threading.active_count()
    made = []

    def broken_off() -> None:
        with serving.int8_batching(model, pool(), greedy(70)) as manager:
            made.append(manager)
            manager.add_request(PROMPTS[3], max_new_tokens=2500, streaming=True)
            manager.get_result(timeout=20)
            raise OfTheUserError

    with pytest.raises(OfTheUserError):
        broken_off()
    assert not made[0].is_running()
    assert threading.active_count() == before
    assert model.config._attn_implementation == "sdpa"
    assert len(tokens_of(serving.generate_batch(model, PROMPTS[:1], pool(), greedy(2)))[0]) == 2


def test_a_call_can_sample_otherwise_and_the_next_as_before(model: Any, expected: list[list[int]]) -> None:
    with serve(model, pool(), greedy(70)) as manager:
        sampled = model.generate_batch(
            [PROMPTS[5]] * 2, generation_config=greedy(30, do_sample=True, top_k=VOCAB, temperature=3.0)
        )
        assert tokens_of(sampled)[0] != tokens_of(sampled)[1]
        assert tokens_of(model.generate_batch([PROMPTS[5]])) == [expected[5]]
        with pytest.raises(ValueError, match="must be given to int8_batching, got another one"):
            model.generate_batch([PROMPTS[5]], continuous_batching_config=pool(61))
        assert tokens_of(model.generate_batch([PROMPTS[5]], continuous_batching_config=pool())) == [expected[5]]
        manager.start()
        with pytest.raises(RuntimeError, match="must have one generation_config, got another one while"):
            model.generate_batch([PROMPTS[5]], generation_config=top_of(1))


@pytest.mark.parametrize(
    "make",
    [
        lambda sizes: Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32, num_key_value_heads=2)),
        lambda sizes: GraniteForCausalLM(GraniteConfig(**sizes, num_key_value_heads=4, attention_multiplier=0.5)),
        lambda sizes: GPT2LMHeadModel(GPT2Config(**sizes, n_positions=512, n_embd=64, n_layer=2, n_head=4)),
    ],
    ids=["qwen3", "granite", "gpt2"],
)
def test_other_architectures_give_the_tokens_of_generate(make: Any) -> None:
    torch.manual_seed(2)
    sizes = {"vocab_size": VOCAB, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if "GPT2" not in repr(make.__code__.co_names):
        sizes |= {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = make(sizes).eval()
    prompts = [prompt(length) for length in (3, 64, 150)]
    want = [generated(model, tokens) for tokens in prompts]
    assert tokens_of(serving.generate_batch(model, prompts, pool(), greedy())) == want


def test_a_report_says_what_the_pool_holds() -> None:
    model = llama(head_dim=128, num_hidden_layers=1, dtype=torch.bfloat16)
    exact_block = 2 * 2 * 128 * 64 * 2
    with serve(model, pool(100, allow_block_sharing=True), greedy(70)) as manager:
        report = manager.report()
        assert report.block_nbytes == 2 * (132 * 128 + 256)
        assert abs(report.blocks * report.block_nbytes - 100 * exact_block) <= report.block_nbytes
        assert report.tokens == 64 * report.blocks > 1.9 * 6400
        assert report.exact_nbytes == report.blocks * exact_block
        assert (report.open_blocks, report.most_tokens) == (2, report.tokens - 65)
        assert report.tokens_free == report.tokens
        name = manager.add_request(prompt(200), max_new_tokens=60, streaming=True)
        stream = manager.request_id_iter(name)
        next(stream)
        report = manager.report()
        assert report.requests_running == 1
        assert 5 <= report.blocks_used <= 6
        for _ in stream:
            pass
        manager.stop()
        report = manager.report()
        assert (report.blocks_used, report.blocks_kept, report.tokens_free) == (0, 4, report.tokens)
        assert (report.steps_mixed, report.steps_decoding, report.records) == (1, 59, False)
        text = str(report)
        for words in (
            f"{report.blocks} blocks",
            "1.91 x the tokens of bfloat16",
            "4 kept",
            report.backend,
            "59 decoding",
        ):
            assert words in text
        assert max(map(len, text.splitlines())) < 120


@pytest.mark.parametrize("percent", [0.25, 0.5])
def test_memory_percent_means_the_bytes_that_it_means_to_transformers(
    percent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.generation.continuous_batching import cache

    total, model = 40 << 20, llama(head_dim=128, dtype=torch.bfloat16)
    monkeypatch.setattr(cache, "get_device_and_memory_breakdown", lambda: (torch.device("cpu"), total, 0, 0))
    config = pool(None, max_memory_percent=percent, max_batch_tokens=64, max_requests_per_batch=8)
    with serve(model, config, greedy(2)) as manager:
        assert 0.9 * percent * total < manager.report().nbytes <= percent * total
    with pytest.raises(MemoryError):
        serving.create_manager(model, pool(20000, max_memory_percent=percent))
    assert "_cached_continuous_batching_manager" not in vars(model)
    assert model.config._attn_implementation == "sdpa"


def test_requests_from_many_threads_are_all_answered(model: Any, expected: list[list[int]]) -> None:
    answers: dict[str, list[int]] = {}
    with serve(model, pool(12, safety_margin=0.0), greedy(70)) as manager:

        def ask(index: int) -> None:
            manager.add_request(PROMPTS[index % 6], request_id=f"{index}", max_new_tokens=3 + index % 5)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while len(answers) < 40:
            output = manager.get_result(timeout=20)
            assert output is not None
            assert output.error is None
            answers[output.request_id] = output.generated_tokens
        manager.stop()
        check_ledger(manager)
    for index in range(40):
        assert answers[f"{index}"] == expected[index % 6][: 3 + index % 5]


def test_a_prompt_started_again_sees_what_it_saw(model: Any) -> None:
    """Where its answer has pages of its own, and in whatever parts it comes."""
    from quantcache.serving.pool import _cuts

    assert _cuts(0, 300, None) == []
    assert _cuts(0, 100, 100) == []
    assert _cuts(0, 300, 100) == [100, 128, 192, 256]
    assert _cuts(0, 256, 128) == [128, 192]
    assert _cuts(64, 30, 100) == []
    assert _cuts(110, 30, 100) == [128]
    assert _cuts(128, 64, 100) == []


def test_inference_mode_is_no_matter(model: Any, expected: list[list[int]]) -> None:
    with torch.inference_mode(), serve(model, pool(), greedy(70)):
        assert tokens_of(model.generate_batch(PROMPTS[4:6], max_new_tokens=5)) == [t[:5] for t in expected[4:6]]
    with torch.inference_mode():
        manager = serving.create_manager(model, pool(), greedy(70))
    name = manager.add_request(PROMPTS[5], max_new_tokens=5)
    assert next(manager.request_id_iter(name)).generated_tokens == expected[5][:5]
    serving.remove_manager(model)


def test_versions_are_those_that_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for release in ("5.20.2", "5.17.0", "5.25.0", "6.0.0"):
        monkeypatch.setattr(versions.transformers, "__version__", release)
        with pytest.raises(NotImplementedError, match=rf"must be 5\.21 to 5\.24.*got {release}\."):
            serving.create_manager(None)
        with pytest.raises(NotImplementedError, match=r"must be 5\.21 to 5\.24"):
            serving.__getattr__("Int8BatchingManager")
    for release in ("5.21.0", "5.22.2", "5.24.3"):
        monkeypatch.setattr(versions.transformers, "__version__", release)
        versions.check_version()
