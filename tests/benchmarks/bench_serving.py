"""Requests under continuous batching over int8 blocks, and the same with what else transformers offers.

    PYTHONPATH=. python tests/benchmarks/bench_serving.py [--jobs even mixed] [--size tiny|full] [--share S]

Jobs: "even", 64 prompts of 2,048 tokens with 128 new ones each; "mixed", 256 requests of 100 to 8,000 tokens, of which
the first 1,000 are those of all, with 16 to 512 new ones each. Weights are random, in Qwen2.5-7B's geometry on a GPU,
and no answer ends before its number of new tokens.

- "int8 blocks": the manager of ``serving.int8_batching``. A few requests run first, which builds kernels.
- "stock": transformers' manager, as in ``model.generate_batch``, with flash-attn where it can be imported and sdpa
  else. It is slow: of the even job it generates the first ``--stock-tokens`` of every answer, all prompts at the same
  time, and ``whole_job_seconds`` adds the rest at the pace of those steps. It leaves out the mixed job.
- "generate()": left-padded batches with ``QuantizedInt8Cache``, sorted by length, the largest that fit.

``--share`` takes that part of a job's requests for all of them, where time is short. Checked are the number of tokens
of every answer, and first tokens: those of "int8 blocks" must be those of "generate()" for most requests (with random
weights in bfloat16 the best two tokens are often as good as equal). Jobs of the file that are not run again are kept.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel

from quantcache import QuantizedInt8Cache, serving
from quantcache.layers._host import cache_argument
from quantcache.planning import Geometry
from quantcache.planning.serving import EXACT_BLOCK_TOKENS, blocks
from quantcache.quantization.scheme import PAGE_SIZE
from tests.benchmarks import report
from tests.benchmarks.bench_generate import DEVICE, GEOMETRIES, ON_GPU, SPOKEN, Peak, random_model
from tests.benchmarks.turns import now

Row = dict[str, Any]
Kind = Callable[[PreTrainedModel, ContinuousBatchingConfig, GenerationConfig], AbstractContextManager[Any]]
Left = Callable[[], bool]

MIN_FIRST_TOKENS_ALIKE = 0.5
"""Of requests; tokens of another context are alike for 1 in ``SPOKEN``."""


@dataclass(frozen=True)
class Sizes:
    """Of both jobs.

    Attributes:
        requests: of the even job, and tokens of a prompt and an answer.
        mixed: requests of the mixed job.
        prompts: fewest and most tokens of its prompts.
        answers: fewest and most of its answers.
        prefix: tokens that its prompts have in common.
    """

    requests: tuple[int, int, int]
    mixed: int
    prompts: tuple[int, int]
    answers: tuple[int, int]
    prefix: int


SIZES = {
    "tiny": Sizes((4, 150, 8), 6, (20, 300), (2, 12), 100),
    "cpu": Sizes((8, 512, 32), 16, (50, 1000), (8, 64), 200),
    "gpu": Sizes((64, 2048, 128), 256, (100, 8000), (16, 512), 1000),
}


@dataclass(frozen=True)
class Job:
    """Prompts, and how many tokens each is continued by."""

    says: str
    prompts: list[list[int]]
    new_tokens: list[int]

    def part(self, share: float) -> "Job":
        """Every so many-th request."""
        step = max(1, round(1 / share))
        return Job(self.says, self.prompts[::step], self.new_tokens[::step])


def job(name: str, sizes: Sizes) -> Job:
    generator = torch.Generator().manual_seed(1)

    def whole(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    def ids(count: int) -> list[int]:
        found: list[int] = torch.randint(1, SPOKEN, (count,), generator=generator).tolist()
        return found

    if name == "even":
        count, prompt, new_tokens = sizes.requests
        return Job(
            f"{count} prompts of {prompt:,} tokens, {new_tokens} new each",
            [ids(prompt) for _ in range(count)],
            [new_tokens] * count,
        )
    prefix = ids(sizes.prefix)
    lengths = [whole(*sizes.prompts) for _ in range(sizes.mixed)]
    prompts = [(prefix + ids(max(0, length - len(prefix))))[:length] for length in lengths]
    says = (
        f"{sizes.mixed} prompts of {sizes.prompts[0]:,} to {sizes.prompts[1]:,} tokens, {sizes.prefix:,} of them "
        f"shared, {sizes.answers[0]} to {sizes.answers[1]} new each"
    )
    return Job(says, prompts, [whole(*sizes.answers) for _ in lengths])


@dataclass
class Ran:
    """What became of a job.

    Attributes:
        seconds: of the call.
        answers: new tokens of each request.
        peak: bytes above what was there before, None where that is not known.
        notes: about how it ran.
    """

    seconds: float
    answers: list[list[int]]
    peak: int | None
    notes: Row


def generation(new_tokens: int, no_end: int | None) -> GenerationConfig:
    """Of answers that take the likeliest tokens; ``no_end`` is what stands for none that ends them."""
    return GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=no_end, pad_token_id=0)


@contextmanager
def stock(model: PreTrainedModel, config: ContinuousBatchingConfig, options: GenerationConfig) -> Iterator[Any]:
    """Transformers' own manager, as ``generate_batch`` makes it."""
    with model.continuous_batching_context_manager(options, continuous_batching_config=config, warmup=True) as manager:
        yield manager


