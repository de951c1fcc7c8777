"""Does the report say what is stored, what that saves against the model's dtype, and why it was read as it was?"""

import sys

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig

from quantcache import QuantizedInt8Cache
from quantcache.layers.report import CacheReport, LayerReport, human_bytes
from tests.strategies import random_states

BATCH, HEADS, HEAD_DIM = 2, 3, 16


def config(layers: int = 3) -> LlamaConfig:
    return LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=HEADS, hidden_size=HEADS * HEAD_DIM, intermediate_size=8
    )


def filled(cache: QuantizedInt8Cache, tokens: int, dtype: torch.dtype = torch.bfloat16) -> CacheReport:
    """The report of a cache with so many tokens in each layer of ``config()``."""
    for layer_idx in range(3):
        key_states, value_states = random_states(BATCH, HEADS, tokens, HEAD_DIM, seed=layer_idx)
        cache.update(key_states.to(dtype), value_states.to(dtype), layer_idx)
    return cache.report()


@pytest.mark.parametrize(("max_cache_len", "tokens_of_default"), [(None, 300), (512, 512)])
def test_a_report_counts_what_is_saved_against_the_dtype(max_cache_len: int | None, tokens_of_default: int) -> None:
    cache = QuantizedInt8Cache(config(), max_cache_len=max_cache_len)
    report = filled(cache, 300)
    exact = 3 * BATCH * HEADS * tokens_of_default * 2 * HEAD_DIM * 2
    assert report.nbytes == cache.nbytes
    assert report.exact_nbytes == exact
    assert report.saved_nbytes == exact - cache.nbytes
    assert report.saved_share == report.saved_nbytes / exact
    assert 0 < report.saved_share < 0.5
    assert f"{human_bytes(report.saved_nbytes)} ({report.saved_share:.0%})" in str(report).splitlines()[-2]


def test_layers_that_are_alike_share_a_row() -> None:
    head, row, total, *_ = str(filled(QuantizedInt8Cache(config()), 300)).splitlines()
    assert head.split() == ["layers", "storage", "tokens", "size", "in", "bfloat16", "saved", "read", "by"]
    assert row.split()[:3] == ["0-2", "int8", "300"]
    assert total.split()[0] == "all"


def test_a_row_names_layers_that_are_no_neighbours() -> None:
    kinds: list[str] = (["int8, window 4096"] * 5 + ["int8"]) * 7
    layers = [
        LayerReport(i, kind, 9, 10, "cpu", None, dtype="float32", exact_nbytes=20) for i, kind in enumerate(kinds)
    ]
    rows = str(CacheReport(layers)).splitlines()
    assert rows[1].startswith("0-4, 6-10, ... (35)  int8, window 4096")
    assert rows[2].startswith("5, 11, ... (7) ")
    assert all(len(row) <= 98 for row in rows), rows


def test_a_window_is_compared_with_the_tokens_that_the_default_cache_keeps() -> None:
    gemma = Gemma3TextConfig(
        num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=2000, num_attention_heads=1
    )
    cache = QuantizedInt8Cache(gemma)
    for tokens, kept in ((1500, 1500), (1000, 1999)):
        cache.update(*random_states(1, 1, tokens, HEAD_DIM), 0)
        assert cache.report().exact_nbytes == kept * 2 * HEAD_DIM * 4


def test_layers_of_transformers_save_nothing() -> None:
    gemma = Gemma3TextConfig(
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=64
    )
    cache = QuantizedInt8Cache(gemma)
    for layer_idx in range(2):
        cache.update(*random_states(1, 1, 300, HEAD_DIM), layer_idx)
    native, int8 = cache.report().layers
    assert (native.kernel, native.exact_nbytes, native.dtype) == ("native", native.nbytes, "float32")
    assert int8.exact_nbytes > int8.nbytes


def test_a_report_says_why_a_context_is_exact() -> None:
    cache = QuantizedInt8Cache(config(), residual_length=16)
    short = filled(cache, 79)
    assert short.backend == "exact"
    assert short.why_exact == "int8 begins at 80 tokens; a shorter context stays exact"
    assert str(short).endswith(f"exact: {short.why_exact}.")
    assert filled(cache, 1).why_exact is not None, "the page that this closes is read by the next"
    prompt = filled(QuantizedInt8Cache(config()), 300)
    assert prompt.why_exact == "a prompt is attended to as the model made it; what follows reads int8"
    assert QuantizedInt8Cache(config()).report().why_exact is None


@pytest.mark.parametrize("model_config", [None, config()], ids=["without a config", "with one"])
def test_an_empty_cache_has_a_report(model_config: PreTrainedConfig | None) -> None:
    report = QuantizedInt8Cache(model_config).report()
    assert (report.nbytes, report.exact_nbytes, report.saved_share) == (0, 0, 0.0)
    assert "0 bytes" in str(report)
    assert "<table>" in report._repr_html_()


def test_a_notebook_shows_a_table() -> None:
    layers = [LayerReport(0, "int8", 200, 1 << 20, "restored", "a < b", dtype="float32", exact_nbytes=4 << 20)]
    page = CacheReport(layers, "It was lost")._repr_html_()
    assert page.count("<tr>") == 3
    assert "<td>1.00 MiB</td><td>4.00 MiB</td><td>3.00 MiB (75%)</td>" in page
    assert "<p>0: restored, a &lt; b.</p><p>It was lost.</p>" in page


def test_a_report_draws_bars_of_both_sizes() -> None:
    report = filled(QuantizedInt8Cache(config()), 300)
    (axes,) = report.plot().axes
    exact, stored = ([bar.get_height() for bar in bars if bar.get_height() is not None] for bars in axes.containers)
    assert [height * 2**20 for height in exact] == [row.exact_nbytes for row in report.layers]
    assert [height * 2**20 for height in stored] == [row.nbytes for row in report.layers]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["bfloat16", "this cache"]


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib must be installed.*pip install matplotlib"):
        CacheReport([]).plot()


def test_sizes_have_the_unit_that_suits_them() -> None:
    sizes = {512: "512 bytes", 1536: "1.50 KiB", 2**29: "512.00 MiB", 3 * 2**30: "3.00 GiB", -(2**21): "-2.00 MiB"}
    assert {nbytes: human_bytes(nbytes) for nbytes in sizes} == sizes
