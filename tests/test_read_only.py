"""Does every write that reaches cached states raise, and does everything else read them as it would a dense tensor?

What is stored is int8 and a tail, and a reader gets a copy: a write into it would be lost without a word.
"""

import copy
import io
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quantcache import Int8Tensor
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.fixed import StaticInt8Layer
from quantcache.layers.growing import Int8Layer
from quantcache.store.states import CachedStates, ReadOnlyTensor
from quantcache.store.tensor import RecordedStates
from tests.conftest import compiler_warnings
from tests.strategies import random_states

pytestmark = pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning", "ignore:TypedStorage is deprecated")

CAPACITY = 300
SHAPE = 1, 2, 4
"""Batch, num_kv_heads and head_dim."""

LAYERS: dict[str, Callable[[], BaseInt8Layer]] = {"growing": Int8Layer, "fixed": lambda: StaticInt8Layer(CAPACITY)}
MODES = {"gradients": torch.enable_grad, "no gradients": torch.no_grad, "inference": torch.inference_mode}
READ_ONLY = (
    r"^Int8Tensor: cached states are read-only, got \w+.*\.clone\(\).*cache\.edit\(layer_idx\)"
    "|^assignment destination is read-only$"  # which is numpy's
)


def filled(kind: str, tokens: int, seed: int = 0) -> BaseInt8Layer:
    layer = LAYERS[kind]()
    batch, heads, head_dim = SHAPE
    layer.update(*random_states(batch, heads, tokens, head_dim, seed=seed))
    return layer


def one_token() -> tuple[Tensor, Tensor]:
    batch, heads, head_dim = SHAPE
    return random_states(batch, heads, 1, head_dim, seed=9)


def recorded(layer: StaticInt8Layer) -> tuple[RecordedStates, RecordedStates]:
    """What a recorded step of the layer would hand to attention, made here and now."""
    parts = layer.pages.memory, layer._common.scratch
    form: Any = {"shape_of_memory": layer.pages.layout.shape, "dtype": torch.float32, "on_restore": "quiet"}
    return RecordedStates(*parts, **form, is_key=True), RecordedStates(*parts, **form, is_key=False)


def add_in_place(states: Tensor) -> None:
    states += 1


def set_item(states: Tensor) -> None:
    states[:, :, 0] = 0


