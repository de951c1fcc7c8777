"""Does the prefill kernel compute what the reference says, in every shape, mask and option, and nothing else?"""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from quantcache import QuantizedInt8Cache
from quantcache.backends import cuda
from quantcache.backends.cuda.prefill import MAX_ROUNDS, Shape
from quantcache.layers._host import cache_argument
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.store import reads
from quantcache.store.segments import ClosedPages
from quantcache.store.view import PagesView
from tests.attention_cases import Case, Stored, build
from tests.conftest import skip_without_gpu
from tests.test_cuda_kernels import HEAD_DIMS, TOLERANCE, masks, on_gpu

pytestmark = [pytest.mark.cuda, skip_without_gpu]

CASE = Case(2, 2, 4, 200, (1, 3, 9), 33, 128, 128, torch.bfloat16)
"""200 queries of eight heads: row tiles of one head and of two, pages in three segments, and a tail."""

SHAPES = [
    *(Shape(2, 8, 64, 2), Shape(2, 8, 64, 1), Shape(2, 4, 64, 1), Shape(2, 4, 32, 1), Shape(1, 2, 32, 1)),
    *(Shape(1, 8, 64, 2, True), Shape(1, 4, 64, 2, True), Shape(1, 8, 32, 2, True), Shape(1, 12, 64, 2, True)),
]


def check(stored: Stored, shape: Shape | None = None, splits: int | None = None, **options: Any) -> Tensor:
    """The kernel's output, which is the specification's in float64 over the exact restored states."""
    if shape is not None and shape.is_warpgroup and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("instructions of compute capability 9.0")
    asked = AttentionOptions(**options)
    key, value = (states.to(stored.query.device) for states in stored.exact())
    expected = reference.attend(stored.query.double(), key, value, asked)
    output = cuda.prefill(stored.query, stored.view, asked, shape, splits)
    assert output.dtype == stored.query.dtype
    assert output.is_contiguous()
    error = (output.double() - expected).norm() / expected.norm()
    assert error <= TOLERANCE[stored.query.dtype], f"relative error {error:.2e}"
    return output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize(("group", "query_len"), [(1, 65), (4, 17), (7, 33), (1, 300), (96, 1)])
def test_every_head_dim_dtype_and_number_of_rows(
    head_dims: tuple[int, int], group: int, query_len: int, dtype: torch.dtype
) -> None:
    case = Case(2, 3, group, query_len, (3, 4), 35, *head_dims, dtype)
    check(on_gpu(build(case)), is_causal=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("head_dims", [(64, 64), (80, 96), (128, 128)], ids=str)
def test_every_way_in_which_it_is_built(shape: Shape, head_dims: tuple[int, int]) -> None:
    case = replace(CASE, head_dim=head_dims[0], v_head_dim=head_dims[1])
    check(on_gpu(build(case)), shape, is_causal=True)


@pytest.mark.parametrize("head_dims", [(192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("shape", [Shape(1, 4, 32, 1), Shape(1, 2, 32, 1), Shape(1, 8, 64, 1)], ids=str)
def test_wide_heads_on_gpus_without_warpgroups(shape: Shape, head_dims: tuple[int, int]) -> None:
    check(on_gpu(build(replace(CASE, head_dim=head_dims[0], v_head_dim=head_dims[1]))), shape, is_causal=True)


@pytest.mark.parametrize("name", masks(Case()) if torch.cuda.is_available() else [])
@pytest.mark.parametrize(("group", "query_len"), [(4, 17), (96, 1), (1, 300), (7, 33), (2, 513)])
def test_every_mask(name: str, group: int, query_len: int) -> None:
    case = replace(CASE, group=group, query_len=query_len)
    check(on_gpu(build(case)), attn_mask=masks(case)[name])


@pytest.mark.parametrize("name", masks(Case()) if torch.cuda.is_available() else [])
def test_every_mask_where_three_warpgroups_have_rows(name: str) -> None:
    case = replace(CASE, head_dim=64, v_head_dim=64)
    check(on_gpu(build(case)), Shape(1, 12, 64, 2, True), attn_mask=masks(case)[name])


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[3], None], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"window": 1, "is_causal": True},
        {"window": 64, "is_causal": True},
        {"window": 300, "is_causal": True},
        {"softcap": 20.0, "is_causal": True},
        {"sinks": True, "is_causal": True},
        {"sinks": True, "softcap": 5.0, "window": 90},
        {"softmax_scale": 0.3},
    ],
    ids=str,
)
def test_every_option(options: dict[str, Any], shape: Shape | None) -> None:
    if options.get("sinks"):
        options = {**options, "sinks": torch.linspace(-1, 2, CASE.num_q_heads, device="cuda")}
    check(on_gpu(build(CASE)), shape, **options)
    check(on_gpu(build(CASE)), shape, 3, **options)


