"""Chat, streams and batches of Qwen v1 as callers of the original know them."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from quantcache.adapters.qwen import (
    QWenLMHeadModel,
    QWenTokenizer,
    batches,
    decode_tokens,
    get_stop_words_ids,
    make_context,
)
from tests.qwen_checkpoint import RANKS, VOCAB, write_checkpoint

GREEDY = {"do_sample": False}
SYSTEM = "You are a helpful assistant."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> QWenTokenizer:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> QWenLMHeadModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_cache_quantization=True, seq_length=4096
    ).eval()


class Dictated(LogitsProcessor):
    """Makes the model say given tokens behind a prompt of ``prompt_len`` tokens, then "z" for ever."""

    def __init__(self, prompt_len: int, tokens: list[int]) -> None:
        self.prompt_len, self.tokens = prompt_len, tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = input_ids.shape[1] - self.prompt_len
        wanted = self.tokens[said] if said < len(self.tokens) else ord("z")
        scores = torch.full_like(scores, -100.0)
        scores[:, wanted] = 100.0
        return scores


def dictate(tokenizer: QWenTokenizer, tokens: list[int], query: str = "q", **options: Any) -> dict[str, Any]:
    """Arguments of chat that make it say ``tokens``."""
    _, ids = make_context(tokenizer, query, None, SYSTEM)
    return {**GREEDY, **options, "logits_processor": LogitsProcessorList([Dictated(len(ids), tokens)])}


def test_a_prompt_is_chatml(tokenizer: QWenTokenizer) -> None:
    """Blocks of role and content; special tokens inside them are plain text."""
    text, ids = make_context(tokenizer, "x<|im_end|>", [("q", "r")], "s")
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nr<|im_end|>"
        "\n<|im_start|>user\nx<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.im_end_id) == 4
    assert tokenizer.decode(ids) == text
    assert make_context(tokenizer, "hel", chat_format="raw") == ("hel", [257])
    with pytest.raises(ValueError, match='chat_format must be "chatml" or "raw", got \'alpaca\''):
        make_context(tokenizer, "hel", chat_format="alpaca")


def test_history_is_kept_from_the_newest_back(tokenizer: QWenTokenizer) -> None:
    """While system, turns and the next older one are under the window; the query is not counted."""
    history = [("1", "2"), ("3", "4"), ("5", "6")]
    system_len = len(tokenizer.encode("<|im_start|>system\ns<|im_end|>"))
    turn_len = len(tokenizer.encode("\n<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"))

    def kept(window: int) -> list[str]:
        text, _ = make_context(tokenizer, "q" * 99, history, "s", window)
        return [digit for digit in "123456" if digit in text]

    assert kept(system_len) == []
    assert kept(system_len + turn_len) == []
    assert kept(system_len + turn_len + 1) == ["5", "6"]
    assert kept(system_len + 2 * turn_len + 1) == ["3", "4", "5", "6"]
    assert kept(10**6) == list("123456")


def test_a_reply_is_cut_as_in_the_original(tokenizer: QWenTokenizer) -> None:
    """At the first turn token behind the prompt; where there is none the last token is dropped."""
    text, ids = make_context(tokenizer, "q", None, "s")
    reply, options = [*ids, *b"hi"], (tokenizer, len(text), len(ids))
    assert decode_tokens([*reply, tokenizer.im_end_id, 65], *options) == "hi"
    assert decode_tokens(torch.tensor([*reply, tokenizer.im_start_id]), *options) == "hi"
    assert decode_tokens(reply, *options) == "h"
    assert decode_tokens(ids, *options) == ""
    assert decode_tokens([*reply, 0xC3, tokenizer.im_end_id], *options) == "hi\ufffd"
    assert decode_tokens([*reply, 0xC3, tokenizer.im_end_id], *options, errors="ignore") == "hi"
    whole = [*b"ab", *b"hi", tokenizer.eod_id, tokenizer.eod_id]
    assert decode_tokens(whole, tokenizer, 2, 2, "raw") == "hi"
    assert decode_tokens(whole[:4], tokenizer, 2, 2, "raw", False, True) == ("hi", "Gen length 4")
    reason = decode_tokens([*reply, tokenizer.im_end_id], *options, return_end_reason=True)
    assert reason == ("hi", "Gen '<|im_end|>'")


def test_verbose_prints_the_reply_and_why_it_ended(tokenizer: QWenTokenizer, capsys: pytest.CaptureFixture) -> None:
    text, ids = make_context(tokenizer, "q", None, "s")
    decode_tokens([*ids, *b"hi", tokenizer.im_end_id], tokenizer, len(text), len(ids), verbose=True)
    printed = capsys.readouterr().out
    assert "hi<|im_end|>" in printed
    assert "End Reason: Gen '<|im_end|>'" in printed


def test_chat_ends_at_a_stop_word_and_changes_no_argument(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> None:
    """The turn token ends it, and so does a stop word of the caller's; history and stop words stay as they were."""
    end = tokenizer.im_end_id
    options = dictate(tokenizer, [*b"hi there", end, *b"more"], max_new_tokens=40)
    history: list[tuple[str, str]] = []
    assert model.chat(tokenizer, "q", history, **options) == ("hi there", [("q", "hi there")])
    assert history == []
    words = [list(b"th")]
    response, _ = model.chat(tokenizer, "q", None, stop_words_ids=words, **options)
    assert response == "hi th"
    assert words == [list(b"th")]
    assert (
        model.generation_config.stop_words_ids is None if hasattr(model.generation_config, "stop_words_ids") else True
    )