def add_to_an_item(states: Tensor) -> None:
    states[:, :, -1] += 1


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda states: states.zero_(),
    "operator": add_in_place,
    "item": set_item,
    "operator on an item": add_to_an_item,
    "slice": lambda states: states[:, :, 0].zero_(),
    "slice of a slice": lambda states: states[0][:, :1][1][0].mul_(2),
    "transposed": lambda states: states.transpose(1, 2)[:, 0].fill_(1),
    "reshaped": lambda states: states.reshape(-1).zero_(),
    "viewed": lambda states: states.view(-1).zero_(),
    "other bits": lambda states: states.view(torch.int32).zero_(),
    "strided": lambda states: states.as_strided((3,), (1,)).zero_(),
    "split": lambda states: states.split(2, dim=2)[0].zero_(),
    "split unsafely": lambda states: states.unsafe_split(2, dim=2)[0].zero_(),
    "unbound": lambda states: states.unbind(1)[0].zero_(),
    "iterated": lambda states: next(iter(states)).zero_(),
    "of the same dtype": lambda states: states[:, :, 0].float().zero_(),
    "on the same device": lambda states: states.cpu().zero_(),
    "contiguous": lambda states: states.contiguous().zero_(),
    "detached": lambda states: states.detach().zero_(),
    "data": lambda states: states.data.zero_(),
    "data assigned": lambda states: setattr(states, "data", torch.zeros(states.shape)),
    "out": lambda states: torch.zeros(states.shape, out=states),
    "out of a slice": lambda states: torch.add(torch.zeros(1, 2, 4), 1, out=states[:, :, 0]),
    "list": lambda states: torch._foreach_add_([torch.zeros(2), states], 1),
    "list of slices": lambda states: torch._foreach_zero_(list(states.unbind(1))),
    "masked": lambda states: states.masked_fill_(torch.ones(states.shape, dtype=torch.bool), 0),
    "indexed": lambda states: states.index_put_((torch.tensor([0]),), torch.tensor(0.0)),
    "copied into": lambda states: states[:, :, 0].copy_(torch.zeros(1, 2, 4)),
    "functional": lambda states: torch.nn.functional.relu(states, inplace=True),
    "einsum": lambda states: torch.einsum("bhtd->bthd", states).zero_(),
    "tensor of a tensor": lambda states: torch.as_tensor(states).zero_(),
    "numpy": lambda states: states.numpy().fill(0),
    "numpy of a slice": lambda states: states[:, :, 0].numpy().fill(0),
    "asarray": lambda states: np.asarray(states).fill(0),
    "dlpack": lambda states: torch.from_dlpack(states).zero_(),
    "dlpack of a slice": lambda states: np.from_dlpack(states[:, :, 0]).fill(0),
    "storage": lambda states: states[:, :, 0].untyped_storage().fill_(0),
    "typed storage": lambda states: states.storage().fill_(0),
    "someone else's storage": lambda states: torch.zeros(1).set_(states),
    "subclass": lambda states: states.as_subclass(torch.Tensor).zero_(),
    "function": lambda states: states.apply_(lambda number: 0),
    "metadata": lambda states: states[:, :, 0].squeeze_(),
    "size": lambda states: states.resize_(3),
    "gradient": lambda states: states.requires_grad_(),
    "gradient assigned": lambda states: setattr(states, "requires_grad", True),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tokens", [1, 20, 96, 200], ids=["one token", "nothing closed", "one page", "pages"])
@pytest.mark.parametrize("kind", LAYERS)
def test_every_write_raises_from_the_first_token_on(kind: str, tokens: int, mode: str) -> None:
    layer = filled(kind, tokens)
    before = layer.keys.clone(), layer.values.clone()
    for write in WRITES.values():
        for states in (layer.keys, layer.values):
            with MODES[mode](), pytest.raises((NotImplementedError, ValueError), match=READ_ONLY):
                write(states)
    assert torch.equal(layer.keys, before[0])
    assert torch.equal(layer.values, before[1])


@pytest.mark.parametrize("name", [name for name in WRITES if name not in ("viewed", "strided", "other bits")])
def test_a_write_into_what_attention_was_given_raises(name: str) -> None:
    """Of fixed capacity too, in a recorded step and outside it."""
    growing, fixed = filled("growing", 200), filled("fixed", 200)
    for states in (*growing.update(*one_token()), *fixed.update(*one_token()), *recorded(fixed)):
        with pytest.raises((NotImplementedError, ValueError), match=READ_ONLY):
            WRITES[name](states)


@compiler_warnings
@pytest.mark.parametrize("name", ["in place", "item", "operator on an item", "slice", "out of a slice", "list"])
@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_write_in_a_compiled_step_raises(name: str, fullgraph: bool) -> None:
    layer = filled("fixed", 200)
    before = layer.keys.clone()
    write = WRITES[name]

    def step(key_states: Tensor, value_states: Tensor) -> Tensor:
        keys, _ = layer.update(key_states, value_states)
        write(keys)
        return keys.sum()

    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="Int8Tensor: cached states are read-only, got "):
        torch.compile(step, backend="aot_eager", fullgraph=fullgraph, dynamic=False)(*one_token())
    assert torch.equal(layer.keys[:, :, :200], before)


