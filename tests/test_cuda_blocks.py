"""Do the CUDA kernels read and write the blocks of a pool as the specification says?"""

import gc
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from quantcache.backends import cuda, torch_blocks
from quantcache.backends.blocks import BlockBatch
from quantcache.backends.cuda import blocks
from quantcache.backends.cuda.plan import Shape
from tests.block_cases import CAUSAL, CHUNKS, DECODING, MIXED, Case, Pool, build, layer_of
from tests.conftest import skip_without_gpu
from tests.test_cuda_kernels import TOLERANCE

pytestmark = [pytest.mark.cuda, skip_without_gpu]

HEAD_DIMS = [(16, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 208), (256, 256)]

BATCHES = {
    "decoding": replace(DECODING, stored=(70, 0, 128, 1, 63, 64, 6500, 1000), new=(1,) * 8),
    "many": replace(DECODING, stored=tuple(range(0, 400, 4)), new=(1,) * 100),
    "one long": Case((5000,), (1,), 1, 4),
    "chunks": CHUNKS,
    "mixed": MIXED,
    "many mixed": replace(MIXED, stored=tuple(range(0, 400, 4)), new=tuple(1 + n * n % 77 for n in range(100))),
    "one prompt": Case((0,), (900,), 2, 7),
    "chunk after long": Case((3000,), (100,), 1, 1),
    "padded": replace(MIXED, padding=40),
}


def attended(pool: Pool, is_recorded: bool = False, **options: Any) -> torch.Tensor:
    """What the kernels find, of lengths that the host knows, or as in a recorded step."""
    batch = pool.pages.batch
    if is_recorded:
        batch.query_lens = batch.kv_lens = None
    return cuda.attend_blocks(*pool.states, pool.pages, CAUSAL._replace(**options))


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_recorded", [False, True])
def test_every_batch(name: str, dtype: torch.dtype, is_recorded: bool) -> None:
    pool = build(replace(BATCHES[name], dtype=dtype)).moved("cuda")
    assert pool.error(attended(pool, is_recorded)) <= TOLERANCE[dtype]


@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize("group", [1, 7, 8, 20])
def test_every_head_dim_and_number_of_rows(head_dims: tuple[int, int], group: int) -> None:
    case = replace(MIXED, head_dim=head_dims[0], v_head_dim=head_dims[1], group=group, dtype=torch.float16)
    pool = build(case).moved("cuda")
    assert pool.error(attended(pool)) <= TOLERANCE[torch.float16]


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"sinks": True}, {"softmax_scale": 0.5}], ids=str)
def test_every_option(options: dict[str, Any]) -> None:
    pool = build(MIXED).moved("cuda")
    if "sinks" in options:
        options = {"sinks": torch.linspace(-2, 6, MIXED.num_kv_heads * MIXED.group)}
    output = attended(pool, **{name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in options.items()})
    assert pool.error(output, CAUSAL._replace(**options)) <= TOLERANCE[MIXED.dtype]


@pytest.mark.parametrize("splits", [1, 2, 7, 33, 128])
@pytest.mark.parametrize("shape", [Shape(1, 4, 32, 2), Shape(1, 8, 16, 2), Shape(2, 4, 16, 2)], ids=str)
def test_every_division_of_single_tokens(shape: Shape, splits: int) -> None:
    """Of short and of long sequences in one batch, which not all take as many CTAs."""
    pool = build(BATCHES["decoding"]).moved("cuda")
    layout, group, sequences = pool.pages.layout, pool.case.group, len(pool.case.stored)
    kernel = blocks._single_kernel(0, shape, layout, False)
    rows = sequences * layout.num_kv_heads * splits * shape.rows
    output = torch.full((1, sequences, layout.num_kv_heads * group, 128), torch.nan, dtype=layout.dtype, device="cuda")
    call = blocks._Call(*pool.states, pool.pages, CAUSAL, output)
    blocks.attend_single(call, blocks.SinglePlan(kernel, 1, splits, rows))
    assert pool.error(output) <= TOLERANCE[layout.dtype]


@pytest.mark.parametrize("splits", [1, 3, 9])
def test_every_division_of_several_tokens(splits: int) -> None:
    pool = build(CHUNKS).moved("cuda")
    output = torch.full((1, sum(CHUNKS.new), 8, 128), torch.nan, dtype=CHUNKS.dtype, device="cuda")
    blocks.attend_several(blocks._Call(*pool.states, pool.pages, CAUSAL, output), splits=splits)
    assert pool.error(output) <= TOLERANCE[CHUNKS.dtype]


