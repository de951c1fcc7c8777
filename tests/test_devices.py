"""A model over several devices: each layer's bytes on its layer's device, in memory and from files.

Where there is no second GPU, ``meta`` is the second device: torch refuses to mix it with the CPU in an operation.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, StaticCache

from quantcache import QuantizedInt8Cache
from quantcache.backends import dispatch
from quantcache.layers._host import cache_argument
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.fixed import StaticInt8Layer
from quantcache.layers.growing import Int8Layer
from quantcache.layers.parallel import device_of_layer
from quantcache.quantization.options import AttentionOptions
from quantcache.store import reads, writes
from quantcache.store.segments import ClosedPages, Segment
from quantcache.store.view import PagesView
from tests.conftest import compiler_warnings, devices, skip_without_gpu
from tests.file_cases import llama, prompt, read_prompt, stored_tensors
from tests.processes import skip_below_two_gpus
from tests.qwen_checkpoint import write_checkpoint
from tests.strategies import random_states

PLACES = ("cpu", "cpu", "meta", "meta")


def feed(cache: QuantizedInt8Cache, tokens: int, seed: int, batch: int = 2, places: tuple[str, ...] = PLACES) -> None:
    for layer_idx, place in enumerate(places):
        key, value = random_states(batch, 2, tokens, 16, seed=10 * seed + layer_idx)
        for states in cache.update(key.to(place), value.to(place), layer_idx):
            assert states.device.type == place


def tensors_of(held: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that an object of quantcache keeps, at any depth."""
    seen = set() if seen is None else seen
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from tensors_of(value, seen)
    elif isinstance(held, (list, tuple)):
        for value in held:
            yield from tensors_of(value, seen)
    elif type(held).__module__.startswith("quantcache"):
        yield from tensors_of(getattr(held, "__dict__", {}), seen)


def assert_in_place(cache: QuantizedInt8Cache, places: tuple[str, ...] = PLACES) -> None:
    for layer, place in zip(cache.layers, places, strict=True):
        commons = vars(layer).get("_commons", {})  # of all layers, by device and v_head_dim
        assert {device for device, _ in commons} <= set(map(torch.device, places))
        assert all(common.scratch.device == device for (device, _), common in commons.items())
        # Not the layer's own: what layers share, and the name that graphs know it by, which is on the CPU for all.
        others = {id(common.scratch) for common in commons.values()} | {id(layer._handle)}
        if (table := getattr(layer.pages, "row_table", None)) is not None:  # of layers alike, for the device of each
            others |= {id(made) for made in table._made.values()}
            assert table.on(torch.device(place)).device.type == place
        assert layer._handle.device.type == "cpu"
        found = [tensor.device for tensor in tensors_of(layer) if id(tensor) not in others]
        assert len(found) >= 6
        assert set(found) == {torch.device(place)}