@compiler_warnings
@pytest.mark.parametrize("view", ["data", "mT", "real"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_write_behind_a_graph_break_raises(kind: str, view: str) -> None:
    layer = filled(kind, 200)
    before = layer.keys.clone()

    def step(key_states: Tensor, value_states: Tensor) -> None:
        keys, _ = layer.update(key_states, value_states)
        torch._dynamo.graph_break()
        getattr(keys, view).zero_()

    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(NotImplementedError, match=READ_ONLY):
        torch.compile(step, backend="eager")(*one_token())
    assert torch.equal(layer.keys[:, :, :200], before[:, :, :200])


@compiler_warnings
def test_a_compiled_step_reads_slices() -> None:
    compiled, eager = filled("fixed", 200), filled("fixed", 200)

    def step(layer: BaseInt8Layer, key_states: Tensor, value_states: Tensor) -> Tensor:
        keys, values = layer.update(key_states, value_states)
        return torch.nn.functional.scaled_dot_product_attention(key_states, keys[:, :, :150], values[:, :, 50:200])

    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=False)(compiled, *one_token())
        torch.testing.assert_close(got, step(eager, *one_token()))


def test_what_is_computed_from_states_may_be_written() -> None:
    layer = filled("growing", 200)
    before = layer.keys.clone()
    for made in (
        layer.keys * 2,
        layer.keys.clone(),
        layer.keys[:, :, 3].clone(),
        layer.keys.double(),
        torch.cat([layer.keys, layer.keys]),
        layer.keys.restore(),
        layer.keys[:, :, [0, 5]],
        copy.deepcopy(layer.keys[:, :, 0]),
        filled("growing", 20).keys.restore(),
    ):
        assert type(made) is Tensor
        made.zero_()
    mine = torch.empty(layer.keys.shape)
    assert mine.copy_(layer.keys) is mine
    assert torch.equal(layer.keys, before)


@pytest.mark.parametrize("tokens", [20, 200])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_file_of_states_loads_as_the_values_there_were(kind: str, tokens: int) -> None:
    layer = filled(kind, tokens)
    for states in (layer.keys, layer.values[:, :, 3:9], recorded(filled("fixed", tokens))[0]):
        file = io.BytesIO()
        torch.save({"states": states}, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)["states"]
        assert type(loaded) is Tensor
        assert torch.equal(loaded, states)


def test_pickles_and_copies_of_a_slice_are_its_values() -> None:
    part = filled("growing", 200).keys[:, :, 3:9]
    for copied in (pickle.loads(pickle.dumps(part)), copy.deepcopy(part)):
        assert type(copied) is Tensor
        assert torch.equal(copied, part)


def test_a_slice_prints_its_numbers_and_gives_its_address() -> None:
    layer = filled("growing", 200)
    part = layer.keys[0, 0, :2]
    assert repr(part) == f"ReadOnlyTensor({part.clone()!r})"
    assert part.data_ptr() == part.dense.data_ptr() != 0
    assert np.asarray(part).tolist() == part.tolist() == part.clone().tolist()


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("tokens", [20, 200])
@pytest.mark.parametrize("kind", LAYERS)
def test_memory_taken_past_the_dispatcher_is_that_of_a_copy(kind: str, tokens: int) -> None:
    layer = filled(kind, tokens)
    part, before = layer.keys[:, :, 5:9], layer.keys.clone()
    for taken in (torch.from_numpy(layer.keys.numpy()), torch.from_numpy(np.asarray(part))):
        taken.zero_()
    assert torch.equal(part, before[:, :, 5:9])
    torch.from_dlpack(torch.utils.dlpack.to_dlpack(part)).zero_()
    assert torch.equal(layer.keys, before)
    with pytest.raises(RuntimeError, match="Cannot access data pointer"):
        torch.utils.dlpack.to_dlpack(layer.keys)


def test_short_states_are_read_without_a_fallback() -> None:
    from quantcache.store.read_log import FallbackPolicy

    layer = Int8Layer(policy=FallbackPolicy(strict=True))
    key_states, value_states = random_states(1, 2, 40, 4)
    layer.update(key_states, value_states)
    assert torch.equal(layer.keys, key_states)
    assert torch.equal(layer.values[:, :, 3:], value_states[:, :, 3:])
    assert layer.read_log.reason is None


# Every method of torch.Tensor.

_OF_OBJECTS = {
    *("__class__", "__delattr__", "__dict__", "__dir__", "__doc__", "__getattribute__", "__getstate__", "__init__"),
    *(
        "__init_subclass__",
        "__module__",
        "__new__",
        "__reduce__",
        "__reduce_ex__",
        "__repr__",
        "__setattr__",
        "__str__",
    ),
    *("__setstate__", "__sizeof__", "__subclasshook__", "__torch_dispatch__", "__torch_function__", "__weakref__"),
    *("__annotations__", "__hash__", "__cuda_array_interface__", "__dlpack_c_exchange_api__"),
}
METHODS = [
    name
    for name in dir(Tensor)
    if (not name.startswith("_") or (name.startswith("__") and name not in _OF_OBJECTS))
    and callable(getattr(Tensor, name))
]
MAY_REFUSE = {
    *("__setitem__", "__delitem__", "__dlpack__", "untyped_storage", "storage", "data_ptr", "const_data_ptr"),
    *("is_set_to", "as_subclass", "record_stream", "module_load"),
}
"""Refused beside what writes by its name."""

NOT_COMPARED = {"new", "new_empty", "new_empty_strided", "data_ptr", "const_data_ptr", "__dlpack__", "storage_type"}
"""Results that are uninitialised memory, or addresses."""


def is_write(name: str) -> bool:
    is_operator = name.startswith("__i") and name.rstrip("_")[3:] in {
        *("add", "and", "div", "floordiv", "lshift", "mod", "mul", "or", "pow", "rshift", "sub", "truediv", "xor")
    }
    return is_operator or (name.endswith("_") and not name.endswith("__"))


def arguments(dense: Tensor) -> Iterator[tuple[Any, ...]]:
    """Something for each signature; what does not fit a method raises on a dense tensor too."""
    other, index = dense.clone() + 1, torch.tensor([0, 1])
    yield from ((), (0,), (2,), (2.0,), (-1,), (0, 1), (1, 2), (0.2, 0.5), (-2, 0, 1), (2, 0, 1), ((0, 1),))
    yield from ((other,), (other, other), (other, 2), (dense > 0,), (dense > 0, 0.0), (dense > 0, other), (dense.mT,))
    yield from ((2, index), (2, index, 0.0), (2, index, other[:, :, :2]), (2, index, other[:, :, :2], "amax"))
    yield from ((2, other.long().clamp(0, 1)), (2, other.long().clamp(0, 1), other), (torch.float64,), (dense.shape,))
    yield from (((2, -1),), (2, (2, -1)), ((1, 1, 1, 1),), ((0, 1, 3, 2),), (0, 1, 3, 2), (2, 0, 3), ("b",), ([1.0],))
    yield from ((lambda number: 0.0,), (other, lambda one, two: one), (Tensor,), (2, 3, 1), ([0, 1], [2, 3]))
    yield from (((index[:1],), other[:1]), (dense.shape, dense.stride()), (slice(0, 1), 0.0))


def outcome(states: Tensor, name: str, args: tuple[Any, ...]) -> tuple[object, Exception | None]:
    torch.manual_seed(0)
    try:
        return getattr(states, name)(*args), None
    except Exception as error:
        return None, error


def assert_same(ours: Any, theirs: Any, name: str) -> None:
    if isinstance(theirs, Tensor):
        assert isinstance(ours, Tensor), name
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), name
        if name not in NOT_COMPARED and not theirs.is_meta:
            one, other = ours.clone().to_dense(), theirs.to_dense()
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)
    elif isinstance(theirs, (tuple, list)) and theirs and isinstance(theirs[0], Tensor):
        assert len(ours) == len(theirs), name
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other, name)
    elif isinstance(theirs, np.ndarray):
        assert np.array_equal(ours, theirs), name
    elif isinstance(theirs, (bool, int, float, str, complex, torch.dtype, torch.device, torch.Size, tuple, list)):
        assert name in NOT_COMPARED or ours == theirs or theirs != theirs, name


