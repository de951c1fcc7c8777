"""Does a cache of fixed capacity hold and read what the growing one does, compiled or not?"""

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import CompileConfig, Gemma2Config, GenerationMixin, Qwen2Config, Qwen2ForCausalLM, StaticCache

from quantcache import QuantizedInt8Cache
from quantcache.backends import dispatch
from quantcache.layers._host import cache_argument
from quantcache.layers.fixed import StaticInt8Layer
from quantcache.layers.growing import Int8Layer
from quantcache.quantization.errors import FallbackWarning
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import reads
from quantcache.store.fixed import StaticInt8Pages
from quantcache.store.growing import Int8Pages
from quantcache.store.tensor import Int8Tensor, read_recorded
from quantcache.store.view import PagesView
from tests.cases import NEWEST
from tests.conftest import compiler_warnings, devices, skip_without_gpu
from tests.strategies import random_states
from tests.test_generate import SIZES, prompt

CAPACITY = 7 * PAGE_SIZE + 17
HEADS, HEAD_DIM, V_HEAD_DIM = 2, 64, 80


def new_states(tokens: int, seed: int, device: str = "cpu", batch: int = 2) -> tuple[Tensor, Tensor]:
    """Keys and values as a model hands them over, of different widths."""
    key, _ = random_states(batch, tokens, HEADS, HEAD_DIM, seed=seed, device=device)
    value, _ = random_states(batch, tokens, HEADS, V_HEAD_DIM, seed=seed + 1000, device=device)
    return key.transpose(1, 2), value.transpose(1, 2)


@pytest.fixture
def frames() -> Any:
    """Graphs that dynamo has made since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]


def assert_same_bytes(static: StaticInt8Pages, growing: Int8Pages) -> None:
    static.close_due_pages()
    assert static.seq_len == growing.seq_len
    assert static.num_pages == growing.num_pages
    assert int(static.device_seq_len) == static.seq_len
    assert static.buffers.lengths.tolist()[:2] == [static.num_pages, static.key_tail.shape[2]]
    for have, want in zip(static.restore(), growing.restore(), strict=True):
        assert torch.equal(have, want)
    stored = [torch.cat(parts) for parts in zip(*growing.stored().segments, strict=True)]
    held = [torch.cat(parts) for parts in zip(*static.stored().segments, strict=True)]
    for have, want in zip(held, stored, strict=True):
        assert torch.equal(have, want)


class Attention(torch.nn.Module):
    """A decoding step of one layer: store, then read."""

    def __init__(self, layer: StaticInt8Layer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        states, _ = self.layer.update(key, value)
        options = AttentionOptions(mask, is_causal=mask is None)
        if isinstance(states, Int8Tensor):
            return reads.attention(query, states.pages_view, options)
        return read_recorded(states, query, options)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("residual_length", [0, 32, 100])
@pytest.mark.parametrize("chunks", [[1] * 200, [150, *[1] * 60], [40, 90, 1, 1, 64, 130, 1], [465], [95, 1, 1, 2, 300]])
def test_what_is_stored_is_what_the_growing_cache_stores(chunks: list[int], residual_length: int, device: str) -> None:
    static = StaticInt8Pages(*new_states(0, 0, device), CAPACITY, residual_length)
    growing = Int8Pages(*new_states(0, 0, device), residual_length)
    for index, tokens in enumerate(chunks):
        states = new_states(tokens, index, device)
        static.append(*states)
        growing.append(*states)
    assert_same_bytes(static, growing)


@pytest.mark.cuda
@skip_without_gpu
def test_more_heads_than_processors_are_stored_by_turns() -> None:
    """A CTA then takes several heads; none is left out, at a page's end either."""
    static = StaticInt8Pages(*new_states(0, 0, "cuda", batch=150), CAPACITY)
    growing = Int8Pages(*new_states(0, 0, "cuda", batch=150))
    for index, tokens in enumerate([90, *[1] * 75]):
        states = new_states(tokens, index, "cuda", batch=150)
        static.append(*states)
        growing.append(*states)
    assert_same_bytes(static, growing)


