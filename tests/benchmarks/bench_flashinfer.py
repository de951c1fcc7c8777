"""Decode attention over int8 pages against the kernels of serving engines, in one run on one GPU.

    PYTHONPATH=. python tests/benchmarks/bench_flashinfer.py [--shapes N] [--out FILE]

FlashInfer decodes with and without tensor cores, over keys and values in bfloat16 and in float8 (e4m3), in pages of 64
tokens, as they are here, and of other sizes, tokens first and heads first; what is fastest counts. flash-attn, xformers
and torch's paged attention for sequences of several lengths run beside it where they are installed, and are named in
the file where not, with the reason. The pages of a sequence lie one behind the other, which is the best case for all.

Every result is first compared with attention in float64 over the states before any cache had them. Then the candidates
take turns, each call behind a flush of the L2 cache: medians of the GPU's time between two events.
"""

import argparse
import importlib
import importlib.metadata
import inspect
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quantcache.quantization import reference
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import reads
from tests.benchmarks import report
from tests.benchmarks.bench_attention import SHAPES, filled, interleaved, relative_error

Row = dict[str, Any]
Call = Callable[[], Tensor]

CAUSAL = AttentionOptions(is_causal=True)

DTYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}

MAX_RELATIVE_ERROR = {"int8": 0.02, "bf16": 0.01, "fp8": 0.08}
"""Twice what each format costs on normal data; another sequence's result is 1.4 away."""

PAGE_SIZES = (16, PAGE_SIZE, 128)
LAYOUTS = ("NHD", "HND")  # FlashInfer's names: tokens first, heads first
WORKSPACE_BYTES = 128 << 20  # what FlashInfer's documentation recommends


class WrongResultError(AssertionError):
    """A candidate is farther from exact attention than its format explains."""


class AbsentError(Exception):
    """A peer that cannot run here; the message says why."""


@dataclass(frozen=True)
class Problem:
    """One decode step: bfloat16, no padding."""

    query: Tensor
    """(batch, num_q_heads, head_dim)"""
    key: Tensor
    """(batch, num_kv_heads, tokens, head_dim)"""
    value: Tensor
    """as ``key``"""

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """Batch, query heads, KV heads, tokens, head_dim."""
        batch, num_kv_heads, tokens, head_dim = self.key.shape
        return batch, self.query.shape[1], num_kv_heads, tokens, head_dim

    def paged(self, states: Tensor, page_size: int, layout: str, dtype: torch.dtype) -> Tensor:
        """Pages of one sequence behind those of another: (pages, page_size, num_kv_heads, head_dim) in ``NHD``,
        (pages, num_kv_heads, page_size, head_dim) in ``HND``; contiguous."""
        batch, _, num_kv_heads, tokens, head_dim = self.sizes
        pages = states.to(dtype).view(batch, num_kv_heads, tokens // page_size, page_size, head_dim)
        order = (0, 2, 3, 1, 4) if layout == "NHD" else (0, 2, 1, 3, 4)
        return pages.permute(order).flatten(0, 1).contiguous()

    def block_table(self, page_size: int) -> Tensor:
        """int32 (batch, pages of a sequence): where each page of a sequence lies."""
        batch, _, _, tokens, _ = self.sizes
        return torch.arange(batch * tokens // page_size, dtype=torch.int32, device=self.query.device).view(batch, -1)

    def expected(self, row: int) -> Tensor:
        """(num_q_heads, head_dim): exact attention of one sequence, float64."""
        states = (states[row : row + 1].double() for states in (self.key, self.value))
        return reference.attend(self.query[row : row + 1, :, None].double(), *states)[0, 0]


def checked(problem: Problem, outputs: dict[str, Tensor]) -> dict[str, float]:
    """Relative error of each candidate's (batch, num_q_heads, head_dim), the larger one of first and last sequence.

    Raises:
        WrongResultError: one is not attention over these states.
    """
    errors = dict.fromkeys(outputs, 0.0)
    for row in {0, problem.query.shape[0] - 1}:
        expected = problem.expected(row)
        for name, output in outputs.items():
            error = relative_error(output[row], expected)
            limit = next(limit for words, limit in MAX_RELATIVE_ERROR.items() if words in name)
            if not error <= limit:  # NaN is wrong, too
                raise WrongResultError(
                    f"{name}: the result must be within {limit} of exact attention, got {error:.3g}."
                )
            errors[name] = max(errors[name], error)
    return errors


def flashinfer_call(problem: Problem, dtype: torch.dtype, tensor_cores: bool, page_size: int, layout: str) -> Call:
    import flashinfer

    batch, num_q_heads, num_kv_heads, _, head_dim = problem.sizes
    device = problem.query.device
    table = problem.block_table(page_size)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, layout, use_tensor_cores=tensor_cores)
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device=device) * table.shape[1], table.flatten(),
        torch.full((batch,), page_size, dtype=torch.int32, device=device), num_q_heads, num_kv_heads, head_dim,
        page_size, q_data_type=torch.bfloat16, kv_data_type=dtype,
    )  # fmt: skip
    pages = tuple(problem.paged(states, page_size, layout, dtype) for states in (problem.key, problem.value))
    return lambda: wrapper.run(problem.query, pages)


