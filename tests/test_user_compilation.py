"""Does a model that its user compiles take the cache as it takes transformers' own: once compiled, and right?"""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Cache,
    DynamicCache,
    GenerationMixin,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from quantcache import QuantizedInt8Cache
from quantcache.backends import dispatch
from quantcache.layers._host import cache_argument
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.fixed import StaticInt8Layer
from quantcache.quantization.errors import FallbackWarning
from tests.conftest import devices
from tests.test_generate import SIZES, prompt

CAPACITY = 320
PROMPT = 100
KINDS = ["growing", "growing without config", "fixed"]


def tiny_model(**options: Any) -> GenerationMixin:
    torch.manual_seed(1)
    return Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "num_hidden_layers": 2, **options})).eval()


def new_cache(kind: str, model: GenerationMixin, **options: Any) -> QuantizedInt8Cache:
    if kind == "growing without config":
        return QuantizedInt8Cache(**options)
    return QuantizedInt8Cache(model.config, max_cache_len=CAPACITY if kind == "fixed" else None, **options)


def generated(model: GenerationMixin, cache: Cache, new_tokens: int = 70, ids: Tensor | None = None) -> list[int]:
    """Tokens behind the prompt; ``generate()`` itself compiles nothing."""
    ids = prompt(PROMPT) if ids is None else ids
    options = {"do_sample": False, "max_new_tokens": new_tokens, "disable_compile": True}
    return model.generate(ids, **cache_argument(cache), **options)[0, ids.shape[1] :].tolist()


@torch.no_grad()
def continued(model: GenerationMixin, cache: Cache, ids: Tensor, new_tokens: int) -> list[int]:
    """Greedy tokens behind ``ids`` and what the cache holds."""
    tokens = []
    for _ in range(new_tokens):
        ids = model(ids, **cache_argument(cache)).logits[:, -1:].argmax(-1)
        tokens.append(int(ids))
    return tokens