@given(
    operations=st.lists(
        st.tuples(
            st.sampled_from(["append", "append", "append", "append_recorded", "crop", "reorder", "reset"]),
            st.sampled_from([1, 1, 1, 2, 31, 33, 64, 97, 130]),
        ),
        max_size=25,
    )
)
def test_any_schedule_leaves_the_bytes_of_the_growing_cache(operations: list[tuple[str, int]]) -> None:
    static, growing = StaticInt8Pages(*new_states(0, 0), CAPACITY), Int8Pages(*new_states(0, 0))
    for index, (name, number) in enumerate(operations):
        if name.startswith("append") and growing.seq_len + number <= CAPACITY:
            states = new_states(number, index)
            getattr(static, name)(*states)
            growing.append(*states)
        elif name == "crop":
            # As the host's layer does before: both see a page that is due as closed.
            static.close_due_pages()
            number = min(number, growing.seq_len)
            static.crop(number)
            growing.crop(number)
        elif name == "reorder":
            order = torch.tensor([number % 2, (number + 1) % 2])
            static.index_select(order)
            growing.index_select(order)
        elif name == "reset":
            static.reset()
            growing = Int8Pages(*new_states(0, 0))
    if growing.seq_len:
        assert_same_bytes(static, growing)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_compiled_step_reads_what_an_uncompiled_one_reads(device: str, with_mask: bool) -> None:
    """Over page ends, in single tokens and chunks; the mask is as wide as the capacity, as transformers makes it."""
    eager, compiled = (StaticInt8Layer(CAPACITY) for _ in range(2))
    prompt_states = new_states(70, 0, device)
    for layer in (eager, compiled):
        layer.update(*prompt_states)
    torch._dynamo.reset()
    step = torch.compile(Attention(compiled), fullgraph=True, backend="aot_eager", dynamic=False)
    length = 70
    for index, tokens in enumerate([1] * 40 + [5, 1, 70, 1, 1, 5]):
        length += tokens
        query = random_states(2, 4 * HEADS, tokens, HEAD_DIM, seed=index, device=device)[0]
        mask = None
        if with_mask:
            keys = torch.arange(CAPACITY, device=device)
            mask = (keys <= torch.arange(length - tokens, length, device=device)[:, None]) & (keys >= 9)
            mask = mask.expand(2, 1, tokens, CAPACITY)
        states = new_states(tokens, index, device)
        with torch.no_grad():
            expected, actual = Attention(eager)(query, *states, mask), step(query, *states, mask)
        assert torch.equal(eager.pages.buffers.lengths, compiled.pages.buffers.lengths)
        # On a GPU other splits of the same tokens round other 16-bit weights.
        tolerance = 1e-5 if device == "cpu" else 2e-3
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert_same_bytes(compiled.pages, _grown_alike(70, [1] * 40 + [5, 1, 70, 1, 1, 5], device))


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("reordered_first", [True, False])
def test_a_compiled_step_stays_valid_after_reorderings(reordered_first: bool, device: str, frames: Any) -> None:
    """One graph, at the addresses it knows, recorded before the first of them or behind; no page is copied."""
    grown, layer = Int8Layer(), StaticInt8Layer(CAPACITY)
    for each in (grown, layer):
        each.update(*new_states(150, 0, device, batch=3))
        if reordered_first:
            each.reorder_cache(torch.tensor([2, 0, 0], device=device))
    addresses = [part.data_ptr() for part in layer.pages.buffers]
    pages = layer.pages.buffers.pages.key_qdata[:1].clone()
    step = torch.compile(Attention(layer), fullgraph=True, backend="aot_eager", dynamic=False)
    for index in range(150):
        query = random_states(3, 4 * HEADS, 1, HEAD_DIM, seed=index, device=device)[0]
        states = new_states(1, index, device, batch=3)
        with torch.no_grad():
            view = grown.update(*states)[0].pages_view
            torch.testing.assert_close(step(query, *states), reads.attention(query, view), rtol=2e-3, atol=2e-3)
        if index % 40 == 20:
            order = torch.tensor([[1, 0, 2], [2, 2, 1]][index % 3 % 2], device=device)
            for each in (grown, layer):
                each.reorder_cache(order)
    assert frames() == 1
    assert [part.data_ptr() for part in layer.pages.buffers] == addresses
    follows = dispatch.BACKENDS[layer.pages.backend[0]].READS_ROW_TABLE
    assert torch.equal(layer.pages.buffers.pages.key_qdata[:1], pages) == follows
    assert_same_bytes(layer.pages, grown.pages)