@pytest.fixture
def torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend that runs on any device."""
    monkeypatch.setenv("QUANTCACHE_BACKEND", "torch")


@pytest.mark.usefixtures("torch_backend")
@pytest.mark.parametrize("max_cache_len", [None, 400])
def test_every_byte_of_a_layer_is_where_its_states_come_from(max_cache_len: int | None) -> None:
    """Through updates and whatever else a cache does; the layers on the CPU hold what they would hold alone."""
    config = llama(num_hidden_layers=4).config
    mixed, alone = (QuantizedInt8Cache(config, max_cache_len=max_cache_len) for _ in range(2))
    for cache, places in ((mixed, PLACES), (alone, ("cpu",) * 4)):
        for seed, tokens in enumerate((150, 1, 1, 90, 1)):
            feed(cache, tokens, seed, places=places)
        cache.reorder_cache(torch.tensor([1, 0]))
        cache.crop(-40)
        feed(cache, 70, 7, places=places)
        if max_cache_len is None:
            cache.batch_repeat_interleave(2)
            cache.batch_select_indices(torch.tensor([0, 2, 3]))
            feed(cache, 3, 8, batch=3, places=places)
    assert_in_place(mixed)
    assert mixed.nbytes == alone.nbytes
    assert [row.seq_len for row in mixed.report().layers] == [row.seq_len for row in alone.report().layers]
    for mixed_layer, layer in zip(mixed.layers[:2], alone.layers[:2], strict=True):
        for have, want in zip(mixed_layer.pages.restore(), layer.pages.restore(), strict=True):
            assert torch.equal(have, want)


def read_after_every_operation(max_cache_len: int | None, place: str, folder: Path) -> list[Tensor]:
    """What attention reads of a cache after each of its operations, and of the file of it."""
    config, places = llama(num_hidden_layers=2).config, (place,) * 2
    cache, read = QuantizedInt8Cache(config, max_cache_len=max_cache_len), []

    def look() -> None:
        for layer in cache.layers:
            query = random_states(layer.pages.batch_size, 2, 3, 16, seed=99, device=place)[0]
            read.append(torch.nn.functional.scaled_dot_product_attention(query, layer.keys, layer.values))

    for seed, tokens in enumerate((150, 1, 90)):
        feed(cache, tokens, seed, places=places)
        look()
    for operation in (
        lambda: cache.reorder_cache([1, 0]),
        lambda: cache.crop(-100),
        lambda: [layer.pages.offload() for layer in cache.layers],
        lambda: feed(cache, 80, 4, places=places),
        lambda: cache.batch_repeat_interleave(2 if max_cache_len is None else 1),
        lambda: cache.save(folder / "cache"),
    ):
        operation()
        look()
    loaded = QuantizedInt8Cache.load(folder / "cache", config=config, device=place)
    read += loaded.layers[0].pages.restore()
    step = torch.compile(lambda key, value: cache.update(key, value, 0)[0] * 1, backend="eager")
    return [*read, step(*random_states(cache.layers[0].pages.batch_size, 2, 1, 16, device=place))]


@compiler_warnings
@pytest.mark.parametrize(
    ("place", "backend", "default"),
    [
        ("cpu", "torch", "meta"),
        ("cpu", "cpu", "meta"),
        pytest.param("cuda", "cuda", "cuda", marks=[pytest.mark.cuda, skip_without_gpu]),
    ],
)
@pytest.mark.parametrize("max_cache_len", [None, 400])
def test_torchs_default_device_is_no_matter(
    max_cache_len: int | None, place: str, backend: str, default: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a cache keeps on the host is there, whatever ``torch.set_default_device`` was told."""
    monkeypatch.setenv("QUANTCACHE_BACKEND", backend)
    wanted = read_after_every_operation(max_cache_len, place, tmp_path)
    with torch.device(default):
        found = read_after_every_operation(max_cache_len, place, tmp_path)
    for have, want in zip(found, wanted, strict=True):
        assert torch.equal(have, want)


@pytest.mark.usefixtures("torch_backend")
def test_a_layer_refuses_states_of_another_layers_device() -> None:
    cache = QuantizedInt8Cache()
    feed(cache, 100, 0)
    key, value = random_states(2, 2, 1, 16)
    with pytest.raises(ValueError, match=r"key_states must be on the layer's device, meta, got cpu\."):
        cache.update(key, value, 2)
    assert [layer.get_seq_length() for layer in cache.layers] == [100] * 4


LAYERS: dict[str, Callable[[], BaseInt8Layer]] = {"growing": Int8Layer, "fixed": lambda: StaticInt8Layer(300)}


def layer_of(kind: str, device: str) -> tuple[BaseInt8Layer, PagesView]:
    """A layer with pages and a tail, and what attention would read of it."""
    layer = LAYERS[kind]()
    key, value = random_states(2, 2, 200, 16, seed=1, device=device)
    layer.update(key[:, :, :199], value[:, :, :199])
    states, _ = layer.update(key[:, :, 199:], value[:, :, 199:])
    return layer, states.pages_view  # type: ignore[attr-defined]


