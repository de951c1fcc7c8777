"""Is every field of a prompt cache's header held against its type and its range?"""

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantcache import CacheFileError, QuantizedInt8Cache
from quantcache.cli.inspect import summarise
from quantcache.files import header
from quantcache.files.description import DTYPE_NAMES
from quantcache.layers import factory
from tests.file_cases import BEYOND, MODELS, assert_bit_equal, filled_cache, gemma, llama, prompt, read_prompt, rewrite

NO_INTEGERS = (True, 2.0, "2", None, [2], {"2": 2}, BEYOND)
NO_TEXTS = (1, None, ["float32"], "x" * 257, "\ud800", "a\nb")
NO_COUNTS = (-2, 1 << 31, 10**30, True, 2.0, BEYOND, "2", None, [True], [2.0], [[2]], {"0": 2}, [2] * 4097)

WRONG: dict[str, tuple[object, ...]] = {
    "layout": (0, -1, *NO_INTEGERS),
    "quantcache": NO_TEXTS,
    "page_size": (32, *NO_INTEGERS, 64.0, "64"),
    "residual_length": (-1, (1 << 30) + 1, 10**30, *NO_INTEGERS),
    "from_config": (1, 0, None, "true", []),
    "model": (True, 1, "llama", [], [{}], {}),
    "layers": (None, 2, {}, [], [[]], [{}], ["int8"], [{"storage": "empty"}] * 4097),
    "model.model_type": NO_TEXTS,
    "model.num_hidden_layers": NO_COUNTS,
    "model.num_key_value_heads": NO_COUNTS,
    "model.head_dim": NO_COUNTS,
    "model.sliding_window": NO_COUNTS,
    "model.layer_types": (1, "full_attention", [1], [["full_attention"]], {"a": "b"}, ["a"] * 4097),
    "model.rope_parameters": (
        *(1, [], "default", {"a": BEYOND}, {"a": 10**30}, {"a": "x" * 257}, {"a": {"b": {"c": {}}}}, {"a\n": 1}),
        {"a": [[[[]]]]},
    ),
    "model.dtype": (*NO_TEXTS, "float33", "nn"),
    "model.weights_sha256": (1, "0" * 63, "g" * 64, "0" * 65),
    "layers.0.storage": (1, None, ["int8"], "os.system", "Int8", ""),
    "layers.0.sliding_window": (0, -1, 1 << 31, *NO_INTEGERS),
    "layers.0.first_page": (-1, 1 << 25, 10**30, *NO_INTEGERS),
}


Saved = tuple[bytes, QuantizedInt8Cache, Any]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompt.safetensors"


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 70 go int8, windows of 40 stay transformers' own."""
    monkeypatch.setattr(factory, "MAX_NATIVE_WINDOW", 60)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> list[Saved]:
    """Small files of every kind, with the caches they hold and the models that made them."""
    path = tmp_path_factory.mktemp("saved") / "prompt.safetensors"
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factory, "MAX_NATIVE_WINDOW", 60)
        for model in (None, *(make() for make in MODELS.values()), gemma(sliding_window=70)):
            cache = filled_cache(100, heads=1, head_dim=2) if model is None else read_prompt(model, prompt(150))
            cache.save(path, model=model, input_ids=prompt(cache.get_seq_length(), batch=2 if model is None else 1))
            found.append((path.read_bytes(), cache, model))
    return found


@pytest.fixture
def window(path: Path, saved: list[Saved], windows: None) -> Any:
    """The model of a file of int8 windows and full attention, which lies at ``path``."""
    content, _, model = saved[-1]
    path.write_bytes(content)
    return model


def put(told: Any, place: str, value: object) -> None:
    """Set what the dotted ``place`` names."""
    *way, last = place.split(".")
    for name in way:
        told = told[int(name) if isinstance(told, list) else name]
    told[last] = value


@pytest.mark.parametrize("place", WRONG)
def test_a_value_of_another_type_or_out_of_range_is_refused(path: Path, window: Any, place: str) -> None:
    whole = path.read_bytes()
    for value in WRONG[place]:
        path.write_bytes(whole)
        rewrite(path, lambda table, told, value=value: put(told, place, value))
        for read in (lambda: QuantizedInt8Cache.load(path, model=window), lambda: summarise(path)):
            with pytest.raises(CacheFileError, match=f"^prompt cache {re.escape(str(path))}: .* must .*, got "):
                read()


@pytest.mark.parametrize("place", ["", "model", "layers.0", "layers.1"])
def test_an_unknown_field_is_refused(path: Path, window: Any, place: str) -> None:
    rewrite(path, lambda table, told: put(told, f"{place}.other".removeprefix("."), 1))
    with pytest.raises(CacheFileError, match=r"must have no fields but .*, got 'other'\."):
        QuantizedInt8Cache.load(path, model=window)


@pytest.mark.parametrize(
    "place", [*(place for place in WRONG if place.count(".") == 0), "model.dtype", "layers.0.first_page"]
)
def test_a_missing_field_is_refused(path: Path, window: Any, place: str) -> None:
    def drop(table: object, told: Any) -> None:
        *way, last = place.split(".")
        for name in way:
            told = told[int(name) if isinstance(told, list) else name]
        del told[last]

    rewrite(path, drop)
    with pytest.raises(CacheFileError, match=" must "):
        QuantizedInt8Cache.load(path, model=window)


