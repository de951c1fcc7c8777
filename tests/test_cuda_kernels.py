"""Do the CUDA kernels compute what the reference says, in every shape, mask and option, and nothing else?"""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcache.backends import cuda, dispatch
from quantcache.layers._host import cache_argument
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import reads
from quantcache.store.fixed import StaticInt8Pages
from quantcache.store.growing import Int8Pages
from quantcache.store.segments import ClosedPages, Segment
from quantcache.store.view import PagesView
from tests.attention_cases import Case, Stored, asked_of_cuda, build
from tests.conftest import skip_without_gpu
from tests.strategies import broken, make_states

pytestmark = [pytest.mark.cuda, skip_without_gpu]

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-3}
"""Largest ||output - expected|| / ||expected||."""

HEAD_DIMS = [(64, 64), (80, 80), (96, 96), (112, 112), (128, 128), (192, 192), (256, 256), (192, 128), (64, 128)]


def on_gpu(stored: Stored) -> Stored:
    """The same numbers on the GPU; segments as parts of larger memory, as a cache has them."""

    def move(tensor: Tensor) -> Tensor:
        whole = tensor._base if tensor._base is not None and tensor._base.dim() == tensor.dim() else tensor
        moved = torch.empty_strided(whole.shape, whole.stride(), dtype=whole.dtype, device="cuda").copy_(whole)
        return moved[: tensor.shape[0]] if whole is not tensor and whole.shape[0] != tensor.shape[0] else moved

    parts = (getattr(stored, name) for name in stored.__dataclass_fields__)
    return Stored(*(list(map(move, part)) if isinstance(part, list) else move_states(part) for part in parts))


CAUSAL = AttentionOptions(is_causal=True)


def move_states(states: Tensor) -> Tensor:
    """To the GPU with the same strides."""
    return torch.empty_strided(states.shape, states.stride(), dtype=states.dtype, device="cuda").copy_(states)


def check(stored: Stored, **options: Any) -> Tensor:
    return asked_of_cuda(stored, TOLERANCE[stored.query.dtype], **options)