def elsewhere(device: str) -> str:
    return "meta" if device == "cpu" else "cpu"


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", ["query", "attn_mask", "sinks"])
def test_attention_refuses_what_is_on_another_device_than_the_cache(kind: str, name: str, device: str) -> None:
    """Kernels would take its address as if it were on theirs."""
    _, view = layer_of(kind, device)
    query, _ = random_states(2, 2, 1, 16, seed=2, device=device)
    mask = torch.ones(1, 1, 1, 200, dtype=torch.bool, device=device)
    given = {"query": query, "attn_mask": mask, "sinks": torch.zeros(2, device=device)}
    expected = reads.attention(query, view, AttentionOptions(mask, sinks=given["sinks"]))
    away = given | {name: given[name].to(elsewhere(device))}
    options = AttentionOptions(away["attn_mask"], sinks=away["sinks"])
    place = view.device
    said = rf"ops\.attention: {name} must be on the device of the cached states, {place}, got {elsewhere(device)}\."
    packed = reads.packed(view)
    for ask in (
        lambda: reads.attention(away["query"], view, options),
        lambda: torch.ops.quantcache.attention(away["query"], *packed, *options),
    ):
        with pytest.raises(ValueError, match=said):
            ask()
    assert torch.equal(reads.attention(query, view, AttentionOptions(mask, sinks=given["sinks"])), expected)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("kind", LAYERS)
def test_torchs_attention_refuses_a_query_on_another_device_than_the_cache(kind: str, device: str) -> None:
    layer, _ = layer_of(kind, device)
    query = torch.zeros(2, 2, 1, 16, device=elsewhere(device))
    with pytest.raises(ValueError, match=r"ops\.attention: query must be on the device of the cached states"):
        torch.nn.functional.scaled_dot_product_attention(query, layer.keys, layer.values)


@pytest.mark.parametrize("device", devices())
def test_a_recorded_read_refuses_what_is_on_another_device_than_the_cache(device: str) -> None:
    layer, _ = layer_of("fixed", device)
    pages = layer.pages
    recorded = [pages.memory, dispatch.scratch_for(pages.key_tail, pages.value_tail)], pages.layout.shape
    query = torch.zeros(2, 2, 1, 16, device=elsewhere(device))
    said = r"query must be on the device of the cached states"
    with pytest.raises(ValueError, match=said):
        reads.attention_recorded(query, *recorded)
    with pytest.raises(ValueError, match=said), FakeTensorMode(allow_non_fake_inputs=True):
        reads.attention_recorded(query, *recorded)


@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("operation", ["store_pages", "append_tail", "advance"])
def test_writes_refuse_states_on_another_device_than_the_layer(operation: str, device: str) -> None:
    layer, _ = layer_of("fixed", device)
    key, value = random_states(2, 2, 64, 16, seed=3, device=device)
    pages = layer.pages
    newest = key[:, :, :1], value[:, :, :1]
    writes_of = {
        "store_pages": ((key, value), tuple(pages.buffers.pages.narrow(0, 1))),
        "append_tail": (newest, (pages.buffers.key_tail, pages.buffers.value_tail, 0)),
        "advance": (newest, (pages.memory, pages.layout.shape, torch.float32)),
    }
    states, target = writes_of[operation]
    before = pages.memory.clone()
    for index, name in enumerate(("key_states", "value_states")):
        away = list(states)
        away[index] = away[index].to(elsewhere(device))
        said = rf"ops\.{operation}: {name} must be on the device of the cached states, {pages.device}, got "
        with pytest.raises(ValueError, match=said):
            getattr(torch.ops.quantcache, operation)(*away, *target)
    with pytest.raises(ValueError, match=r"ops\.append_tail: key_states must be on the device"):
        writes.append_tail(newest[0].to(elsewhere(device)), newest[1], *writes_of["append_tail"][1])
    with pytest.raises(ValueError, match=r"ops\.store_pages: value_states must be on the device"):
        writes.store_pages(key, value.to(elsewhere(device)), pages.buffers.pages.narrow(0, 1))
    assert torch.equal(pages.memory, before)