@pytest.mark.cuda
@skip_without_gpu
def test_a_captured_graph_stays_valid_after_the_first_reordering() -> None:
    """Replayed as it is, at the addresses it knows, without a copy of a page."""
    grown, layer = Int8Layer(), StaticInt8Layer(CAPACITY)
    for each in (grown, layer):
        each.update(*new_states(150, 0, "cuda", batch=3))
    step = torch.compile(Attention(layer), fullgraph=True, backend="aot_eager", dynamic=False)
    query = random_states(3, 4 * HEADS, 1, HEAD_DIM, device="cuda")[0]
    held = new_states(1, 0, "cuda", batch=3)

    def fed(index: int) -> PagesView:
        for part, new in zip(held, new_states(1, index, "cuda", batch=3), strict=True):
            part.copy_(new)
        return grown.update(*(part.clone() for part in held))[0].pages_view

    with torch.no_grad():
        for index in range(3):
            fed(index)
            step(query, *held)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = step(query, *held)
        pages = layer.pages.buffers.pages.key_qdata[:1].clone()
        for index in range(3, 150):
            view = fed(index)
            graph.replay()
            torch.testing.assert_close(output, reads.attention(query, view), rtol=2e-3, atol=2e-3)
            if index % 40 == 20:
                for each in (grown, layer):
                    each.reorder_cache(torch.tensor([[1, 0, 2], [2, 2, 1]][index % 3 % 2], device="cuda"))
    layer.pages.is_stale = True  # a replay tells the host nothing
    assert torch.equal(layer.pages.buffers.pages.key_qdata[:1], pages)
    assert_same_bytes(layer.pages, grown.pages)


def _grown_alike(first: int, chunks: list[int], device: str) -> Int8Pages:
    growing = Int8Pages(*new_states(0, 0, device))
    growing.append(*new_states(first, 0, device))
    for index, tokens in enumerate(chunks):
        growing.append(*new_states(tokens, index, device))
    return growing


def test_whether_steps_can_be_compiled_is_asked_again_for_other_states(monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(key_states: Tensor, value_states: Tensor) -> str | None:
        return "no kernels take float64" if key_states.dtype == torch.float64 else None

    monkeypatch.setattr(dispatch, "why_not_recorded", why_not)
    layer = StaticInt8Layer(CAPACITY)
    layer.update(*(states.double() for states in new_states(100, 0)))
    assert not layer.is_compileable
    assert layer.report(0).reason == "not compiled: no kernels take float64"
    layer.reset()
    layer.update(*new_states(100, 0))
    assert layer.is_compileable


@pytest.mark.parametrize("device", devices())
def test_nothing_behind_the_last_token_is_read(device: str) -> None:
    layer = StaticInt8Layer(CAPACITY)
    layer.update(*new_states(200, 1, device))
    query = random_states(2, HEADS, 1, HEAD_DIM, device=device)[0]
    scratch = layer._common.scratch
    recorded = [layer.pages.memory, scratch], layer.pages.layout.shape
    expected = reads.attention_recorded(query, *recorded)
    pages, tail_len = layer.pages.num_pages, layer.pages.key_tail.shape[2]
    for part in layer.pages.buffers.pages:
        part[pages:] = -128 if part.dtype == torch.int8 else 0x7FC0
    for tail in layer.pages.buffers[4:6]:
        tail[:, :, tail_len:] = torch.nan
    assert torch.equal(reads.attention_recorded(query, *recorded), expected)
    for is_key in (True, False):
        dense = reads.restore_recorded(*recorded, torch.float32, is_key)
        assert torch.equal(dense[:, :, :200], layer.pages.restore()[0 if is_key else 1])
        assert not dense[:, :, 200:].any()


def tiny_model(device: str = "cpu", **options: Any) -> GenerationMixin:
    torch.manual_seed(1)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, **options)).eval().to(device)


def compiled_with(backend: str) -> CompileConfig:
    """What makes ``generate()`` compile on a CPU, too."""
    config = CompileConfig(backend=backend, fullgraph=True, mode="default" if backend == "inductor" else None)
    config._compile_all_devices = True
    return config