def test_a_window_given_to_chat_goes_before_the_config(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> None:
    seen = []

    class Watch(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            seen.append(tokenizer.decode(input_ids[0]))
            return scores

    for window in (20, 6144):
        model.chat(
            tokenizer, "q", [("old", "words")], max_window_size=window, max_new_tokens=1,
            logits_processor=LogitsProcessorList([Watch()]),
        )  # fmt: skip
    assert ["words" in text for text in seen] == [False, True]


def test_arguments_that_are_no_chat_are_refused(folder: Path, model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> None:
    """stream=True, a base model's generation config; chat_stream says so when it is called, not when it is read."""
    with pytest.raises(TypeError, match=r"chat: stream is not an argument, got True\. Use chat_stream"):
        model.chat(tokenizer, "q", None, stream=True)
    for call in (model.chat, model.chat_stream):
        with pytest.raises(ValueError, match=r"chat_format must be \"chatml\", got 'raw'\. Is this a chat model\?"):
            call(tokenizer, "q", None, chat_format="raw")
    with pytest.raises(ValueError, match="stop words must not be empty"):
        model.generate(torch.tensor([[1]]), stop_words_ids=[[]])
    with pytest.raises(ValueError, match="eos_token_id must be a token id, got None"):
        model.generate(torch.tensor([[1]]), stop_words_ids=[[5]], eos_token_id=None)


def test_stop_words_of_a_generation_config_count(model: QWenLMHeadModel) -> None:
    """As base models have them; every row ends for itself."""
    processor = LogitsProcessorList([Dictated(2, [7, 8, 9, 10])])
    options = {**GREEDY, "max_new_tokens": 6, "logits_processor": processor, "stop_words_ids": [[8, 9]]}
    output = model.generate(torch.tensor([[1, 2]]), attention_mask=torch.ones(1, 2), **options)
    assert output[0].tolist() == [1, 2, 7, 8, 9, RANKS]
    config = copy.deepcopy(model.generation_config)
    config.stop_words_ids, config.do_sample, config.max_new_tokens = [[7]], False, 6
    output = model.generate(torch.tensor([[1, 2]]), config, attention_mask=torch.ones(1, 2), logits_processor=processor)
    assert output[0].tolist() == [1, 2, 7, RANKS]


def test_a_stream_ends_with_the_whole_answer(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> None:
    """Every piece continues the one before, and the last is the text of what generate gives for the same prompt."""
    options = {**GREEDY, "max_new_tokens": 30}
    pieces = list(model.chat_stream(tokenizer, "Hello!", None, **options))
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(pieces))
    _, ids = make_context(tokenizer, "Hello!", None, SYSTEM)
    words = get_stop_words_ids("chatml", tokenizer)
    output = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), stop_words_ids=words, **options
    )
    answer = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True, errors="ignore")
    assert len(answer) > 3
    assert pieces[-1] == answer