@pytest.mark.parametrize("device", devices())
def test_pages_that_are_not_where_the_tail_is_are_refused(device: str) -> None:
    """As those of a layer that is offloaded, and not fetched."""
    _, view = layer_of("growing", device)
    segments = tuple(Segment(*(part.to(elsewhere(device)) for part in segment)) for segment in view.segments)
    apart = PagesView(ClosedPages(segments), *view.buffers)
    query, _ = random_states(2, 2, 1, 16, seed=2, device=device)
    said = f"pages and exact tail must be on one device, got {elsewhere(device)} and {view.device}"
    if device == "cuda" or not dispatch.cpu_backend.unavailable():
        with pytest.raises(ValueError, match=said):
            reads.attention(query, apart)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("device", devices())
def test_sequences_are_taken_by_indices_of_any_device_that_holds_numbers(kind: str, device: str) -> None:
    layer, _ = layer_of(kind, device)
    before = layer.keys.restore()
    order = torch.tensor([1, 0])
    layer.reorder_cache(order.to("cpu" if device == "cuda" else device))
    layer.batch_select_indices(order.to(device))
    layer.reorder_cache(order)
    assert torch.equal(layer.keys.restore(), before.flip(0))
    with pytest.raises(ValueError, match=r"indices must be on a device that holds numbers, such as the CPU, got meta"):
        layer.reorder_cache(order.to("meta"))
    assert torch.equal(layer.keys.restore(), before.flip(0))


