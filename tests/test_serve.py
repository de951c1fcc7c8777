"""Does ``quantcache serve`` answer a real client: one, many at a time, one that leaves, one that asks for too much?"""

import asyncio
import inspect
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

openai = pytest.importorskip("openai", reason="needs the extra serve")
pytest.importorskip("fastapi", reason="needs the extra serve")

from transformers.cli.serving import utils  # noqa: E402

from quantcache.cli.main import app  # noqa: E402
from quantcache.serving import asked, choices, server  # noqa: E402
from tests.documentation import make_tokenizer, names, snippets  # noqa: E402
from tests.serving_load import NAME, Served, check, load, served  # noqa: E402
from tests.test_documentation import PAGES, run  # noqa: E402

TURNS = [{"role": "user", "content": "Hello!"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("served"), "--num-blocks", "64", "--max-batch-tokens", "512") as found:
        yield found
    assert found.process.returncode == 0


def chat(running: Served, client: Any = None, **options: Any) -> Any:
    """The answer, or all of a stream; of a client that is given, the stream itself."""
    asked = {"model": NAME, "messages": TURNS, "max_tokens": 8, "temperature": 0, **options}
    if client is not None:
        return client.chat.completions.create(**asked)
    with running.client() as client:
        found = client.chat.completions.create(**asked)
        return list(found) if options.get("stream") else found


def post(running: Served, body: bytes, path: str = "/chat/completions", **headers: str) -> tuple[int, Any]:
    """Status and body of the answer to exactly these bytes."""
    headers = {"content-type": "application/json", **headers}
    request = urllib.request.Request(running.url + path, data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_chat_is_answered(running: Served) -> None:
    answer = chat(running)
    assert answer.model == NAME
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8
    assert answer.usage.total_tokens == 8 + answer.usage.prompt_tokens
    assert [model.id for model in running.client().models.list()] == [NAME]


def test_a_stream_brings_what_the_whole_answer_is(running: Served) -> None:
    whole = chat(running, max_tokens=40)
    chunks = list(chat(running, max_tokens=40, stream=True))
    # Whether bytes that begin a character end the text is all that may differ.
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text.rstrip("\N{REPLACEMENT CHARACTER}") == whole.choices[0].message.content.rstrip(
        "\N{REPLACEMENT CHARACTER}"
    )
    assert len(chunks) > 10, "token by token"
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_the_other_endpoints_answer(running: Served) -> None:
    client = running.client()
    plain = client.completions.create(model=NAME, prompt="Once upon a time", max_tokens=5, temperature=0)
    assert (plain.usage.prompt_tokens, plain.usage.completion_tokens) == (16, 5)
    response = client.responses.create(model=NAME, input="Hello!", max_output_tokens=5)
    assert response.usage.output_tokens == 5
    assert isinstance(response.output_text, str)


def test_sixteen_at_once_get_what_one_gets_alone(running: Served) -> None:
    turns = [[{"role": "user", "content": f"{number}: " + "word " * number}] for number in range(16)]
    alone = [chat(running, messages=each, max_tokens=12).choices[0].message.content for each in turns]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda each: chat(running, messages=each, max_tokens=12), turns))
    assert [each.choices[0].message.content for each in found] == alone


def test_each_request_samples_as_it_asks(running: Served) -> None:
    likely = chat(running, max_tokens=30).choices[0].message.content
    assert chat(running, max_tokens=30).choices[0].message.content == likely
    assert chat(running, max_tokens=30, temperature=1.5).choices[0].message.content != likely
    assert chat(running, max_tokens=30, temperature=5.0, top_p=1e-9).choices[0].message.content == likely


def choices_of(chunks: Iterator[Any]) -> dict[int, tuple[str, str]]:
    """Text and reason of the end of each choice of a stream, whose chunks are put together."""
    texts: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for chunk in chunks:
        (choice,) = chunk.choices
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        if choice.finish_reason is not None:
            reasons[choice.index] = choice.finish_reason
    return {index: (text, reasons[index]) for index, text in texts.items()}


def words_of(text: str) -> tuple[str, str]:
    """What is before the first two readable characters of an answer that are not its first, and these."""
    found = re.search(r"(?<=.)[!-~]{2}", text, re.DOTALL)
    assert found is not None
    return text[: text.index(found[0])], found[0]