def generated(model: GenerationMixin, cache: object, ids: Tensor, **options: Any) -> Tensor:
    return model.generate(ids, **cache_argument(cache), do_sample=False, **{"max_new_tokens": 70, **options})


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generate_compiles_the_step_once_and_gives_the_tokens_of_the_growing_cache(attention: str, frames: Any) -> None:
    """Left-padded, over two page ends; then again in the same memory, without another compilation."""
    model = tiny_model(attn_implementation=attention)
    ids = prompt(100, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :13] = 0
    options = {"attention_mask": mask, "compile_config": compiled_with("aot_eager")}
    expected = generated(model, QuantizedInt8Cache(model.config), ids, **(options | {"compile_config": None}))
    cache = QuantizedInt8Cache.for_generate(model, ids, max_new_tokens=70)
    assert torch.equal(generated(model, cache, ids, **options), expected)
    assert frames() == 1
    rows = cache.report().layers
    assert [row.seq_len for row in rows] == [169, 169]
    assert all(row.kernel.endswith(", compiled") for row in rows)
    cache.reset()
    other = prompt(90, batch=2, seed=9)
    expected = generated(model, QuantizedInt8Cache(model.config), other)
    assert torch.equal(generated(model, cache, other, **(options | {"attention_mask": None})), expected)
    assert frames() == 1


def test_inductor_copies_nothing_of_the_cache(frames: Any) -> None:
    from torch._inductor.utils import run_and_get_code

    model = tiny_model()
    cache = QuantizedInt8Cache(model.config, max_cache_len=CAPACITY)
    with torch.no_grad():
        model(prompt(150), **cache_argument(cache))
        step = torch.compile(model.forward, fullgraph=True)
        mask = (torch.arange(CAPACITY) <= 150)[None, None, None]
        arguments = {**cache_argument(cache), "attention_mask": mask, "position_ids": torch.tensor([[150]])}
        exact = copy.deepcopy(cache)
        output, (code,) = run_and_get_code(step, prompt(1), **arguments)
        expected = model(prompt(1), **(arguments | {**cache_argument(exact)})).logits
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    size = f"({len(cache.layers[0].pages.memory)}, )"
    assert size in code, "the memory is an argument of the compiled code"
    made = [line for line in code.splitlines() if "empty_strided" in line and "= empty" in line]
    assert made
    assert not [line for line in made if "int8" in line or size in line]
    assert "copy_" not in code.split("def call")[1].replace("_to_copy", "")