@contextmanager
def int8(model: PreTrainedModel, config: ContinuousBatchingConfig, options: GenerationConfig) -> Iterator[Any]:
    """The same over int8 blocks."""
    with serving.int8_batching(model, continuous_batching_config=config, generation_config=options) as manager:
        manager.warmup()
        manager.start()
        yield manager


def batched(model: PreTrainedModel, work: Job, num_blocks: int | None, kind: Kind) -> Ran:
    """A job under continuous batching: the manager is made and warmed up, then every request is added, and time runs
    from the first of them to the last answer.

    Raises:
        WrongResultError: a request fails, or the manager stops.
    """
    peak = Peak()
    page_size = PAGE_SIZE if kind is int8 else EXACT_BLOCK_TOKENS
    config = ContinuousBatchingConfig(page_size=page_size, num_blocks=num_blocks)
    found: dict[str, Any] = {}
    with kind(model, config, generation(max(work.new_tokens), -1)) as manager:
        start = now()
        names = [
            manager.add_request(prompt, max_new_tokens=count, record_timestamps=True)
            for prompt, count in zip(work.prompts, work.new_tokens, strict=True)
        ]
        while len(found) < len(names):
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = result
            elif result is None and not manager.is_running():
                raise WrongResultError("bench_serving: the manager must answer every request, got a stop before.")
        seconds = now() - start
        report = asdict(manager.report()) if kind is int8 else None
    if errors := {result.error for result in found.values() if result.error}:
        raise WrongResultError(f"bench_serving: no request may fail, got {sorted(errors)}.")
    firsts, lasts = zip(*((found[name].timestamps[0], found[name].timestamps[-1]) for name in names), strict=True)
    notes: Row = {
        "attention": str(model.config._attn_implementation) if kind is stock else "int8",
        "first_token_seconds": round(statistics.median(firsts) - min(found[name].created_time for name in names), 4),
        # Of an even job, whose answers end together.
        "decode_seconds": round(max(lasts) - max(firsts), 4),
    }
    if report is not None:
        notes["report"] = report
    return Ran(seconds, [list(found[name].generated_tokens) for name in names], peak.nbytes(), notes)