def flashinfer_calls(problem: Problem) -> Iterator[tuple[str, Callable[[], Call]]]:
    """Every way FlashInfer has of reading these states, by name."""
    for words, dtype in DTYPES.items():
        for tensor_cores in (False, True):
            for page_size in PAGE_SIZES:
                for layout in LAYOUTS:
                    path = "tensor cores" if tensor_cores else "plain"
                    yield (
                        f"flashinfer {words}, {path}, pages of {page_size}, {layout}",
                        lambda args=(problem, dtype, tensor_cores, page_size, layout): flashinfer_call(*args),
                    )


def build_flashinfer(head_dims: set[int]) -> None:
    """Have FlashInfer compile its kernels, a few at a time: one after the other they take minutes."""

    def build(args: tuple[int, torch.dtype, bool]) -> None:
        head_dim, dtype, tensor_cores = args
        states = torch.zeros(1, 1, PAGE_SIZE, head_dim, device="cuda", dtype=torch.bfloat16)
        flashinfer_call(Problem(states[:, :, 0], states, states), dtype, tensor_cores, PAGE_SIZE, "NHD")

    wanted = itertools.product(head_dims, DTYPES.values(), (True, False))
    with ThreadPoolExecutor(max_workers=4) as pool:
        for built in [pool.submit(build, args) for args in wanted]:
            built.exception()  # a kernel that cannot be built is left out of its row, which names the reason


def flash_attn_call(problem: Problem) -> Call:
    flash_attn = imported("flash_attn")
    batch, _, _, tokens, _ = problem.sizes
    page_size = 256  # the smallest that it takes
    key, value = (problem.paged(states, page_size, "NHD", torch.bfloat16) for states in (problem.key, problem.value))
    settings = {
        "cache_seqlens": torch.full((batch,), tokens, dtype=torch.int32, device=problem.query.device),
        "block_table": problem.block_table(page_size),
    }
    return lambda: flash_attn.flash_attn_with_kvcache(problem.query[:, None], key, value, **settings)[:, 0]


def xformers_call(problem: Problem, kernel: str = "triton_splitk") -> Call:
    imported("xformers")
    from xformers.ops import fmha
    from xformers.ops.fmha.attn_bias import BlockDiagonalPaddedKeysMask, PagedBlockDiagonalPaddedKeysMask

    batch, num_q_heads, num_kv_heads, tokens, head_dim = problem.sizes
    group = num_q_heads // num_kv_heads
    bias = BlockDiagonalPaddedKeysMask.from_seqlens([1] * batch, tokens, [tokens] * batch, device=problem.query.device)
    paged = bias.make_paged(problem.block_table(PAGE_SIZE), PAGE_SIZE, PagedBlockDiagonalPaddedKeysMask)
    query = problem.query.view(1, batch, num_kv_heads, group, head_dim)
    states = [
        problem.paged(states, PAGE_SIZE, "NHD", torch.bfloat16)
        .view(1, batch * tokens, num_kv_heads, 1, head_dim)
        .expand(-1, -1, -1, group, -1)
        for states in (problem.key, problem.value)
    ]
    kernels = getattr(fmha, kernel).FwOp
    return lambda: fmha.memory_efficient_attention_forward(query, *states, paged, op=kernels).view_as(problem.query)


def torch_varlen_call(problem: Problem) -> Call:
    from torch.nn.attention import varlen

    if "block_table" not in inspect.signature(varlen.varlen_attn).parameters:
        raise AbsentError(f"torch {torch.__version__}'s varlen_attn takes no block_table")
    batch, num_q_heads, num_kv_heads, tokens, _ = problem.sizes
    page_size = 256  # the smallest that flash attention 2 takes, which it calls
    key, value = (problem.paged(states, page_size, "NHD", torch.bfloat16) for states in (problem.key, problem.value))
    device = problem.query.device
    settings: dict[str, Any] = {
        "cu_seq_q": torch.arange(batch + 1, dtype=torch.int32, device=device),
        "cu_seq_k": None,
        "max_q": 1,
        "max_k": tokens,
        "seqused_k": torch.full((batch,), tokens, dtype=torch.int32, device=device),
        "block_table": problem.block_table(page_size),
        "enable_gqa": num_q_heads > num_kv_heads,
    }
    return lambda: varlen.varlen_attn(problem.query, key, value, **settings)


def imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise AbsentError(f"{name} is not installed") from None


PEERS: dict[str, Callable[[Problem], Call]] = {
    "flash-attn bf16, flash_attn_with_kvcache": flash_attn_call,
    "xformers bf16, split keys": xformers_call,
    "torch bf16, varlen_attn": torch_varlen_call,
}


def candidates(problem: Problem) -> tuple[dict[str, Call], dict[str, str]]:
    """Those that can read these states, and why each of the others cannot."""
    calls: dict[str, Call] = {}
    left_out: dict[str, str] = {}
    made = dict(flashinfer_calls(problem)) | {name: lambda make=make: make(problem) for name, make in PEERS.items()}
    for name, make in made.items():
        try:
            calls[name] = make()
            calls[name]()
        except Exception as reason:  # what a peer refuses with is its own affair; the file names it
            calls.pop(name, None)
            left_out[name] = in_one_line(reason)
    if not any(name.startswith("flashinfer") for name in calls):
        raise RuntimeError(f"bench_flashinfer: FlashInfer must run, got {left_out}.")
    return calls, left_out


def in_one_line(reason: Exception) -> str:
    """What a peer says, without the places of its files."""
    return re.sub(r" at /\S+", "", " ".join(str(reason).split()))[:400] or type(reason).__name__


def best(times: dict[str, float], *words: str) -> float | None:
    """The shortest of the times whose names have all of these words."""
    return min((time for name, time in times.items() if all(word in name for word in words)), default=None)


def row(
    batch: int, num_q_heads: int, num_kv_heads: int, tokens: int, head_dim: int, *, repeats: int = 30,
    device: str = "cuda", timed: Callable[..., dict[str, float]] = interleaved,
) -> Row:  # fmt: skip
    """One geometry: every candidate checked, then timed."""
    view, key, value = filled(batch, num_kv_heads, tokens, head_dim, device)
    problem = Problem(torch.randn(batch, num_q_heads, head_dim, device=device).bfloat16(), key, value)
    query = problem.query[:, :, None]
    calls, left_out = candidates(problem)
    calls = {"int8": lambda: reads.attention(query, view, CAUSAL)[:, 0]} | calls
    errors = checked(problem, {name: call() for name, call in calls.items()})
    times = timed(calls, repeats)
    fp8, bf16 = (best(times, "flashinfer", words) for words in ("fp8", "bf16"))
    ratios = {
        name: round(time / times["int8"], 3) for name, time in {"fp8": fp8, "bf16": bf16}.items() if time is not None
    }
    return {
        "row": f"batch {batch}, {num_q_heads}/{num_kv_heads} heads, {tokens:,} tokens, head_dim {head_dim}",
        "median_us": times,
        "relative_error": {name: float(f"{error:.2g}") for name, error in errors.items()},
        "times_as_fast_as_flashinfer": ratios,
        "left_out": left_out,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, help="the first ones alone")
    parser.add_argument("--out", default="docs/benchmarks/flashinfer.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes = [shape[:5] for shape in SHAPES if shape[5] == 1][: options.shapes]
    build_flashinfer({shape[4] for shape in shapes})
    rows: list[Row] = []
    for shape in shapes:
        rows.append(row(*shape))
        print(json.dumps(rows[-1]), flush=True)
        write(rows, Path(options.out))  # after each row: a run that is cut short keeps what it has
        torch.cuda.empty_cache()


def write(rows: list[Row], out: Path) -> None:
    """The file, with the rows that there are."""
    properties = torch.cuda.get_device_properties(0)
    packages = {"flashinfer": "flashinfer-python", "flash-attn": "flash-attn", "xformers": "xformers"}
    result = {
        "command": shlex.join(["PYTHONPATH=.", "python", "tests/benchmarks/bench_flashinfer.py", *sys.argv[1:]]),
        "hardware": {"gpu": properties.name, "processors": properties.multi_processor_count},
        "load_average": round(os.getloadavg()[0], 2),
        "versions": report.versions() | {name: found for name, of in packages.items() if (found := report.version(of))},
        "rows": rows,
    }
    report.write(result, out)


if __name__ == "__main__":
    main()
