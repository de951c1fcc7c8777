"""Does a saved cache come back bit for bit, into the right model only, and does ``generate`` go on from it?"""

import os
import re
import stat
import threading
import tracemalloc
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from quantcache import CacheFileError, QuantizedInt8Cache
from quantcache.files import container, fingerprint
from quantcache.layers import factory
from quantcache.layers._host import CACHE_NAMES, cache_argument
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.growing import Int8Layer
from tests.conftest import devices
from tests.file_cases import (
    MODELS,
    SIZES,
    assert_bit_equal,
    filled_cache,
    gemma,
    llama,
    prompt,
    read_prompt,
    stored_tensors,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "prompt.safetensors"


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return MODELS[request.param]()


GREEDY = {"max_new_tokens": 12, "do_sample": False}


@pytest.mark.parametrize("mmap", [False, True])
def test_generation_goes_on_as_if_the_cache_had_never_left(model: PreTrainedModel, path: Path, mmap: bool) -> None:
    cache = QuantizedInt8Cache(model.config)
    first = model.generate(prompt(150), **cache_argument(cache), **GREEDY)
    cache.save(path, model=model, input_ids=first)
    loaded = QuantizedInt8Cache.load(path, model=model, mmap=mmap)
    assert_bit_equal(loaded, cache)
    assert torch.equal(loaded.input_ids, first[:, : cache.get_seq_length()])
    follow_up = torch.cat([first, prompt(40, seed=3)], dim=1)
    expected = model.generate(follow_up, **cache_argument(cache), **GREEDY)
    assert torch.equal(model.generate(follow_up, **cache_argument(loaded), **GREEDY), expected)
    assert_bit_equal(loaded, cache)
    assert_bit_equal(QuantizedInt8Cache.load(path, model=model), QuantizedInt8Cache.load(path, model=model, mmap=mmap))


@pytest.mark.parametrize("tokens", [1, 63, 95, 96, 97, 160, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_length_and_dtype_comes_back(path: Path, tokens: int, dtype: torch.dtype) -> None:
    cache = filled_cache(tokens, dtype=dtype, v_head_dim=5)
    cache.save(path)
    for mmap in (False, True):
        loaded = QuantizedInt8Cache.load(path, mmap=mmap)
        assert_bit_equal(loaded, cache)
        assert (loaded.get_seq_length(), loaded.input_ids) == (tokens, None)
        assert [layer.residual_length for layer in loaded.layers] == [32, 32]


def test_a_grown_cache_is_stored_without_its_slack(path: Path) -> None:
    cache = filled_cache(700, batch=1, head_dim=64, v_head_dim=64)
    for layer_idx in range(2):
        for step in range(40):
            cache.update(*(torch.randn(1, 3, 11, 64) + step for _ in range(2)), layer_idx)
    cache.save(path)
    loaded = QuantizedInt8Cache.load(path)
    assert_bit_equal(loaded, cache)
    assert len(loaded.layers[0].pages.segments) == 1 < len(cache.layers[0].pages.segments)
    assert loaded.nbytes <= cache.nbytes
    stored = sum(tensor.nbytes for tensor in stored_tensors(cache).values())
    assert stored <= path.stat().st_size <= 1.01 * stored


@pytest.mark.parametrize("device", devices())
def test_a_cache_of_one_device_loads_on_another(path: Path, device: str) -> None:
    cache = filled_cache(300, device=device)
    cache.save(path)
    for target in {"cpu", device}:
        loaded = QuantizedInt8Cache.load(path, device=target)
        assert {layer.pages.device.type for layer in loaded.layers} == {target}
        assert_bit_equal(loaded, cache)


@pytest.mark.parametrize("max_tokens", [1, 40, 64, 100, 128, 192, 200, 229, 230, 1000])
@pytest.mark.parametrize("mmap", [False, True])
def test_a_prefix_is_what_crop_leaves(path: Path, max_tokens: int, mmap: bool) -> None:
    cache = filled_cache(230)
    cache.save(path, input_ids=prompt(230, batch=2))
    loaded = QuantizedInt8Cache.load(path, max_tokens=max_tokens, mmap=mmap)
    kept = min(max_tokens, 230)
    cache.crop(kept - 230)
    assert loaded.get_seq_length() == kept
    assert torch.equal(loaded.input_ids, prompt(230, batch=2)[:, :kept])
    assert_bit_equal(loaded, cache)


def test_a_prefix_reads_no_more_than_its_pages(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled_cache(64 * 40, batch=1, head_dim=64, v_head_dim=64, layers=1).save(path)
    sizes: list[int] = []
    original = container._roomy_memory
    monkeypatch.setattr(container, "_roomy_memory", lambda nbytes: sizes.append(nbytes) or original(nbytes))
    QuantizedInt8Cache.load(path, max_tokens=64 * 4)
    assert sum(sizes) <= path.stat().st_size * 4 / 37


def test_windows_and_states_cannot_be_cut(path: Path) -> None:
    model = gemma()
    read_prompt(model, prompt(150)).save(path, model=model)
    with pytest.raises(ValueError, match="max_tokens needs layers that hold every token, got DynamicSlidingWi"):
        QuantizedInt8Cache.load(path, model=model, max_tokens=100)
    assert QuantizedInt8Cache.load(path, model=model, max_tokens=150).get_seq_length() == 150


def test_windows_in_int8_come_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factory, "MAX_NATIVE_WINDOW", 16)
    model = gemma(sliding_window=100)
    cache = read_prompt(model, prompt(400))
    assert cache.layers[0].pages.first_page > 0
    cache.save(path, model=model, input_ids=prompt(400))
    for mmap in (False, True):
        loaded = QuantizedInt8Cache.load(path, model=model, mmap=mmap)
        assert_bit_equal(loaded, cache)
        assert loaded.layers[0].pages.first_page == cache.layers[0].pages.first_page
        assert loaded.layers[0].pages.keep_tokens == cache.layers[0].pages.keep_tokens
    follow_up = prompt(440)
    follow_up[:, :400] = prompt(400)
    expected = model.generate(follow_up, **cache_argument(cache), **GREEDY)
    assert torch.equal(model.generate(follow_up, **cache_argument(loaded), **GREEDY), expected)
    with pytest.raises(ValueError, match="max_tokens needs layers that hold every token, got int8 as layer 0, whose"):
        QuantizedInt8Cache.load(path, model=model, max_tokens=200)
    with pytest.raises(ValueError, match="other layers than plain int8, int8 windows, got neither model nor config"):
        QuantizedInt8Cache.load(path)
    monkeypatch.setattr(factory, "MAX_NATIVE_WINDOW", 1024)
    with pytest.raises(CacheFileError, match="layer 0 must be DynamicSlidingWindowLayer for this model, got int8"):
        QuantizedInt8Cache.load(path, model=model)


def test_an_offloaded_cache_is_saved_from_where_it_is(path: Path) -> None:
    cache, resident = filled_cache(300), filled_cache(300)
    for layer in cache.layers:
        layer.pages.offload()
    cache.save(path)
    assert all(layer.pages.is_offloaded for layer in cache.layers)
    assert_bit_equal(QuantizedInt8Cache.load(path), resident)


@pytest.mark.parametrize("tokens", [40, 96, 150, 160])
def test_a_cache_of_fixed_capacity_comes_back_as_one_that_grows(path: Path, tokens: int) -> None:
    model = llama()
    cache = QuantizedInt8Cache(model.config, max_cache_len=300)
    first = max(1, tokens - 7)
    with torch.no_grad():
        for chunk in (prompt(tokens)[:, :first], prompt(tokens)[:, first:]):
            model(chunk, **cache_argument(cache), use_cache=True)
    cache.save(path, model=model, input_ids=prompt(tokens))
    loaded = QuantizedInt8Cache.load(path, model=model)
    assert_bit_equal(loaded, cache)
    assert type(loaded.layers[0]) is Int8Layer
    model.generate(torch.cat([prompt(tokens), prompt(5)], dim=1), **cache_argument(loaded), **GREEDY)


def test_folders_work_as_transformers_users_expect(tmp_path: Path) -> None:
    model, folder = llama(), tmp_path / "a" / "b"
    cache = read_prompt(model, prompt(150))
    cache.save_pretrained(folder, model=model, input_ids=prompt(150))
    assert os.listdir(folder) == ["prompt_cache.safetensors"]
    loaded = QuantizedInt8Cache.from_pretrained(folder, model=model, strict=True)
    assert_bit_equal(loaded, cache)
    assert loaded.layers[0].read_log.policy.strict


def test_tokens_go_with_the_rows_of_the_batch(path: Path) -> None:
    filled_cache(120).save(path, input_ids=prompt(120, batch=2))
    loaded, ids = QuantizedInt8Cache.load(path), prompt(120, batch=2)
    loaded.batch_repeat_interleave(2)
    assert torch.equal(loaded.input_ids, ids[[0, 0, 1, 1]])
    loaded.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(loaded.input_ids, ids[[1, 0]])
    loaded.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(loaded.input_ids, ids[[0, 0]])
    loaded.crop(-20)
    assert torch.equal(loaded.input_ids, ids[[0, 0], :100])
    loaded.save(path)
    assert torch.equal(QuantizedInt8Cache.load(path).input_ids, ids[[0, 0], :100])
    loaded.reset()
    assert loaded.input_ids is None


@pytest.mark.parametrize("name", CACHE_NAMES)
def test_another_prompt_is_refused_before_anything_changes(path: Path, name: str) -> None:
    model, ids = llama(), prompt(150)
    read_prompt(model, ids).save(path, model=model, input_ids=ids)
    cache = QuantizedInt8Cache.load(path, model=model)
    other = torch.cat([ids, prompt(5, seed=4)], dim=1)
    other[0, 7] = 0
    message = (
        f"the prompt must begin with the 150 stored tokens, got token 0 for {int(ids[0, 7])} at place 7 of row 0. Pass"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(other, **{name: cache}, **GREEDY)
    with pytest.raises(ValueError, match=re.escape("with the (1, 150) tokens in the cache and go on, got (1, 20).")):
        model.generate(input_ids=ids[:, :20], **{name: cache}, **GREEDY)
    assert_bit_equal(cache, QuantizedInt8Cache.load(path, model=model))
    cache.input_ids = None
    model.generate(other, **cache_argument(cache), **GREEDY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, "num_key_value_heads 2 in the file and 4 in the model"),
        ({"num_hidden_layers": 3}, "num_hidden_layers 2 in the file and 3 in the model"),
        ({"head_dim": 16}, "head_dim 8 in the file and 16 in the model"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_parameters {'rope_"),
    ],
)
def test_another_model_is_refused(path: Path, changes: dict[str, object], message: str) -> None:
    model = llama()
    read_prompt(model, prompt(100)).save(path, model=model)
    for how in ({"model": llama(**changes)}, {"config": llama(**changes).config}):
        with pytest.raises(CacheFileError, match=f"^prompt cache .*: it must be of this model, got .*{message}"):
            QuantizedInt8Cache.load(path, **how)
    with pytest.raises(CacheFileError, match="dtype 'float32' in the file and 'bfloat16' in the model"):
        QuantizedInt8Cache.load(path, model=llama().to(torch.bfloat16))


def test_a_field_that_differs_between_layers_is_stored_for_each(path: Path) -> None:
    sizes = {"head_dim": 8, "global_head_dim": 16, "sliding_window": 40, "hidden_size_per_layer_input": 0}
    types = ["sliding_attention", "full_attention"]
    config = transformers.Gemma4TextConfig(**{**SIZES, **sizes, "layer_types": types, "num_kv_shared_layers": 0})
    model = transformers.Gemma4ForCausalLM(config).eval()
    assert fingerprint.of_config(model.config)["head_dim"] == [8, 16]
    read_prompt(model, prompt(100)).save(path, model=model)
    assert_bit_equal(QuantizedInt8Cache.load(path, model=model), read_prompt(model, prompt(100)))


def test_a_digest_of_the_weights_tells_tuned_models_apart(path: Path) -> None:
    model = llama()
    read_prompt(model, prompt(100)).save(path, model=model, digest_weights=True)
    assert QuantizedInt8Cache.load(path, model=llama()).get_seq_length() == 100
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(CacheFileError, match="weights_sha256"):
        QuantizedInt8Cache.load(path, model=model)


def test_native_layers_need_the_config(path: Path) -> None:
    model = gemma()
    read_prompt(model, prompt(100)).save(path, model=model)
    with pytest.raises(ValueError, match="layers than plain int8, DynamicSlidingWindowLayer, got neither model nor"):
        QuantizedInt8Cache.load(path)
    loaded = QuantizedInt8Cache.load(path, config=model.config)
    assert [isinstance(layer, BaseInt8Layer) for layer in loaded.layers] == [False, True, False, True]
    with pytest.raises(CacheFileError, match="sliding_window 40 in the file and 48 in the model"):
        QuantizedInt8Cache.load(path, model=gemma(sliding_window=48))


def test_a_cache_without_config_stays_one(path: Path) -> None:
    model = gemma()
    cache = read_prompt(model, prompt(100), with_config=False)
    cache.save(path, model=model)
    loaded = QuantizedInt8Cache.load(path, model=model)
    assert all(isinstance(layer, BaseInt8Layer) for layer in loaded.layers)
    assert_bit_equal(loaded, cache)


def test_what_cannot_be_saved_is_refused_and_leaves_no_file(path: Path) -> None:
    cache = filled_cache(100)
    place = "^QuantizedInt8Cache.save: "
    with pytest.raises(ValueError, match=place + "int8 layers must hold the same tokens, at least one, got"):
        QuantizedInt8Cache().save(path)
    with pytest.raises(TypeError, match=place + "input_ids must be an int64 tensor, got torch.float32."):
        cache.save(path, input_ids=torch.ones(2, 100))
    with pytest.raises(ValueError, match=place + re.escape("input_ids must be the (2, 100) tokens stored, or begin")):
        cache.save(path, input_ids=prompt(99, batch=2))
    model = gemma()
    recording = read_prompt(model, prompt(20))
    recording.layers[0].activate_past_recording()
    with pytest.raises(ValueError, match="a DynamicSlidingWindowLayer of 40 must not keep a past that waits"):
        recording.save(path)
    assert list(path.parent.iterdir()) == []


def test_bad_arguments_are_named(path: Path) -> None:
    model = llama()
    read_prompt(model, prompt(100)).save(path)
    place = "^QuantizedInt8Cache.load: "
    with pytest.raises(ValueError, match=place + "max_tokens must be an int of at least 1, got 0."):
        QuantizedInt8Cache.load(path, max_tokens=0)
    with pytest.raises(ValueError, match=place + "one of model and config must be None, got both."):
        QuantizedInt8Cache.load(path, model=model, config=model.config)
    with pytest.raises(ValueError, match=place + "mmap=True must go to the CPU, got device='meta'."):
        QuantizedInt8Cache.load(path, mmap=True, device="meta")
    with pytest.raises(FileNotFoundError):
        QuantizedInt8Cache.load(path.parent / "missing")


def test_what_is_no_prompt_cache_is_named(path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(CacheFileError, match="it is no prompt cache of quantcache"):
        QuantizedInt8Cache.load(path)
    path.write_bytes(b"hello")
    with pytest.raises(CacheFileError, match=r"must start with the length of its header.*got 5 bytes"):
        QuantizedInt8Cache.load(path)
    with pytest.raises(CacheFileError, match="must be a regular file"):
        QuantizedInt8Cache.load(path.parent)
    if hasattr(os, "mkfifo"):
        os.mkfifo(path.parent / "pipe")
        with pytest.raises(CacheFileError, match="must be a regular file"):
            QuantizedInt8Cache.load(path.parent / "pipe")


def test_a_failed_save_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled_cache(100).save(path)
    before = path.read_bytes()

    def full(file: object, view: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(container, "_write_all", full)
        with pytest.raises(OSError, match="No space left"):
            filled_cache(200).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_readers_see_an_old_file_or_a_new_one(path: Path) -> None:
    caches = {tokens: filled_cache(tokens, layers=1) for tokens in (100, 300)}
    caches[100].save(path)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            for cache in caches.values():
                cache.save(path)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(50):
            loaded = QuantizedInt8Cache.load(path)
            assert_bit_equal(loaded, caches[loaded.get_seq_length()])
    finally:
        stop.set()
        writer.join()


@pytest.mark.skipif(os.name != "posix", reason="Windows lets nobody replace an open file")
def test_a_file_is_mapped_as_it_was_opened(path: Path) -> None:
    cache = filled_cache(200)
    cache.save(path)
    with container.Container(path) as file:
        filled_cache(300, heads=1).save(path)
        found = {name.removeprefix("layers."): file.mapped(name) for name in file.entries}
    expected = stored_tensors(cache)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.skipif(os.name != "posix", reason="permissions as POSIX has them")
def test_the_file_has_the_permissions_of_any_new_file(path: Path) -> None:
    filled_cache(100).save(path)
    other = path.parent / "other"
    other.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(other.stat().st_mode)


def test_saving_and_loading_need_less_than_a_layer_beside_the_cache(path: Path) -> None:
    """tracemalloc counts what numpy and bytes objects take, which is all that is not the cache's own memory."""
    cache = filled_cache(4096, batch=1, heads=2, head_dim=64, v_head_dim=64, layers=4)
    layer = cache.nbytes / 4
    tracemalloc.start()
    try:
        cache.save(path)
        assert tracemalloc.get_traced_memory()[1] < layer / 4
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        loaded = QuantizedInt8Cache.load(path)
        assert tracemalloc.get_traced_memory()[1] - before < loaded.nbytes + layer / 4
    finally:
        tracemalloc.stop()


def test_progress_ends_with_everything(path: Path) -> None:
    seen: list[tuple[int, int]] = []
    filled_cache(300).save(path, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    seen.clear()
    QuantizedInt8Cache.load(path, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