@pytest.mark.cuda
@skip_without_gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@compiler_warnings
def test_generate_on_a_gpu_replays_one_cuda_graph(attention: str, frames: Any) -> None:
    """256 tokens over four page ends; their logits are those of the growing cache for the same tokens."""
    model = tiny_model("cuda", attn_implementation=attention)
    ids = prompt(100, batch=2).cuda()
    cache = QuantizedInt8Cache.for_generate(model, ids, max_new_tokens=256)
    options = {"max_new_tokens": 256, "return_dict_in_generate": True, "output_logits": True}
    output = generated(model, cache, ids, **options)
    assert frames() == 1
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    assert cache.report().layers[0].kernel == "cuda, compiled"
    growing, expected = QuantizedInt8Cache(model.config), []
    with torch.no_grad():
        step = ids
        for position in range(256):
            expected.append(model(step, **cache_argument(growing)).logits[:, -1].float())
            step = output.sequences[:, 100 + position, None]
    torch.testing.assert_close(torch.stack(list(output.logits)), torch.stack(expected), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_uncompiled_generate_gives_the_tokens_of_the_growing_cache(num_beams: int) -> None:
    model = tiny_model()
    ids = prompt(100, batch=2)
    options = {"num_beams": num_beams, "disable_compile": True}
    expected = generated(model, QuantizedInt8Cache(model.config), ids, **options)
    cache = QuantizedInt8Cache.for_generate(model, ids, max_new_tokens=70)
    assert torch.equal(generated(model, cache, ids, **options), expected)


@pytest.mark.parametrize("chunk", [None, pytest.param(64, marks=[pytest.mark.slow, pytest.mark.sweep])])
@pytest.mark.parametrize("device", devices())
def test_later_turns_around_compiled_steps_give_the_tokens_of_the_growing_cache(device: str, chunk: int | None) -> None:
    """Prompts, whole or in chunks, behind steps that are compiled."""
    if chunk and not NEWEST:
        pytest.skip("older transformers begins its chunks from the front, which is refused")
    torch._dynamo.reset()
    model = tiny_model(device)
    caches = QuantizedInt8Cache(model.config), QuantizedInt8Cache(model.config, max_cache_len=CAPACITY)
    said = []
    for cache in caches:
        ids = prompt(0, batch=2).to(device)
        compiling = {"disable_compile": True} if cache is caches[0] else {"compile_config": compiled_with("aot_eager")}
        for turn in range(3):
            ids = torch.cat([ids, prompt(100, batch=2, seed=turn).to(device)], dim=1)
            ids = generated(model, cache, ids, max_new_tokens=12, prefill_chunk_size=chunk, **compiling)
        said.append(ids)
    assert torch.equal(*said)
    assert {row.kernel.endswith(", compiled") for row in caches[1].report().layers} == {True}


def test_a_prompt_in_compiled_chunks_gives_the_tokens_of_one_that_is_not(frames: Any) -> None:
    model = tiny_model()
    ids = prompt(200, batch=2)
    expected = generated(model, QuantizedInt8Cache(model.config), ids, prefill_chunk_size=50)
    cache = QuantizedInt8Cache(model.config, max_cache_len=300)
    cache.early_initialization(2, 2, 16, torch.float32, torch.device("cpu"))
    options = {"prefill_chunk_size": 50, "compile_config": compiled_with("aot_eager")}
    assert torch.equal(generated(model, cache, ids, **options), expected)


def test_a_step_can_be_exported() -> None:
    model = tiny_model()
    cache = QuantizedInt8Cache(model.config, max_cache_len=CAPACITY)
    with torch.no_grad():
        model(prompt(150), **cache_argument(cache))
    twin = copy.deepcopy(cache)

    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            for index, layer in enumerate(cache.layers):
                self.register_buffer(f"memory_{index}", layer.pages.memory, persistent=False)

        def forward(self, ids: Tensor, mask: Tensor, position_ids: Tensor) -> Tensor:
            return self.model(ids, attention_mask=mask, position_ids=position_ids, **cache_argument(cache)).logits

    def arguments(position: int) -> tuple[Tensor, Tensor, Tensor]:
        mask = (torch.arange(CAPACITY) <= position)[None, None, None]
        return prompt(1, seed=position), mask, torch.tensor([[position]])

    exported = torch.export.export(Step(), arguments(150), strict=False).module()
    for position in (150, 151, 152):
        ids, mask, position_ids = arguments(position)
        with torch.no_grad():
            expected = model(ids, attention_mask=mask, position_ids=position_ids, **cache_argument(twin)).logits
            torch.testing.assert_close(exported(ids, mask, position_ids), expected, rtol=1e-5, atol=1e-5)


def test_windows_keep_the_static_layers_of_transformers() -> None:
    config = Gemma2Config(**SIZES, sliding_window=64, head_dim=16)
    ours = QuantizedInt8Cache(config, max_cache_len=256)
    theirs = StaticCache(config=config, max_cache_len=256)
    assert [type(layer).__name__ for layer in ours.layers] == ["StaticSlidingWindowLayer", "StaticInt8Layer"]
    assert [type(layer).__name__ for layer in theirs.layers] == ["StaticSlidingWindowLayer", "StaticLayer"]
    assert ours.is_compileable


@pytest.mark.parametrize("tokens", [1, 5])
def test_restored_states_have_the_shape_of_the_capacity(tokens: int) -> None:
    """However few tokens are in the tail; a model that reads them otherwise views and reshapes them."""
    layer = StaticInt8Layer(CAPACITY)
    layer.update(*new_states(70, 0))
    states, _ = layer.update(*new_states(tokens, 1))
    with pytest.warns(FallbackWarning):
        dense = states * 1
    assert dense.shape == states.shape == (2, HEADS, CAPACITY, HEAD_DIM)
    assert dense.is_contiguous()
    expected = torch.cat([new_states(70, 0)[0], new_states(tokens, 1)[0]], dim=2)
    assert torch.equal(dense[:, :, : 70 + tokens], expected)
    assert not dense[:, :, 70 + tokens :].any()


def test_memory_is_allocated_once_and_counted() -> None:
    layer = StaticInt8Layer(2048)
    layer.update(*new_states(100, 0))
    addresses = [part.data_ptr() for part in layer.pages.buffers]
    nbytes = layer.nbytes
    for index in range(300):
        layer.update(*new_states(1, index))
    layer.reset()
    layer.update(*new_states(1500, 0))
    assert [part.data_ptr() for part in layer.pages.buffers] == addresses
    assert layer.nbytes == nbytes
    exact = 4 * 2 * HEADS * 2048 * (HEAD_DIM + V_HEAD_DIM)
    assert nbytes < 0.34 * exact  # 1.06 of 4 bytes, and an exact tail of 96 tokens in 2048


@pytest.mark.parametrize("change", ["batch", "dtype"])
def test_after_a_reset_other_sequences_may_come(change: str) -> None:
    layer = StaticInt8Layer(CAPACITY)
    layer.update(*new_states(100, 0))
    scratch = layer._common.scratch
    layer.reset()
    states = new_states(200, 1, batch=3 if change == "batch" else 2)
    if change == "dtype":
        states = states[0].bfloat16(), states[1].bfloat16()
    growing = Int8Pages(states[0][:, :, :0], states[1][:, :, :0])
    layer.update(*states)
    growing.append(*states)
    assert_same_bytes(layer.pages, growing)
    assert layer._common.scratch is scratch


def test_a_full_cache_refuses_before_it_writes() -> None:
    layer = StaticInt8Layer(128)
    layer.update(*new_states(127, 0))
    layer.update(*new_states(1, 1))
    before = [part.clone() for part in layer.pages.buffers]
    with pytest.raises(ValueError, match=r"at most max_cache_len=128 tokens fit, got 1 more behind 128\. Make a cache"):
        layer.update(*new_states(1, 2))
    assert all(torch.equal(have, want) for have, want in zip(layer.pages.buffers, before, strict=True))


def test_generate_is_refused_before_the_step_that_does_not_fit(frames: Any) -> None:
    model, ids = tiny_model(), prompt(100)
    cache = QuantizedInt8Cache(model.config, max_cache_len=130)
    with pytest.raises(ValueError, match=r"at most max_cache_len=130 tokens fit, got 1 more behind 130"):
        generated(model, cache, ids, compile_config=compiled_with("aot_eager"))
    assert cache.layers[0].pages.seq_len == 130
    with pytest.raises(ValueError, match=r"at most max_cache_len=60 tokens fit, got 100 more behind 0"):
        generated(model, QuantizedInt8Cache(model.config, max_cache_len=60), ids)


def test_a_prompt_that_fills_most_of_the_capacity_is_not_refused() -> None:
    """Without padding transformers asks for the sizes of the mask twice."""
    model = tiny_model()
    ids = prompt(100)
    cache = QuantizedInt8Cache.for_generate(model, ids, max_new_tokens=5)
    expected = generated(model, QuantizedInt8Cache(model.config), ids, max_new_tokens=5)
    assert torch.equal(generated(model, cache, ids, max_new_tokens=5), expected)


def test_a_compiled_step_too_many_is_seen_afterwards() -> None:
    pages = StaticInt8Pages(*new_states(0, 0), 100)
    pages.append(*new_states(100, 0))
    before = pages.restore()[0]
    pages.append_recorded(*new_states(1, 1))
    with pytest.raises(RuntimeError, match=r"at most max_cache_len=100 tokens fit, compiled steps were given 101\."):
        pages.seq_len  # noqa: B018
    pages.reset()
    pages.append(*new_states(100, 0))
    assert torch.equal(pages.restore()[0], before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 20, "max_cache_len": 60}, r"the prompt and the new tokens, 50 \+ 20 = 70, got 60\."),
        ({"max_length": None}, r"must be limited, got neither max_new_tokens nor max_length\."),
    ],
)
def test_for_generate_refuses_with_the_numbers(options: dict[str, Any], message: str) -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        QuantizedInt8Cache.for_generate(model, {"input_ids": prompt(50)}, **options)