@pytest.mark.parametrize(
    "field", ['"from_config":true', '"vocab_size":97', '"storage":"int8"', '"dtype":"I64"', '"layers.0.key_tail":{}']
)
def test_a_field_that_stands_twice_is_refused(path: Path, field: str) -> None:
    model = llama()
    read_prompt(model, prompt(100)).save(path, model=model, input_ids=prompt(100))
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length].decode()
    name, _, value = field.partition(":")
    for once in (field, field.replace('"', '\\"')):  # the description is text within JSON
        text = text.replace(once, f"{once},{once}", 1)
    if name.startswith('"layers'):
        text = text.replace(name, f"{name}:{value},{name}", 1)
    assert len(text) > length
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + content[8 + length :])
    with pytest.raises(CacheFileError, match="a name stands twice in one object"):
        QuantizedInt8Cache.load(path)


def test_checksums_are_those_of_the_tensors(path: Path) -> None:
    filled_cache(100).save(path)
    whole = path.read_bytes()
    for value in ("0" * 15 + "G", "0" * 15 + "A", "0" * 17, 0, None, ["0" * 16]):
        path.write_bytes(whole)
        rewrite(path, lambda table, told, value=value: told["checksums"].update({"layers.0.key_tail": value}))
        with pytest.raises(CacheFileError, match=r"layers\.0\.key_tail must have 1 checksums of 16 digits, got "):
            QuantizedInt8Cache.load(path, verify=False)
    path.write_bytes(whole)
    rewrite(path, lambda table, told: told["checksums"].update({"layers.7.key_tail": "0" * 16}))
    with pytest.raises(CacheFileError, match=r"every checksum must be that of a tensor, got 'layers\.7\.key_tail'"):
        QuantizedInt8Cache.load(path)


def test_a_header_that_says_too_much_for_its_file_is_not_parsed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of lists become thirty times as large as their text."""
    monkeypatch.setattr(header, "_parse", None)
    text = b"[" + b"[]," * (2 << 20) + b"[]]"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CacheFileError, match=f"from 2 to {(4 << 20) + 32 * 6} and less than .*, got {len(text)}"):
        QuantizedInt8Cache.load(path)


def test_what_load_would_refuse_is_not_written(path: Path) -> None:
    model = llama()
    cache = read_prompt(model, prompt(100))
    model.config.v_head_dim = "eight"
    with pytest.raises(
        ValueError, match=r"^QuantizedInt8Cache\.save: 'v_head_dim' of the model must be an int .*, got 'eight'\."
    ):
        cache.save(path, model=model)
    assert not path.exists()
    del model.config.v_head_dim
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": float("inf")}
    cache.save(path, model=model)
    assert QuantizedInt8Cache.load(path, model=model).get_seq_length() == 100


LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=5)
    | st.sampled_from(
        [0, -1, 1 << 31, 1 << 62, 1 << 64, 10**30, BEYOND, "int8", "empty", "DynamicLayer", "I8", "F64", [0] * 9]
    )
)
JSON = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)


def mutate(node: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
    """Change one place of a JSON tree: another value, one more, one less, one moved a level down, or one by one."""
    while isinstance(node, (dict, list)) and node:
        key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if isinstance(node[key], (dict, list)) and node[key] and draw(st.integers(0, 4)):
            node = node[key]
            continue
        kind = draw(st.sampled_from(("another", "near", "more", "less", "deeper")))
        if kind == "less":
            del node[key]
        elif kind == "deeper":
            node[key] = draw(st.sampled_from(([node[key]], {"a": node[key]})))
        elif kind == "near" and type(node[key]) is int:
            node[key] += draw(st.sampled_from((-1, 1)))
        elif kind == "more" and isinstance(node, dict):
            node[draw(st.text(max_size=5) | st.just("layers.0.other"))] = draw(JSON)
        elif kind == "more":
            node.append(draw(JSON | st.just(node[key])))
        else:
            node[key] = draw(JSON)
        return


@pytest.mark.usefixtures("windows")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_changed_header_loads_the_same_cache_or_is_refused(
    path: Path, saved: list[Saved], data: st.DataObject
) -> None:
    """Never another error, and never more memory than a few times the file and the parser take."""
    content, cache, model = data.draw(st.sampled_from(saved))
    path.write_bytes(content)

    def change(table: dict[str, Any], told: dict[str, Any]) -> None:
        for _ in range(data.draw(st.integers(1, 3))):
            text = table["__metadata__"].pop("quantcache", "") if isinstance(table.get("__metadata__"), dict) else None
            mutate(data.draw(st.sampled_from((table, told, told))), data.draw)
            if text is not None and isinstance(table.get("__metadata__"), dict):
                table["__metadata__"]["quantcache"] = text

    rewrite(path, change)
    form = rf"prompt cache {re.escape(str(path))}: .+, got .*\.|QuantizedInt8Cache\.load: .+\."
    tracemalloc.start()
    try:
        loaded = QuantizedInt8Cache.load(path, model=model, mmap=data.draw(st.booleans()))
        refusal = None
    except ValueError as error:
        loaded, refusal = None, str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 8 * len(content) + (4 << 20)
    if loaded is None:
        assert refusal is not None
        assert re.match(form, refusal, re.DOTALL)
    else:
        assert_bit_equal(loaded, cache)


def test_the_dtypes_of_files_and_models_are_those_of_torch() -> None:
    known = {name: found for name in dir(torch) if isinstance(found := getattr(torch, name), torch.dtype)}
    assert {dtype.name: dtype.itemsize for dtype in header.DTYPES.values()} == {
        dtype.name: known[dtype.name].itemsize for dtype in header.DTYPES.values()
    }
    assert known.keys() >= DTYPE_NAMES
    floats = {str(dtype).removeprefix("torch.") for dtype in known.values() if dtype.is_floating_point}
    assert floats <= DTYPE_NAMES
