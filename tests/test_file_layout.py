"""Is layout 1 what docs/prompt-caches.md says, byte for byte, and is every other file refused with the reason?"""

import functools
import hashlib
import json
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save as library_save

from quantcache import CacheFileError, QuantizedInt8Cache
from quantcache.files import container, save
from quantcache.layers import factory
from tests.file_cases import (
    MODELS,
    assert_bit_equal,
    filled_cache,
    forged,
    gemma,
    lfm,
    llama,
    prompt,
    read_prompt,
    rewrite,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompt.safetensors"


HEADER = (
    '{"__metadata__":{"quantcache":"{\\"layout\\":1,\\"quantcache\\":\\"9.9\\",\\"page_size\\":64,'
    '\\"residual_length\\":32,\\"from_config\\":false,\\"model\\":null,\\"layers\\":[{\\"storage\\":\\"int8\\"}],'
    '\\"header_xxh3\\":\\"0000000000000000\\",\\"checksums\\":{\\"input_ids\\":\\"%s\\",\\"layers.0.key_tail\\":\\"%s\\",'
    '\\"layers.0.value_tail\\":\\"%s\\",\\"layers.0.key_metadata\\":\\"%s\\",\\"layers.0.value_metadata\\":\\"%s\\",'
    '\\"layers.0.key_qdata\\":\\"%s\\",\\"layers.0.value_qdata\\":\\"%s\\"}}"},'
    '"input_ids":{"dtype":"I64","shape":[1,97],"data_offsets":[0,776]},'
    '"layers.0.key_tail":{"dtype":"F32","shape":[1,1,33,2],"data_offsets":[776,1040]},'
    '"layers.0.value_tail":{"dtype":"F32","shape":[1,1,33,1],"data_offsets":[1040,1172]},'
    '"layers.0.key_metadata":{"dtype":"I16","shape":[1,1,1,2,2],"data_offsets":[1172,1180]},'
    '"layers.0.value_metadata":{"dtype":"I16","shape":[1,1,1,64,2],"data_offsets":[1180,1436]},'
    '"layers.0.key_qdata":{"dtype":"I8","shape":[1,1,1,64,2],"data_offsets":[1436,1564]},'
    '"layers.0.value_qdata":{"dtype":"I8","shape":[1,1,1,64,1],"data_offsets":[1564,1628]}}'
)


def test_the_layout_is_the_documented_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is put together here from the documentation alone, out of the numbers that go in."""
    monkeypatch.setattr(save, "__version__", "9.9")
    tokens = torch.arange(97.0)
    key = torch.stack([tokens, 2 * tokens], dim=-1)[None, None]
    value = tokens.fmod(2)[None, None, :, None]
    cache = QuantizedInt8Cache()
    cache.update(key, value, 0)
    cache.save(path, input_ids=torch.arange(97)[None])

    (segment,) = cache.layers[0].pages.view().segments
    data = [
        struct.pack("<97q", *range(97)),
        struct.pack("<66f", *(factor * token for token in range(64, 97) for factor in (1, 2))),
        struct.pack("<33f", *(token % 2 for token in range(64, 97))),
        struct.pack("<4h", *segment.key_metadata.flatten().tolist()),
        struct.pack("<128h", *segment.value_metadata.flatten().tolist()),
        struct.pack("<128b", *segment.key_qdata.flatten().tolist()),
        struct.pack("<64b", *segment.value_qdata.flatten().tolist()),
    ]
    header = (HEADER % tuple(xxhash.xxh3_64_hexdigest(piece) for piece in data)).encode()
    header += b" " * (-len(header) % 8)
    header = header.replace(b"0" * 16, xxhash.xxh3_64_hexdigest(header).encode(), 1)
    assert path.read_bytes() == struct.pack("<Q", len(header)) + header + b"".join(data)
    # What these codes mean is the format's business; that they mean the numbers above is checked here once.
    scale = segment.key_metadata[..., 0].view(torch.bfloat16).double()[0, 0, 0]
    restored = scale * (segment.key_qdata[0, 0, 0].double() - segment.key_metadata[0, 0, 0, :, 1].double())
    assert bool(((restored - key[0, 0, :64].double()).abs() <= scale / 2).all())
    # And that nobody changes layout 1 without noticing.
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN_SHA256


GOLDEN_SHA256 = "de068cecd036125ed9cec657838756fc4d974534ffe2a3bf523f58b496174a40"


@pytest.mark.parametrize("name", MODELS)
def test_the_safetensors_library_reads_and_would_write_the_same_bytes(path: Path, name: str) -> None:
    model = MODELS[name]()
    read_prompt(model, prompt(200)).save(path, model=model, input_ids=prompt(200))
    with safe_open(path, "pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    assert library_save(tensors, metadata=metadata) == path.read_bytes()


FORGERIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], object], str]] = {
    "newer_layout": (
        lambda table, told: told.update(layout=3, quantcache="7.0"),
        "the layout must be 1 or 2, which this version of quantcache reads, got 3, written by quantcache 7.0. Use a",
    ),
    "layout_without_row_table": (
        lambda table, told: told.update(layout=2),
        "the layout of a file with such tensors must be 1, got 2.",
    ),
    "page_size": (lambda table, told: told.update(page_size=32), "'page_size' of the description must be 64, got 32."),
    "residual_length": (
        lambda table, told: told.update(residual_length=-1),
        "'residual_length' of the description must be an int from 0 to 1073741824, got -1.",
    ),
    "no_model": (lambda table, told: told.pop("model"), "the description must have 'model', got none."),
    "layers": (lambda table, told: told.update(layers=[3]), "layer 0 must be an object, got 3."),
    "fewer_layers": (lambda table, told: told["layers"].pop(), "every tensor must belong to a layer, got layers.1."),
    "more_layers": (
        lambda table, told: told["layers"].append({"storage": "int8"}),
        "layer 2 must have the tensor layers.2.key_qdata, got none.",
    ),
    "dtype": (
        lambda table, told: table["layers.0.key_qdata"].update(dtype="U8"),
        "layers.0.key_qdata must be I8 (3, 2, 3, 64, 8), got U8 (3, 2, 3, 64, 8).",
    ),
    "unknown_dtype": (
        lambda table, told: table["layers.0.key_qdata"].update(dtype="F8_E4M3"),
        "the dtype of layers.0.key_qdata must be one of BOOL, U8",
    ),
    "shape": (
        lambda table, told: table["layers.0.key_qdata"].update(shape=[3, 2, 3, 8, 64]),
        "layers.0.key_qdata must be I8 (3, 2, 3, 64, 8), got I8 (3, 2, 3, 8, 64).",
    ),
    "absurd_shape": (
        lambda table, told: table["layers.0.key_qdata"].update(shape=[1 << 61, 1 << 61]),
        "layers.0.key_qdata, I8 (2305843009213693952, 2305843009213693952), must end at byte 5316911983139663491615",
    ),
    "negative_shape": (
        lambda table, told: table["layers.0.key_qdata"].update(shape=[-1]),
        "the shape of layers.0.key_qdata must be at most 8 sizes, got [-1].",
    ),
    "offsets": (
        lambda table, told: table["layers.0.key_qdata"].update(data_offsets=[0, 9216]),
        "must start where the tensor before it ends",
    ),
    "checksums": (
        lambda table, told: told["checksums"].update({"layers.0.key_qdata": ""}),
        "layers.0.key_qdata must have 1 checksums of 16 digits, got ''.",
    ),
    "a_checksum": (
        lambda table, told: told["checksums"].update({"layers.0.key_qdata": "0" * 16}),
        "bytes 0 to 9216 of layers.0.key_qdata must have the checksum 0000000000000000, got ",
    ),
    "native": (
        lambda table, told: told["layers"][0].update(storage="DynamicSlidingWindowLayer"),
        "layers other than plain int8 must come from a cache made with a config, got DynamicSlidingWindowLayer.",
    ),
    "foreign_class": (
        lambda table, told: told["layers"][0].update(storage="os.system"),
        "'storage' of layer 0 must be one of int8, empty, DynamicLayer, ",
    ),
    "metadata": (
        lambda table, told: table["__metadata__"].update(other=1),
        "the entry 'quantcache' must be alone in __metadata__, got ['other', 'quantcache'].",
    ),
    "ids": (
        lambda table, told: table["input_ids"].update(shape=[1, 460]),
        "input_ids must be I64 (2, 230), got I64 (1, 460).",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_header_is_refused_with_the_reason(path: Path, name: str) -> None:
    change, message = FORGERIES[name]
    filled_cache(230).save(path, input_ids=prompt(230, batch=2))
    rewrite(path, change)
    with pytest.raises(CacheFileError, match=f"^prompt cache {re.escape(str(path))}: .*{re.escape(message)}"):
        QuantizedInt8Cache.load(path)


def test_a_file_that_the_safetensors_library_does_not_take_is_refused_where_it_maps(path: Path) -> None:
    filled_cache(230).save(path)
    with container.Container(path) as file:
        os.truncate(path, 5000)
        with pytest.raises(CacheFileError, match="the safetensors library must take it, got "):
            file.mapped("layers.0.key_qdata")


NATIVE_FORGERIES = {
    "window": (
        gemma,
        lambda table, told: [table[f"layers.0.{part}"].update(shape=[1, 2, 78, 4]) for part in ("keys", "values")],
        "a DynamicSlidingWindowLayer of 40 must hold 39 of 100 tokens, got 78",
    ),
    "swapped": (gemma, lambda table, told: told["layers"].reverse(), "layer 0 must be DynamicSlidingWindowLayer for"),
    "axes": (
        gemma,
        lambda table, told: table["layers.0.keys"].update(shape=[1, 624]),
        "must hold only what its class holds, got keys (1, 624).",
    ),
    "one": (
        gemma,
        lambda table, told: table.update({"layers.0.conv_states.0": table.pop("layers.0.values")}),
        "layers.0.conv_states.0 must have 1 checksums of 16 digits, got None.",
    ),
    "batch": (
        lfm,
        lambda table, told: table["layers.0.conv_states.0"].update(shape=[32, 1, 3]),
        "all layers must hold one batch, got [1, 32].",
    ),
}


@pytest.mark.parametrize("name", NATIVE_FORGERIES)
def test_a_forged_native_layer_is_refused(path: Path, name: str) -> None:
    make, change, message = NATIVE_FORGERIES[name]
    model = make()
    read_prompt(model, prompt(100)).save(path)
    rewrite(path, change)
    with pytest.raises(CacheFileError, match=re.escape(message)):
        QuantizedInt8Cache.load(path, model=model)


def test_a_flipped_bit_is_named_with_its_place(path: Path) -> None:
    filled_cache(230).save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    with pytest.raises(CacheFileError, match=r"bytes 0 to 9216 of layers.1.value_qdata must have the checksum"):
        QuantizedInt8Cache.load(path)
    assert QuantizedInt8Cache.load(path, max_tokens=50, verify=False).get_seq_length() == 50


def fuzz_cases() -> list[tuple[bytes, QuantizedInt8Cache, dict[str, Any]]]:
    """Small files of every kind with the caches they hold."""
    cases = []
    for make in (None, *MODELS.values(), functools.partial(gemma, sliding_window=70)):
        model = None if make is None else make()
        cache = filled_cache(100, batch=1, heads=1, head_dim=2, v_head_dim=2) if model is None else None
        if model is not None:
            cache = read_prompt(model, prompt(300))
        cases.append((cache, model))
    shared = filled_cache(100, batch=2, heads=1, head_dim=2, v_head_dim=2)
    shared.batch_repeat_interleave(2)
    shared.reorder_cache(torch.tensor([3, 0, 1, 1]))
    return [*cases, (shared, None)]


def header_of(content: bytes) -> dict[str, Any]:
    """The table in the head of a file."""
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def mutate(content: bytes, rng: random.Random) -> bytes:
    """One damaged or forged file."""
    length = int.from_bytes(content[:8], "little")
    kind = rng.choice(("flip", "flip_header", "cut", "grow", "length", "swap", "forge", "forge", "forge"))
    made = bytearray(content)
    if kind == "flip":
        for _ in range(rng.randint(1, 8)):
            made[rng.randrange(len(made))] ^= 1 << rng.randrange(8)
    elif kind == "flip_header":
        made[rng.randrange(8 + length)] = rng.randrange(256)
    elif kind == "cut":
        del made[rng.randrange(len(made)) :]
    elif kind == "grow":
        place = rng.randrange(len(made))
        made[place:place] = rng.randbytes(rng.randint(1, 64))
    elif kind == "length":
        made[:8] = rng.choice((rng.randrange(1 << 64), rng.randrange(len(made) + 9), 0)).to_bytes(8, "little")
    elif kind == "swap":
        one, other, size = rng.randrange(len(made)), rng.randrange(len(made)), rng.randint(1, 64)
        made[one : one + size], made[other : other + size] = made[other : other + size], made[one : one + size]
    else:
        table = json.loads(content[8 : 8 + length])
        description = json.loads(table["__metadata__"]["quantcache"])
        table["__metadata__"]["quantcache"] = ""
        scramble(rng.choice((table, description)), rng)
        return forged(table, description) + content[8 + length :]
    return bytes(made)


ABSURD = (0, 1, -1, 2, 3, 64, 1 << 31, 1 << 62, 1 << 64, 10**30, 1.5, "", "I8", "int8", None, True, [], {}, [1], [[[]]])


def scramble(node: Any, rng: random.Random) -> None:
    """Replace one value somewhere in a JSON tree."""
    while isinstance(node, (dict, list)) and node:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.2:
            near = [node[key] + 1, node[key] - 1] if type(node[key]) is int else []
            node[key] = rng.choice((*ABSURD, *near))
            return
        node = node[key]


def run_fuzz(path: Path, seeds: range, monkeypatch: pytest.MonkeyPatch) -> int:
    """Load a mutated file for each seed; a clean refusal or a bit-equal cache, no allocation beyond the file."""
    original, limit = container._roomy_memory, [0]

    def bounded(nbytes: int) -> torch.Tensor:
        assert nbytes <= limit[0], f"{nbytes} bytes asked for by a file of {limit[0]}"
        return original(nbytes)

    monkeypatch.setattr(container, "_roomy_memory", bounded)
    monkeypatch.setattr(factory, "MAX_NATIVE_WINDOW", 60)  # windows of 70 in int8, of 40 in transformers' own layers
    cases = []
    for cache, model in fuzz_cases():
        batch = 1 if model else cache.layers[0].pages.batch_size
        cache.save(path, model=model, input_ids=prompt(cache.get_seq_length(), batch))
        cases.append((path.read_bytes(), cache, model))
    assert {json.loads(header_of(content)["__metadata__"]["quantcache"])["layout"] for content, *_ in cases} == {1, 2}
    refused = 0
    for seed in seeds:
        rng = random.Random(seed)
        content, cache, model = cases[seed % len(cases)]
        mutated = mutate(content, rng)
        path.write_bytes(mutated)
        limit[0] = len(mutated)
        try:
            loaded = QuantizedInt8Cache.load(path, model=model, mmap=False)
        except CacheFileError:
            refused += 1
        except Exception as error:
            raise AssertionError(f"seed {seed} ended in {error!r}") from error
        else:
            assert_bit_equal(loaded, cache)
    return refused


def test_damaged_files_end_in_a_refusal_or_the_same_cache(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_fuzz(path, range(400), monkeypatch) > 300


@pytest.mark.slow
@pytest.mark.parametrize("first", range(400, 10_400, 2_500))
def test_ten_thousand_damaged_files(path: Path, monkeypatch: pytest.MonkeyPatch, first: int) -> None:
    assert run_fuzz(path, range(first, first + 2_500), monkeypatch) > 2_000


def test_the_fuzz_test_would_notice_a_wrong_cache(path: Path) -> None:
    """Without checksums a flipped bit comes through, and the comparison sees it."""
    cache = filled_cache(230)
    cache.save(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    with pytest.raises(AssertionError):
        assert_bit_equal(QuantizedInt8Cache.load(path, verify=False), cache)


def test_deep_json_is_no_crash(path: Path) -> None:
    for text in (b"[" * 200_000, b'{"a":' * 100_000, b'{"a":' + b"9" * 10_000 + b"}"):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        with pytest.raises(CacheFileError, match="the header must"):
            QuantizedInt8Cache.load(path)


def test_another_model_cannot_be_forged_by_removing_its_name(path: Path) -> None:
    """Without a fingerprint the shapes still have to fit the layers of the model."""
    model = gemma()
    read_prompt(model, prompt(100)).save(path)
    with pytest.raises(CacheFileError, match=r"the model has 2 layers, so many must be stored, got 4\."):
        QuantizedInt8Cache.load(path, model=llama())