def test_for_generate_counts_what_generate_will_store() -> None:
    model = tiny_model()
    assert QuantizedInt8Cache.for_generate(model, prompt(50), max_new_tokens=14).get_max_length() == 64
    assert QuantizedInt8Cache.for_generate(model, {"input_ids": prompt(50)}, max_length=80).get_max_length() == 80
    assert QuantizedInt8Cache.for_generate(model, prompt(5), max_new_tokens=5, max_cache_len=99).get_max_length() == 99
    with pytest.raises(ValueError, match=r"must be token ids or have input_ids or inputs_embeds, got attention_mask\."):
        QuantizedInt8Cache.for_generate(model, {"attention_mask": prompt(5)}, max_new_tokens=5)


def test_what_a_fixed_capacity_cannot_do_is_refused() -> None:
    config = Qwen2Config(**SIZES)
    with pytest.raises(ValueError, match=r"max_cache_len needs the model's config, got config=None\."):
        QuantizedInt8Cache(max_cache_len=64)
    with pytest.raises(ValueError, match=r"max_cache_len must be at least 1 token, got 0\."):
        QuantizedInt8Cache(config, max_cache_len=0)
    with pytest.raises(TypeError, match=r"max_cache_len must be an int, got float\."):
        QuantizedInt8Cache(config, max_cache_len=64.0)
    layer = StaticInt8Layer(64)
    layer.update(*new_states(5, 0))
    with pytest.raises(ValueError, match=r"keeps its batch of 2 sequences, got 1\."):
        layer.batch_select_indices(torch.tensor([1]))