def without_unread(pool: Pool) -> Pool:
    """With nothing where exact states of a page that closed may remain: behind the pages of sequences that end with a
    closed one, and behind the exact keys of the next open page.
    """
    layer, batch, layout = layer_of(pool.memory, pool.case), pool.pages.batch, pool.case.layout
    for row, stored, new in zip(batch.block_table.tolist(), pool.case.stored, pool.case.new, strict=False):
        full, rest = divmod(stored + new, 64)
        if new and not rest:
            layer[[block for block in row[full:] if block >= 0]] = 0
        elif full > stored // 64:
            keys = layer[row[full]].unflatten(0, (layout.num_kv_heads, layout.chunk_bytes))
            keys[:, rest * layout.head_dim * layout.dtype.itemsize :] = 0
    return pool


@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_appended_tokens_lie_as_the_specification_says(name: str, dtype: torch.dtype) -> None:
    """Every byte of the pool, those that were never anybody's included."""
    pool = build(replace(BATCHES[name], dtype=dtype))
    moved = pool.moved("cuda")
    cuda.append_blocks(*moved.states[1:], moved.pages)
    torch_blocks.append_blocks(*pool.states[1:], pool.pages)
    assert torch.equal(without_unread(moved).memory.cpu(), without_unread(pool).memory)


@pytest.mark.parametrize("head_dims", HEAD_DIMS, ids=str)
@pytest.mark.parametrize(("stored", "new"), [(0, 64), (63, 1), (63, 66), (20, 44), (20, 200), (1, 1), (64, 63)])
def test_pages_close_in_place(head_dims: tuple[int, int], stored: int, new: int) -> None:
    pool = build(Case((stored, 5), (new, 1), 3, 1, *head_dims))
    moved = pool.moved("cuda")
    cuda.append_blocks(*moved.states[1:], moved.pages)
    torch_blocks.append_blocks(*pool.states[1:], pool.pages)
    assert torch.equal(without_unread(moved).memory.cpu(), without_unread(pool).memory)


def test_a_page_takes_its_range_from_what_is_finite() -> None:
    pool = build(replace(CHUNKS, stored=(63, 63, 20, 0), new=(1, 70, 44, 64)))
    pool.key_states[0, 0, ::7, 3], pool.value_states[0, 1, ::5, 9] = torch.inf, torch.nan
    pool.key_states[0, 1, ::9, 4], pool.value_states[0, 0, ::3, 8] = torch.nan, -torch.inf
    moved = pool.moved("cuda")
    cuda.append_blocks(*moved.states[1:], moved.pages)
    torch_blocks.append_blocks(*pool.states[1:], pool.pages)
    assert torch.equal(without_unread(moved).memory.cpu(), without_unread(pool).memory)


@pytest.mark.parametrize("name", BATCHES)
def test_where_blocks_lie_changes_no_bit(name: str) -> None:
    ordered, shuffled = (build(replace(BATCHES[name], is_shuffled=kind)).moved("cuda") for kind in (False, True))
    tables = [pool.pages.batch.block_table for pool in (ordered, shuffled)]
    assert not torch.equal(*tables)
    assert torch.equal(attended(ordered), attended(shuffled))


@pytest.mark.parametrize("name", ["decoding", "mixed"])
def test_what_is_not_stored_changes_no_bit(name: str) -> None:
    """The pool is NaN everywhere else; here it is zero."""
    pool, zeros = build(BATCHES[name]).moved("cuda"), build(BATCHES[name]).moved("cuda")
    kept = zeros.memory.clone()
    zeros.memory.zero_()
    layout, case = zeros.pages.layout, zeros.case
    for index, stored in enumerate(case.stored):
        used = zeros.pages.batch.block_table[index, : layout.blocks_for(stored)].long()
        zeros.memory[used] = kept[used]
        if rest := stored % 64:
            for is_key, block in ((True, used[-2]), (False, used[-1])):
                layout.exact(layer_of(zeros.memory, case), is_key)[block, :, rest:] = 0
    assert torch.equal(attended(pool), attended(zeros))


