"""Does a file hold what sequences share once, and does it come back shared?"""

import hashlib
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from quantcache import CacheFileError, QuantizedInt8Cache
from quantcache.cli.inspect import summarise
from quantcache.files import save
from tests.file_cases import assert_bit_equal, filled_cache, gemma, prompt, read_prompt, rewrite, stored_tensors
from tests.strategies import random_states

HEADS, HEAD_DIM = 3, 8


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompt.safetensors"


@pytest.fixture(autouse=True)
def reads_row_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTCACHE_BACKEND", "torch")


def append(cache: QuantizedInt8Cache, tokens: int, seed: int) -> None:
    for layer_idx, layer in enumerate(cache.layers):
        states = random_states(layer.pages.batch_size, HEADS, tokens, HEAD_DIM, seed=seed + layer_idx)
        cache.update(*states, layer_idx)


def shared_cache() -> QuantizedInt8Cache:
    """Two prompts, three answers to each, in an order of their own; the first page of each answer is closed."""
    cache = filled_cache(230, heads=HEADS, head_dim=HEAD_DIM)
    cache.batch_repeat_interleave(3)
    append(cache, 70, seed=5)
    cache.reorder_cache(torch.tensor([5, 0, 1, 1, 4, 2]))
    return cache


def description(path: Path) -> dict:
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["quantcache"])


@pytest.mark.parametrize("mmap", [False, True])
def test_shared_rows_are_stored_once_and_come_back_shared(path: Path, mmap: bool) -> None:
    cache = shared_cache()
    cache.save(path)
    loaded = QuantizedInt8Cache.load(path, mmap=mmap)
    assert_bit_equal(loaded, cache)
    for layer in loaded.layers:
        # Three pages of two prompts; the fourth of five answers, one of which goes on twice.
        assert layer.pages.rows_stored == 3 * 2 + 5
        assert layer.pages.batch_size * layer.pages.num_pages == 6 * 4
    unshared = stored_tensors(cache)
    pages = sum(tensor.nbytes for name, tensor in unshared.items() if not name.endswith("tail"))
    tails = sum(tensor.nbytes for name, tensor in unshared.items() if name.endswith("tail"))
    assert tails < path.stat().st_size - pages * 11 // 24 < tails + 4096
    for each in (cache, loaded):
        append(each, 100, seed=9)
        each.reorder_cache(torch.tensor([1, 1, 0, 3, 2, 5]))
        each.crop(-150)
    assert_bit_equal(loaded, cache)
    assert summarise(path)["layers"][0]["pages"] == 4


def test_rows_that_nobody_reads_are_left_out(path: Path) -> None:
    cache = filled_cache(230, batch=4, heads=HEADS, head_dim=HEAD_DIM)
    cache.reorder_cache(torch.tensor([2, 2, 2, 3]))
    cache.save(path)
    loaded = QuantizedInt8Cache.load(path)
    assert_bit_equal(loaded, cache)
    assert loaded.layers[0].pages.rows_stored == 2 * 3


@pytest.mark.parametrize("max_tokens", [1, 63, 64, 130, 192, 193, 256, 290, 300])
def test_a_prefix_is_what_crop_leaves(path: Path, max_tokens: int) -> None:
    cache = shared_cache()
    cache.save(path)
    loaded = QuantizedInt8Cache.load(path, max_tokens=max_tokens)
    cache.crop(-(300 - max_tokens))
    assert_bit_equal(loaded, cache)


@pytest.mark.parametrize("order", [[1, 0], [0, 1]])
def test_sequences_that_share_nothing_are_stored_in_layout_1(path: Path, order: list[int]) -> None:
    cache = filled_cache(230)
    cache.reorder_cache(torch.tensor(order))
    cache.save(path)
    assert description(path)["layout"] == 1
    assert_bit_equal(QuantizedInt8Cache.load(path), cache)


def test_a_fixed_capacity_is_stored_shared(path: Path) -> None:
    config = Qwen2Config(num_hidden_layers=2, hidden_size=HEADS * HEAD_DIM, num_attention_heads=HEADS)
    fixed = QuantizedInt8Cache(config, max_cache_len=300)
    for layer_idx in range(2):
        fixed.update(*random_states(3, HEADS, 200, HEAD_DIM, seed=layer_idx), layer_idx)
    fixed.reorder_cache(torch.tensor([1, 1, 2]))
    fixed.save(path)
    loaded = QuantizedInt8Cache.load(path, config=config)
    assert_bit_equal(loaded, fixed)
    assert loaded.layers[0].pages.rows_stored == 2 * 2