@pytest.fixture(scope="module")
def whole(running: Served) -> str:
    content: str = chat(running, max_tokens=60).choices[0].message.content
    return content


def test_an_answer_ends_before_its_stop_string(running: Served, whole: str) -> None:
    before, string = words_of(whole)
    for stop in (string, ["nowhere in it", string]):
        answer = chat(running, max_tokens=60, stop=stop)
        assert answer.choices[0].message.content == before
        assert answer.choices[0].finish_reason == "stop"
        assert 2 < answer.usage.completion_tokens < 60
        assert choices_of(chat(running, max_tokens=60, stop=stop, stream=True)) == {0: (before, "stop")}
    # With the last token that there may be, too.
    for stream in (False, True):
        last = chat(running, max_tokens=answer.usage.completion_tokens, stop=string, stream=stream)
        assert (choices_of(last)[0][1] if stream else last.choices[0].finish_reason) == "stop"
    assert chat(running, max_tokens=60, stop=["nowhere in it"]).choices[0].message.content == whole
    asked = {"model": NAME, "prompt": "Hello", "max_tokens": 60, "temperature": 0}
    with running.client() as client:
        before, string = words_of(client.completions.create(**asked).choices[0].text)
        cut = client.completions.create(**asked, stop=string)
    assert (cut.choices[0].text, cut.choices[0].finish_reason) == (before, "stop")


def test_no_part_of_a_stop_string_is_streamed(running: Served, whole: str) -> None:
    before, string = words_of(whole)
    for chunks in (1, 2):
        seen = ""
        for chunk in chat(running, max_tokens=60, stop=[string, "never"][:chunks], stream=True):
            seen += chunk.choices[0].delta.content or ""
            assert before.startswith(seen)
        assert seen == before


def test_a_stop_string_does_not_begin_in_the_prompt(running: Served, whole: str) -> None:
    """The prompt ends with a blank and what follows is the answer, unlike in generate()."""
    assert chat(running, max_tokens=60, stop=" " + whole[0]).choices[0].message.content.startswith(whole[0])


def test_several_choices_are_of_one_prompt(running: Served) -> None:
    turns = [{"role": "user", "content": "long " * 300}]
    alone = chat(running, messages=turns, max_tokens=30)
    answer = chat(running, messages=turns, max_tokens=30, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {alone.choices[0].message.content}
    assert answer.usage.prompt_tokens == alone.usage.prompt_tokens
    assert answer.usage.completion_tokens == 90
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 90
    sampled = chat(running, messages=turns, max_tokens=30, n=3, temperature=1.5)
    assert len({choice.message.content for choice in sampled.choices}) == 3
    with running.client() as client:
        plain = client.completions.create(model=NAME, prompt="Hello", max_tokens=5, n=2, temperature=1.5)
    assert [choice.index for choice in plain.choices] == [0, 1]
    assert plain.usage.completion_tokens == 10


def test_several_choices_stream_beside_each_other_and_share_blocks(running: Served, whole: str) -> None:
    before, string = words_of(whole)
    chunks, used = [], []
    turns = [{"role": "user", "content": "hello " * 250}]
    with running.client() as client:
        for chunk in chat(running, client, messages=turns, max_tokens=200, n=4, stream=True):
            chunks.append(chunk)
            if len(chunks) in (20, 100):
                used.append(client.get("/../report", cast_to=object)["blocks_used"])
    assert 23 < max(used) < 2 * 23, "the whole pages of the prompt are there once"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].usage.completion_tokens == 800
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    found = choices_of(iter(chunks))
    assert sorted(found) == [0, 1, 2, 3]
    assert {reason for _, reason in found.values()} == {"length"}
    indices = [chunk.choices[0].index for chunk in chunks]
    assert indices[40:80] != sorted(indices[40:80]), "one beside the other"
    stopped = chat(running, max_tokens=60, n=2, stop=string, stream=True)
    assert choices_of(stopped) == {0: (before, "stop"), 1: (before, "stop")}