def test_a_compiled_step_that_restores_says_so() -> None:
    layer = StaticInt8Layer(CAPACITY)
    layer.update(*new_states(100, 0))
    torch._dynamo.reset()
    total = torch.compile(lambda key, value: layer.update(key, value)[0].sum(), backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pytest.warns(FallbackWarning, match=r"restoring it to full precision \(aten::sum"):
        total(*new_states(1, 1))


@pytest.mark.usefixtures("unknown_eager_attention")
def test_a_strict_cache_does_not_restore_in_a_compiled_step(frames: Any) -> None:
    model = tiny_model(attn_implementation="eager")
    cache = QuantizedInt8Cache(model.config, max_cache_len=200, strict=True)
    with pytest.raises(Exception, match=r"QuantizedInt8Cache\(strict=True\): every read must be int8 attention"):
        generated(model, cache, prompt(100), compile_config=compiled_with("aot_eager"))


@pytest.mark.parametrize("device", devices())
def test_offloaded_pages_of_a_fixed_capacity_come_back_as_they_were(device: str) -> None:
    """Offloaded before each call, in single tokens and chunks, over page ends, rollbacks and reorderings."""
    layer, plain = StaticInt8Layer(CAPACITY), StaticInt8Layer(CAPACITY)
    for step, tokens in enumerate([90, *[1] * 70, 130, 1, 1, 40, *[1] * 30]):
        for each in (layer, plain):
            each.update(*new_states(tokens, step, device))
            if step % 20 == 0:
                each.reorder_cache(torch.tensor([step // 20 % 2, 0]))
            if step in (30, 71):
                each.crop(-50)
        layer.pages.offload()
        assert layer.pages.is_offloaded
        assert not layer.pages.buffers.key_qdata.numel()
        if step % 3 == 0:
            layer.prefetch()
    assert layer.get_seq_length() == plain.get_seq_length()
    for have, want in zip(layer.pages.stored().segments[0], plain.pages.stored().segments[0], strict=True):
        assert torch.equal(have.cpu(), want.cpu())
    for have, want in zip(layer.pages.restore(), plain.pages.restore(), strict=True):
        assert torch.equal(have, want)
    layer.pages.offload()
    layer.reset()
    layer.update(*new_states(200, 1, device))
    growing = Int8Pages(*new_states(0, 0, device))
    growing.append(*new_states(200, 1, device))
    assert_same_bytes(layer.pages, growing)


@pytest.mark.parametrize("how", ["crop", "reorder_cache"])
def test_a_rollback_and_a_new_order_leave_offloaded_pages_in_host_memory(how: str) -> None:
    """Of every layer at once they would need the memory that offloading saves."""
    layer = StaticInt8Layer(CAPACITY)
    layer.update(*new_states(95, 0))
    for index in range(64 + 32 + 1):
        layer.update(*new_states(1, index))
    layer.pages.offload()
    getattr(layer, how)(-70 if how == "crop" else torch.tensor([1, 0]))
    assert layer.pages.is_offloaded
    assert layer.report(0).storage == "int8 static, in host memory"


@pytest.mark.parametrize("how", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("is_back", [False, True])
def test_a_copy_of_an_offloaded_layer_is_its_own(how: Any, is_back: bool) -> None:
    layer = StaticInt8Layer(CAPACITY)
    layer.update(*new_states(300, 0))
    layer.pages.offload()
    if is_back:
        layer.prefetch()
    expected = layer.pages.restore()
    branch = how(layer)
    branch.update(*new_states(100, 1))
    for have, want in zip(layer.pages.restore(), expected, strict=True):
        assert torch.equal(have, want)
    for have, want in zip(branch.pages.restore(), expected, strict=True):
        assert torch.equal(have[:, :, :300][:, :, :192], want[:, :, :192])
    assert branch.get_seq_length() == 400


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_offloading_cache_of_fixed_capacity_gives_the_tokens_of_a_resident_one(
    device: str, num_beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``generate()`` compiles nothing then. On a CPU pages are moved as on a GPU, to other memory."""
    model = tiny_model(device)
    ids = prompt(100, batch=2).to(device)
    resident = QuantizedInt8Cache(model.config, max_cache_len=200)
    expected = generated(model, resident, ids, num_beams=num_beams, disable_compile=True)
    cache = QuantizedInt8Cache(model.config, max_cache_len=200, offloading=True)
    if device == "cpu":
        monkeypatch.setattr(StaticInt8Layer, "offload", lambda layer: layer.pages.offload())
    assert not cache.is_compileable
    assert torch.equal(generated(model, cache, ids, num_beams=num_beams), expected)
    assert not cache.is_compileable
    assert any(layer.pages.is_offloaded for layer in cache.layers)
    assert cache.report().layers[0].reason == "not compiled: its pages are offloaded"


@pytest.mark.cuda
@skip_without_gpu
def test_offloading_a_fixed_capacity_leaves_two_layers_on_the_gpu() -> None:
    config = Qwen2Config(**{**SIZES, "num_hidden_layers": 8, "hidden_size": 1024, "num_attention_heads": 8})
    held = {}
    for offloading in (False, True):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        cache = QuantizedInt8Cache(config, max_cache_len=8192, offloading=offloading)
        for tokens in (4096, 1):
            for layer_idx in range(8):
                states = random_states(1, tokens, 8, 128, dtype=torch.float16, device="cuda")
                cache.update(*(state.transpose(1, 2) for state in states), layer_idx)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        held[offloading] = torch.cuda.memory_allocated() - before
        del cache, states
    assert held[True] < 0.3 * held[False]


@pytest.mark.parametrize("device", devices())
def test_a_fixed_capacity_can_be_offloaded_and_prefetched_by_hand(device: str) -> None:
    model = tiny_model(device)
    ids = prompt(150).to(device)
    cache = QuantizedInt8Cache(model.config, max_cache_len=CAPACITY)
    cache.prefetch(0)
    cache.offload(0)
    with torch.no_grad():
        model(ids, **cache_argument(cache))
        twin = copy.deepcopy(cache)
        cache.offload(0)
        cache.prefetch(0)
        cache.offload(1)
        assert cache.is_compileable == (device == "cpu")
        step = ids[:, :1]
        actual, expected = (model(step, **cache_argument(each)).logits for each in (cache, twin))
    assert torch.equal(actual, expected)


@pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")
@pytest.mark.parametrize("prefix", [40, 150])
@pytest.mark.parametrize("offloading", [False, True])
def test_a_forward_pass_with_gradients_is_that_of_the_growing_cache(prefix: int, offloading: bool) -> None:
    """Outside of ``torch.no_grad()``, with parameters that require gradients: prompt, chunk and token."""
    model = tiny_model()
    outputs = []
    for options in ({}, {"max_cache_len": CAPACITY, "offloading": offloading}):
        cache = QuantizedInt8Cache(model.config, **options)
        for tokens in (prefix, 5, 1):
            model.zero_grad()
            logits = model(prompt(tokens, seed=tokens), **cache_argument(cache)).logits
            logits.logsumexp(-1).sum().backward()
            outputs.append([logits.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        assert cache.get_seq_length() == prefix + 6
    for have, want in zip(outputs[3:], outputs[:3], strict=True):
        for one, other in zip(have, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("prefix", [40, 150])
def test_steps_that_are_never_compiled_read_the_tokens_there_are(prefix: int) -> None:
    """transformers makes masks as for a cache that grows: none for a token behind a prompt without padding."""
    config = Qwen2Config(**SIZES)
    cache = QuantizedInt8Cache(config, max_cache_len=CAPACITY, offloading=True)
    states = random_states(1, SIZES["num_key_value_heads"], prefix, 16)
    cache.update(*states, 0)
    for tokens in (1, 3):
        assert cache.get_mask_sizes(tokens, 0) == (cache.get_seq_length() + tokens, 0)
        key, value = cache.update(*(each[:, :, :tokens] for each in states), 0)
        assert key.shape[2] == value.shape[2] == cache.get_seq_length()


def test_a_full_cache_refuses_a_token_with_gradients_before_it_writes() -> None:
    layer = StaticInt8Layer(64)
    layer.update(*new_states(64, 0))
    key, value = new_states(1, 1)
    before = layer.pages.memory.clone()
    with pytest.raises(ValueError, match=r"at most max_cache_len=64 tokens fit"):
        layer.update(key.requires_grad_(), value)
    assert torch.equal(layer.pages.memory, before)
