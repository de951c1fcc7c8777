"""Compiled decoding with the int8 cache of fixed capacity against transformers' ``StaticCache``, in one run.

    PYTHONPATH=. python tests/benchmarks/bench_compiled.py [--rows WORD ...] [--out FILE]
    PYTHONPATH=. python tests/benchmarks/bench_compiled.py --rows variants --out docs/benchmarks/compiled-variants.json

``generate()`` itself runs, with random bf16 weights, behind random states already in the cache. Times are the GPU's
from one token to the next, medians of the steady state, within ``generate()`` ("ms") and of the compiled step called in
a row by itself ("step_ms"); a profile of the same steps says where they go. Memory is what torch has allocated and
reserved at its peak.

The row "variants" is int8 alone: other ways to compile and to loop, what each takes until its first replayed token, at
first and in a later call, and what it takes per token.
"""

import argparse
import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CompileConfig,
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)
from transformers.generation import utils as generation

from quantcache import QuantizedInt8Cache
from quantcache.layers._host import cache_argument
from tests.benchmarks import report

Row = dict[str, Any]

GEOMETRIES = {
    # https://huggingface.co/Qwen/Qwen-7B and https://huggingface.co/Qwen/Qwen2.5-7B, config.json
    "Qwen-7B": {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "Qwen2.5-7B": {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4,
    },
    "tiny": {
        "vocab_size": 97, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip

ROWS = {  # geometry, batch, tokens, capacity, target: ms a token, or times as fast as StaticCache
    "b1": ("Qwen-7B", 1, 1024, 1152, {"ms": 6.3}),
    "b32": ("Qwen-7B", 32, 4096, 4224, {"ms": 14.5}),
    "half": ("Qwen-7B", 32, 4096, 8192, {"of b32": 1.10}),
    "gqa": ("Qwen2.5-7B", 32, 8192, 8320, {"ms": 9.0}),
    "long": ("Qwen2.5-7B", 1, 131072, 131200, {"ratio": 1.4}),
    "tiny": ("tiny", 2, 200, 320, {}),
}

LENGTHS = [1024, 8192, 32768, 131072]
"""Tokens of the row "long" that each cache is read behind, compiled ones without another compilation."""

EAGER = ("DynamicCache eager", "DynamicCache eager, no cuDNN", "int8 eager")
"""Growing caches of that row. cuDNN's attention, which torch may take, builds a plan for every new length
(https://github.com/pytorch/pytorch/pull/155958)."""

BEST_STOCK = "DynamicCache eager, no cuDNN"
"""What a user would take in place of int8 where ``StaticCache`` is slow; measured beside every row."""

WARM_UP, STEPS, PROFILED = 8, 40, 8

ROUNDS = {"b1": 2}
"""Times that a row's caches are measured in turn, each compiled anew, where the host's time decides: it drifts within a
process by more than the caches differ. Their means count."""

VARIANTS: dict[str, dict[str, Any]] = {  # options of CompileConfig; the second default finds its kernels on disk
    "default": {},
    "backend cudagraphs": {"backend": "cudagraphs", "mode": None},
    "backend cudagraphs, inputs may change": {"backend": "cudagraphs", "mode": None},
    "default, in a later process": {},
    "fullgraph": {"fullgraph": True},
    "dynamic=False": {"dynamic": False},
}
"""Ways to compile. ``generate()`` has mode "reduce-overhead" of torch's inductor as its default."""

INPUTS_MAY_CHANGE = {"cudagraph_backend_support_input_mutation": True, "cudagraph_backend_keep_input_mutation": True}
"""Settings of torch, without which its backend cudagraphs records no step that writes into a cache."""

REPLAYED = 4
"""The token whose step is the first that replays a graph: the first is the prompt's, one compiles, one records."""


class Clock(LogitsProcessor):
    """Notes when each token's logits are there."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []
        self.skipped = WARM_UP

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)
        return scores

    def median_ms(self) -> float:
        torch.cuda.synchronize()
        steps = [a.elapsed_time(b) for a, b in zip(self.events, self.events[1:], strict=False)]
        return round(statistics.median(steps[self.skipped :]), 3)


def make_model(geometry: str) -> Any:
    config = Qwen2Config(
        **GEOMETRIES[geometry], max_position_embeddings=262144, dtype=torch.bfloat16, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Qwen2ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.pad_token_id = 0
    return model


def generate(model: Any, cache: Any, ids: torch.Tensor, new_tokens: int, **options: Any) -> Clock:
    clock = Clock()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=new_tokens, do_sample=False,
        logits_processor=LogitsProcessorList([clock]), **options,
    )  # fmt: skip
    return clock


def steps_alone(model: Any, cache: Any, ids: torch.Tensor) -> float:
    """Milliseconds of the compiled step by itself, called in a row with the inputs that ``generate()`` last gave it."""
    given: dict[str, Any] = {}
    prepare = model.prepare_inputs_for_generation

    def remember(*args: Any, **kwargs: Any) -> dict[str, Any]:
        given.update(prepare(*args, **kwargs))
        return given

    model.prepare_inputs_for_generation = remember
    generate(model, cache, ids, 4)
    model.prepare_inputs_for_generation = prepare
    step, clock = model._compiled_call, Clock()
    for _ in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        clock(ids, step(**given, return_dict=True).logits)
    return clock.median_ms()


def filled(kind: str, config: Qwen2Config, batch: int, tokens: int, capacity: int) -> Any:
    if kind in EAGER:
        cache: Any = (DynamicCache if kind.startswith("Dynamic") else QuantizedInt8Cache)(config=config)
    else:
        cache = (StaticCache if kind == "StaticCache" else QuantizedInt8Cache)(config=config, max_cache_len=capacity)
    fill(cache, config, batch, tokens)
    return cache


def fill(cache: Any, config: Qwen2Config, batch: int, tokens: int) -> None:
    """Random states of every layer into an empty cache."""
    head_dim = config.hidden_size // config.num_attention_heads
    shape = (batch, config.num_key_value_heads, tokens, head_dim)
    states = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    for layer in range(config.num_hidden_layers):
        cache.update(*states, layer)


def by_length(
    kind: str, cache: Any, config: Qwen2Config, model: Any, lengths: list[int], batch: int = 1
) -> dict[str, float]:
    """Milliseconds a token of ``generate()`` behind so many tokens; compiled if the cache is static."""
    found = {}
    torch.backends.cuda.enable_cudnn_sdp(not kind.endswith("no cuDNN"))
    for tokens in lengths:
        if kind in EAGER:
            cache = filled(kind, config, batch, tokens - 1, 0)
        else:
            cache.reset()
            fill(cache, config, batch, tokens - 1)
        ids = torch.zeros(batch, tokens, dtype=torch.long, device="cuda")
        found[str(tokens)] = generate(model, cache, ids, WARM_UP + STEPS // 2).median_ms()
    torch.backends.cuda.enable_cudnn_sdp(True)
    return found


def forget() -> None:
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def memory() -> dict[str, float]:
    """Peak gigabytes (1e9 bytes)."""
    return {
        "allocated": round(torch.cuda.max_memory_allocated() / 1e9, 2),
        "reserved": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }


def account(model: Any, cache: Any, ids: torch.Tensor) -> dict[str, float]:
    """Milliseconds a token by kind of kernel, and without any, from a trace of the compiled steps."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        generate(model, cache, ids, PROFILED)
        torch.cuda.synchronize()
    kinds = {"attention": 0.0, "advance": 0.0, "matrix products": 0.0, "other": 0.0}
    for event in trace.key_averages():
        name, spent = event.key, event.self_device_time_total / 1e3 / PROFILED
        if name == "attention":
            kinds["attention"] += spent
        elif name == "advance":
            kinds["advance"] += spent
        elif any(word in name for word in ("gemm", "gemv", "cutlass", "nvjet", "splitK", "_mm_")):
            kinds["matrix products"] += spent
        else:
            kinds["other"] += spent
    return {kind: round(spent, 3) for kind, spent in kinds.items()}


@torch.no_grad()
def speed_row(name: str, model: Any, kinds: list[str]) -> Row:
    geometry, batch, tokens, capacity, target = ROWS[name]
    row: Row = {
        "row": f"{geometry}, batch {batch}, {tokens} tokens of {capacity}",
        "ms": {},
        "step_ms": {},
        "first_seconds": {},
        "memory_gb": {},
        "target": target,
    }
    rounds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for kind in kinds * ROUNDS.get(name, 1):
        ids = torch.randint(0, 90, (batch, tokens), device="cuda")
        forget()
        vars(model).pop("_compiled_call", None)
        cache = None
        try:
            cache = filled(kind, model.config, batch, tokens - 1, capacity)
            start = time.perf_counter()
            clock = generate(model, cache, ids, WARM_UP + STEPS)
            rounds[kind].append(clock.median_ms())
            row["ms"][kind] = round(statistics.mean(rounds[kind]), 3)
            row["first_seconds"].setdefault(kind, round(time.perf_counter() - start, 1))
            row["memory_gb"][kind] = memory()
            row.setdefault("graphs", {})[kind] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            row.setdefault("cudagraph_skips", {})[kind] = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
            torch._dynamo.utils.counters.clear()
            # generate() goes on where the cache ends, with as many ids as it then holds and one.
            ids = ids.new_zeros(batch, tokens + WARM_UP + STEPS)
            if kind == "int8":
                row["account_ms"] = account(model, cache, ids)
                ids = ids.new_zeros(batch, ids.shape[1] + PROFILED)
            row["step_ms"][kind] = steps_alone(model, cache, ids)
            if name == "long":
                row.setdefault("ms_by_tokens", {})[kind] = by_length(kind, cache, model.config, model, LENGTHS)
        except torch.cuda.OutOfMemoryError:
            row["ms"][kind] = None
        del cache
    if name == "long":
        for kind in EAGER:
            forget()
            row["ms_by_tokens"][kind] = by_length(kind, None, model.config, model, LENGTHS)
    elif len(kinds) > 1:
        forget()
        with contextlib.suppress(torch.cuda.OutOfMemoryError):
            behind = by_length(BEST_STOCK, None, model.config, model, [tokens], batch)
            row["ms"][BEST_STOCK] = round(behind[str(tokens)], 3)
    if name in ROUNDS:
        row["ms_by_round"] = rounds
    if row["ms"].get("StaticCache") and row["ms"].get("int8"):
        row["ratio"] = round(row["ms"]["StaticCache"] / row["ms"]["int8"], 3)
    return row


class LateStopCheck(generation.DeferredStopCheck):
    """transformers' own, which it uses on MPS alone: the host learns a step late whether all sequences have ended.

    The cache is not cropped by the step that was too many, so it must not be read afterwards.
    """

    def __init__(self, input_ids: torch.Tensor, max_length: int, cache: Any, is_returned: bool, *args: Any) -> None:
        super().__init__(input_ids, max_length, cache, False, *args)

    @staticmethod
    def is_supported(*args: Any, **kwargs: Any) -> bool:
        return True


@contextlib.contextmanager
def late_stop_check() -> Iterator[None]:
    kept = generation.DeferredStopCheck
    generation.DeferredStopCheck = LateStopCheck  # type: ignore[misc]
    try:
        yield
    finally:
        generation.DeferredStopCheck = kept  # type: ignore[misc]


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """torch's own way to compare fewer things before each compiled step; wrong if something else changed."""
    torch.compiler.set_stance(skip_guard_eval_unsafe=True)
    try:
        yield
    finally:
        torch.compiler.set_stance("default")


@contextlib.contextmanager
def late_and_unguarded() -> Iterator[None]:
    with late_stop_check(), unguarded():
        yield


LOOPS = {
    "waits for every token": contextlib.nullcontext,
    "stops a step late": late_stop_check,
    "without guards": unguarded,
    "both": late_and_unguarded,
}
"""Ways to call the default step from ``generate()``."""

LOOP_ROUNDS = 3


@torch.no_grad()
def variants_row(name: str, model: Any) -> Row:
    geometry, batch, tokens, capacity, _ = ROWS[name]
    ids = torch.randint(0, 90, (batch, tokens), device="cuda")
    row: Row = {"row": f"variants, {geometry}, batch {batch}, {tokens} tokens of {capacity}", "variants": {}}

    def again(cache: Any, **options: Any) -> tuple[Clock, float]:
        """A call behind a refilled cache; its clock, and its seconds until the first replayed token."""
        cache.reset()
        fill(cache, model.config, batch, tokens - 1)
        begin = torch.cuda.Event(enable_timing=True)
        begin.record()
        clock = generate(model, cache, ids, WARM_UP + STEPS, **options)
        torch.cuda.synchronize()
        return clock, round(begin.elapsed_time(clock.events[REPLAYED - 1]) / 1e3, 2)

    def note_loops(cache: Any) -> Row:
        rounds: dict[str, list[float]] = {loop: [] for loop in LOOPS}
        for loop in list(LOOPS) * LOOP_ROUNDS:
            try:
                with LOOPS[loop]():
                    rounds[loop].append(again(cache)[0].median_ms())
            except Exception as error:
                row.setdefault("why", {})[loop] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        return {loop: round(statistics.median(found), 3) for loop, found in rounds.items() if found}

    for variant, options in VARIANTS.items():
        forget()
        torch._dynamo.utils.counters.clear()
        for kept in ("_compiled_call", "_last_compile_config"):
            vars(model).pop(kept, None)
        cache = filled("int8", model.config, batch, tokens - 1, capacity)
        config = {"compile_config": CompileConfig(**options)} if options else {}
        settings = INPUTS_MAY_CHANGE if variant.endswith("inputs may change") else {}
        try:
            with torch._dynamo.config.patch(settings):
                _, first = again(cache, **config)
                clock, later = again(cache, **config)
        except Exception as error:  # what torch refuses is a finding
            row["variants"][variant] = {"why": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
            continue
        row["variants"][variant] = {
            "first_s": first,
            "later_s": later,
            "ms": clock.median_ms(),
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
            "cudagraph_skips": torch._dynamo.utils.counters["inductor"]["cudagraph_skips"],
        }
        if variant == "default":
            row["loops_ms"] = note_loops(cache)
            again(cache)
            row["step_ms"] = steps_alone(model, cache, ids.new_zeros(batch, tokens + WARM_UP + STEPS))
        print(json.dumps(row), flush=True)
        del cache
    return row


@torch.no_grad()
def memory_row(model: Any, batch: int, target: float | None, limit: float | None = None) -> Row:
    """16-token prompts, room for 1,024 new tokens. The memory is all there after a few of them, which is checked."""
    forget()
    if limit:
        torch.cuda.set_per_process_memory_fraction(limit * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    ids = torch.randint(0, 90, (batch, 16), device="cuda")
    row: Row = {
        "row": f"memory, Qwen-7B geometry, batch {batch}, 16 + 1024 tokens",
        "limit_gb": limit,
        "target": target,
    }
    try:
        cache = QuantizedInt8Cache.for_generate(model, ids, max_new_tokens=1024)
        seen: list[int] = []
        for new_tokens in (8, 24):
            cache.reset()
            generate(model, cache, ids, new_tokens, disable_compile=True)
            seen.append(torch.cuda.max_memory_allocated())
        row |= {"memory_gb": memory(), "grows_by_bytes": seen[1] - seen[0], "cache_gb": round(cache.nbytes / 1e9, 2)}
    except torch.cuda.OutOfMemoryError:
        row["memory_gb"] = None
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=["b1", "b32", "half", "memory", "gqa", "long"])
    parser.add_argument("--kinds", nargs="*", default=["StaticCache", "int8"])
    parser.add_argument("--variants-of", default="b1", choices=list(ROWS), help="model and length of the row variants")
    parser.add_argument("--out", default="docs/benchmarks/compiled-decode.json")
    options = parser.parse_args()
    chosen = options.rows != parser.get_default("rows")
    command = "PYTHONPATH=. python tests/benchmarks/bench_compiled.py"
    if chosen:
        command = " ".join([command, "--rows", *options.rows])
    if chosen and "variants" in options.rows:  # nothing that was compiled before
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="inductor-")
    torch.manual_seed(0)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(json.dumps(row), flush=True)
        write()

    def write() -> None:
        result = {"command": command, **report.surroundings(on_gpu=True), "rows": rows}
        report.write(result, Path(options.out))

    model, at = None, ""
    for name in options.rows:
        row = {"memory": "b1", "variants": options.variants_of}.get(name, name)
        geometry = ROWS[row][0]
        if geometry != at:
            model = None
            forget()
            model, at = make_model(geometry), geometry
        if name == "memory":
            for batch, target in ((32, 27.0), (64, 37.0), (100, 48.0)):
                add(memory_row(model, batch, target))
            add(memory_row(model, 200, None, limit=80.0))
        elif name == "variants":
            add(variants_row(row, model))
        else:
            add(speed_row(name, model, [k for k in options.kinds if not (name == "half" and k == "StaticCache")]))


if __name__ == "__main__":
    main()