@pytest.mark.parametrize("tail_len", [0, 1, 63, 64, 65, 95, 160])
@pytest.mark.parametrize("segments", [(), (1,), (33,), tuple([1] * 70), (300,)])
def test_every_length(tail_len: int, segments: tuple[int, ...]) -> None:
    case = replace(CASE, segments=segments, tail_len=max(tail_len, 70) if not segments else tail_len, query_len=70)
    if case.kv_len < case.query_len:
        case = replace(case, query_len=case.kv_len)
    check(on_gpu(build(case)), is_causal=True)


@pytest.mark.parametrize("splits", [1, 2, 3, 13, 32])
def test_splitting_changes_nothing(splits: int) -> None:
    stored = on_gpu(build(CASE))
    check(stored, splits=splits, is_causal=True)
    check(stored, splits=splits, attn_mask=masks(CASE)["left padding, causal"])


def test_results_are_the_same_from_run_to_run() -> None:
    stored = on_gpu(build(replace(CASE, segments=(200,))))
    first = check(stored, is_causal=True)
    assert all(torch.equal(check(stored, is_causal=True), first) for _ in range(5))


def test_states_as_transformers_hands_them_over() -> None:
    check(on_gpu(build(replace(CASE, transposed=True))), is_causal=True)


@pytest.mark.parametrize("exponent", [-20, 0, 12])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_of_any_size(exponent: int, dtype: torch.dtype) -> None:
    """Large keys, as a bias makes them, and small queries; a power of two that the softmax scale takes back."""
    stored = on_gpu(build(replace(CASE, dtype=dtype)))
    made = replace(stored, query=stored.query * 2.0**exponent)
    check(made, is_causal=True, softmax_scale=128**-0.5 * 2.0**-exponent)


def test_a_query_that_sees_nothing_reads_zeros() -> None:
    mask = torch.ones(2, 1, CASE.query_len, CASE.kv_len, dtype=torch.bool, device="cuda")
    mask[1, :, 3:90] = False
    output = check(on_gpu(build(CASE)), attn_mask=mask)
    assert not output[1, 3:90].any()


def test_a_mask_is_looked_at_again_when_it_changes() -> None:
    """And another one at the address of one that is gone."""
    stored = on_gpu(build(CASE))
    mask = masks(CASE)["left padding, causal"].contiguous()
    check(stored, attn_mask=mask)
    mask[:, :, :, :300] = False
    check(stored, attn_mask=mask)
    for seed in range(3):
        del mask
        generator = torch.Generator("cuda").manual_seed(seed)
        shape = (CASE.batch, 1, CASE.query_len, CASE.kv_len)
        mask = torch.rand(shape, device="cuda", generator=generator) > 0.5
        mask[..., seed * 100 : seed * 100 + 256] = False
        check(stored, attn_mask=mask)


def test_memory_does_not_grow_with_the_context() -> None:
    extra = []
    for pages in (100, 800, 3200):
        case = Case(1, 4, 7, 256, (pages,), 33, 128, 128, torch.bfloat16)
        stored = on_gpu(build(case))
        mask = torch.ones(1, 1, 256, case.kv_len, dtype=torch.bool, device="cuda")
        for asked in (AttentionOptions(is_causal=True), AttentionOptions(mask)):
            reads.attention(stored.query, stored.view, asked)
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            reads.attention(stored.query, stored.view, asked)
            extra.append(torch.cuda.max_memory_allocated() - before)
    # The parts of as many CTAs as there may be, of which two fit a processor, or one with twice the rows.
    rows = MAX_ROUNDS * 2 * 128 * torch.cuda.get_device_properties(0).multi_processor_count
    assert max(extra) <= rows * (128 + 2) * 4
    _, _, long, long_masked, _, _ = extra
    assert long_masked - long <= 1 << 20  # what was found in the mask, an eighth of a percent of it


def test_a_mask_on_the_way_to_a_split_that_sees_nothing() -> None:
    """The first splits have nothing to attend to."""
    mask = torch.zeros(2, 1, CASE.query_len, CASE.kv_len, dtype=torch.bool, device="cuda")
    mask[..., -50:] = True
    check(on_gpu(build(CASE)), splits=5, attn_mask=mask)