@pytest.mark.parametrize("name", ["decoding", "many", "mixed"])
def test_results_are_the_same_from_run_to_run(name: str) -> None:
    pool = build(BATCHES[name]).moved("cuda")
    first = attended(pool)
    assert all(torch.equal(attended(pool), first) for _ in range(20))


def test_a_broken_sequence_reaches_no_other() -> None:
    pool = build(MIXED).moved("cuda")
    expected = pool.expected()
    starts = pool.pages.batch.cu_seqlens_q.tolist()
    pool.key_states[:, :, starts[1] : starts[2], 3] = torch.nan
    pool.value_states[:, :, starts[3] : starts[4], 5] = torch.inf
    output = attended(pool).cpu()
    others = [t for i, (a, b) in enumerate(itertools.pairwise(starts)) if i not in (1, 3) for t in range(a, b)]
    assert not output[:, starts[1] : starts[2]].isfinite().all()
    error = (output[:, others].double() - expected[:, others]).norm() / expected[:, others].norm()
    assert error <= TOLERANCE[MIXED.dtype]


def test_a_captured_step_reads_lengths_and_blocks_when_it_runs() -> None:
    """Tokens generated one by one by replays of one graph: attention and bytes as in fresh calls, to the bit."""
    case = replace(DECODING, stored=(60, 0, 127, 300), new=(1,) * 4, padding=2)
    pool, fresh = build(case).moved("cuda"), build(case).moved("cuda")
    width, sequences = 8, len(case.stored) + case.padding
    table = torch.full((sequences, width), -1, dtype=torch.int32, device="cuda")
    free = [int(b) for b in range(len(pool.memory)) if b not in set(pool.pages.batch.block_table.flatten().tolist())]
    pool.memory = torch.cat([pool.memory, torch.full_like(pool.memory[:64], 0xFF)])
    fresh.memory = pool.memory.clone()
    free += range(len(pool.memory) - 64, len(pool.memory))
    for index, stored in enumerate(case.stored):
        used = pool.pages.layout.blocks_for(stored)
        table[index, :used] = pool.pages.batch.block_table[index, :used]
        for page in range(used, width):
            table[index, page] = free.pop()
    lengths = torch.tensor([*case.stored, 0, 0], dtype=torch.int32)
    starts_q = torch.tensor([0, 1, 2, 3, 4, 4, 4], dtype=torch.int32, device="cuda")
    starts_k = torch.zeros(sequences + 1, dtype=torch.int32, device="cuda")

    def states(heads: int) -> torch.Tensor:
        return torch.randn(1, heads, sequences, 128, device="cuda").bfloat16()

    inputs = states(8), states(2), states(2)

    def step(memory: torch.Tensor) -> torch.Tensor:
        batch = BlockBatch(table, starts_q, starts_k, 1, 64 * width)
        pages = pool.pages._replace(pool=layer_of(memory, case), batch=batch)
        output = cuda.attend_blocks(*inputs, pages, CAUSAL)
        cuda.append_blocks(*inputs[1:], pages)
        return output

    starts_k[1:] = (lengths + torch.tensor([1, 1, 1, 1, 0, 0])).cumsum(0).int()
    scratch = pool.memory.clone()
    step(scratch)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step(pool.memory)
    gc.collect()
    torch.cuda.empty_cache()
    for _ in range(70):
        for tensor in inputs:
            tensor.copy_(torch.randn(tensor.shape, device="cuda"))
        starts_k[1:] = (lengths + torch.tensor([1, 1, 1, 1, 0, 0])).cumsum(0).int()
        graph.replay()
        assert torch.equal(output, step(fresh.memory))
        assert torch.equal(pool.memory, fresh.memory)
        lengths[:4] += 1
    assert output.isfinite().all()
    assert not output[:, 4:].any()


def test_streams_do_not_share_what_was_found() -> None:
    pools = [build(BATCHES["one long"], seed=seed).moved("cuda") for seed in range(4)]
    expected = [attended(pool) for pool in pools]
    streams = [torch.cuda.Stream() for _ in pools]
    torch.cuda.synchronize()
    outputs: list[list[torch.Tensor]] = [[] for _ in pools]
    for _ in range(10):
        for pool, stream, found in zip(pools, streams, outputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(attended(pool))
    torch.cuda.synchronize()
    for found, right in zip(outputs, expected, strict=True):
        assert all(torch.equal(output, right) for output in found)
