"""Do stop strings end the answers that they end in ``generate``, with the same token, and no other?"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from quantcache import serving
from tests.conftest import skip_without_gpu
from tests.serving_cases import (
    VOCAB,
    check_ledger,
    generated,
    greedy,
    llama,
    needs_known_host,
    pool,
    prompt,
    serve,
    tokenizer_of_pieces,
    top_of,
)

pytestmark = needs_known_host

if not needs_known_host.args[0]:
    from transformers import StopStringCriteria

    from quantcache.serving.stopping import Cut, StopStrings, cut

PROMPTS = [prompt(length) for length in (1, 5, 40, 63, 64, 128, 200, 300)]
STOPS = ["abbbab", "aaccac", "accbaa"]


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizer_of_pieces()


@pytest.fixture(scope="module")
def expected(model: Any, tokenizer: Any) -> list[list[int]]:
    return [generated(model, tokens, 70, stop_strings=STOPS, tokenizer=tokenizer) for tokens in PROMPTS]


def tokens_of(outputs: dict[str, Any]) -> list[list[int]]:
    assert [output.error for output in outputs.values()] == [None] * len(outputs)
    return [output.generated_tokens for output in outputs.values()]


def results(manager: Any, names: list[str]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    while not set(names) <= found.keys():
        output = manager.get_result(timeout=20)
        assert output is not None
        assert output.error is None
        if output.is_finished():
            found[output.request_id] = output.generated_tokens
    return [found[name] for name in names]


def test_answers_end_with_the_token_that_ends_them_in_generate(
    model: Any, tokenizer: Any, expected: list[list[int]]
) -> None:
    assert [len(tokens) for tokens in expected] == [70, 13, 46, 18, 52, 70, 70, 14]
    whole = {"stop_strings": STOPS, "tokenizer": tokenizer}
    assert tokens_of(serving.generate_batch(model, PROMPTS, pool(), greedy(70), **whole)) == expected
    with serve(model, pool(), greedy(70)):
        assert tokens_of(model.generate_batch(PROMPTS, **whole)) == expected
        config = greedy(70, stop_strings=STOPS)
        assert tokens_of(model.generate_batch(PROMPTS, generation_config=config)) == expected
        one = model.generate(
            torch.tensor([PROMPTS[2]]), generation_config=greedy(70), cache_implementation="paged", **whole
        )
        assert one[0, 0, len(PROMPTS[2]) :].tolist() == expected[2]
        assert len(tokens_of(model.generate_batch(PROMPTS))[0]) == 70, "a call's strings are its own"


def test_each_request_has_its_own_strings(model: Any, tokenizer: Any) -> None:
    tokens = prompt(40)
    whole = generated(model, tokens, 60)
    own = generated(model, tokens, 60, stop_strings=STOPS, tokenizer=tokenizer)
    with serving.int8_batching(model, pool(), greedy(60, stop_strings=STOPS), tokenizer=tokenizer) as manager:
        names = [
            manager.add_request(tokens, stop_strings=tokenizer.decode(whole[9:11])),
            manager.add_request(tokens, stop_strings=[tokenizer.decode(whole[:30])]),
            manager.add_request(tokens, stop_strings=[]),
            manager.add_request(tokens),
        ]
        found = results(manager, names)
        assert len(found[0]) <= 11
        assert found == [whole[: len(found[0])], whole[:30], whole, own]
        manager.stop()
        check_ledger(manager)


def test_a_string_can_begin_in_the_prompt_unless_it_must_not(model: Any, tokenizer: Any) -> None:
    tokens = prompt(40)
    string = tokenizer.decode([tokens[-1], generated(model, tokens, 1)[0]])
    expected = generated(model, tokens, 12, stop_strings=string, tokenizer=tokenizer)
    assert len(expected) == 1
    with serve(model, pool(), greedy(12)) as manager:
        call = {"stop_strings": string, "tokenizer": tokenizer}
        assert tokens_of(model.generate_batch([tokens], **call)) == [expected]
        manager.stop_strings.in_prompt = False
        assert len(tokens_of(model.generate_batch([tokens], **call))[0]) > 1


def test_a_stream_ends_with_its_string_and_others_go_on(model: Any, tokenizer: Any) -> None:
    tokens = prompt(40)
    whole, beside = (generated(model, each, 60) for each in (tokens, prompt(70)))
    with serving.int8_batching(model, pool(), greedy(60), tokenizer=tokenizer) as manager:
        other = manager.add_request(prompt(70), max_new_tokens=60, request_id="other")
        name = manager.add_request(tokens, streaming=True, stop_strings=tokenizer.decode(whole[:20]))
        seen = [output.generated_tokens for output in manager.request_id_iter(name)]
        assert [len(each) for each in seen] == list(range(1, 21))
        assert results(manager, [other]) == [beside]


def test_strings_go_with_forks_prefixes_chunks_and_what_is_started_again(
    model: Any, tokenizer: Any, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = {"stop_strings": STOPS, "tokenizer": tokenizer}
    short = generated(model, PROMPTS[2], 70, stop_strings=STOPS, tokenizer=tokenizer)
    with serve(model, pool(allow_block_sharing=True), top_of(3, 70)):
        assert tokens_of(model.generate_batch([PROMPTS[2]] * 2, **stops)) == [short] * 6
    from transformers.generation.continuous_batching.requests import RequestState

    again: list[int] = []
    original = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState,
        "create_equivalent_initial_request",
        lambda state: again.append(state.generated_len()) or original(state),  # type: ignore[func-returns-value]
    )
    with serve(model, pool(4, safety_margin=0.0), greedy(70)):
        assert tokens_of(model.generate_batch(PROMPTS, **stops)) == expected
    assert max(again) > 0, "one had a part of its answer"
    with serve(model, pool(max_batch_tokens=48, allow_block_sharing=True), greedy(70)):
        for tokens, new in zip(PROMPTS, tokens_of(model.generate_batch(PROMPTS, **stops)), strict=True):
            text = tokenizer.decode(tokens[-3:] + new)
            assert len(new) == 70 or any(string in text for string in STOPS)
            assert not any(string in tokenizer.decode(new[:-1]) for string in STOPS)


def test_a_call_beside_a_running_loop_has_its_own_strings_and_number_of_answers(model: Any, tokenizer: Any) -> None:
    tokens = prompt(40)
    expected = generated(model, tokens, 60, stop_strings=STOPS, tokenizer=tokenizer)
    with serving.int8_batching(model, pool(), top_of(1, 60), tokenizer=tokenizer) as manager:
        manager.start()
        config = top_of(2, 60)
        config.stop_strings = STOPS
        outputs = model.generate_batch([tokens], generation_config=config)
        assert tokens_of(outputs) == [expected] * 2


def test_a_request_can_have_several_answers_of_its_own(model: Any) -> None:
    tokens = prompt(150)
    with serve(model, pool(allow_block_sharing=True), top_of(1, 10)) as manager:
        name = manager.add_request(tokens, num_return_sequences=3)
        other = manager.add_request(tokens)
        found = results(manager, [name, f"{name}__child#0", f"{name}__child#1", other])
        assert [len(each) for each in found] == [10] * 4
        assert found[0] == found[1] == found[2]
        with pytest.raises(ValueError, match=r"num_return_sequences must be a whole number from 1, got 0\."):
            manager.add_request(tokens, num_return_sequences=0)
        with pytest.raises(ValueError, match="must be in no name but those of further answers, got 'a__child#0'"):
            manager.add_request(tokens, request_id="a__child#0")


def test_log_probabilities_of_the_tokens_come_where_the_config_asks_for_them(model: Any, tokenizer: Any) -> None:
    calls = {"stop_strings": STOPS, "tokenizer": tokenizer}
    with serve(model, pool(return_logprobs=True), greedy(70)):
        for tokens, output in zip(PROMPTS[1:3], model.generate_batch(PROMPTS[1:3], **calls).values(), strict=True):
            whole = tokens + output.generated_tokens
            assert len(output.logprobs) == len(output.generated_tokens) < 70
            first = output.logprobs[0]
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0, len(tokens) - 1]
    assert first == pytest.approx(float(logits.log_softmax(-1).max()), abs=1e-4)


@pytest.mark.parametrize(
    ("strings", "error", "words"),
    [
        ("", ValueError, "each of stop_strings must have a character, got ''"),
        (["a", ""], ValueError, r"must have a character, got \['a', ''\]"),
        (["a", 3], TypeError, r"stop_strings must be a string or a list of strings, got \['a', 3\]"),
        (7, TypeError, "must be a string or a list of strings, got 7"),
    ],
)
def test_what_is_no_stop_string_is_refused_and_nothing_queued(
    model: Any, tokenizer: Any, strings: Any, error: type[Exception], words: str
) -> None:
    with serve(model, pool(), greedy(5)) as manager:
        for call in (
            lambda: model.generate_batch([[3]], stop_strings=strings, tokenizer=tokenizer),
            lambda: manager.add_request([3], stop_strings=strings),
        ):
            with pytest.raises(error, match=words):
                call()
        assert len(tokens_of(model.generate_batch([[3]]))[0]) == 5


def test_strings_without_a_tokenizer_are_refused(model: Any) -> None:
    words = r"stop_strings must come with the model's tokenizer, got \['a'\] and NoneType\. Give int8_batching or"
    with pytest.raises(ValueError, match=words):
        serving.create_manager(model, pool(), greedy(stop_strings=["a"]))
    with serve(model, pool(), greedy(5)) as manager:
        with pytest.raises(ValueError, match=words):
            model.generate_batch([[3]], stop_strings=["a"])
        with pytest.raises(ValueError, match=words):
            manager.add_request([3], stop_strings=["a"])
        with pytest.raises(ValueError, match=r"with the model's tokenizer, got .* and int"):
            model.generate_batch([[3]], stop_strings=["a"], tokenizer=5)


@pytest.mark.parametrize("seed", range(20))
def test_a_string_is_found_where_transformers_finds_it(seed: int) -> None:
    tokenizer, generator = tokenizer_of_pieces(seed), torch.Generator().manual_seed(seed)
    strings = ["abab", "ca", "b", "cbabca", "é", "aé"][seed % 3 :: 3]
    criterion, ours = StopStringCriteria(tokenizer, strings), StopStrings(tokenizer)
    rows = torch.randint(1, VOCAB, (300, 9), generator=generator)
    rows[::3, -3:] = torch.randint(1, 8, rows[::3, -3:].shape, generator=generator)
    found = [ours.are_completed(strings, row[-1], reversed(row[:-1])) for row in rows.tolist()]
    assert found == criterion(rows, None).tolist()
    assert any(found)
    assert not all(found)


def test_a_token_that_the_tokenizer_does_not_know_is_in_no_string() -> None:
    ours = StopStrings(tokenizer_of_pieces())
    a = next(token for token, piece in ours.texts().items() if piece == b"a")
    assert ours.are_completed(["aa"], a, iter([a]))
    assert not ours.are_completed(["aa"], a, iter([VOCAB + 5, a]))
    assert not ours.are_completed(["aa"], VOCAB + 5, iter([a, a]))
    assert not ours.are_completed(["aa"], a, iter([]))


@pytest.mark.parametrize("strings", [["</s>"], ["ab", "cabd"], ["aab"], ["aaaa", "ba"]])
@pytest.mark.parametrize("text", ["", "</s", "x</s>y", "a<</s></s>", "cabd", "caab", "aaabaaaab", "bbbb"])
@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_a_cut_shows_nothing_of_a_string_and_all_before_it(strings: list[str], text: str, size: int) -> None:
    shown, whole = [], Cut(strings)
    for at in range(0, len(text), size):
        shown.append(whole.feed(text[at : at + size]))
        assert not any(string in "".join(shown) for string in strings)
    found = [at for string in strings if (at := text.find(string)) >= 0]
    before = "".join(shown) + whole.end()
    assert whole.is_done is bool(found)
    # What came in pieces ends at the string that was complete first, as the answer does.
    assert text.startswith(before)
    if not found:
        assert before == text
    elif size == 20:
        assert before == text[: min(found)] == cut(text, strings)
    else:
        assert any(text.startswith(string, len(before)) for string in strings)


ON_DEVICES = pytest.mark.parametrize(
    ("device", "records"),
    [("cpu", False), *(pytest.param("cuda", on, marks=[pytest.mark.cuda, skip_without_gpu]) for on in (False, True))],
)
"""On a GPU in steps that are recorded and asynchronous, and in steps that are neither."""


@ON_DEVICES
def test_an_answer_has_a_string_in_its_last_token_and_in_none_before(
    tokenizer: Any, device: str, records: bool
) -> None:
    served = llama(torch.bfloat16, head_dim=64, hidden_size=128).to(device)
    config = pool(use_cuda_graph=(False, records), max_batch_tokens=1024, max_requests_per_batch=8)
    finder, ends = StopStrings(tokenizer), []
    with serve(served, config, greedy(70)) as manager:
        assert manager.report().records is records
        assert bool(manager.continuous_batching_config.use_async_batching) is records
        new = tokens_of(served.generate_batch(PROMPTS, stop_strings=STOPS, tokenizer=tokenizer))
    for tokens, answer in zip(PROMPTS, new, strict=True):
        whole = tokens + answer
        found = [finder.are_completed(STOPS, whole[at], reversed(whole[:at])) for at in range(len(tokens), len(whole))]
        assert not any(found[:-1])
        assert found[-1] or len(answer) == 70
        ends.append(len(answer))
    assert min(ends) < 70, "one of them ended before"


@ON_DEVICES
def test_cancelled_requests_leave_the_others_going_on(device: str, records: bool) -> None:
    """Also those whose page is filled by the very step."""
    served = llama(torch.bfloat16, head_dim=64, hidden_size=128).to(device)
    config = pool(200, use_cuda_graph=(False, records), max_requests_per_batch=16, allow_block_sharing=True)
    with serve(served, config, greedy(100)) as manager:
        names = [manager.add_request(prompt(40 + at, seed=at), request_id=f"{at}", streaming=True) for at in range(12)]
        left, seen = set(names), dict.fromkeys(names, 0)
        while left:
            output = manager.get_result(timeout=20)
            assert output is not None
            assert output.error is None
            name = output.request_id
            seen[name] = len(output.generated_tokens)
            if output.is_finished():
                left.discard(name)
            elif int(name) % 3 and seen[name] == 2 * int(name):
                manager.cancel_request(name)
                left.discard(name)
        assert manager.is_running()
        assert [seen[name] for name in names[::3]] == [100] * 4
        manager.stop()
        while manager.get_result(timeout=0) is not None:
            pass


@pytest.fixture
def stepped(model: Any) -> Iterator[Any]:
    """A manager whose steps are those of the test."""
    with serving.int8_batching(model, pool(allow_block_sharing=True), greedy(70)) as manager:
        yield manager


def test_a_request_that_is_cancelled_in_an_asynchronous_batch_is_left_out(stepped: Any) -> None:
    """Its blocks went before the batch was over that closes its page, of which transformers then asks."""
    processor = stepped.batch_processor
    stepped.start = lambda: None
    name = stepped.add_request(prompt(64))
    assert processor.prepare_next_batch()
    stepped._generation_step()
    processor.scheduler.set_request_cancellation(name)
    assert [each.request_id for each in processor.scheduler.clear_cancelled_requests()] == [name]
    processor.use_async_batching = True
    try:
        processor.update_batch()
    finally:
        processor.use_async_batching = False
    assert not processor.has_pending_requests()
    check_ledger(stepped)
