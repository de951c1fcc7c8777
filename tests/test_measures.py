"""Do the figures of `quantcache eval` mean what their names say?"""

import math
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast

from quantcache import QuantizedInt8Cache
from quantcache.evaluation import baselines
from quantcache.evaluation.comparison import EXACT, Candidate, compare_caches, held_states
from quantcache.evaluation.needle import DEPTHS, find_needles
from quantcache.evaluation.texts import read_dataset, read_text, token_rows
from quantcache.layers._host import cache_argument
from tests.cases import NEWEST
from tests.file_cases import gemma, llama, prompt
from tests.test_cli import folder as folder

TOKENS, PROMPT = 260, 200


@pytest.fixture
def model() -> PreTrainedModel:
    return llama()


def test_layer_errors_are_those_of_what_the_layers_hold(model: PreTrainedModel) -> None:
    ids = prompt(TOKENS)
    result = compare_caches(
        model, ids, {"int8": Candidate(lambda: QuantizedInt8Cache(model.config))}, prompt_len=PROMPT, chunk_len=TOKENS
    )["int8"]
    caches = DynamicCache(config=model.config), QuantizedInt8Cache(model.config)
    with torch.no_grad():
        for cache in caches:
            for chunk in (ids[:, :PROMPT], ids[:, PROMPT:]):
                model(chunk, **cache_argument(cache), use_cache=True)
    for layer_idx in range(2):
        exact, tested = (held_states(cache.layers[layer_idx]) for cache in caches)
        for place, errors in enumerate((result.key_errors, result.value_errors)):
            expected = (tested[place] - exact[place]).norm() / exact[place].norm()
            assert math.isclose(errors[layer_idx], expected, rel_tol=1e-4)
    # A step is 1/254 of the range, the rounding error 1/sqrt(12) of a step, a normal range about 5 deviations.
    assert 1e-4 < result.key_errors[0] < 1e-2


def test_every_cache_is_compared_with_the_same_reference(model: PreTrainedModel) -> None:
    made, left_out = baselines.candidates(model)
    assert {baselines.INT8, baselines.ROUNDED, baselines.BF16} <= made.keys()
    assert (baselines.FP8 in made) == NEWEST, "transformers 5.17 has no fp8"
    assert made.keys() | left_out.keys() == set(baselines.NAMES.values())
    results = compare_caches(model, prompt(TOKENS, batch=2), made, prompt_len=PROMPT, chunk_len=20)
    assert len({result.exact_perplexity for result in results.values()}) == 1
    assert {result.tokens for result in results.values()} == {2 * (TOKENS - PROMPT)}
    assert 0 < results[baselines.ROUNDED].mean_kl < results[baselines.BF16].mean_kl
    worse = baselines.FP8 if NEWEST else baselines.BF16
    assert 0 < results[baselines.INT8].mean_kl < results[worse].mean_kl
    # Rounding to 8 bits of mantissa: at most 2**-9 of each number.
    assert 0 < results[baselines.ROUNDED].key_errors[0] < 2**-9


def test_what_cannot_be_compared_is_left_out_with_the_reason() -> None:
    made, left_out = baselines.candidates(gemma())
    assert ("only full attention layers" if NEWEST else "Unknown quantization backend") in left_out[baselines.FP8]
    assert baselines.INT8 in made
    assert baselines.candidates(llama().to(torch.bfloat16))[1][baselines.BF16] == "the reference is bfloat16 itself"
    with pytest.raises(
        ValueError, match=r"^check_names: a cache must be one of int8, bf16-cache, bf16, fp8, hqq, quanto"
    ):
        baselines.candidates(llama(), ["int3"])


def test_native_layers_have_their_errors_too() -> None:
    model = gemma()
    result = compare_caches(
        model,
        prompt(TOKENS),
        {"int8": Candidate(lambda: QuantizedInt8Cache(model.config))},
        prompt_len=PROMPT,
        chunk_len=30,
    )["int8"]
    assert result.key_errors[0] == 0, "the first layer is a window, which is exact"
    assert all(error > 0 for error in result.key_errors[1:])


class Forgetful(DynamicCache):
    """A cache that loses what it was told first."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        key, value = super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[2] == key.shape[2]:
            return key, value
        value = value.clone()
        value[:, :, :-50] = 0
        return key, value


def test_a_needle_is_read_from_the_cache(folder: Path) -> None:
    from transformers import LlamaForCausalLM

    model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)
    compared = {
        "same": Candidate(lambda: DynamicCache(config=model.config)),
        "int8": Candidate(lambda: QuantizedInt8Cache(model.config)),
        "forgetful": Candidate(lambda: Forgetful(config=model.config)),
    }
    found = find_needles(model, tokenizer, compared, read_text("prose"), tokens=400)
    assert [answer.depth for answer in found[EXACT]] == list(DEPTHS)
    assert found["same"] == found[EXACT]
    for int8, forgetful, exact in zip(found["int8"], found["forgetful"], found[EXACT], strict=True):
        assert abs(int8.loss - exact.loss) < 1e-2
        assert abs(forgetful.loss - exact.loss) > abs(int8.loss - exact.loss)
    with pytest.raises(ValueError, match=r"^find_needles: the text must have .* tokens besides the needle, got 3"):
        find_needles(model, tokenizer, {}, "abc", tokens=400)


def test_texts_are_real_and_rows_do_not_overlap(folder: Path, tmp_path: Path) -> None:
    assert "Anne" in read_text("prose")
    assert "def quantize_key_pages" in read_text("code")
    (tmp_path / "a.txt").write_text("é" * 50, encoding="utf-8")
    assert read_text(str(tmp_path / "a.txt")) == "é" * 50
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be UTF-8"):
        read_text(str(tmp_path / "b.txt"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = token_rows(tokenizer, ["abcdefgh", "ABCDEFGH"], 3, 4)
    assert [tokenizer.decode(row) for row in rows] == ["abcd", "ABCD", "efgh"]
    with pytest.raises(ValueError, match=r"^token_rows: text 2 must have 8 tokens, got 3"):
        token_rows(tokenizer, ["abcdefgh", "ABC"], 4, 4)


def test_a_column_of_a_dataset_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    rows = "".join(f'{{"text": "row {index}", "other": 1}}\n' for index in range(9))
    (tmp_path / "owner" / "name" / "test.jsonl").write_text(rows)
    assert read_dataset("owner/name:text", 12) == "row 0\n\nrow 1\n\nrow 2"
    with pytest.raises(ValueError, match=r"^read_dataset: the column must be one of text, other, got 'none'"):
        read_dataset("owner/name:none", 12)
    with pytest.raises(
        ValueError, match=r"^read_dataset: must be owner/name\[/config\]:column\[@split\], got 'owner/name'"
    ):
        read_dataset("owner/name", 12)
    with pytest.raises(ValueError, match=r"^read_dataset: 'no/such:text' must be a dataset that can be read"):
        read_dataset("no/such:text", 12)