def masks(case: Case) -> dict[str, Tensor]:
    """Masks of every kind that transformers makes, and some it does not."""
    generator = torch.Generator().manual_seed(3)
    batch, heads, query_len, kv_len = case.batch, case.num_q_heads, case.query_len, case.kv_len
    left = torch.arange(kv_len) >= torch.tensor([[(row * 97 + 70) % (kv_len - 1)] for row in range(batch)])
    random = torch.rand(batch, heads, query_len, kv_len, generator=generator) > 0.3
    causal = reference.visible(query_len, kv_len, is_causal=True, window=None, device=torch.device("cpu"))
    made = {
        "left padding": left[:, None, None],
        "left padding, causal": (left[:, None, None] & causal).expand(batch, 1, query_len, kv_len),
        "random": random,
        "by head": random[:, :, :1],
        "one row, one value": random[:1, :1, :1, :1].new_ones(1, 1, 1, 1),
        "additive": torch.randn(batch, 1, query_len, kv_len, generator=generator),
        "additive, lowest": torch.where(left[:, None, None], 0.0, torch.finfo(torch.float32).min),
        "additive bfloat16": torch.where(random, 0.0, -torch.inf).bfloat16(),
    }
    return {name: mask.cuda() for name, mask in made.items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize(("group", "query_len"), [(1, 1), (4, 1), (7, 1), (4, 4), (7, 3), (8, 8)])
def test_every_head_dim_dtype_and_number_of_rows(
    head_dims: tuple[int, int], group: int, query_len: int, dtype: torch.dtype
) -> None:
    case = Case(2, 2, group, query_len, (3, 1, 2), 37 + query_len, *head_dims, dtype=dtype)
    check(on_gpu(build(case)), is_causal=True)


@pytest.mark.parametrize("name", masks(Case()) if torch.cuda.is_available() else [])
@pytest.mark.parametrize("query_len", [1, 5])
@pytest.mark.parametrize("segments", [(1,), (40, 35, 70)])
def test_every_mask(name: str, query_len: int, segments: tuple[int, ...]) -> None:
    case = Case(3, 2, 4, query_len, segments, 21, 128, 128, torch.bfloat16, transposed=True)
    check(on_gpu(build(case)), attn_mask=masks(case)[name])


@pytest.mark.parametrize(
    "options",
    [
        {"window": 1},
        {"window": 70},
        {"window": 300, "is_causal": True},
        {"softcap": 2.0},
        {"softcap": 30.0, "is_causal": True, "window": 100},
        {"sinks": True},
        {"sinks": True, "softcap": 5.0, "is_causal": True, "window": 128},
        {"softmax_scale": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("query_len", [1, 6])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_option(options: dict[str, Any], query_len: int, dtype: torch.dtype) -> None:
    case = Case(2, 2, 4, query_len, (2, 5), 40, 64, 64, dtype)
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-2, 6, case.num_q_heads, device="cuda")
    check(on_gpu(build(case)), **options)


@pytest.mark.parametrize("tail_len", [0, 1, 15, 16, 17, 95, 160])
@pytest.mark.parametrize("segments", [(), (1,), (1, 1, 1), (33,), tuple([1] * 70)])
def test_every_length(tail_len: int, segments: tuple[int, ...]) -> None:
    case = Case(1, 2, 2, 1, segments, tail_len, 128, 128, torch.float16)
    if case.kv_len:
        check(on_gpu(build(case)), is_causal=True)


@pytest.mark.parametrize("splits", [(1, 1), (2, 2), (3, 4), (16, 16), (64, 65)])
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_splitting_changes_nothing(splits: tuple[int, int], rows: int) -> None:
    """Any number of splits gives the reference's numbers, empty ones included."""
    case = Case(1, 2, rows, 1, (9, 21), 50, 128, 128, torch.float16)
    stored = on_gpu(build(case))
    whole = check(stored, is_causal=True)
    output = cuda.decode(*stored.arguments, CAUSAL, splits=splits)
    torch.testing.assert_close(output, whole, rtol=2e-3, atol=2e-3)


def test_a_query_that_sees_nothing_reads_zeros() -> None:
    case = Case(2, 2, 2, 2, (3,), 20, 128, 128, torch.bfloat16)
    mask = torch.ones(2, 1, 2, case.kv_len, dtype=torch.bool, device="cuda")
    mask[1, :, 0] = False
    output = check(on_gpu(build(case)), attn_mask=mask)
    assert (output[1, 0] == 0).all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_results_are_the_same_from_run_to_run(head_dim: int) -> None:
    stored = on_gpu(build(Case(1, 2, 4, 1, (150, 90), 60, head_dim, head_dim, torch.bfloat16)))
    first = reads.attention(*stored.arguments)
    for _ in range(20):
        assert torch.equal(reads.attention(*stored.arguments), first)


def test_flat_attention_over_131072_tokens_loses_no_accuracy() -> None:
    """Every key is equally likely, so the output is the mean of all values, which cancel almost entirely."""
    generator = torch.Generator("cuda").manual_seed(0)
    value = torch.randn(1, 1, 131072, 128, device="cuda", generator=generator).half()
    key = torch.zeros_like(value)
    pages = Int8Pages(key, value, residual_length=0)
    pages.append(key, value)
    query = torch.randn(1, 1, 1, 128, device="cuda", generator=generator).half()
    exact = pages.restore()[1].double().mean(dim=2).flatten()
    output = reads.attention(query, pages.view()).double().flatten()
    assert (output - exact).norm() / exact.norm() <= 1e-3


@pytest.mark.parametrize("query_len", [17, 64, 200])
@pytest.mark.parametrize("options", [{"is_causal": True}, {"window": 90, "is_causal": True}, {"mask": True}], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_long_chunks(query_len: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Up to 64 rows for each KV head the kernel for decoding, for more of them the other one; float32 has one."""
    case = Case(3, 4, 4, query_len, (6, 3), query_len + 20, 128, 128, dtype)
    options = dict(options)
    if options.pop("mask", False):
        options["attn_mask"] = masks(case)["left padding, causal"]
    check(on_gpu(build(case)), **options)


@pytest.mark.parametrize("options", [{"softcap": 20.0}, {"sinks": True}], ids=str)
def test_long_chunks_with_options_that_torch_lacks(options: dict[str, Any]) -> None:
    case = Case(1, 2, 4, 100, (6, 3), 130, 128, 128, torch.bfloat16)
    if options.get("sinks"):
        options = {"sinks": torch.linspace(-1, 2, case.num_q_heads, device="cuda")}
    check(on_gpu(build(case)), is_causal=True, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "constant", "huge_channel", "grid", "any_bits", "offset", "top"])
def test_pages_and_restored_states_equal_the_reference(
    kind: str, head_dims: tuple[int, int], dtype: torch.dtype
) -> None:
    """Bit for bit, from the transposed views that models hand over."""
    key = make_states(kind, (2, 192, 3, head_dims[0]), dtype, seed=5).cuda().transpose(1, 2)
    value = make_states(kind, (2, 3, 192, head_dims[1]), dtype, seed=6).cuda()
    expected = [t.contiguous() for t in (*reference.quantize_key_pages(key), *reference.quantize_value_pages(value))]
    pages = [torch.empty_like(t) for t in expected]
    cuda.store_pages(key, value, Segment(*pages))
    for ours, theirs in zip(pages, expected, strict=True):
        assert torch.equal(ours, theirs)
    tails = key[:, :, :7], value[:, :, 3:10]
    halves = Segment(*(part[:1] for part in pages)), Segment(*(part[1:] for part in pages))
    view = PagesView(ClosedPages(halves), *tails)
    restored = [cuda.restore(view, True), cuda.restore(view, False)]
    wanted = [
        torch.cat([reference.restore_key_pages(*expected[:2], dtype), tails[0]], dim=2),
        torch.cat([reference.restore_value_pages(*expected[2:], dtype), tails[1]], dim=2),
    ]
    for ours, theirs in zip(restored, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_mantissa_is_quantised_as_the_reference_does(dtype: torch.dtype) -> None:
    """Every element of 11 bits under every scale of 8 that a symmetric group can have, ties among them."""
    ends = torch.arange(128, 256, device="cuda").float()[:, None]
    states = torch.arange(1024, 2048, device="cuda") * 2.0 ** -torch.arange(3, 12, device="cuda")[:, None]
    states = torch.cat([states.flatten(), -states.flatten()]).expand(128, -1)
    states = torch.where(states.abs() <= ends, states, 0.0)
    pad = -states.shape[1] % 62
    states = torch.nn.functional.pad(states, (0, pad)).reshape(128, -1, 62)
    ends = ends[:, :, None].expand(-1, states.shape[1], 1)
    groups = torch.cat([ends, -ends, states], dim=2).to(dtype).reshape(1, -1, 64)  # a group each
    groups = torch.nn.functional.pad(groups, (0, 0, 0, -groups.shape[1] % 64)).unflatten(1, (-1, 64))
    value = groups.reshape(1, 1, -1, 64)
    key = groups.transpose(2, 3).reshape(1, 1, -1, 64)
    expected = [t.contiguous() for t in (*reference.quantize_key_pages(key), *reference.quantize_value_pages(value))]
    pages = [torch.empty_like(t) for t in expected]
    cuda.store_pages(key, value, Segment(*pages))
    for ours, theirs in zip(pages, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_appending_writes_the_new_tokens_and_nothing_else(dtype: torch.dtype) -> None:
    key = torch.randn(2, 5, 3, 64, device="cuda").to(dtype).transpose(1, 2)
    value = torch.randn(2, 3, 5, 128, device="cuda").to(dtype)
    for position in (0, 4):
        tails = [torch.full((2, 3, 16, width), 7.0, dtype=dtype, device="cuda") for width in (64, 128)]
        wanted = [tail.clone() for tail in tails]
        for tail, states in zip(wanted, (key, value), strict=True):
            tail[:, :, position : position + 5] = states
        cuda.append_tail(key, value, *tails, position)
        for ours, theirs in zip(tails, wanted, strict=True):
            assert torch.equal(ours, theirs)


def test_a_thread_may_begin_with_a_kernel_of_ours() -> None:
    """Nothing of torch has made the GPU's context that thread's before."""
    case = Case(1, 2, 4, 1, (3,), 20, 64, 64, torch.bfloat16)
    stored = on_gpu(build(case))
    wanted = cuda.decode(stored.query, stored.view, CAUSAL)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(cuda.decode, stored.query, stored.view, CAUSAL).result()
    assert torch.equal(found, wanted)


def test_lengths_are_read_by_a_captured_graph_when_it_runs() -> None:
    """One captured step, replayed behind other lengths, gives what a fresh call gives."""
    case = Case(2, 2, 4, 1, (40,), 95, 128, 128, torch.bfloat16)
    stored = on_gpu(build(case))
    lengths = torch.tensor([40, 95], dtype=torch.int32, device="cuda")
    view = PagesView(stored.view.closed, *stored.view.buffers, lengths=lengths)

    def step() -> Tensor:
        return cuda.decode(stored.query, view, CAUSAL)

    step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        output = step()
    for pages, tail in itertools.product((0, 1, 17, 40), (1, 50, 95)):
        lengths.copy_(torch.tensor([pages, tail], dtype=torch.int32))
        graph.replay()
        live = replace(
            stored,
            **{
                name: [t[:pages] for t in getattr(stored, name)]
                for name in stored.__dataclass_fields__
                if "data" in name
            },
            key_tail=stored.key_tail[:, :, :tail],
            value_tail=stored.value_tail[:, :, :tail],
        )
        key, value = live.exact()
        expected = reference.attend(live.query.double(), key, value, CAUSAL)
        error = (output.double() - expected).norm() / expected.norm()
        assert error <= TOLERANCE[case.dtype]


def test_what_lies_behind_the_pages_in_use_is_not_read() -> None:
    """NaN in unused pages and behind the tail changes no bit."""
    case = Case(1, 2, 4, 1, (8,), 95, 128, 128, torch.bfloat16)
    stored = on_gpu(build(case))
    lengths = torch.tensor([5, 30], dtype=torch.int32, device="cuda")

    def run() -> Tensor:
        view = PagesView(ClosedPages(stored.view.segments), *stored.view.buffers, lengths=lengths)
        return cuda.decode(stored.query, view, CAUSAL)

    clean = run()
    for metadata in (*stored.key_metadata, *stored.value_metadata):
        metadata[5:] = 0x7FC0
    stored.key_tail[:, :, 30:] = torch.nan
    stored.value_tail[:, :, 30:] = torch.nan
    assert torch.equal(run(), clean)


def test_an_exact_token_that_is_not_finite_reaches_the_result() -> None:
    """NaN is not swallowed by a maximum or a comparison, until its page is closed."""
    key = torch.randn(1, 1, 2 * PAGE_SIZE, 64, device="cuda").half()
    value = torch.randn_like(key)
    query = torch.randn(1, 1, 1, 64, device="cuda").half()
    for states in (key, value):
        whole = states.clone()
        states[0, 0, PAGE_SIZE + 5, 7] = torch.nan
        pages = Int8Pages(key, value, residual_length=60)
        pages.append(key, value)
        assert pages.tail_len == PAGE_SIZE
        assert reads.attention(query, pages.view()).isnan().any()
        pages.append(key[:, :, :PAGE_SIZE], value[:, :, :PAGE_SIZE])
        assert pages.num_pages == 2
        assert reads.attention(query, pages.view()).isfinite().all()
        states.copy_(whole)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
def test_pages_of_states_that_are_not_finite_equal_the_reference(
    head_dims: tuple[int, int], dtype: torch.dtype
) -> None:
    """Bit for bit, by the kernel of a growing layer and by that of a fixed capacity."""
    key, value = (broken(make_states("normal", (2, 3, 192, n), dtype, seed=n)).cuda() for n in head_dims)
    expected = [t.contiguous() for t in (*reference.quantize_key_pages(key), *reference.quantize_value_pages(value))]
    pages = [torch.empty_like(t) for t in expected]
    cuda.store_pages(key, value, Segment(*pages))
    fixed = StaticInt8Pages(key, value, 192, residual_length=0)
    fixed.append(key, value)
    fixed.close_due_pages()
    for ours, advanced, theirs in zip(pages, fixed.view().segments[0], expected, strict=True):
        assert torch.equal(ours, theirs)
        assert torch.equal(advanced, theirs)


@pytest.mark.parametrize(("batch", "num_kv_heads"), [(65536, 1), (8192, 8), (1, 65537)])
def test_more_heads_than_a_grid_takes_side_by_side(batch: int, num_kv_heads: int) -> None:
    """Stored, read and restored as few would be, growing and of fixed capacity."""
    key = torch.randn(batch, num_kv_heads, 101, 16, device="cuda").half()
    value = torch.randn_like(key)
    query = torch.randn(batch, num_kv_heads, 1, 16, device="cuda").half()
    fixed, growing = StaticInt8Pages(key, value, 160), Int8Pages(key, value)
    for tokens in (slice(0, 95), slice(95, 100), slice(100, 101)):
        for pages in (fixed, growing):
            pages.append(key[:, :, tokens], value[:, :, tokens])
    fixed.close_due_pages()
    places = [(0, 0), (batch // 2, num_kv_heads // 2), (batch - 1, num_kv_heads - 1)]
    for pages in (fixed, growing):
        view = pages.view()
        assert view.num_pages == 1
        restored, output = reads.restore_both(view), reads.attention(query, view)
        for b, h in places:
            dense = [states[b : b + 1, h : h + 1, :101] for states in restored]
            for ours, quantize, restore, states in (
                (dense[0], reference.quantize_key_pages, reference.restore_key_pages, key),
                (dense[1], reference.quantize_value_pages, reference.restore_value_pages, value),
            ):
                exact = states[b : b + 1, h : h + 1]
                assert torch.equal(ours[:, :, :64], restore(*quantize(exact[:, :, :64]), torch.float16))
                assert torch.equal(ours[:, :, 64:], exact[:, :, 64:])
            expected = reference.attend(query[b : b + 1, h : h + 1].double(), *dense)
            torch.testing.assert_close(output[b : b + 1, :, h : h + 1].double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("option", ["softcap", "sinks"])
def test_16384_new_tokens_with_options_that_torch_lacks(option: str) -> None:
    """As many heads as gpt-oss has; some of the queries are compared."""
    key = torch.randn(1, 8, 16384 + 100, 64, device="cuda").bfloat16()
    value = torch.randn_like(key)
    pages = Int8Pages(key, value)
    pages.append(key[:, :, :100], value[:, :, :100])
    view = pages.append(key[:, :, 100:], value[:, :, 100:])
    query = torch.randn(1, 64, 16384, 64, device="cuda").bfloat16()
    options = AttentionOptions(is_causal=True, softcap=20.0)
    if option == "sinks":
        options = AttentionOptions(is_causal=True, sinks=torch.linspace(-1, 2, 64, device="cuda"))
    output = reads.attention(query, view, options)
    (page,) = view.segments
    restored = [  # to float32, as the kernel reads them
        torch.cat([reference.restore_key_pages(*page[:2], torch.float32), view.key_tail.float()], dim=2),
        torch.cat([reference.restore_value_pages(*page[2:], torch.float32), view.value_tail.float()], dim=2),
    ]
    for place in (0, 1, 5000, 16383):
        seen = [states[:, :, : place + 101].double() for states in restored]
        expected = reference.attend(query[:, :, place : place + 1].double(), *seen, options)
        error = (output[:, place : place + 1].double() - expected).norm() / expected.norm()
        assert error <= TOLERANCE[torch.bfloat16]


def test_streams_do_not_share_their_partial_results() -> None:
    stored = on_gpu(build(Case(1, 1, 4, 1, (300,), 60, 128, 128, torch.bfloat16)))
    expected = reads.attention(*stored.arguments)
    streams = [torch.cuda.Stream() for _ in range(4)]
    torch.cuda.synchronize()
    outputs = []
    for _ in range(25):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(reads.attention(*stored.arguments))
    torch.cuda.synchronize()
    assert all(torch.equal(output, expected) for output in outputs)


def test_a_cache_reads_with_the_kernels_and_says_so() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from quantcache import QuantizedInt8Cache

    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).cuda().bfloat16().eval()
    cache = QuantizedInt8Cache(strict=True)
    ids = torch.randint(0, 64, (3, 200), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :90] = 0
    model.generate(
        ids, attention_mask=mask, **cache_argument(cache), max_new_tokens=70, do_sample=False, pad_token_id=0
    )
    assert cache.report().backend == "cuda decode"


def test_a_head_dim_without_a_kernel_falls_back_with_its_reason() -> None:
    states = torch.randn(1, 1, 200, 72, device="cuda").half()
    assert dispatch.backend_for(states, states) == (
        "torch",
        "the CUDA kernels take head_dims up to 256 in steps of 16, got 72",
    )
    pages = Int8Pages(states, states)
    pages.append(states, states)
    assert reads.attention(states[:, :, :1], pages.view()).isfinite().all()