def spread(model: PreTrainedModel, layers: Any) -> None:
    """Move the second half of the layers to ``meta``."""
    for layer in layers[len(layers) // 2 :]:
        layer.to("meta")


@pytest.mark.usefixtures("torch_backend")
def test_a_file_puts_each_layer_where_the_model_has_it(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=4)
    cache = read_prompt(model, prompt(150, batch=2))
    cache.save(tmp_path / "file", model)
    spread(model, model.model.layers)
    loaded = QuantizedInt8Cache.load(tmp_path / "file", model)
    assert_in_place(loaded)
    feed_places = [layer.pages.device.type for layer in loaded.layers]
    assert feed_places == list(PLACES)
    kept, whole = stored_tensors(loaded), stored_tensors(cache)
    for name, tensor in whole.items():
        if int(name[0]) < 2:
            assert torch.equal(kept[name], tensor), name


def test_the_device_of_a_layer_is_found_whatever_its_module_is_called(tmp_path: Path) -> None:
    """Device maps name modules as coarsely as they like, and Qwen v1 has ``transformer.h``."""
    from quantcache.adapters.qwen import QWenLMHeadModel

    qwen = QWenLMHeadModel.from_pretrained(write_checkpoint(tmp_path))
    for model, layers in ((qwen, qwen.transformer.h), (llama(), None)):
        layers = model.model.layers if layers is None else layers
        spread(model, layers)
        assert [device_of_layer(model, index).type for index in range(len(layers))] == ["cpu", "meta"]
    assert device_of_layer(None, 0) == torch.device("cpu")
    assert device_of_layer(llama(), 99) == torch.device("cpu")


def test_layers_that_accelerate_keeps_on_disk_use_the_cache_where_they_run(tmp_path: Path) -> None:
    """Same tokens; the weights are on ``meta`` between the steps, and the cache is not."""
    model, ids = llama(), prompt(150, batch=2)
    options = {"do_sample": False, "max_new_tokens": 12}
    expected = model.generate(ids, **cache_argument(QuantizedInt8Cache()), **options)
    model.save_pretrained(tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    split = type(model).from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "weights", dtype=torch.float32
    )
    assert split.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    cache = QuantizedInt8Cache()
    sequences = split.generate(ids, **cache_argument(cache), **options)
    assert torch.equal(sequences, expected)
    cache.save(tmp_path / "file", split, sequences)
    loaded = QuantizedInt8Cache.load(tmp_path / "file", split)
    assert [layer.pages.device.type for layer in loaded.layers] == ["cpu", "cpu"]
    expected = model.generate(sequences, **cache_argument(QuantizedInt8Cache.load(tmp_path / "file")), **options)
    assert torch.equal(split.generate(sequences, **cache_argument(loaded), **options), expected)


GPUS = ("cuda:0", "cuda:0", "cuda:1", "cuda:1")


def on_two_gpus(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """A model on one GPU, and the same one over two."""
    alone = llama(num_hidden_layers=4, hidden_size=64)
    alone.save_pretrained(folder)
    places: dict[str, int] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 1, "lm_head": 1}
    places |= {f"model.layers.{index}": index // 2 for index in range(4)}
    split = type(alone).from_pretrained(folder, device_map=places, dtype=torch.float32).eval()
    return alone.to("cuda:0"), split


@pytest.mark.cuda
@skip_below_two_gpus
@pytest.mark.parametrize("kind", ["growing", "offloaded", "static", "static compiled", "beams"])
def test_two_gpus_give_the_tokens_of_one(kind: str, tmp_path: Path) -> None:
    """Each layer is read by the CUDA kernels of its GPU, whichever GPU is the current one."""
    alone, split = on_two_gpus(tmp_path / "model")
    ids = prompt(250, batch=2).to("cuda:0")
    options = {"do_sample": False, "max_new_tokens": 80, "disable_compile": kind != "static compiled"}
    options |= {"num_beams": 3} if kind == "beams" else {}
    if kind == "static compiled":
        try:
            split.generate(ids, **cache_argument(StaticCache(config=split.config, max_cache_len=330)), **options)
        except Exception as error:
            pytest.skip(f"transformers' own StaticCache goes no further: {type(error).__name__}: {error}")
    made: dict[str, Any] = {"offloading": kind == "offloaded", "max_cache_len": 330 if "static" in kind else None}
    expected = alone.generate(ids, **cache_argument(QuantizedInt8Cache(alone.config, **made)), **options)
    cache = QuantizedInt8Cache(split.config, **made)
    assert torch.equal(split.generate(ids, **cache_argument(cache), **options), expected)
    assert [str(layer.pages.device) for layer in cache.layers] == list(GPUS)
    expected_kernel = "cuda, compiled" if kind == "static compiled" else "cuda decode"
    assert {row.kernel for row in cache.report().layers} == {expected_kernel}
    if kind in ("growing", "beams"):
        assert_in_place(cache, GPUS)


@pytest.mark.cuda
@skip_below_two_gpus
def test_files_load_each_layer_to_its_gpu(tmp_path: Path) -> None:
    """From one GPU to two and back, with an offloaded cache in between; the bytes stay what they are."""
    alone, split = on_two_gpus(tmp_path / "model")
    ids = prompt(250, batch=2).to("cuda:0")
    options = {"do_sample": False, "max_new_tokens": 40}
    cache = QuantizedInt8Cache(split.config, offloading=True)
    sequences = split.generate(ids, **cache_argument(cache), **options)
    cache.save(tmp_path / "file", split, sequences)
    loaded = QuantizedInt8Cache.load(tmp_path / "file", split)
    assert_in_place(loaded, GPUS)
    for name, tensor in stored_tensors(cache).items():
        assert torch.equal(stored_tensors(loaded)[name].cpu(), tensor.cpu()), name
    one = QuantizedInt8Cache.load(tmp_path / "file", alone)
    assert {str(layer.pages.device) for layer in one.layers} == {"cuda:0"}
    expected = alone.generate(sequences, **cache_argument(one), **options)
    assert torch.equal(split.generate(sequences, **cache_argument(loaded), **options), expected)
