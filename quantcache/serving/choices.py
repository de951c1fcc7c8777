"""Several choices, and text up to a stop string, of handlers of transformers that give one choice and all its text."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from copy import copy
from typing import Any, Final

from fastapi.responses import JSONResponse, StreamingResponse
from transformers import GenerationConfig

from quantcache.serving import _host, stopping

_GEN_CONFIG: Final = 4
"""The place of the generation config in the arguments of a handler's answer."""


class Choices:
    """Before a handler of transformers, whose answers have one choice: as many as a request asks for, of one prompt."""

    def _streaming(self, request_id: str, *args: Any, **kwargs: Any) -> StreamingResponse:
        one, names, calls = super()._streaming, *_calls(request_id, args)  # type: ignore[misc]
        if len(names) == 1:
            whole: StreamingResponse = one(request_id, *args, **kwargs)
            return whole
        streams = [one(name, *call, **kwargs).body_iterator for name, call in zip(names, calls, strict=True)]
        return StreamingResponse(_merged(request_id, streams), media_type="text/event-stream")

    async def _non_streaming(self, request_id: str, *args: Any, **kwargs: Any) -> JSONResponse:
        one, names, calls = super()._non_streaming, *_calls(request_id, args)  # type: ignore[misc]
        tasks = [asyncio.ensure_future(one(name, *call, **kwargs)) for name, call in zip(names, calls, strict=True)]
        try:
            answers = [json.loads(each.body) for each in await asyncio.gather(*tasks)]
        finally:
            for task in tasks:
                task.cancel()
        whole = answers[0]
        whole["choices"] = [{**each["choices"][0], "index": index} for index, each in enumerate(answers)]
        whole["usage"] = _sum(each["usage"] for each in answers)
        for choice in whole["choices"]:
            message = choice.get("message", {})
            for field in {"content", "reasoning_content"} & message.keys():  # what a template made of the tokens
                message[field] = stopping.cut(message[field], args[_GEN_CONFIG].stop_strings)
        return JSONResponse(whole)


def _calls(request_id: str, args: tuple[Any, ...]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Names of the answers to a request, its own first, and the arguments of each, with its own generation config."""
    gen_config = args[_GEN_CONFIG]
    names = _host.names_of_answers(request_id, gen_config.num_return_sequences)[::-1]
    return names, [(*args[:_GEN_CONFIG], copy(gen_config), *args[_GEN_CONFIG + 1 :]) for _ in names]


def _sum(usages: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """The usage of several answers to one prompt."""
    each = list(usages)
    prompt, new = each[0]["prompt_tokens"], sum(usage["completion_tokens"] for usage in each)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}


async def _merged(request_id: str, streams: list[AsyncIterator[str]]) -> AsyncIterator[str]:
    """The events of several streams of one choice each, as they come; the last has the usage of all."""
    events: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()

    async def follow(index: int, stream: AsyncIterator[str]) -> None:
        try:
            async for text in stream:
                for event in text.split("\n\n")[:-1]:
                    events.put_nowait((index, event))
        finally:
            events.put_nowait(None)

    tasks = [asyncio.ensure_future(follow(*each)) for each in enumerate(streams)]
    usages: list[dict[str, int]] = []
    try:
        at_work = len(tasks)
        while at_work:
            if (found := await events.get()) is None:
                at_work -= 1
                continue
            index, event = found
            if not event.startswith('data: {"error"'):
                chunk = json.loads(event.removeprefix("data: "))
                chunk["id"], chunk["choices"][0]["index"] = request_id, index
                if usage := chunk.pop("usage", None):
                    usages.append(usage)
                    if len(usages) == len(streams):
                        chunk["usage"] = _sum(usages)
                event = f"data: {json.dumps(chunk)}"
            yield f"{event}\n\n"
        await asyncio.gather(*tasks)  # what went wrong in one
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class UpToStop:
    """Before the queue of a stream: its text up to a stop string, reasoning and the answer each by itself."""

    def __init__(self, queue: "asyncio.Queue[Any]", gen_config: GenerationConfig) -> None:
        self._queue, self._gen_config = queue, gen_config
        self._kind: type[str] = str
        self._cut = stopping.Cut(gen_config.stop_strings)

    def put_nowait(self, item: Any) -> None:
        """Take what the stream brings: text, a call of a tool, an error or None for the end."""
        if not isinstance(item, str):
            self._put(self._cut.end())
            self._queue.put_nowait(item)
        elif not self._cut.is_done:
            if type(item) is not self._kind:
                self._put(self._cut.end())
                self._kind = type(item)
            self._put(self._cut.feed(item))
            if self._cut.is_done:
                self._gen_config.max_new_tokens = None  # by which transformers tells an answer that was too long

    def _put(self, text: str) -> None:
        if text:
            self._queue.put_nowait(self._kind(text))
