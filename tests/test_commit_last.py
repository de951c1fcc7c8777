"""Does an operation that fails, wherever it fails, leave the layer as it was?

Every operation of torch that an operation of the layer makes, allocations among them, is made to fail in turn, and so
is every call of a backend.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quantcache.backends import dispatch
from quantcache.layers import native
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.fixed import StaticInt8Layer
from quantcache.layers.growing import GrowingInt8Layer, Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import fixed, reads, tail, writes
from quantcache.store.fixed import StaticInt8Pages
from tests.strategies import random_states

BATCH, HEADS, HEAD_DIM, V_HEAD_DIM = 3, 2, 8, 12

KINDS: dict[str, Callable[[], BaseInt8Layer]] = {
    "growing": Int8Layer,
    "window": lambda: Int8SlidingLayer(150),
    "fixed": lambda: StaticInt8Layer(700),
}


class InjectedError(Exception):
    """What the operation that is made to fail raises."""


class FailAt(TorchDispatchMode):
    """The ``place``-th operation of torch fails, counted from 1."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.left = place

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left == 0:
            raise InjectedError(str(func))
        if func.namespace == "quantcache":  # its own operations are looked into
            room = reads if func._opname in ("attention", "restore") else writes
            with self:
                return getattr(room, f"_run_{func._opname}")(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextmanager
def failing_backend(place: int, patch: pytest.MonkeyPatch) -> Iterator[None]:
    """The ``place``-th call of any backend fails; calls of plain tensors go past torch's dispatcher."""
    left = [place]

    def failing(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise InjectedError(original.__name__)
            return original(*args)

        return call

    with patch.context() as patched:
        for backend in dispatch.BACKENDS.values():
            for name in ("store_pages", "append_tail", "advance", "restore", "attention"):
                patched.setattr(backend, name, failing(getattr(backend, name)))
        yield


def states(tokens: int, seed: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    key, _ = random_states(batch, HEADS, tokens, HEAD_DIM, seed=seed)
    value, _ = random_states(batch, HEADS, tokens, V_HEAD_DIM, seed=seed + 1000)
    return key, value


def stored(layer: BaseInt8Layer) -> list[Any]:
    """Lengths, and every byte that they count."""
    pages = layer.pages
    if pages is None:
        return [None]
    if isinstance(layer, StaticInt8Layer):
        pages = copy.deepcopy(pages)
        pages.close_due_pages()  # a page that is due counts as closed
    view = pages.view()
    parts = [part for segment in view.closed.resolved.segments for part in segment]
    lengths = [pages.buffers.lengths] if isinstance(pages, StaticInt8Pages) else []
    numbers = [pages.first_page, pages.num_pages, pages.tail_len, pages.batch_size, pages.is_offloaded]
    if pages.is_offloaded:
        parts = [part for segment in pages.stored().segments for part in segment]
    return [*numbers, *(part.clone() for part in (*parts, pages.key_tail, pages.value_tail, *lengths))]


def assert_same(have: list[Any], want: list[Any], place: int) -> None:
    assert len(have) == len(want), f"after a failure at {place}"
    for one, other in zip(have, want, strict=True):
        same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
        assert same, f"after a failure at {place}"


def touch(layer: BaseInt8Layer) -> None:
    layer.pages.offload()  # what offload() does on a GPU


def replace(layer: BaseInt8Layer) -> None:
    tokens = layer.pages.num_pages * PAGE_SIZE + layer.pages.tail_len
    layer.pages.replace(*states(tokens, 53))


def fork(layer: BaseInt8Layer) -> BaseInt8Layer:
    """What ``fork()`` of a cache makes of it."""
    return layer.fork(layer.read_log.policy) if isinstance(layer, GrowingInt8Layer) else copy.deepcopy(layer)


OPERATIONS: dict[str, Callable[[BaseInt8Layer], Any]] = {
    "update": lambda layer: layer.update(*states(1, 50)),
    "update many": lambda layer: layer.update(*states(200, 51)),
    "update of fewer sequences": lambda layer: layer.update(*states(130, 52, batch=2)),
    "crop": lambda layer: layer.crop(-3),
    "crop into a page": lambda layer: layer.crop(-min(40, layer.pages.seq_len)),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([2, 0, 1])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([2, 1])),
    "select one": lambda layer: layer.batch_select_indices(torch.tensor([1])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "replace": replace,
    "fork": fork,
    "offload": touch,
    "fetch": lambda layer: layer.pages.fetch(),
    "read": lambda layer: layer.keys.restore() if layer.pages.num_pages else layer.keys,
}

NOT_FOR: dict[str, frozenset[str]] = {
    "growing": frozenset({"update of fewer sequences"}),
    "window": frozenset({"update of fewer sequences", "crop into a page"}),
    "fixed": frozenset({"update of fewer sequences", "select", "select one", "repeat"}),
}

LENGTHS = {"short": 20, "before a page closes": 95, "pages": 260, "a page is due": 64 * 3 + 95}


def prepared(kind: str, length: int, how: str) -> BaseInt8Layer:
    layer = KINDS[kind]()
    first = min(length - 1, 90)
    layer.update(*states(first, 1))
    if length - 1 > first:
        layer.update(*states(length - 1 - first, 2))
    layer.update(*states(1, 3))
    if how == "reordered":
        layer.reorder_cache(torch.tensor([1, 1, 0]))
        layer.update(*states(1, 4))
    elif how == "reordered, tails not gathered":
        layer.reorder_cache(torch.tensor([1, 1, 0]))
    elif how == "offloaded":
        layer.pages.offload()
    return layer


THIRD = [3, pytest.param(1, marks=[pytest.mark.slow, pytest.mark.sweep])]
"""Of the operations of torch that an operation makes every third fails, other ones at each length, or all."""


@pytest.mark.parametrize("step", THIRD)
@pytest.mark.parametrize("backend", ["torch", "cpu"])
@pytest.mark.parametrize("how", ["plain", "reordered", "reordered, tails not gathered", "offloaded", "unwritten"])
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_fails_leaves_every_byte(
    kind: str, how: str, backend: str, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "fixed" and how == "unwritten":
        pytest.skip("a layer of fixed capacity writes at once")
    if backend == "cpu":
        if dispatch.cpu_backend.unavailable():
            pytest.skip("no C++ compiler")
        if how == "unwritten":
            pytest.skip("the CPU kernels write before they read")
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, backend)
    if how == "unwritten":
        monkeypatch.setattr(dispatch.BACKENDS["torch"], "WRITES_ON_READ", True)
    for turn, length in enumerate(LENGTHS.values()):
        for name, operation in OPERATIONS.items():
            if name in NOT_FOR[kind] or (name == "fetch" and how != "offloaded"):
                continue
            expected = prepared(kind, length, how)
            operation(expected)
            before, after = stored(prepared(kind, length, how)), stored(expected)
            backend_fails = (lambda place: failing_backend(place, monkeypatch)), range(1, 100)
            for fail, places in ((FailAt, range(1 + turn % step, 1000, step)), backend_fails):
                layer = prepared(kind, length, how)
                for place in places:
                    try:
                        with fail(place):
                            operation(layer)
                    except InjectedError:
                        assert_same(stored(layer), before, place)
                        continue
                    break
                assert_same(stored(layer), after, place)


@pytest.mark.parametrize("how", ["plain", "reordered", "reordered, tails not gathered", "offloaded"])
@pytest.mark.parametrize("kind", ["growing", "window"])
def test_whatever_fails_in_one_of_a_fork_leaves_every_byte_of_the_other(
    kind: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "torch")
    for turn, (name, operation) in enumerate(OPERATIONS.items()):
        if name in NOT_FOR[kind] or (name == "fetch" and how != "offloaded"):
            continue
        length = list(LENGTHS.values())[-1 - turn % 2]
        layer = prepared(kind, length, how)
        other = fork(layer)
        layer, other = (layer, other) if turn % 4 < 2 else (other, layer)
        before = stored(copy.deepcopy(other))
        for place in range(1 + turn % 3, 1000, 3):
            try:
                with FailAt(place):
                    operation(layer)
            except InjectedError:
                assert_same(stored(other), before, place)
                assert_same(stored(layer), before, place)
                continue
            break
        assert_same(stored(other), before, place)


def test_layers_that_are_reordered_together_are_so_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tail, fixed):  # as on a GPU
        monkeypatch.setattr(module, "gathers_together", lambda _: True)
    layers = [prepared("fixed", 260, "plain") for _ in range(3)]
    before, order = stored(layers[0]), torch.tensor([2, 0, 1])
    for place in range(1, 1000):
        try:
            with FailAt(place):
                native.reorder_rows(layers, order)
        except InjectedError:
            for layer in layers:
                assert_same(stored(layer), before, place)
            continue
        break
    assert place > 5
    layer = prepared("fixed", 260, "plain")
    layer.reorder_cache(order)
    for each in layers:
        assert_same(stored(each), stored(layer), place)


def test_the_first_tokens_of_other_sequences_leave_a_reset_layer_as_it_was() -> None:
    layer = StaticInt8Layer(700)
    layer.update(*states(100, 1))
    layer.reset()
    memory = layer.pages.memory
    for place in range(1, 1000):
        try:
            with FailAt(place):
                layer.update(*states(130, 2, batch=2))
        except InjectedError:
            assert layer.pages.memory is memory
            assert layer.is_empty
            continue
        break
    assert place > 5
    assert layer.get_seq_length() == 130


def test_a_token_whose_writing_fails_is_written_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.BACKEND_VARIABLE, "torch")
    monkeypatch.setattr(dispatch.BACKENDS["torch"], "WRITES_ON_READ", True)
    layer = prepared("growing", 200, "plain")
    newest = states(1, 9)
    key, _ = layer.update(*newest)
    assert key.pages_view.pending is not None
    with pytest.raises(InjectedError), failing_backend(1, monkeypatch):
        key.pages_view.write_pending()
    assert key.pages_view.pending is not None
    assert torch.equal(layer.pages.key_tail[:, :, -1:], newest[0])