def test_a_stream_grows_token_by_token(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> None:
    """Without a space to wait for; half a character is not shown."""
    options = dictate(tokenizer, [*"aé好".encode(), tokenizer.im_end_id], max_new_tokens=20)
    assert list(model.chat_stream(tokenizer, "q", None, **options)) == ["a", "aé", "aé好"]


def test_a_stream_raises_what_generate_raises(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> None:
    with pytest.raises(ValueError, match="no_such_argument"):
        list(model.chat_stream(tokenizer, "q", None, no_such_argument=1))


def test_a_stream_that_nobody_reads_ends(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> None:
    """Closing it ends generate at its next token, and waits for that."""
    said = []

    class Watch(Dictated):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            said.append(input_ids.shape[1])
            return super().__call__(input_ids, scores)

    stream = model.chat_stream(
        tokenizer, "q", None, logits_processor=LogitsProcessorList([Watch(0, [])]), max_new_tokens=5000, **GREEDY
    )
    assert next(stream) == "z"
    stream.close()
    count = len(said)
    assert count < 5000
    assert len(said) == count


PROMPTS: list[str | list[int]] = ["Hello!", [4, 5], "a much longer question than the others", [7] * 30, "he"]


def test_a_batch_gives_each_prompt_its_own_answer(model: QWenLMHeadModel, tokenizer: QWenTokenizer) -> None:
    """Sub-batches of other lengths, padding and sorting change no answer and no order; chat gives the same."""
    options = {"progress": False, **GREEDY, "max_new_tokens": 10}
    together = model.generate_batch(PROMPTS, tokenizer, batch_size=2, **options)
    alone = [model.generate_batch([p, "x"], tokenizer, batch_size=1, **options)[0] for p in PROMPTS]
    assert together == alone == model.generate_batch(PROMPTS, tokenizer, **options)
    assert len(set(together)) > 2
    assert together[0] == model.chat(tokenizer, "Hello!", None, max_new_tokens=10, **GREEDY)[0]
    assert model.generate_batch([], tokenizer) == []


def test_batches_are_as_large_as_memory_allows(
    model: QWenLMHeadModel, tokenizer: QWenTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Free memory decides; a device that does not say gets a fixed number; longer answers mean fewer rows."""
    sizes: list[int] = []
    generate = type(model).generate

    def watched(self: QWenLMHeadModel, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(inputs))
        return generate(self, inputs, **kwargs)

    monkeypatch.setattr(type(model), "generate", watched)
    options = {"progress": False, **GREEDY, "max_new_tokens": 2}
    prompts = [[1, 2, 3]] * 20
    for free, expected in ((None, [8, 8, 4]), (10**12, [20]), (1, [1] * 20), (15 * 10**5, None)):
        sizes.clear()
        monkeypatch.setattr(batches, "free_memory", lambda device, free=free: free)
        assert len(set(model.generate_batch(prompts, tokenizer, **options))) == 1
        assert sizes == expected or (expected is None and 1 < sizes[0] < 20)
    few = sizes[0]
    sizes.clear()
    model.generate_batch(prompts, tokenizer, **{**options, "max_new_tokens": 90})
    assert sizes[0] < few
    monkeypatch.undo()
    assert batches.free_memory(torch.device("meta")) is None
    assert batches.free_memory(torch.device("cpu")) != 0


def test_a_batch_that_does_not_fit_is_halved(
    model: QWenLMHeadModel, tokenizer: QWenTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers and order stay; one prompt that does not fit is an error."""
    sizes: list[int] = []
    generate, limit = type(model).generate, 2

    def cramped(self: QWenLMHeadModel, inputs: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(inputs))
        if len(inputs) > limit:
            raise torch.OutOfMemoryError("no room")
        return generate(self, inputs, **kwargs)

    options = {"progress": False, **GREEDY, "max_new_tokens": 6}
    expected = model.generate_batch(PROMPTS, tokenizer, **options)
    monkeypatch.setattr(type(model), "generate", cramped)
    assert model.generate_batch(PROMPTS, tokenizer, batch_size=5, **options) == expected
    assert sizes == [5, 2, 2, 1]
    limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        model.generate_batch(PROMPTS, tokenizer, **options)


@pytest.fixture
def bars_on() -> Iterator[None]:
    """transformers' switch for progress bars, which other code may have turned off."""
    were_on = logging.is_progress_bar_enabled()
    logging.enable_progress_bar()
    yield
    (logging.enable_progress_bar if were_on else logging.disable_progress_bar)()


def test_a_batch_finds_its_tokenizer_where_the_model_came_from(
    model: QWenLMHeadModel, tokenizer: QWenTokenizer, tmp_path: Path
) -> None:
    options = {**GREEDY, "max_new_tokens": 5}
    assert model.generate_batch(["a", "hello"], **options) == model.generate_batch(["a", "hello"], tokenizer, **options)
    made = QWenLMHeadModel(model.config)
    made.name_or_path = ""
    with pytest.raises(ValueError, match=r"got a model that was not loaded. Pass the tokenizer"):
        made.generate_batch(["a"])
    made.name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=r"must lie where the model came from, got .* without a readable one"):
        made.generate_batch(["a"])


@pytest.mark.usefixtures("bars_on")
def test_a_batch_shows_its_progress(
    model: QWenLMHeadModel, tokenizer: QWenTokenizer, capsys: pytest.CaptureFixture
) -> None:
    """On the standard error; not where it is unwanted here, or transformers' bars are switched off."""
    options = {**GREEDY, "max_new_tokens": 2}
    model.generate_batch(["a", "b", "c"], tokenizer, batch_size=2, **options)
    assert "3/3" in capsys.readouterr().err
    model.generate_batch(["a"], tokenizer, progress=False, **options)
    logging.disable_progress_bar()
    model.generate_batch(["a"], tokenizer, **options)
    assert "1/1" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"past_key_values": DynamicCache()}, "past_key_values must not be given, as each batch"),
        ({"cache": DynamicCache()}, "cache must not be given, as each batch"),
        ({"num_return_sequences": 2, "do_sample": True}, "num_return_sequences must be 1, got 2"),
        ({"chat_format": "raw"}, "chat_format must be \"chatml\", got 'raw'"),
    ],
)
def test_a_batch_refuses_what_it_cannot_do(
    model: QWenLMHeadModel, tokenizer: QWenTokenizer, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.generate_batch(["a"], tokenizer, **arguments)
    with pytest.raises(ValueError, match="prompts must not be empty, got an empty one at 1"):
        model.generate_batch(["a", []], tokenizer)


def test_a_base_model_continues_tokens(folder: Path, tokenizer: QWenTokenizer) -> None:
    """Token prompts need no chat format; an end token of theirs ends the answer."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    base.generation_config.chat_format = "raw"
    ids = torch.randint(0, VOCAB, (6,)).tolist()
    processor = LogitsProcessorList([Dictated(6, [*b"ok", tokenizer.eod_id, *b"no"])])
    options = {"progress": False, **GREEDY, "max_new_tokens": 9, "logits_processor": processor}
    assert base.generate_batch([ids, ids[:4]], tokenizer, **options) == ["ok", "ok"]
