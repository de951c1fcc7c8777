"""Do the CPU kernels, on every instruction set, and the torch backend equal the reference?"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantcache.backends import cpu, dispatch
from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import METADATA_SCALE, PAGE_SIZE
from quantcache.store import reads, writes
from quantcache.store.segments import ClosedPages, Segment
from quantcache.store.view import PagesView
from tests.attention_cases import Case, Stored, assert_within, attention_bound, build
from tests.strategies import broken

BACKENDS = ("torch", *(f"cpu-{isa}" for isa in cpu.ISAS))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small operations on shared cores spend their time waiting for each other; threads have tests of their own."""
    before, isa = torch.get_num_threads(), None if cpu.unavailable() else cpu.isa()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    if isa:
        cpu.use_isa(isa)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of the backend that every operation of the test runs on."""
    name, _, isa = request.param.partition("-")
    if not isa:
        monkeypatch.setenv(dispatch.BACKEND_VARIABLE, name)
        yield name
        return
    reason = cpu.unavailable()
    if reason is not None:
        pytest.skip(f"the CPU kernels cannot be built here: {reason}")
    if not cpu.use_isa(isa):
        pytest.skip(f"this processor does not run {isa}")
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, name)
    yield name


def run(stored: Stored, **options: Any) -> Tensor:
    return reads.attention(*stored.arguments, AttentionOptions(**options))  # type: ignore[arg-type]


def check(backend: str, case: Case, seed: int = 0, **options: Any) -> None:
    """Attention of ``case`` lies within the bound of the specification in float64."""
    stored = build(case, seed)
    key, value = stored.exact()
    scale = options.get("softmax_scale") or case.head_dim**-0.5
    sinks, mask = options.get("sinks"), options.get("attn_mask")
    exact = {
        "attn_mask": mask if mask is None or mask.dtype == torch.bool else mask.double(),
        "sinks": None if sinks is None else sinks.double(),
    }
    expected = reference.attend(stored.query.double(), key, value, AttentionOptions(**(options | exact)))
    output = run(stored, **options)
    assert output.dtype == case.dtype
    assert output.is_contiguous()
    assert output.shape == (case.batch, case.query_len, case.num_q_heads, case.v_head_dim)
    # The torch backend restores to the dtype of the query; the kernels compute in float32 whatever the dtype.
    eps = torch.finfo(torch.float32 if backend == "cpu" else case.dtype).eps
    assert_within(output, expected, attention_bound(stored, expected, scale, eps))


SHAPES = [
    Case(),
    Case(head_dim=128, v_head_dim=128, group=4, segments=(3, 1), tail_len=95),
    Case(batch=3, num_kv_heads=1, head_dim=80, v_head_dim=80, group=7, segments=(1,), tail_len=1),
    Case(batch=2, head_dim=96, v_head_dim=96, group=3, segments=(1, 1, 2), tail_len=32),
    Case(head_dim=112, v_head_dim=112, group=8, segments=(5,), tail_len=0),
    Case(head_dim=256, v_head_dim=256, group=4, segments=(1,), tail_len=64),
    Case(head_dim=192, v_head_dim=128, num_kv_heads=3, group=1, segments=(2, 1)),
    Case(head_dim=20, v_head_dim=12, group=2, segments=(2,), tail_len=3),
    Case(head_dim=8, v_head_dim=1, segments=(1,), tail_len=5),
    Case(segments=(), tail_len=1),
    Case(segments=(), tail_len=130, group=3, query_len=3),
    Case(batch=2, segments=(4,), tail_len=40, group=3, query_len=5),
    Case(num_kv_heads=1, segments=(40,), tail_len=40, group=2),
]


@pytest.mark.parametrize(
    ("dtype", "transposed"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)], ids=str
)
@pytest.mark.parametrize("case", SHAPES, ids=lambda c: f"{c.head_dim}-{c.group}-{sum(c.segments)}+{c.tail_len}")
def test_attention_equals_the_reference(backend: str, case: Case, transposed: bool, dtype: torch.dtype) -> None:
    check(backend, dataclasses.replace(case, transposed=transposed, dtype=dtype), is_causal=True)


OPTIONS = [
    {"is_causal": False},
    {"is_causal": True, "window": 1},
    {"is_causal": True, "window": 100},
    {"window": 70},
    {"softcap": 5.0},
    {"softcap": 0.3, "is_causal": True},
    {"softmax_scale": 0.7},
    {"sinks": torch.tensor([0.5, -2.0, 9.0, 0.0, 1.0, 2.0])},
    {"sinks": torch.tensor([0.5, -2.0, 9.0, 0.0, 1.0, 2.0]), "softcap": 3.0, "window": 90, "is_causal": True},
]


@pytest.mark.parametrize("query_len", [1, 6])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o))
def test_every_option_equals_the_reference(backend: str, options: dict[str, Any], query_len: int) -> None:
    case = Case(batch=2, num_kv_heads=2, group=3, query_len=query_len, segments=(2, 1), tail_len=37, head_dim=32)
    check(backend, case, **options)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("broadcast", ["1111", "b11k", "1hqk", "bhqk", "bhqk strided", "qk", "bhq1"])
def test_masks_of_every_form_equal_the_reference(backend: str, kind: torch.dtype, broadcast: str) -> None:
    case = Case(batch=2, group=2, query_len=3, segments=(1, 1), tail_len=21, head_dim=32, v_head_dim=32)
    sizes = {"b": 2, "h": 4, "q": 3, "k": case.kv_len, "1": 1}
    form, _, strided = broadcast.partition(" ")
    shape = [sizes[axis] for axis in form]
    generator = torch.Generator().manual_seed(1)
    mask = torch.randn(*shape[:-1], shape[-1] * (2 if strided else 1), generator=generator)
    mask = mask > -0.5 if kind == torch.bool else mask.to(kind)
    mask = mask[..., ::2] if strided else mask
    if form.endswith("k") and kind == torch.float32:
        mask[..., 5:70] = -torch.inf
    check(backend, case, attn_mask=mask, is_causal=True)


def test_a_mask_of_left_padding_hides_the_padding(backend: str) -> None:
    case = Case(batch=2, group=4, segments=(4,), tail_len=40)
    mask = torch.ones(2, 1, 1, case.kv_len, dtype=torch.bool)
    mask[1, ..., :100] = False
    check(backend, case, attn_mask=mask)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_attention_is_deterministic_for_a_thread_count(backend: str, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    stored = build(Case(group=3, segments=(30,), tail_len=70))
    first = run(stored)
    assert all(torch.equal(run(stored), first) for _ in range(5))
    check(backend, Case(group=3, segments=(30,), tail_len=70))


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="lists the threads of the process as Linux does")
@pytest.mark.skipif(cpu.unavailable() is not None, reason="the CPU kernels cannot be built here")
def test_a_call_with_work_for_few_threads_ends_none_of_torchs() -> None:
    """GNU's OpenMP ends those that a smaller team leaves over, and torch's next operation would start them again."""
    torch.set_num_threads(6)
    stored = build(Case(segments=(40,), tail_len=0))  # work for two
    large = torch.ones(2_000_000)

    def threads() -> set[str]:
        return {entry.name for entry in Path("/proc/self/task").iterdir()}

    large.add(1)
    before = threads()
    cpu.attention(*stored.arguments, AttentionOptions())  # type: ignore[arg-type]
    large.add(1)
    assert threads() == before


def test_a_row_that_sees_nothing_gets_zeros() -> None:
    stored = build(Case(query_len=3, segments=(2,), tail_len=10))
    mask = torch.ones(3, 138, dtype=torch.bool)
    mask[1] = False
    for isa in cpu.ISAS:
        if cpu.unavailable() is None and cpu.use_isa(isa):
            output = cpu.attention(*stored.arguments, AttentionOptions(mask))  # type: ignore[arg-type]
            assert torch.equal(output[:, 1], torch.zeros_like(output[:, 1]))
            assert (output[:, 0] != 0).all()


def test_many_queries_are_attended_in_passes(backend: str) -> None:
    check(
        backend, Case(num_kv_heads=1, group=2, query_len=700, segments=(3,), tail_len=700), is_causal=True, window=300
    )


def test_a_broken_page_shows_as_nan_where_it_is_seen(backend: str) -> None:
    stored = build(Case(batch=2, num_kv_heads=2, segments=(3,), tail_len=10))
    nan = torch.tensor(torch.nan).to(torch.bfloat16).view(torch.int16)
    stored.key_metadata[0][1, 0, 1, 3, METADATA_SCALE] = nan
    output = run(stored)
    assert output[0, :, 1].isnan().all()
    assert output[1].isfinite().all()
    assert output[0, :, 0].isfinite().all()
    stored = build(Case(batch=2, num_kv_heads=2, segments=(3,), tail_len=10))
    stored.value_metadata[0][1, 0, 1, 3, METADATA_SCALE] = nan
    output = run(stored)
    assert output[0, :, 1].isnan().all()
    assert output[1].isfinite().all()
    assert output[0, :, 0].isfinite().all()


def test_a_hidden_broken_page_is_not_read() -> None:
    stored = build(Case(segments=(3,), tail_len=10))
    for metadata in (stored.key_metadata[0], stored.value_metadata[0]):
        metadata[1, ..., METADATA_SCALE] = 0x7FC0
    mask = torch.ones(1, 202, dtype=torch.bool)
    mask[:, 64:128] = False
    for isa in cpu.ISAS:
        if cpu.unavailable() is None and cpu.use_isa(isa):
            output = cpu.attention(*stored.arguments, AttentionOptions(mask))  # type: ignore[arg-type]
            assert output.isfinite().all()


def extreme_states(dtype: torch.dtype, head_dim: int) -> Tensor:
    """(2, 3, 3 pages, head_dim): ordinary, tiny, huge, constant, zero, NaN, inf, ties of power-of-two scales."""
    generator = torch.Generator().manual_seed(2)
    states = torch.randn(2, 3, 3 * PAGE_SIZE, head_dim, generator=generator)
    largest = torch.finfo(dtype).max
    states[0, 1] *= 1e-30 if dtype != torch.float16 else 1e-6
    states[0, 2] *= largest / 8
    states[0, 2, 0, 0], states[0, 2, 1, 0], states[0, 2, 2, -1] = largest, -largest, largest
    states[1, 0, :70] = 3.3
    states[1, 0, 70:80] = 0.0
    states[1, 0, 100] = torch.finfo(torch.float32).tiny / 3
    states[1, 1] = torch.randint(-508, 509, states[1, 1].shape, generator=generator) / 4
    states[1, 2, 5, 0] = torch.nan
    states[1, 2, 70, -1] = torch.inf
    states[1, 2, 130, 0] = -torch.inf
    return states.to(dtype)


@functools.cache
def expected_pages(dtype: torch.dtype, head_dim: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    states = extreme_states(torch.float32 if dtype == torch.float64 else dtype, head_dim)
    return reference.quantize_key_pages(states), reference.quantize_value_pages(states)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("head_dim", [1, 20, 80, 128])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
def test_pages_equal_the_reference_bit_for_bit(backend: str, layout: str, head_dim: int, dtype: torch.dtype) -> None:
    states = extreme_states(torch.float32 if dtype == torch.float64 else dtype, head_dim).to(dtype)
    if layout == "transposed":
        states = states.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "strided":
        states = states.transpose(2, 3).contiguous().transpose(2, 3)
    key, value = expected_pages(dtype, head_dim)
    written = [torch.full(t.shape, 77, dtype=t.dtype) for t in (*key, *value)]
    writes.store_pages(states, states, Segment(*written))
    for ours, theirs in zip(written, (*key, *value), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 20, 80, 128])
def test_pages_of_states_that_are_not_finite_equal_the_reference(
    backend: str, head_dim: int, dtype: torch.dtype
) -> None:
    states = broken(extreme_states(dtype, head_dim))
    expected = (*reference.quantize_key_pages(states), *reference.quantize_value_pages(states))
    written = [torch.full(t.shape, 77, dtype=t.dtype) for t in expected]
    writes.store_pages(states, states, Segment(*written))
    for ours, theirs in zip(written, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 20, 64, 128])
@pytest.mark.parametrize("tail_len", [0, 70])
def test_restored_states_equal_the_reference(backend: str, tail_len: int, head_dim: int, dtype: torch.dtype) -> None:
    states = extreme_states(dtype, head_dim)
    tail = states[:, :, :tail_len]
    pages = Segment(*reference.quantize_key_pages(states), *reference.quantize_value_pages(states))
    halves = pages.narrow(0, 1), pages.narrow(1, None)
    for is_key, dense, (qdata, metadata) in (
        (True, reference.restore_key_pages, pages[:2]),
        (False, reference.restore_value_pages, pages[2:]),
    ):
        expected = torch.cat([dense(qdata, metadata, dtype), tail], dim=2)
        restored = reads.restore(PagesView(ClosedPages(halves), tail, tail), is_key)
        assert torch.equal(restored.isnan(), expected.isnan())
        # Bit for bit, infinities of the tail included.
        assert torch.equal(restored.masked_fill(restored.isnan(), 0), expected.masked_fill(expected.isnan(), 0))


def test_operations_pass_opcheck(backend: str) -> None:
    stored = build(Case(segments=(1, 1), tail_len=5, group=2))
    packed = reads.packed(stored.view)
    options = (None, True, 0.1, None, None, None)
    torch.library.opcheck(torch.ops.quantcache.attention.default, (stored.query, *packed, *options))
    for is_key in (True, False):
        torch.library.opcheck(torch.ops.quantcache.restore.default, (*packed, torch.float32, is_key))
    states = torch.randn(1, 2, PAGE_SIZE, 64)
    pages = [torch.empty_like(part) for part in stored.view.segments[0]]
    torch.library.opcheck(torch.ops.quantcache.store_pages.default, (states, states, *pages))


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "fast")
    with pytest.raises(ValueError, match=re.escape("QUANTCACHE_BACKEND: must be one of torch, cpu")):
        dispatch.choose_backend(torch.device("cpu"))