def test_several_choices_are_refused_and_left_as_one(running: Served) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=r"must have at most .* tokens together"):
            chat(running, max_tokens=100_000, n=3, stream=stream)
    with running.client() as client, chat(running, client, max_tokens=900, n=3, stream=True) as stream:
        for _, _chunk in zip(range(5), stream, strict=False):
            pass
    with running.client(timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        chat(running, client, max_tokens=900, n=3)
    assert idle(running)["requests_running"] == 0
    status, answer = post(running, json.dumps({"messages": TURNS}).encode(), **{"x-request-id": "a__child#0"})
    assert (status, answer["error"]["message"]) == (
        400, "x-request-id must not have '__child#' in it, got 'a__child#0'."
    )  # fmt: skip


def test_many_choices_and_stop_strings_leave_no_block_behind(running: Served, whole: str) -> None:
    before, string = words_of(whole)

    def ask(index: int, client: Any) -> None:
        kind = index % 4
        if kind == 0:
            answer = chat(running, client, max_tokens=60, n=3, stop=string)
            assert [choice.message.content for choice in answer.choices] == [before] * 3
        elif kind == 1:
            answer = chat(running, client, max_tokens=1 + index, n=2, temperature=1.0)
            assert 2 <= answer.usage.completion_tokens <= 2 + 2 * index
        elif kind == 2:
            chunks = chat(running, client, max_tokens=60, n=2, stop=string, stream=True)
            assert choices_of(chunks) == dict.fromkeys((0, 1), (before, "stop"))
        else:
            with chat(running, client, max_tokens=400, n=4, temperature=1.0, stream=True) as stream:
                for _, _chunk in zip(range(index), stream, strict=False):
                    pass

    with running.client() as client, ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda index: ask(index, client), range(48)))
    report = idle(running)
    assert (report["requests_running"], report["requests_waiting"]) == (0, 0)
    assert report["tokens_free"] == report["tokens"]


def test_reasoning_and_the_answer_end_each_by_itself() -> None:
    think, call = utils.ReasoningText, utils.ToolCall("f", "{}")
    for items, shown, stopped in (
        ([think("a S"), "TOP b", None], [think("a "), think("S"), "TOP b", None], False),
        ([think("a ST"), think("OP b"), "c", None], [think("a "), None], True),
        (["a ST", call, None], ["a ", "ST", call, None], False),
        (["a S", "TOPSTOP", None], ["a ", None], True),
    ):
        queue: asyncio.Queue[Any] = asyncio.Queue()
        config = GenerationConfig(stop_strings=["STOP"], max_new_tokens=9)
        stream = choices.UpToStop(queue, config)
        for item in items:
            stream.put_nowait(item)
        found = [queue.get_nowait() for _ in range(queue.qsize())]
        assert [(type(each), each) for each in found] == [(type(each), each) for each in shown]
        assert (config.max_new_tokens is None) is stopped