def padded(model: PreTrainedModel, work: Job) -> Ran:
    """A job as left-padded batches of ``generate()`` with the int8 cache, of requests of about the same length."""
    order = sorted(range(len(work.prompts)), key=lambda index: len(work.prompts[index]))
    size = len(order)
    while True:
        try:
            return _in_batches(model, work, [order[i : i + size] for i in range(0, len(order), size)])
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            size = -(-size // 2)
        gc.collect()
        torch.cuda.empty_cache()


@torch.no_grad()
def _in_batches(model: PreTrainedModel, work: Job, batches: list[list[int]]) -> Ran:
    answers: list[list[int]] = [[] for _ in work.prompts]
    peak, start = Peak(), now()
    for rows in batches:
        longest = max(len(work.prompts[index]) for index in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(rows):
            prompt = work.prompts[index]
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        output = model.generate(
            ids.to(DEVICE), attention_mask=mask.to(DEVICE), **cache_argument(QuantizedInt8Cache(model.config)),
            generation_config=generation(max(work.new_tokens[index] for index in rows), None),
        )  # fmt: skip
        for row, index in enumerate(rows):
            answers[index] = output[row, longest : longest + work.new_tokens[index]].tolist()
    return Ran(now() - start, answers, peak.nbytes(), {"batches": [len(rows) for rows in batches]})


class WrongResultError(RuntimeError):
    """An answer is not right, so that its time means nothing."""


def row_of(work: Job, ran: Ran) -> Row:
    """What one way of doing a job took.

    Raises:
        WrongResultError: an answer has another number of tokens than asked for.
    """
    for index, (answer, count) in enumerate(zip(ran.answers, work.new_tokens, strict=True)):
        if len(answer) != count:
            raise WrongResultError(f"bench_serving: request {index} must have {count} new tokens, got {len(answer)}.")
    new_tokens = sum(work.new_tokens)
    return {
        "seconds": round(ran.seconds, 4),
        "requests": len(work.prompts),
        "new_tokens": new_tokens,
        "new_tokens_per_second": round(new_tokens / ran.seconds, 2),
        "peak_gib": None if ran.peak is None else round(ran.peak / 2**30, 4),
        **ran.notes,
    }


def memory(model: PreTrainedModel, work: Job) -> Row:
    """Bytes of all requests at their ends, in blocks, without shared prefixes; and blocks that hold them in 16 bits."""
    geometry = Geometry.from_config({**model.config.to_dict(), "dtype": str(model.dtype).removeprefix("torch.")})
    ends = [len(prompt) + count - 1 for prompt, count in zip(work.prompts, work.new_tokens, strict=True)]
    found: Row = {}
    for kind in ("bf16", "int8"):
        each = blocks(geometry, kind)
        found[kind] = sum(each.most_of_request(end) for end in ends) * each.nbytes
    return {"blocks_gib": {kind: round(nbytes / 2**30, 4) for kind, nbytes in found.items()}, "tokens": sum(ends)}


def measure(name: str, sizes: Sizes, model: PreTrainedModel, options: argparse.Namespace, left: Left) -> Row:
    """A job, done in every way that there is time for."""
    whole = job(name, sizes)
    work = whole.part(options.share)
    found: Row = {"name": name, "job": whole.says, "share": len(work.prompts) / len(whole.prompts), "ways": {}}
    found |= memory(model, work)
    # A pool with room for all of it in 16 bits, and for each in the last of its blocks.
    tokens = found["tokens"] + EXACT_BLOCK_TOKENS * len(work.prompts)
    batched(model, Job("", work.prompts[:2], [2, 2]), -(-tokens // PAGE_SIZE), int8)
    ran = {"int8 blocks": batched(model, work, -(-tokens // PAGE_SIZE), int8)}
    found["ways"]["int8 blocks"] = row_of(work, ran["int8 blocks"])
    if left():
        ran["generate()"] = padded(model, work)
        found["ways"]["generate()"] = row_of(work, ran["generate()"])
        firsts = [[answer[0] for answer in each.answers] for each in ran.values()]
        alike = sum(a == b for a, b in zip(*firsts, strict=True)) / len(work.prompts)
        if alike < MIN_FIRST_TOKENS_ALIKE:
            raise WrongResultError(
                f"bench_serving: {name}: first tokens must be alike for {MIN_FIRST_TOKENS_ALIKE} of the requests, "
                f"got {alike}."
            )
        found["first_tokens_alike"] = round(alike, 3)
    if left() and name == "even":
        first_ones = [min(options.stock_tokens, count) for count in work.new_tokens]
        begun = Job(work.says, work.prompts, first_ones)
        row = row_of(begun, batched(model, begun, -(-tokens // EXACT_BLOCK_TOKENS), stock))
        step = row["decode_seconds"] / max(1, first_ones[0] - 1)
        row["whole_job_seconds"] = round(row["seconds"] + step * (work.new_tokens[0] - first_ones[0]), 4)
        row["whole_job_tokens_per_second"] = round(sum(work.new_tokens) / row["whole_job_seconds"], 2)
        found["ways"]["stock"] = row
    ours = found["ways"]["int8 blocks"]["seconds"]
    found["times_as_fast_as"] = {
        other: round(row.get("whole_job_seconds", row["seconds"]) / ours, 3)
        for other, row in found["ways"].items()
        if other != "int8 blocks"
    }
    return found


def merged(out: Path, rows: list[Row]) -> Row:
    """The file's content: ``rows``, and those of an earlier run that were not measured again."""
    old = json.loads(out.read_text())["jobs"] if out.exists() else []
    new = {row["name"] for row in rows}
    jobs = [*(row for row in old if row["name"] not in new), *rows]
    return {
        "command": "PYTHONPATH=. python tests/benchmarks/bench_serving.py",
        **report.surroundings(ON_GPU),
        "jobs": sorted(jobs, key=lambda row: str(row["name"])),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the jobs that the command line names, or ``arguments``; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="*", default=["even", "mixed"], choices=("even", "mixed"))
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--share", type=float, default=1.0, help="of the requests of a job")
    parser.add_argument("--stock-tokens", type=int, default=16, help="of each answer that the stock batching generates")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which nothing is begun")
    parser.add_argument("--out", default=f"docs/benchmarks/serving-{'gpu' if ON_GPU else 'cpu'}.json")
    options = parser.parse_args(arguments)
    start, out = time.monotonic(), Path(options.out)
    size = "tiny" if options.size == "tiny" else DEVICE.type.replace("cuda", "gpu")
    geometry = {"tiny": "tiny", "cpu": "SmolLM2-135M", "gpu": "7B"}[size]
    model = random_model(GEOMETRIES[geometry], None)
    rows: list[Row] = []
    failed = False
    for name in options.jobs:
        if time.monotonic() - start > options.budget:
            print(f"{name}: not run, the budget is spent", file=sys.stderr)
            continue
        try:
            row = measure(name, SIZES[size], model, options, lambda: time.monotonic() - start < options.budget)
        except (WrongResultError, torch.OutOfMemoryError) as reason:
            print(f"{name}: {reason}", file=sys.stderr)
            failed = True
            continue
        row |= {"model": f"{geometry} geometry, random weights", "size": size, "flash_attn": flash_attn()}
        rows.append(row | {"load_average": round(os.getloadavg()[0], 2)} | report.surroundings(ON_GPU))
        print(json.dumps(rows[-1]), flush=True)
        report.write(merged(out, rows), out)
    return int(failed)


def flash_attn() -> str | None:
    """The version of flash-attn, None where there is none."""
    return importlib.metadata.version("flash-attn") if find_spec("flash_attn") else None


if __name__ == "__main__":
    sys.exit(main())