@pytest.fixture(scope="module")
def all_states() -> dict[str, CachedStates]:
    """Some of each kind, all of one shape, and all but the exact ones with a quantised page."""
    batch, heads, head_dim = SHAPE
    states = random_states(batch, heads, 100, head_dim)
    exact, fixed, handed = Int8Layer(residual_length=100), StaticInt8Layer(100), StaticInt8Layer(100)
    exact.update(*states)
    fixed.update(*states)
    handed.update(states[0][:, :, 1:], states[1][:, :, 1:])
    return {
        "growing": filled("growing", 100).keys,
        "exact": exact.keys,
        "fixed": fixed.keys,
        "handed to attention": handed.update(*one_token())[0],
        "recorded": recorded(fixed)[0],
        "slice": filled("growing", 100).keys[:],
    }


@pytest.fixture(scope="module")
def calls(all_states: dict[str, CachedStates]) -> list[tuple[str, tuple[Any, ...]]]:
    """Methods and arguments that a dense tensor of this shape takes, a few of each."""
    dense, found = all_states["growing"].restore(), []
    for name in METHODS:
        taken = ((name, args) for args in arguments(dense) if outcome(dense.clone(), name, args)[1] is None)
        found += itertools.islice(taken, 2)  # a refusal of torch takes a millisecond
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["growing", "exact", "fixed", "handed to attention", "recorded", "slice"])
def test_every_method_of_a_tensor_is_right_or_refused(
    kind: str, all_states: dict[str, CachedStates], calls: list[tuple[str, tuple[Any, ...]]]
) -> None:
    states = all_states[kind]
    expected, refused, answered = states.restore(), set(), set()
    for name, args in calls:
        theirs, failed = outcome(expected.clone(), name, args)
        ours, error = outcome(states, name, args)
        if isinstance(error, NotImplementedError) and str(error).startswith("Int8Tensor: cached states are"):
            assert is_write(name) or name in MAY_REFUSE, f"{name}{args}: {error}"
            refused.add(name)
        elif failed is None and not (is_write(name) and error is not None):  # which torch itself refuses for a view
            assert error is None, f"{name}{args}: {error!r}"
            assert_same(ours, theirs, name)
            answered.add(name)
    assert torch.equal(states, expected)
    assert {"share_memory_", "apply_", "zero_", "copy_", "requires_grad_", "untyped_storage"} <= refused
    assert {"numpy", "tolist", "clone", "matmul", "split", "index_select", "__getitem__"} <= answered
    assert len(answered) > 300


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["growing", "exact", "fixed", "handed to attention", "recorded", "slice"])
def test_every_attribute_of_a_tensor_is_that_of_the_values(kind: str, all_states: dict[str, CachedStates]) -> None:
    states = all_states[kind]
    expected = states.restore()
    for name in dir(Tensor):
        if not name.startswith("_") and not callable(getattr(Tensor, name)) and name not in ("volatile", "grad_dtype"):
            try:
                theirs = getattr(expected, name)
            except Exception:
                with pytest.raises(Exception, match=r"."):
                    getattr(states, name)
                continue
            assert_same(getattr(states, name), theirs, name)
    assert not hasattr(states, "__cuda_array_interface__")


def test_the_types_of_what_is_read(all_states: dict[str, CachedStates]) -> None:
    assert isinstance(all_states["growing"], Int8Tensor)
    assert isinstance(all_states["exact"], Int8Tensor)
    assert isinstance(all_states["slice"], ReadOnlyTensor)