def test_the_page_runs(running: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Of docs/serving.md, whose client asks the server here."""
    monkeypatch.setenv("OPENAI_BASE_URL", running.url)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    page, known = PAGES["docs/serving.md"], names()
    for snippet in snippets(page):
        run(snippet, page, known)
    assert "blocks of 64 tokens in int8" in capsys.readouterr().out


def idle(running: Served) -> dict[str, Any]:
    """The report, once no request has a block."""
    for _ in range(300):
        report = running.report()
        if not report["blocks_used"]:
            return report
        asyncio.run(asyncio.sleep(0.05))
    raise AssertionError(f"blocks must be given back, got {report}")


def test_a_request_whose_client_leaves_gives_its_blocks_back(running: Served) -> None:
    before = idle(running)
    with running.client() as client, chat(running, client, max_tokens=900, stream=True) as stream:
        for _, _chunk in zip(range(5), stream, strict=False):
            pass
        assert running.report()["blocks_used"] > 0
    with pytest.raises(openai.APITimeoutError):
        running.client(timeout=0.2).chat.completions.create(model=NAME, messages=TURNS, max_tokens=900)
    after = idle(running)
    assert (after["blocks"], after["blocks_used"]) == (before["blocks"], 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_too_long_is_refused_by_itself(running: Served, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=r"must have at most .* tokens together, got 18,0.. and 8"):
        chat(running, messages=[{"role": "user", "content": "long " * 3600}], stream=stream)
    with pytest.raises(openai.BadRequestError, match=r"must have at most .* tokens together, got .* 100,000"):
        chat(running, max_tokens=100_000, stream=stream)
    assert chat(running).usage.completion_tokens == 8


def test_an_answer_without_a_length_has_what_fits(running: Served) -> None:
    answer = chat(running, max_tokens=None, messages=[{"role": "user", "content": "long " * 800}])
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert 4018 < answer.usage.total_tokens <= 4096


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"messages": [', "the body must be a JSON object, got: Expecting value"),
        (b"\xff\xfe\x00", "There was an error parsing the body"),
        (b"[]", "the body must be a JSON object, got: Input should be a valid dictionary."),
        (b"{}", "messages must be a list of at least one object with role and content."),
        (b'{"messages": []}', "messages must be a list"),
        (b'{"messages": ["hello"]}', "messages must be a list"),
        (b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "cannot be read: KeyError: 'text'"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "the request cannot be read: TypeError"),
        (b'{"messages": [{"role": "user", "content": "a"}], "tools": 3}', "the request cannot be read: TypeError"),
    ],
)
def test_what_is_no_request_is_refused_by_itself(running: Served, body: bytes, message: str) -> None:
    status, answer = post(running, body)
    assert status == 400
    assert message in answer["error"]["message"]
    assert chat(running).usage.completion_tokens == 8


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("n", 0, "n must be a whole number from 1 to 128, got 0."),
        ("n", True, "n must be a whole number from 1 to 128, got True."),
        ("n", 129, "n must be a whole number from 1 to 128, got 129."),
        ("stop", "", "stop must be a string or up to 4 of them, none empty, got ''."),
        ("stop", ["a", ""], "stop must be a string or up to 4 of them, none empty, got ['a', '']."),
        ("stop", list("abcde"), "stop must be a string or up to 4 of them"),
        ("stop", [3], "stop must be a string or up to 4 of them, none empty, got [3]."),
        ("top_logprobs", 2, "top_logprobs is not served under continuous batching, got 2."),
        ("logprobs", True, "logprobs is not served"),
        ("logit_bias", {"5": 2}, "logit_bias is not served"),
        ("frequency_penalty", 0.5, "frequency_penalty is not served"),
        ("response_format", {"type": "json_object"}, "response_format is not served"),
        ("max_tokens", 0, "max_tokens must be a whole number from 1, got 0."),
        ("max_tokens", "two", "max_tokens must be a whole number from 1, got 'two'."),
        ("max_completion_tokens", 2.5, "max_completion_tokens must be a whole number from 1, got 2.5."),
        ("temperature", -1, "temperature must be a number from 0 to 100, got -1."),
        ("temperature", float("nan"), "temperature must be a number from 0 to 100, got nan."),
        ("top_p", 1.5, "top_p must be a number from 0 to 1, got 1.5."),
        ("model", "another", "Server is pinned to 'tiny'; requested 'another'."),
    ],
)
def test_a_field_that_is_not_served_is_refused_with_its_name(
    running: Served, field: str, value: Any, message: str
) -> None:
    status, answer = post(running, json.dumps({"messages": TURNS, "max_tokens": 2, field: value}).encode())
    assert status == 400
    assert message in answer["error"]["message"]


@pytest.mark.parametrize("field", sorted(asked.NEUTRAL))
def test_a_field_that_asks_for_nothing_is_taken(field: str) -> None:
    for value in (None, *asked.NEUTRAL[field]):
        asked.check_body({"messages": TURNS, field: value})


def test_two_requests_of_one_name_are_refused(running: Served) -> None:
    """Outputs go to requests by their names."""
    body = json.dumps({"messages": TURNS, "max_tokens": 200, "temperature": 0}).encode()
    with ThreadPoolExecutor(2) as pool:
        found = sorted(pool.map(lambda _: post(running, body, **{"x-request-id": "mine"})[0], range(2)))
    assert found == [200, 409]
    for _ in range(20):  # the name is free at once
        assert post(running, body.replace(b"200", b"2"), **{"x-request-id": "mine"})[0] == 200


def test_a_client_that_left_can_come_again_under_the_name_of_its_request(running: Served) -> None:
    """A proxy that tries again does so; what it left goes by its name, and must not take the new one along."""
    url, headers = running.url + "/chat/completions", {"content-type": "application/json", "x-request-id": "again"}
    for _ in range(5):
        body = json.dumps({"messages": TURNS, "max_tokens": 900, "temperature": 0}).encode()
        with pytest.raises(TimeoutError):
            urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers), timeout=0.3)
        body = body.replace(b"900", b"5")
        while (status := post(running, body, **{"x-request-id": "again"})[0]) == 409:
            pass
        assert status == 200


@pytest.mark.parametrize("path", ["/../reset", "/../load_model", "/audio/transcriptions", "/systemone"])
def test_what_would_change_the_model_is_not_there(running: Served, path: str) -> None:
    assert post(running, b"{}", path)[0] == 404


def test_hundreds_of_requests_leave_nothing_behind(running: Served) -> None:
    check(asyncio.run(load(running, 200, at_once=64)), 200, growth=64 << 20)


@pytest.mark.sweep
@pytest.mark.slow
def test_ten_thousand_requests_leave_nothing_behind(running: Served) -> None:
    """From the 2,000th to the 10,000th, two KB each would be 16 MB."""
    check(asyncio.run(load(running, 10_000, at_once=64)), 10_000, growth=16 << 20)


def test_wrong_options_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    for arguments, message in (
        (["--dtype", "int3"], "must be float32, bfloat16 or float16, got 'int3'"),
        (["--log-level", "loud"], "must be debug, info, warning or error, got 'loud'"),
        (["--port", "70000"], "Invalid value for '--port'"),
        (["--max-memory", "2"], "Invalid value for '--max-memory'"),
    ):
        result = CliRunner().invoke(app, ["serve", str(tmp_path), *arguments], env={"COLUMNS": "160"})
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("│", " ").split())


def test_a_port_that_is_taken_is_named_before_a_model_is_loaded(tmp_path: Path) -> None:
    with server.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", port])
    assert result.exit_code == 1
    assert f"quantcache serve: 127.0.0.1 and port {port} must be free on this machine" in result.stderr


def test_a_model_that_is_not_served_is_refused_with_its_layers(tmp_path: Path) -> None:
    config = MistralConfig(
        vocab_size=258, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=40,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["serve", str(tmp_path), "--port", "0", "--device", "cpu"])
    assert result.exit_code == 1
    assert "all layers must be full_attention, MistralForCausalLM has sliding_attention in layers 0, 1" in result.stderr


def test_the_host_is_as_it_is_taken_for() -> None:
    """What ``server`` uses of transformers' server, by the names and arguments that it uses."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter

    def has(function: Any, *names: str) -> None:
        assert set(names) <= set(inspect.signature(function).parameters), function

    has(server.build_server, "model_manager", "chat_handler", "completion_handler", "response_handler")
    has(server.build_server, "transcription_handler", "systemone_handler", "generation_state")
    has(server.TimedModel, "model", "timeout_seconds", "processor")
    has(utils.CBGenerateManager.generate_streaming, "model", "processor", "inputs", "gen_config", "request_id")
    has(utils.CBGenerateManager.generate_non_streaming, "model", "processor", "inputs", "gen_config", "request_id")
    has(utils.BaseHandler._build_generation_config, "body", "model_generation_config", "use_cb")
    has(ContinuousBatchingManager.add_request, "input_ids", "request_id", "max_new_tokens", "streaming", "eos_token_id")
    assert list(vars(OutputRouter())) == ["output_queue", "result_handlers", "_lock"]
    assert "self._queue.put_nowait(" in inspect.getsource(utils.CBStreamer.put)
    for handler in (server.ChatCompletionHandler, server.CompletionHandler):
        for answer in (handler._streaming, handler._non_streaming):
            assert list(inspect.signature(answer).parameters)[1 + 1 + choices._GEN_CONFIG] == "gen_config"
            assert "gen_config.max_new_tokens is not None and" in inspect.getsource(answer)
        assert "n" in handler._unused_fields
    state = utils.GenerationState(continuous_batching=True)
    assert (state._cb_manager, state._cb_model_id) == (None, None)
    assert server.ModelManager(device="cpu").loaded_models == {}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, {"temperature": 1.0, "top_k": 1, "top_p": 1.0}),
        ({"do_sample": True, "temperature": 0.0}, {"temperature": 1.0, "top_k": 1, "top_p": 1.0}),
        ({"do_sample": True, "temperature": 0.5, "top_k": 20}, {"temperature": 0.5, "top_k": 20, "top_p": 1.0}),
        ({"do_sample": True, "top_k": 0, "top_p": 0.9}, {"temperature": 1.0, "top_k": 100, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 500}, {"temperature": 1.0, "top_k": 100, "top_p": 1.0}),
    ],
)
def test_what_a_request_does_not_ask_for_leaves_every_token(fields: dict[str, Any], told: dict[str, Any]) -> None:
    assert asked.sampling_of(GenerationConfig(**fields), vocab_size=100) == told