def test_as_many_heads_as_a_batch_has() -> None:
    """More than the 65,535 that the second axis of a grid has."""
    few = on_gpu(build(Case(10, 2, 1, 70, (1,), 10, 64, 64, torch.bfloat16)))

    def repeated(part: Tensor | list[Tensor]) -> Any:
        if isinstance(part, list):
            return [tensor.repeat(1, 3500, *[1] * (tensor.dim() - 2)) for tensor in part]
        return part.repeat(3500, 1, 1, 1)

    many = Stored(*(repeated(getattr(few, name)) for name in few.__dataclass_fields__))
    output = cuda.prefill(many.query, many.view, AttentionOptions())
    assert torch.equal(output[-10:], check(few))


@pytest.mark.parametrize("is_masked", [False, True])
def test_lengths_are_read_by_a_captured_graph_when_it_runs(is_masked: bool) -> None:
    """A chunk of a prompt in a layer of fixed capacity; its mask is as wide as that."""
    case = replace(CASE, segments=(40,), tail_len=95, query_len=70)
    stored = on_gpu(build(case))
    lengths = torch.tensor([40, 95], dtype=torch.int32, device="cuda")
    view = PagesView(stored.view.closed, *stored.view.buffers, lengths=lengths)
    visible = torch.zeros(case.batch, 1, case.query_len, case.kv_len, dtype=torch.bool, device="cuda")
    visible[:, :, :, 5:] = True
    asked = AttentionOptions(visible, is_causal=True) if is_masked else AttentionOptions(is_causal=True)

    def step() -> Tensor:
        return cuda.prefill(stored.query, view, asked)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for pages, tail in itertools.product((1, 17, 40), (7, 50, 95)):
        lengths.copy_(torch.tensor([pages, tail], dtype=torch.int32))
        graph.replay()
        key, value = (states.cuda() for states in in_use(stored, pages, tail).exact())
        mask = visible[..., : key.shape[2]] if is_masked else None
        expected = reference.attend(stored.query.double(), key, value, AttentionOptions(mask, is_causal=True))
        error = (output.double() - expected).norm() / expected.norm()
        assert error <= TOLERANCE[case.dtype]


def in_use(stored: Stored, pages: int, tail: int) -> Stored:
    """The first pages and tokens of the tail."""
    parts = {name: [t[:pages] for t in getattr(stored, name)] for name in stored.__dataclass_fields__ if "data" in name}
    return replace(stored, **parts, key_tail=stored.key_tail[:, :, :tail], value_tail=stored.value_tail[:, :, :tail])


def test_what_lies_behind_the_pages_in_use_is_not_read() -> None:
    """NaN in unused pages and behind the tail changes no bit."""
    stored = on_gpu(build(replace(CASE, segments=(8,), tail_len=95, query_len=70)))
    lengths = torch.tensor([5, 30], dtype=torch.int32, device="cuda")

    def run() -> Tensor:
        view = PagesView(ClosedPages(stored.view.segments), *stored.view.buffers, lengths=lengths)
        return cuda.prefill(stored.query, view, AttentionOptions(is_causal=True))

    clean = run()
    for metadata in (*stored.key_metadata, *stored.value_metadata):
        metadata[5:] = 0x7FC0
    stored.key_tail[:, :, 30:] = torch.nan
    stored.value_tail[:, :, 30:] = torch.nan
    assert torch.equal(run(), clean)


@pytest.mark.parametrize("max_cache_len", [None, 1500])
@pytest.mark.parametrize("mask", [None, "left padding"])
def test_a_cache_reads_a_later_chunk_with_the_kernel_and_says_so(max_cache_len: int | None, mask: str | None) -> None:
    """What generate() does in a second turn: nothing is restored."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=100, hidden_size=256, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, dtype=torch.bfloat16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).eval()
    cache = QuantizedInt8Cache(config, max_cache_len=max_cache_len, strict=True)
    ids = torch.randint(100, (2, 1000), device="cuda")
    seen = torch.ones_like(ids)
    if mask:
        seen[0, :37] = 0
    exact = DynamicCache()
    with torch.no_grad():
        for stop in (700, 1000):
            start = 0 if stop == 700 else 700
            given: dict[str, Any] = {"input_ids": ids[:, start:stop], "attention_mask": seen[:, :stop]}
            logits = model(**given, **cache_argument(cache, model)).logits
            expected = model(**given, **cache_argument(exact, model)).logits
    error = (logits[:, 50:].float() - expected[:, 50:].float()).norm() / expected[:, 50:].float().norm()
    assert error <= 2e-2
    assert {layer.kernel for layer in cache.report().layers} == {"cuda prefill"}
