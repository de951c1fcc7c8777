"""Does the host ask the CUDA kernels for what it should? A stand-in for the driver carries it out, without a GPU."""

import json
import math
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from quantcache import QuantizedInt8Cache
from quantcache.backends import cuda, dispatch
from quantcache.backends.cuda import nvrtc
from quantcache.backends.cuda.plan import Shape
from quantcache.layers import routing
from quantcache.layers._host import attention_function, cache_argument
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import reads
from quantcache.store.buffer import FOLLOWS_TABLE, SHARES_READS
from quantcache.store.fixed import StaticInt8Pages
from quantcache.store.growing import Int8Pages
from quantcache.store.segments import ClosedPages
from quantcache.store.view import PagesView
from tests import emulated_cuda, twins
from tests.attention_cases import Case, Stored, asked_of_cuda, build
from tests.shared_rows import TABLES, share
from tests.strategies import Operation, random_states, schedules
from tests.test_static import assert_same_bytes

TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 1e-3, torch.float32: 1e-5}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched so far, from now on on the CPU."""
    return emulated_cuda.emulate(monkeypatch)


@pytest.mark.parametrize("kernel", emulated_cuda.STRUCTURES)
def test_arguments_are_packed_as_the_sources_declare_them(kernel: str) -> None:
    source, structure, form = emulated_cuda.STRUCTURES[kernel]
    assert emulated_cuda.packed_letters(form) == emulated_cuda.declared_letters(source, structure)


def check(stored: Stored, **options: Any) -> None:
    asked_of_cuda(stored, TOLERANCE[stored.query.dtype], **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("head_dims", [(64, 64), (80, 80), (256, 256), (192, 128), (64, 128)], ids=str)
@pytest.mark.parametrize(
    ("group", "query_len", "segments"), [(1, 1, (3,)), (7, 1, (1, 4, 2)), (4, 5, ()), (8, 8, (2,))]
)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_kind_of_call(
    head_dims: tuple[int, int],
    group: int,
    query_len: int,
    segments: tuple[int, ...],
    dtype: torch.dtype,
    transposed: bool,
    launched: list[str],
) -> None:
    case = Case(2, 2, group, query_len, segments, 37, *head_dims, dtype=dtype, transposed=transposed)
    check(build(case), is_causal=True)
    assert launched == ["attention"]


@pytest.mark.parametrize(
    "options",
    [
        {"window": 70},
        {"window": 100, "is_causal": True, "softcap": 30.0},
        {"sinks": True, "softmax_scale": 0.5},
        {"mask": "left padding"},
        {"mask": "left padding", "sinks": True},
        {"mask": "of every head and query"},
        {"mask": "one value"},
        {"mask": "additive"},
        {"mask": "additive float64"},
    ],
    ids=str,
)
def test_every_option(options: dict[str, Any], launched: list[str]) -> None:
    case = Case(2, 2, 4, 3, (2, 5), 40, 64, 64, torch.float16)
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-2, 6, case.num_q_heads, dtype=torch.float16)
    shape = case.batch, case.num_q_heads, case.query_len, case.kv_len
    masks = {
        "left padding": (torch.arange(case.kv_len) >= torch.tensor([[70], [0]]))[:, None, None],
        "of every head and query": torch.rand(shape) > 0.3,
        "one value": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "additive": torch.randn(2, 1, *shape[2:]).bfloat16(),
        "additive float64": torch.randn(shape).double(),
    }
    if "mask" in options:
        options["attn_mask"] = masks[options.pop("mask")]
    check(build(case), **options)
    assert launched == ["attention"]


@pytest.mark.parametrize("how", ["every second element", "an element off", "odd rows"])
def test_states_that_the_kernels_cannot_read_are_copied(how: str, launched: list[str]) -> None:
    """They read four elements at once, and need strides and addresses for it."""

    def awkward(states: Tensor) -> Tensor:
        if how == "every second element":
            return torch.stack([states, states + 1], dim=-1)[..., 0]
        if how == "odd rows":
            return torch.nn.functional.pad(states, (0, 1))[..., :-1]
        return torch.nn.functional.pad(states.flatten(), (1, 0))[1:].view(states.shape)

    stored = build(Case(2, 2, 4, 3, (2, 5), 40, 64, 80, torch.float16))
    names = ("query", "key_tail", "value_tail")
    check(replace(stored, **{name: awkward(getattr(stored, name)) for name in names}))
    tails = [torch.zeros(2, 2, 64, width, dtype=torch.float16) for width in (64, 80)]
    cuda.append_tail(awkward(stored.key_tail), awkward(stored.value_tail), *tails, 3)
    for tail, states in zip(tails, (stored.key_tail, stored.value_tail), strict=True):
        assert torch.equal(tail[:, :, 3:43], states)
        assert not tail[:, :, :3].any()
        assert not tail[:, :, 43:].any()


@pytest.mark.parametrize("splits", [None, (1, 1), (3, 3), (3, 4), (64, 65)])
@pytest.mark.parametrize("shape", [None, Shape(1, 4, 16, 2), Shape(2, 4, 32, 2)])
def test_partial_results_stay_in_their_workspace(
    splits: tuple[int, int] | None, shape: Shape | None, launched: list[str]
) -> None:
    """The stand-in fills the workspace up to its end, and finds the counters as it left them."""
    stored = build(Case(2, 2, 20, 1, (9, 21), 50, 128, 128, torch.float16))
    expected = reference.attend(stored.query.double(), *stored.exact())
    for _ in range(2):
        output = cuda.decode(*stored.arguments, AttentionOptions(), shape=shape, splits=splits)
        assert (output.double() - expected).norm() <= 1e-3 * expected.norm()
    assert launched == ["attention"] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [None, 1, 5])
@pytest.mark.parametrize(
    "options", [{"is_causal": True}, {"window": 90, "is_causal": True}, {"mask": 1}, {"mask": 8}, {"added": 8}], ids=str
)
def test_many_query_rows_go_to_the_prefill_kernel(
    options: dict[str, Any], splits: int | None, dtype: torch.dtype, launched: list[str]
) -> None:
    """And nothing is restored for them."""
    case = Case(3, 2, 4, 40, (2, 5), 40, 64, 80, dtype, transposed=True)
    options = dict(options)
    for kind in ("mask", "added"):
        if kind in options:
            seen = torch.rand(3, options.pop(kind), case.query_len, case.kv_len) > 0.3
            seen[:, :, :, 64:192] = False
            options["attn_mask"] = seen if kind == "mask" else torch.where(seen, 0.25, -torch.inf)
    stored = build(case)
    expected = reference.attend(stored.query.double(), *stored.exact(), AttentionOptions(**options))
    output = cuda.prefill(*stored.arguments, AttentionOptions(**options), None, splits)
    assert (output.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert torch.equal(reads.attention(*stored.arguments, AttentionOptions(**options)), output)
    merged = [] if splits == 1 else ["merge_parts"]
    scanned = ["scan_mask"] if "attn_mask" in options else []
    assert launched[: len(scanned) + 1 + len(merged)] == [*scanned, "prefill", *merged]
    assert launched.count("scan_mask") == len(scanned)  # once for both


ROWS = (3, 7, 5)
"""Stored rows of three segments that five sequences read: fewer than they, more, and as many."""


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("query_len", [1, 5, 40])
def test_a_row_table_is_followed(kind: str, query_len: int, launched: list[str]) -> None:
    shared = share(Case(5, 2, 4, query_len, (3, 2, 4), 41, 64, 80, torch.float16), kind, ROWS)
    asked = AttentionOptions(is_causal=True)
    assert shared.error(reads.attention(shared.query, shared.view, asked), asked) <= TOLERANCE[torch.float16]
    for is_key in (True, False):
        assert torch.equal(reads.restore(shared.view, is_key), reads.restore(shared.copies.view, is_key))
    assert set(launched) <= {"attention", "prefill", "merge_parts", "restore"}


@pytest.fixture
def shares_any_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """What neighbours share is read once, however little it is."""
    monkeypatch.setattr(emulated_cuda.SHARED, "EACH_PAGE", math.inf)
    monkeypatch.setattr(emulated_cuda.SHARED, "plan_for", emulated_cuda.SHARED.plan_for.__wrapped__)


@pytest.mark.usefixtures("shares_any_page")
@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(("batch", "group", "query_len"), [(5, 4, 1), (2, 8, 8), (21, 7, 1), (70, 1, 1), (3, 4, 5)])
def test_what_neighbours_share_is_read_once(
    kind: str, batch: int, group: int, query_len: int, launched: list[str]
) -> None:
    shared = share(Case(batch, 2, group, query_len, (3, 2, 4), 41, 64, 80, torch.float16), kind)
    asked = AttentionOptions(is_causal=True)
    assert shared.error(reads.attention(shared.query, shared.view, asked), asked) <= TOLERANCE[torch.float16]
    assert launched == ["prefill", "attention"]


@pytest.mark.usefixtures("shares_any_page")
@pytest.mark.parametrize(
    "options",
    [
        {"window": 150},
        {"window": 100, "is_causal": True, "softcap": 30.0},
        {"sinks": True, "softmax_scale": 0.3},
        {"mask": "left padding"},
        {"mask": "of every head and query", "sinks": True},
        {"mask": "additive"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["one row", "runs"])
def test_every_option_of_pages_that_are_shared(options: dict[str, Any], kind: str, launched: list[str]) -> None:
    case = Case(6, 2, 4, 3, (3, 2, 4), 41, 64, 64, torch.float16)
    options = dict(options)
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-2, 6, case.num_q_heads, dtype=torch.float16)
    shape = case.batch, case.num_q_heads, case.query_len, case.kv_len
    masks = {
        "left padding": (torch.arange(case.kv_len) >= torch.arange(6)[:, None] * 50)[:, None, None],
        "of every head and query": torch.rand(shape) > 0.3,
        "additive": torch.randn(case.batch, 1, *shape[2:]).bfloat16(),
    }
    if "mask" in options:
        options["attn_mask"] = masks[options.pop("mask")]
    shared, asked = share(case, kind), AttentionOptions(**options)
    assert shared.error(reads.attention(shared.query, shared.view, asked), asked) <= TOLERANCE[torch.float16]
    assert [name for name in launched if name != "scan_mask"] == ["prefill", "attention"]


@pytest.mark.parametrize(
    ("kind", "dtype", "batch"),
    [
        *(("one row", torch.float16, 3), ("one row", torch.float16, 1)),
        *(("one row", torch.float32, 30), (None, torch.float16, 30)),
    ],
)
def test_where_there_is_little_to_share_one_kernel_is_launched(
    kind: str | None, dtype: torch.dtype, batch: int, launched: list[str]
) -> None:
    shared = share(Case(batch, 2, 4, 1, (3,), 41, 64, 64, dtype), kind or "identity")
    view = shared.view if kind else shared.copies.view
    assert shared.error(reads.attention(shared.query, view)) <= TOLERANCE[dtype]
    assert launched == ["attention"]


@pytest.mark.usefixtures("launched")
def test_a_row_table_may_be_part_of_a_larger_one() -> None:
    """As that of a layer of fixed capacity is."""
    shared = share(Case(5, 2, 4, 1, (3,), 41, 64, 64, torch.float16), "random", (7,))
    table = shared.view.row_table
    assert table is not None
    for whole in (torch.nn.functional.pad(table, (1, 2)), torch.nn.functional.pad(table, (1, 2)).T.contiguous().T):
        view = PagesView(ClosedPages(shared.view.segments, whole[:, 1:4]), *shared.view.buffers)
        assert shared.error(reads.attention(shared.query, view)) <= TOLERANCE[torch.float16]


LOWEST = {dtype: torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@pytest.mark.parametrize("dtype", LOWEST)
@pytest.mark.parametrize("options", [{}, {"sinks": True}, {"is_causal": True}, {"window": 90}], ids=str)
@pytest.mark.parametrize("hides", ["left padding", "whole rows", "all but a far key", "one row for all queries"])
def test_blocks_hidden_by_the_lowest_number_are_passed_over_where_that_changes_nothing(
    hides: str, options: dict[str, Any], dtype: torch.dtype, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that sees no key attends to all alike, so its blocks are read."""
    case = Case(2, 2, 4, 40, (2, 5), 40, 64, 80, torch.bfloat16)
    seen = torch.ones(2, 1, case.query_len, case.kv_len, dtype=torch.bool)
    seen[1, :, :, :200] = False
    if hides == "whole rows":
        seen[0, :, 3] = False
    elif hides == "all but a far key":
        seen[0] = False
        seen[0, :, :, 70] = True
    elif hides == "one row for all queries":
        seen = seen[:, :, :1]
    options = {"sinks": torch.randn(case.num_q_heads)} if "sinks" in options else dict(options)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, LOWEST[dtype])
    read, of = [], emulated_cuda.read_blocks

    def noted(*arguments: Any) -> Tensor:
        read.append(of(*arguments))
        return read[-1]

    monkeypatch.setattr(emulated_cuda, "read_blocks", noted)
    check(build(case), attn_mask=mask, **options)
    assert launched[:2] == ["scan_mask", "prefill"]
    every = bool(options.keys() & {"is_causal", "window"})  # other rules may hide what the mask shows
    for query_block in (0, 1):
        is_whole = every or (hides == "whole rows" and query_block == 0)
        assert bool(read[0][0, 0, query_block, 0]) == (is_whole or hides != "all but a far key")
        assert not read[0][1, 0, query_block, :3].any() or every
        assert read[0][1, 0, query_block, 3]