def test_windows_in_int8_come_back_shared(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantcache.layers.factory.MAX_NATIVE_WINDOW", 60)
    model = gemma(sliding_window=70)
    cache = read_prompt(model, prompt(300))
    cache.batch_repeat_interleave(3)
    cache.save(path, model=model)
    loaded = QuantizedInt8Cache.load(path, model=model)
    assert_bit_equal(loaded, cache)
    assert all(layer.pages.rows_stored == layer.pages.num_pages for layer in loaded.layers)


def test_the_shared_layout_is_the_documented_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows one behind the other, page by page; nobody changes layout 2 without noticing."""
    monkeypatch.setattr(save, "__version__", "9.9")
    tokens = torch.arange(97.0)
    key = torch.stack([tokens, 2 * tokens], dim=-1)[None, None]
    cache = QuantizedInt8Cache()
    cache.update(torch.cat([key, -key]), torch.cat([key, key + 1]), 0)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.save(path, input_ids=torch.arange(97).expand(4, 97))
    told = description(path)
    assert (told["layout"], told["layers"]) == (2, [{"storage": "int8"}])
    (segment,) = cache.layers[0].pages.segments
    for part in (segment.key_qdata, segment.key_metadata, segment.value_qdata, segment.value_metadata):
        assert part.numpy().tobytes() in path.read_bytes()
    assert struct.pack("<4i", 1, 1, 0, 0) in path.read_bytes()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == GOLDEN_SHA256


GOLDEN_SHA256 = "e20a35deb95074e8ef7945023ca2279c7640a6326870a4ac7f33cafb8591f0f1"


def table_of(path: Path) -> tuple[int, list[int]]:
    """Where the row table of layer 0 begins in a file, and its numbers."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    start, stop = json.loads(content[8 : 8 + length])["layers.0.row_table"]["data_offsets"]
    return 8 + length + start, list(
        struct.unpack(f"<{(stop - start) // 4}i", content[8 + length + start :][: stop - start])
    )


POINTS_NOWHERE: dict[str, tuple[Callable[[list[int]], object], str]] = {
    "behind the last": (lambda rows: rows.__setitem__(-1, 11), "page 3 must be read from the rows that follow"),
    "negative": (lambda rows: rows.__setitem__(0, -1), "page 0 must be read from the rows that follow"),
    "another page": (lambda rows: rows.__setitem__(0, 2), "page 1 must be read from the rows that follow"),
    "a row left out": (lambda rows: [rows.__setitem__(4 * i, 0) for i in range(6)], "page 1 must be read from"),
    "huge": (lambda rows: rows.__setitem__(5, 2**31 - 1), "page 1 must be read from the rows that follow"),
}


@pytest.mark.parametrize("name", POINTS_NOWHERE)
def test_a_row_table_that_points_nowhere_is_refused(path: Path, name: str) -> None:
    shared_cache().save(path)
    start, rows = table_of(path)
    change, message = POINTS_NOWHERE[name]
    change(rows)
    content = bytearray(path.read_bytes())
    content[start : start + 4 * len(rows)] = struct.pack(f"<{len(rows)}i", *rows)
    path.write_bytes(content)
    with pytest.raises(CacheFileError, match=message):
        QuantizedInt8Cache.load(path, verify=False)
    with pytest.raises(CacheFileError, match="row_table"):  # by its checksum
        QuantizedInt8Cache.load(path)


def test_whatever_a_row_table_says_a_sequence_reads_rows_that_are_there(path: Path) -> None:
    """Without the checksum: a table some bits of which were flipped is refused, or names stored rows."""
    shared_cache().save(path)
    start, rows = table_of(path)
    whole, refused, loaded = path.read_bytes(), 0, 0
    for seed in range(60):
        content, rng = bytearray(whole), random.Random(seed)
        for _ in range(rng.randint(1, 3)):
            place, bit = rng.randrange(4 * len(rows)), rng.randrange(8)
            if seed % 2:  # as often as not another row of the page
                place, bit = place // 4 * 4, 0
            content[start + place] ^= 1 << bit
        path.write_bytes(content)
        try:
            pages = QuantizedInt8Cache.load(path, verify=False).layers[0].pages
        except CacheFileError:
            refused += 1
            continue
        loaded, first = loaded + 1, 0
        for segment in pages.segments:
            table = pages.row_table.rows[:, first : first + segment.capacity]
            assert table.min() >= 0
            assert table.max() < segment.rows
            first += segment.capacity
        pages.restore()
    assert refused > 30
    assert loaded


FORGERIES: dict[str, tuple[Callable[[dict, dict], object], str]] = {
    "layout 1": (lambda table, told: told.update(layout=1), "the layout of a file with such tensors must be 2, got 1."),
    "dtype": (
        lambda table, told: table["layers.0.row_table"].update(dtype="F32"),
        r"layers.0.row_table must be I32 \(6, 4\), got F32",
    ),
    "batch": (
        lambda table, told: table["layers.0.row_table"].update(shape=[4, 6]),
        r"layers.0.row_table must be I32 \(6, 6\), got I32 \(4, 6\)",
    ),
    "pages": (
        lambda table, told: table["layers.0.row_table"].update(shape=[24]),
        r"layers.0.row_table must be I32 \(6, 24\), got I32 \(24,\)",
    ),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_row_table_is_refused(path: Path, name: str) -> None:
    shared_cache().save(path)
    change, message = FORGERIES[name]
    rewrite(path, change)
    with pytest.raises(CacheFileError, match=message):
        QuantizedInt8Cache.load(path)