@pytest.fixture
def graphs() -> Callable[[], int]:
    """Graphs that dynamo has made since the test began; a graph break makes more."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("eager", marks=[pytest.mark.slow, pytest.mark.sweep])]
)  # which is a part of the other, and below
@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_forward_is_compiled_no_more_often_than_for_transformers_own_cache(
    kind: str, backend: str, dynamic: bool | None, graphs: Callable[[], int]
) -> None:
    """A graph for the prompt and at most two for steps, however many there are; pages are closed between them."""
    model = tiny_model()
    expected = generated(model, new_cache(kind, model))
    model.forward = torch.compile(model.forward, backend=backend, dynamic=dynamic, fullgraph=True)
    assert generated(model, new_cache(kind, model), 12) == expected[:12]
    made = graphs()
    assert made <= 3
    cache = new_cache(kind, model)
    assert generated(model, cache) == expected
    assert graphs() == made, "neither more tokens nor another cache compile again"
    assert cache.get_seq_length() == PROMPT + 69
    assert cache.report().layers[0].storage.startswith("int8")


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_graphs_as_for_transformers_own_cache(kind: str, graphs: Callable[[], int]) -> None:
    made = []
    for cache_kind in ("theirs", kind):
        model = tiny_model(num_hidden_layers=1)
        before = graphs()
        model.forward = torch.compile(model.forward, backend="eager", fullgraph=True)
        generated(model, DynamicCache() if cache_kind == "theirs" else new_cache(kind, model), 6)
        made.append(graphs() - before)
        torch._dynamo.reset()
    assert made[1] <= made[0]


@pytest.mark.parametrize("part", ["whole", "inner", "layer", "method"])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_any_part_of_a_model_may_be_compiled(kind: str, part: str, graphs: Callable[[], int]) -> None:
    model = tiny_model()
    ids = prompt(PROMPT)
    expected = continued(model, new_cache(kind, model), ids, 30)
    step = model
    if part == "whole":
        step = torch.compile(model, backend="eager")
    elif part == "inner":
        model.model = torch.compile(model.model, backend="eager")
    elif part == "layer":
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    else:
        model.compile(backend="eager")
    assert continued(step, new_cache(kind, model), ids, 5) == expected[:5]
    made = graphs()
    assert continued(step, new_cache(kind, model), ids, 30) == expected
    assert graphs() == made
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_was_used_uncompiled_goes_on_compiled_and_back(kind: str, graphs: Callable[[], int]) -> None:
    """Prompt, rollback, copy and reset uncompiled; every step between them compiled."""
    model = tiny_model()
    step = torch.compile(model, backend="eager", fullgraph=True)
    caches = [new_cache(kind, model) for _ in range(2)]

    def both(act: Callable[[GenerationMixin, QuantizedInt8Cache], Any]) -> None:
        plain, compiled = act(model, caches[0]), act(step, caches[1])
        assert plain == compiled
        assert int(caches[0].get_seq_length()) == int(caches[1].get_seq_length())

    for cache in caches:
        continued(model, cache, prompt(PROMPT), 3)
    both(lambda run, cache: continued(run, cache, prompt(1, seed=5), 8))
    for cache in caches:
        cache.crop(-6)
    both(lambda run, cache: continued(run, cache, prompt(1, seed=6), 4))
    made = graphs()
    branch = copy.deepcopy(caches[1])
    continued(step, branch, prompt(1, seed=7), 4)
    both(lambda run, cache: continued(run, cache, prompt(1, seed=8), 70))
    assert graphs() == made
    for cache in caches:
        cache.reset()
        continued(model, cache, prompt(30), 1)
    both(lambda run, cache: continued(run, cache, prompt(1, seed=9), 90))


def test_another_capacity_is_compiled_for_itself(graphs: Callable[[], int]) -> None:
    model = tiny_model(num_hidden_layers=1)
    expected = continued(model, QuantizedInt8Cache(model.config), prompt(PROMPT), 4)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    for capacity in (128, 256, 300):
        cache = QuantizedInt8Cache(model.config, max_cache_len=capacity)
        assert continued(step, cache, prompt(PROMPT), 4) == expected


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_a_chunk_of_a_prompt_sees_itself_exactly(kind: str) -> None:
    torch._dynamo.reset()
    model = tiny_model()
    step = torch.compile(model, backend="eager", fullgraph=True)
    logits = []
    for run in (model, step):
        cache = new_cache(kind, model, residual_length=0)
        with torch.no_grad():
            run(prompt(PROMPT), **cache_argument(cache))
            logits.append(run(prompt(90, seed=4), **cache_argument(cache)).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_later_chunks_and_a_second_turn_are_those_of_an_uncompiled_model(kind: str, device: str) -> None:
    """A prompt in two chunks, an answer and a second turn, behind left padding; in 16 bits on a GPU."""
    torch._dynamo.reset()
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = tiny_model(hidden_size=256, num_hidden_layers=1).to(device, dtype)
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain, compiled = (new_cache(kind, model) for _ in range(2))
    exact = DynamicCache()
    ids = prompt(300, batch=2).to(device)
    seen = torch.ones_like(ids)
    seen[0, :13] = 0
    start = 0
    for new in (100, 90, 1, 1, 1, 70, 1):
        given = {"input_ids": ids[:, start : start + new], "attention_mask": seen[:, : start + new]}
        with torch.no_grad():
            want = model(**given, **cache_argument(plain)).logits
            have = step(**given, **cache_argument(compiled)).logits
            dense = model(**given, **cache_argument(exact)).logits
        start += new
        # Nobody reads the logits of padding.
        have, want, dense = (logits[:, max(13 - start + new, 0) :].double() for logits in (have, want, dense))
        assert (have - want).norm() <= (1e-4 if device == "cpu" else 1e-2) * want.norm()
        assert (want - dense).norm() <= 2e-2 * dense.norm()
        if new == 70:
            kernels = {row.kernel for row in compiled.report().layers}
            suffix = ", compiled" if kind == "fixed" else " prefill" if device == "cuda" else ""
            assert kernels == {dispatch.choose_backend(torch.device(device)) + suffix}
            assert {row.kernel for row in plain.report().layers} == {"cuda prefill" if device == "cuda" else "cpu"}
    assert int(compiled.get_seq_length()) == int(plain.get_seq_length()) == start
    for ours, theirs in zip(compiled.layers, plain.layers, strict=True):
        assert ours.pages.num_pages == theirs.pages.num_pages > 0


def test_the_cross_attention_of_a_compiled_model_reads_what_is_stored(graphs: Callable[[], int]) -> None:
    sizes = dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim"), 32)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, "forced_eos_token_id": None}
    torch.manual_seed(0)
    config = BartConfig(vocab_size=97, **sizes, **heads, **special, decoder_start_token_id=2)
    model = BartForConditionalGeneration(config).eval()
    options = {"max_new_tokens": 70, "do_sample": False, "disable_compile": True}
    ids = prompt(150)

    def tokens() -> list[int]:
        cache = QuantizedInt8Cache.for_encoder_decoder(config)
        return model.generate(ids, **cache_argument(cache), **options)[0].tolist()

    expected = tokens()
    model.forward = torch.compile(model.forward, backend="eager")
    assert tokens() == expected
    assert graphs() <= 3
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")
@pytest.mark.parametrize("trained", ["all", "queries"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_gradients_to_the_new_tokens_are_those_of_a_dense_cache(kind: str, compiled: bool, trained: str) -> None:
    """Fewer tokens than are ever quantised, so that the numbers are the same; earlier tokens are constants."""
    torch._dynamo.reset()
    model = tiny_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained == "all" or "q_proj" in name)
    gradients = []
    for cache in (DynamicCache(), new_cache(kind, model)):
        with torch.no_grad():
            model(prompt(40), **cache_argument(cache))
        is_ours = isinstance(cache, QuantizedInt8Cache)
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled and is_ours else model
        model.zero_grad()
        run(prompt(7, seed=3), **cache_argument(cache)).logits.logsumexp(-1).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert cache.get_seq_length() == 47
    for have, want in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_pages_are_offloaded_by_a_graph_too(
    kind: str, graphs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    expected = continued(model, new_cache(kind, model), prompt(PROMPT), 40)
    # On a CPU pages are moved as on a GPU, to other memory.
    monkeypatch.setattr(BaseInt8Layer, "offload", lambda layer: layer.pages.offload())
    monkeypatch.setattr(StaticInt8Layer, "offload", lambda layer: layer.pages.offload())
    step = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert continued(step, new_cache(kind, model, offloading=True), prompt(PROMPT), 4) == expected[:4]
    made = graphs()
    cache = new_cache(kind, model, offloading=True)
    assert continued(step, cache, prompt(PROMPT), 40) == expected
    assert graphs() == made
    assert [layer.pages.is_offloaded for layer in cache.layers] == [False, True]  # the first is on its way back


@pytest.mark.usefixtures("unknown_eager_attention")
@pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")
@pytest.mark.parametrize("kind", ["growing", "fixed"])
def test_a_read_that_restores_says_so_in_a_graph(kind: str) -> None:
    torch._dynamo.reset()
    model = tiny_model(attn_implementation="eager")
    cache = new_cache(kind, model, strict=True)
    step = torch.compile(model, backend="eager")
    with pytest.raises(Exception, match=r"QuantizedInt8Cache\(strict=True\): every read must be int8 attention"):
        continued(step, cache, prompt(PROMPT), 3)
    model.config._attn_implementation = "sdpa"
    cache = new_cache(kind, model)
    model.config._attn_implementation = "eager"
    expected = continued(model, QuantizedInt8Cache(model.config), prompt(PROMPT), 3)
    with pytest.warns(FallbackWarning):
        assert continued(torch.compile(model, backend="aot_eager"), cache, prompt(PROMPT), 3) == expected


def test_what_a_graph_reads_is_let_go_with_the_cache() -> None:
    from quantcache.store import traced

    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=1)
    cache = new_cache("growing", model)
    continued(torch.compile(model, backend="eager"), cache, prompt(PROMPT), 3)
    assert len(traced._newest) > 0
    cache.reset()
    assert not traced._newest
    continued(torch.compile(model, backend="eager"), cache, prompt(PROMPT), 3)
    del cache
    torch._dynamo.reset()
    gc.collect()
    assert not traced._newest


def test_a_graph_whose_cache_is_gone_says_so() -> None:
    from quantcache.store import traced

    handle = traced.handle_for(QuantizedInt8Cache())
    with pytest.raises(RuntimeError, match=r"a compiled graph needs the cache that it was called with, which is gone"):
        traced.look(handle, 0)


def test_inductor_gives_the_tokens_of_an_uncompiled_model() -> None:
    torch._dynamo.reset()
    model = tiny_model(num_hidden_layers=1)
    ids = prompt(PROMPT)
    caches = [QuantizedInt8Cache(model.config) for _ in range(2)]
    for cache in caches:
        continued(model, cache, ids, 1)
    expected = continued(model, caches[0], prompt(1, seed=5), 70)
    step = torch.compile(model, fullgraph=True, dynamic=True)
    assert continued(step, caches[1], prompt(1, seed=5), 70) == expected


@pytest.mark.slow
@pytest.mark.sweep
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_compiling_gives_the_tokens_of_an_uncompiled_model(
    kind: str, dynamic: bool | None, backend: str
) -> None:
    torch._dynamo.reset()
    model = tiny_model()
    expected = generated(model, new_cache(kind, model))
    model.forward = torch.compile(model.forward, backend=backend, dynamic=dynamic)
    assert generated(model, new_cache(kind, model)) == expected