def test_float32_has_one_kernel_for_any_number_of_rows(launched: list[str]) -> None:
    check(build(Case(2, 2, 4, 40, (2, 5), 40, 64, 80, torch.float32)), is_causal=True)
    assert launched == ["attention"]


def test_a_mask_is_looked_at_again_when_it_has_changed(launched: list[str]) -> None:
    stored = build(Case(1, 2, 4, 40, (2,), 40, 64, 64, torch.bfloat16))
    mask = torch.ones(40, 168, dtype=torch.bool)
    check(stored, attn_mask=mask)
    check(stored, attn_mask=mask)
    mask[:, :64] = False
    check(stored, attn_mask=mask)
    check(stored, attn_mask=mask[:, : mask.shape[1]])
    with torch.inference_mode():  # where torch counts no changes
        for _ in range(2):
            check(stored, attn_mask=mask.clone())
    assert launched.count("scan_mask") == 2 + 2


def test_a_later_turn_under_a_window_asks_the_gpu_for_no_more_than_one_without(launched: list[str]) -> None:
    """A launch for the pages it closes, one for the rest, two to attend; and no copy of a table."""
    states = torch.randn(1, 1, 5000, 64).bfloat16()
    turn, asked = states[:, :, :512], []
    for layer in (Int8Layer(), Int8SlidingLayer(2048)):
        layer.update(states, states)
        launched.clear()
        keys, _ = layer.update(turn, turn)
        view = keys.pages_view
        assert len(view.segments) <= cuda.pages.FEW_SEGMENTS
        mask = torch.ones(512, view.seq_len, dtype=torch.bool).tril(view.seq_len - 512)
        reads.attention(turn, view, AttentionOptions(mask))
        assert not cuda.segment_table(view).copies
        asked.append(Counter(launched))
    assert asked[0] == {"store_pages": 1, "append": 1, "scan_mask": 1, "prefill": 1, "merge_parts": 1}
    # Its pages begin behind those of the turn before, and so they go to the end of one segment and to the next ones.
    assert asked[1] - asked[0] <= Counter(store_pages=2)


