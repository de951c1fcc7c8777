"""Many short requests to a running server, some cancelled, some malformed: what became of each, and what is left.

    PYTHONPATH=. python -m tests.serving_load [--requests 10000] [--at-once 64] [--json FILE]

starts ``quantcache serve`` on the loopback with a tiny random model, sends the requests and ends it. It fails where one
is not answered or gets another answer than alone, where one that must be refused is answered, where a block, a thread
or a file is lost, or where memory grows. ``docs/benchmarks/serving-load.json`` is what it wrote.
"""

import argparse
import asyncio
import collections
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai

from tests.benchmarks.bench_cpu_attention import processor
from tests.documentation import make_model, make_tokenizer
from tests.processes import ROOT

PATIENCE = 120.0
"""Seconds after which a request counts as not answered, and a server as one that does not start or end."""

NAME = "tiny"


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        url: of its API.
        process: that serves.
        folder: of its model.
    """

    url: str
    process: "subprocess.Popen[str]"
    folder: Path

    def client(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, **{"timeout": PATIENCE, **options})

    def report(self) -> dict[str, Any]:
        """What the server says of its blocks."""
        with self.client() as client:
            found: dict[str, Any] = client.get("/../report", cast_to=object)  # type: ignore[assignment]
        return found

    def resident_nbytes(self) -> int:
        """Memory of the server's process that is no file's."""
        return self._status("RssAnon") << 10

    def threads(self) -> int:
        """Of the server's process."""
        return self._status("Threads")

    def files(self) -> int:
        """Files and connections that the server's process has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Served]:
    """``quantcache serve`` of a tiny model in ``folder``, on a free port of the loopback; ended like a user does it."""
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    command = [sys.executable, "-c", "from quantcache.cli.main import app; app()", "serve", str(folder)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with (folder / "server.log").open("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", "0", "--name", NAME, "--device", "cpu", *options],
            stderr=log, stdout=log, text=True, env={**environment, "OMP_NUM_THREADS": "1"}, cwd=folder,
        )  # fmt: skip
        try:
            yield Served(_url(process, folder / "server.log"), process, folder)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(PATIENCE)
            finally:
                process.kill()


def _url(process: "subprocess.Popen[str]", log: Path) -> str:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        if (found := re.search(r"http://127\.0\.0\.1:\d+/v1", log.read_text())) is not None:
            return found[0]
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")


KINDS = (
    *("chat", "stream", "chat", "completion", "chat", "stream", "sampled", "chat", "stream", "prefix"),
    *(
        "not JSON",
        "chat",
        "refused field",
        "stream",
        "too long",
        "cancelled stream",
        "prefix",
        "known",
        "gone",
        "stream",
    ),
)
"""What the requests are, one after another and over again."""

PREFIX = "A prompt that many users have at the beginning, of more than one page of tokens each of which is a byte. "


KNOWN = 12
"""Tokens of an answer that is compared with the same request's, alone."""


async def send(client: openai.AsyncOpenAI, index: int, known: str) -> str:
    """Send one request; what became of it.

    Args:
        client: of the server.
        index: which request, of ``KINDS`` in turn.
        known: what the server answered, alone, where the kind is "known".

    Raises:
        AssertionError: something else than what must.
    """
    kind = KINDS[index % len(KINDS)]
    new_tokens = KNOWN if kind == "known" else 1 + index % 16
    asked = "What is known?" if kind == "known" else f"{PREFIX if kind == 'prefix' else ''}Request {index}."
    turns = [{"role": "user", "content": asked}]
    chat: dict[str, Any] = {"model": NAME, "messages": turns, "max_tokens": new_tokens, "temperature": 0}
    try:
        if kind == "not JSON":
            await client.post("/chat/completions", content=b'{"messages": [', cast_to=object)
        elif kind == "stream":
            return await _stream(client, chat)
        elif kind == "cancelled stream":
            return await _leave(client, {**chat, "max_tokens": 300})
        elif kind == "gone":
            await client.with_options(timeout=0.05).chat.completions.create(**{**chat, "max_tokens": 300})
        elif kind == "completion":
            done = await client.completions.create(model=NAME, prompt=f"Request {index}.", max_tokens=new_tokens)
            assert done.usage is not None
            assert 1 <= done.usage.completion_tokens <= new_tokens
        else:
            wrong = {
                "refused field": {"logprobs": True},
                "too long": {"max_tokens": 10**6},
                "sampled": {"temperature": 1.0},
            }
            answer = await client.chat.completions.create(**{**chat, **wrong.get(kind, {})})
            assert answer.usage is not None
            assert 1 <= answer.usage.completion_tokens <= new_tokens
            assert answer.choices[0].finish_reason == (
                "length" if answer.usage.completion_tokens == new_tokens else "stop"
            )
            assert kind != "known" or answer.choices[0].message.content == known
    except openai.BadRequestError:
        assert kind in ("not JSON", "refused field", "too long"), kind
        return "refused"
    except openai.APITimeoutError:
        assert kind == "gone", f"{kind}: no answer in {PATIENCE} s"
        return "cancelled"
    assert kind not in ("not JSON", "refused field", "too long"), f"{kind}: answered"
    return "answered"