def test_a_later_turn_under_a_window_takes_the_host_few_calls(
    launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Python and of torch, in one layer; where the GPU has less to do, their time is that of the turn."""
    for module in emulated_cuda.MODULES:
        if hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda *arguments, **options: None)
    routing.install()
    layer, module, attend = Int8SlidingLayer(4096), torch.nn.Module(), attention_function("sdpa")
    states = torch.randn(1, 1, 8192, 16).bfloat16()
    turn, mask = states[:, :, :512], torch.ones(1, 1, 512, 8704, dtype=torch.bool)
    counts: Counter[str] = Counter()

    def take() -> None:
        keys, values = layer.update(turn, turn)
        attend(module, turn, keys, values, mask[..., : keys.shape[2]], scaling=0.25)  # type: ignore[misc]

    layer.update(states, states)
    for _ in range(2):
        take()
    # What is written is read next: its address need not be asked for again.
    assert all("cuda" in segment.memo for segment in layer.pages.segments)  # type: ignore[union-attr]
    sys.setprofile(lambda frame, event, argument: counts.update([event]))
    try:
        take()
    finally:
        sys.setprofile(None)
    assert counts["call"] <= 160  # 222 where masks, segments and lengths were looked at for every use
    assert counts["c_call"] <= 150


def test_more_segments_than_go_with_a_launch_are_read_from_a_table(launched: list[str]) -> None:
    segments = (1,) * cuda.pages.FEW_SEGMENTS
    for more, copied in (((), False), ((2,), True)):
        stored = build(Case(1, 2, 4, 40, (*segments, *more), 40, 64, 64, torch.bfloat16))
        check(stored, is_causal=True)
        assert launched[-1] in ("prefill", "merge_parts")
        assert bool(cuda.segment_table(stored.arguments[1]).copies) == copied


def test_a_stream_reads_a_table_that_was_copied_on_it(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork shares the table of its pages, and another thread may read it on a stream of its own."""
    stored = build(Case(1, 2, 4, 3, (1, 2, 3), 40, 64, 64, torch.bfloat16))
    table, addresses = cuda.segment_table(stored.view), []
    for stream in (0, 7, 0):
        monkeypatch.setattr(cuda.pages, "current_stream", lambda index, stream=stream: stream)
        check(stored, is_causal=True)
        addresses.append(table.address_beyond(1))
    assert len(set(addresses)) == len(table.copies) == 2
    assert addresses[0] == addresses[2]


def test_masks_of_two_kinds_of_layers_are_looked_at_once_each(launched: list[str]) -> None:
    """Layers with a window and layers without take turns."""
    stored = build(Case(1, 2, 4, 40, (2,), 40, 64, 64, torch.bfloat16))
    masks = [torch.ones(40, 168, dtype=torch.bool).tril(128).triu(first) for first in (0, 100)]
    for _ in range(3):
        for mask in masks:
            check(stored, attn_mask=mask)
    assert launched.count("scan_mask") == 2
    for _ in range(10):  # what is gone is not remembered
        check(stored, attn_mask=masks[0].clone())
    assert len(emulated_cuda.PREFILL._known[None]) <= emulated_cuda.PREFILL.KNOWN_MASKS


@pytest.mark.parametrize(
    ("grid", "threads", "shared_bytes"),
    [
        ((1, 65536, 1), 256, 0),
        ((1, 1, 65536), 256, 0),
        ((1 << 31, 1, 1), 256, 0),
        ((1, 0, 1), 256, 0),
        ((1, 1, 1), 1056, 0),
        ((1, 1, 1), 256, 1 << 20),
    ],
)
def test_the_stand_in_refuses_what_a_gpu_refuses(grid: tuple[int, int, int], threads: int, shared_bytes: int) -> None:
    source, _, form = emulated_cuda.STRUCTURES["append"]
    macros = (("HEAD_DIM", 16), ("V_HEAD_DIM", 16), ("DTYPE", 0), ("HAS_ROW_TABLE", 0))
    kernel = emulated_cuda.load_kernel(source, macros, "append", 0, threads, shared_bytes)
    with pytest.raises(RuntimeError, match="append: no GPU takes"):
        emulated_cuda.launch(kernel, grid, 0, form, *[0] * len(emulated_cuda.packed_letters(form)))


@pytest.mark.parametrize("limit", [6, 8, 10])
@pytest.mark.parametrize(("batch", "num_kv_heads"), [(11, 1), (1, 11), (3, 4)])
def test_more_heads_and_rows_than_a_grid_takes_side_by_side(
    batch: int, num_kv_heads: int, limit: int, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention, pages, tails and what is restored are those of any number."""
    emulated_cuda.narrow_grids(monkeypatch, limit)
    check(build(Case(batch, num_kv_heads, 3, 9, (2, 1), 20, 32, 16)), softcap=5.0, is_causal=True)
    key, _ = random_states(batch, num_kv_heads, 200, 32, seed=1)
    value, _ = random_states(batch, num_kv_heads, 200, 16, seed=2)
    fixed, growing = StaticInt8Pages(key, value, 300), Int8Pages(key, value)
    for tokens in (slice(0, 150), slice(150, 199), slice(199, 200)):
        fixed.append(key[:, :, tokens], value[:, :, tokens])
        growing.append(key[:, :, tokens], value[:, :, tokens])
    assert_same_bytes(fixed, growing)
    for ours, quantize, restore, states in (
        (growing.restore()[0], reference.quantize_key_pages, reference.restore_key_pages, key),
        (growing.restore()[1], reference.quantize_value_pages, reference.restore_value_pages, value),
    ):
        assert torch.equal(ours[:, :, :128], restore(*quantize(states[:, :, :128]), torch.float32))
        assert torch.equal(ours[:, :, 128:], states[:, :, 128:])
    assert set(launched) == {"attention", "store_pages", "append", "restore", "advance"}


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize(
    ("batch", "num_kv_heads", "group", "query_len"),
    [(65536, 1, 4, 1), (8192, 8, 1, 1), (1, 65536, 1, 1), (1, 8, 8, 16384), (2, 8, 8, 131072), (65535, 1, 1, 1)],
)
def test_every_call_is_planned_within_what_a_grid_takes(
    batch: int, num_kv_heads: int, group: int, query_len: int
) -> None:
    sizes = batch, num_kv_heads, group, query_len, 64, 64
    plan = emulated_cuda.PLAN.plan_for(0, sizes, torch.bfloat16, False, False, False, 300, None, None)
    assert all(1 <= size <= limit for size, limit in zip(plan.grid, emulated_cuda.GRID_LIMITS, strict=True))
    assert plan.tiles <= plan.grid[1] * plan.grid[2] < plan.tiles + plan.grid[2]
    assert plan.kernel.function[1]["FOLDS_GRID"] == int(plan.grid[1:] != (plan.tiles // batch, batch))


def generated(model: torch.nn.Module, how: dict[str, Any]) -> tuple[Tensor, QuantizedInt8Cache]:
    cache = QuantizedInt8Cache(model.config, strict=True)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 64, (2, 70), generator=generator)
    mask = torch.ones_like(ids)
    if "prompt_lookup_num_tokens" in how:
        ids, mask = ids[:1].repeat(1, 2), mask[:1].repeat(1, 2)
    else:
        mask[1, :40] = 0
    output = model.generate(  # type: ignore[operator]
        ids, attention_mask=mask, **cache_argument(cache), max_new_tokens=140, do_sample=False, pad_token_id=0, **how
    )
    return output, cache


@pytest.mark.parametrize("window", [None, 1200])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 6}], ids=str)
def test_generate_stores_and_answers_as_with_the_torch_backend(
    how: dict[str, Any], window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None}
    model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**sizes))
    if window:
        model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=window))
    model.eval()
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "torch")
    expected, with_torch = generated(model, how)
    monkeypatch.delenv(dispatch.BACKEND_VARIABLE)
    emulated_cuda.emulate(monkeypatch)
    output, cache = generated(model, how)
    assert cache.report().backend == "cuda decode"  # in float32 for any number of tokens
    assert torch.equal(output, expected)
    for ours, theirs in zip(cache.layers, with_torch.layers, strict=True):
        assert ours.get_seq_length() == theirs.get_seq_length()
        torch.testing.assert_close(ours.keys.restore(), theirs.keys.restore(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [Int8Layer, lambda: Int8SlidingLayer(150)], ids=["full", "window"])
@given(operations=schedules(longest=30))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
def test_any_schedule_leaves_what_the_exact_layer_holds(
    make: Any, operations: list[Operation], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twins, "HEAD_DIM", 16)
    monkeypatch.setattr(twins, "V_HEAD_DIM", 32)
    twin = twins.ExactTwin(make())
    for operation in operations:
        twin.run(operation)
    twin.check()


def test_kernels_are_launched_with_as_many_threads_as_they_were_built_for() -> None:
    built = re.findall(r"__launch_bounds__\((\w+)[^)]*\)\s+(\w+)\(", nvrtc.program_text("pages.cu"))
    assert {name for threads, name in built if threads == "kStoreThreads"} == set(emulated_cuda.PAGES.MAKES_PAGES)


def test_a_new_thread_is_given_the_context_that_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pytest.importorskip("cuda.bindings.driver")
    launches = emulated_cuda.LAUNCH._Launches()
    entered: list[int] = []
    for name, answer in (
        ("cuCtxGetCurrent", lambda: (0, entered[-1] if entered else 0)),
        ("cuDeviceGet", lambda ordinal: (0, 10 + ordinal)),
        ("cuDevicePrimaryCtxRetain", lambda device: (0, 100 + device)),
        ("cuCtxSetCurrent", lambda context: (entered.append(context), (0,))[1]),
    ):
        monkeypatch.setattr(driver, name, answer)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 3, raising=False)
    assert launches.launch is driver.cuLaunchKernel
    assert entered == [113]
    launch_early, *_ = launches.early
    assert launch_early is driver.cuLaunchKernelEx
    assert entered == [113]  # one that there is stays


def test_a_decoding_step_launches_one_kernel(launched: list[str]) -> None:
    """But for those that give the tail more room, and those that close a page."""
    key, _ = random_states(1, 2, 330, 64, seed=1)
    value = random_states(1, 330, 2, 80, seed=2)[0].transpose(1, 2)
    query, _ = random_states(1, 4, 1, 64, seed=3)
    layer = Int8Layer()
    layer.update(key[:, :, :200], value[:, :, :200])
    steps = []
    for position in range(200, 330):
        newest = slice(position, position + 1)
        launched.clear()
        states, values = layer.update(key[:, :, newest], value[:, :, newest])
        output = reads.attention(query, states.pages_view)  # type: ignore[attr-defined]
        steps.append(tuple(launched))
        seen = states.restore(), values.restore()  # type: ignore[attr-defined]
        assert torch.equal(seen[0][:, :, newest], key[:, :, newest])
        assert torch.equal(seen[1][:, :, newest], value[:, :, newest])
        torch.testing.assert_close(output, reference.attend(query, *seen))
    assert Counter(steps) == {
        ("attention",): 122,
        ("append", "attention"): 6,
        ("append", "store_pages", "append", "attention"): 2,
    }


@pytest.mark.parametrize("chunks", [[150, *[1] * 60], [40, 90, 1, 1, 64, 130, 1], [465], [95, 1, 1, 2, 300]])
@pytest.mark.parametrize("residual_length", [0, 32])
def test_a_fixed_capacity_stores_what_the_growing_cache_stores_and_reads_it(
    chunks: list[int], residual_length: int, launched: list[str]
) -> None:
    """With its lengths from what would be device memory."""

    def states(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        return random_states(2, 2, tokens, 64, seed=seed)[0], random_states(2, 2, tokens, 80, seed=seed + 99)[0]

    static = StaticInt8Pages(*states(0, 0), 7 * 64 + 17, residual_length)
    growing = Int8Pages(*states(0, 0), residual_length)
    query, _ = random_states(2, 4, 1, 64, seed=7)
    scratch = dispatch.scratch_for(static.key_tail, static.value_tail)
    for index, tokens in enumerate(chunks):
        new = states(tokens, index)
        static.append(*new)
        growing.append(*new)
        recorded = [static.memory, scratch], static.layout.shape
        output = reads.attention_recorded(query, *recorded, AttentionOptions(is_causal=True))
        view = static.view()
        torch.testing.assert_close(output, reference.attend(query, *reads.restore_both(view)))
    assert_same_bytes(static, growing)
    assert {"advance", "attention"} <= set(launched)


def test_a_reordered_fixed_capacity_is_read_through_its_table(launched: list[str]) -> None:
    """Over two page ends, in reads recorded before and after as in others, without a copy of a page."""
    states = [random_states(3, 2, tokens, 64, seed=tokens)[0] for tokens in (200, 1)]
    static, growing = (make(*states[:1] * 2) for make in (lambda *given: StaticInt8Pages(*given, 465), Int8Pages))
    query, _ = random_states(3, 4, 1, 64, seed=7)
    scratch = dispatch.scratch_for(static.key_tail, static.value_tail)
    for each in (static, growing):
        each.append(states[0], states[0])
    pages, first_shape = static.buffers.pages.key_qdata[:2].clone(), static.layout.shape
    assert first_shape.sharing == FOLLOWS_TABLE
    for step in range(150):
        for each in (static, growing):
            each.append(states[1] * step, states[1] * step)
            if step % 30 == 5:
                each.index_select(torch.tensor([[2, 0, 0], [1, 1, 2]][step % 2]))
        if step % 10 == 0:
            expected = reference.attend(query, *growing.restore())
            for shape in (first_shape, static.layout.shape):
                output = reads.attention_recorded(query, [static.memory, scratch], shape)
                torch.testing.assert_close(output, expected)
            torch.testing.assert_close(reads.attention(query, static.view()), expected)
    assert static.layout.shape.sharing == SHARES_READS
    assert torch.equal(static.buffers.pages.key_qdata[:2], pages)
    assert_same_bytes(static, growing)


ONCE, EACH = "shared, read once", "shared, read by each"
MEASURED = json.loads((Path(__file__).parents[1] / "docs/benchmarks/cuda-shared.json").read_text())["rows"]


@pytest.mark.parametrize("row", MEASURED, ids=lambda row: row["row"])
def test_pages_are_read_once_where_that_was_measured_to_be_faster(
    row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every case of the benchmark on an H200, so that what saves memory does not cost time."""
    emulated_cuda.emulate(monkeypatch)
    once, each = (row["median_us"][name] for name in (ONCE, EACH))
    sequences, num_q_heads, num_kv_heads, tokens, own = map(int, re.findall(r"\d+", row["row"]))
    sizes = sequences, num_kv_heads, num_q_heads // num_kv_heads, 1, 128, 128
    plan_for = emulated_cuda.SHARED.plan_for.__wrapped__
    plan = plan_for(0, sizes, torch.bfloat16, "mask" in row["row"], False, (tokens + own) // PAGE_SIZE, False)
    assert (each if plan is None else once) <= 1.03 * min(each, once)