async def _stream(client: openai.AsyncOpenAI, chat: dict[str, Any]) -> str:
    chunks = [chunk async for chunk in await client.chat.completions.create(**chat, stream=True)]
    assert chunks[-1].choices[0].finish_reason in ("length", "stop")
    assert chunks[-1].usage.completion_tokens <= chat["max_tokens"]
    return "answered"


async def _leave(client: openai.AsyncOpenAI, chat: dict[str, Any]) -> str:
    stream = await client.chat.completions.create(**chat, stream=True)
    seen = 0
    async for _ in stream:
        seen += 1
        if seen == 3:
            break
    await stream.close()
    return "cancelled" if seen == 3 else "answered"


async def load(served: Served, requests: int, at_once: int) -> dict[str, Any]:
    """Send ``requests``, ``at_once`` of them at a time, and wait until the server is idle.

    Returns:
        how many were answered, refused and cancelled; the server's memory after each tenth of them; its threads and
        open files before and after; and its report at the end.
    """
    turns: Any = [{"role": "user", "content": "What is known?"}]
    with served.client() as one:
        alone = one.chat.completions.create(model=NAME, messages=turns, max_tokens=KNOWN, temperature=0)
    known = alone.choices[0].message.content or ""
    became: collections.Counter[str] = collections.Counter()
    marks = {requests * tenth // 10 for tenth in range(1, 10)}
    before, memory = {"threads": served.threads(), "files": served.files()}, []
    indices = iter(range(requests))
    # A client whose connection was cut closes it; the others go on in theirs.
    async with openai.AsyncOpenAI(base_url=served.url, api_key="none", max_retries=0, timeout=PATIENCE) as client:

        async def work() -> None:
            for index in indices:
                became[await send(client, index, known)] += 1
                if index in marks:
                    memory.append(served.resident_nbytes())

        await asyncio.gather(*(work() for _ in range(at_once)))
    end = time.monotonic() + PATIENCE
    while (report := served.report())["blocks_used"] and time.monotonic() < end:
        await asyncio.sleep(0.1)
    memory.append(served.resident_nbytes())
    after = {"threads": served.threads(), "files": served.files()}
    return {**became, "memory": memory, "before": before, "after": after, "report": report}


ROOM = 16
"""Threads and files that a server may have more at the end: threads that have answered for its report, and connections
whose client has left, end in a while."""


def check(found: dict[str, Any], requests: int, growth: int) -> None:
    """Whether each request was answered, refused or cancelled as it must, and nothing was left behind.

    Args:
        found: of ``load``.
        requests: how many were sent.
        growth: bytes that the server may have more at the end than after a fifth of the requests.

    Raises:
        AssertionError: it was not.
    """
    kinds = [KINDS[index % len(KINDS)] for index in range(requests)]
    refused = sum(kind in ("not JSON", "refused field", "too long") for kind in kinds)
    left = sum(kind in ("cancelled stream", "gone") for kind in kinds)
    assert found["refused"] == refused
    assert 0 < found.get("cancelled", 0) <= left
    assert found["answered"] == requests - refused - found["cancelled"]
    report = found["report"]
    assert report["blocks_used"] == 0, "a block is lost"
    assert report["tokens_free"] == report["tokens"]
    assert report["requests_running"] == report["requests_waiting"] == 0
    for name, count in found["after"].items():
        assert count <= found["before"][name] + ROOM, f"{name} are lost"
    assert found["memory"][-1] - found["memory"][1] <= growth


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, served(Path(folder), "--num-blocks", "64") as server:
        found = asyncio.run(load(server, options.requests, options.at_once))
    print(f"{time.monotonic() - start:.0f} s")
    names = ("torch", "transformers", "openai", "fastapi", "uvicorn")
    made = {
        "command": " ".join(["PYTHONPATH=. python -m tests.serving_load", *sys.argv[1:]]),
        "hardware": {"processor": processor(), "cores": os.cpu_count()},
        "versions": {name: importlib.metadata.version(name) for name in names},
        "requests": options.requests,
        "at_once": options.at_once,
        **found,
    }
    print(json.dumps(made, indent=1))
    if options.json is not None:
        options.json.write_text(json.dumps(made, indent=1) + "\n")
    check(found, options.requests, growth=16 << 20)
    return 0


if __name__ == "__main__":
    sys.exit(main())
