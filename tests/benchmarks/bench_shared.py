"""Decode attention of sequences that share the pages of a prompt, against the same over a copy for each, in one run.

    python -m tests.benchmarks.bench_shared [--rows WORD ...] [--out FILE]

Times are those of ``bench_attention.py``: the GPU's, in turn, behind a flush of the L2 cache. "copies" has no row
table, "copies in another order" a table in which no neighbours read the same page; "shared, read once" reads what
neighbours share once, "shared, read by each" does not, and "shared" is the one of both that the kernels take. A row
with a mask has the one that a compiled step of ``generate()`` makes.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from quantcache.backends import cuda
from quantcache.quantization.options import AttentionOptions
from quantcache.quantization.reference import select_rows
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store.segments import ClosedPages, Segment
from quantcache.store.view import PagesView
from tests.benchmarks.bench_attention import Row, check, interleaved, relative_error, write

HEAD_DIM = 128

SHAPES = [  # name, sequences, q heads, kv heads, tokens of the prompt, own tokens, whether there is a mask, target
    ("16", 16, 32, 8, 32768, 0, False, 5.0),
    ("64", 64, 32, 8, 32768, 0, False, 10.0),
    ("16", 16, 28, 4, 8192, 0, False, None),
    ("64", 64, 28, 4, 8192, 0, False, None),
    ("16", 16, 32, 32, 8192, 0, False, None),
    ("64", 64, 32, 32, 8192, 0, False, None),
    ("beams", 4, 28, 4, 8192, 0, False, None),
    ("beams", 4, 32, 8, 32768, 0, False, None),
    ("own", 16, 32, 8, 32768, 2048, False, None),
    ("mask", 16, 32, 8, 32768, 0, True, None),
]


def random_pages(pages: int, rows: int, num_kv_heads: int) -> Segment:
    """Closed pages of states about as large as a model's."""
    shape = (pages, rows, num_kv_heads)
    parts = []
    for groups in (HEAD_DIM, PAGE_SIZE):
        codes = torch.randint(-128, 128, (*shape, PAGE_SIZE, HEAD_DIM), dtype=torch.int8, device="cuda")
        scale = torch.empty(*shape, groups, device="cuda").uniform_(0.005, 0.02).bfloat16().view(torch.int16)
        zero_point = torch.randint(-20, 21, (*shape, groups), dtype=torch.int16, device="cuda")
        parts += [codes, torch.stack([scale, zero_point], dim=-1)]
    return Segment(*parts)


def shared_row(
    sequences: int,
    num_q_heads: int,
    num_kv_heads: int,
    tokens: int,
    own_tokens: int,
    has_mask: bool,
    target: float | None,
) -> Row:
    """One row: a prompt that all sequences read, and what each has for itself."""
    prompt, own = tokens // PAGE_SIZE, own_tokens // PAGE_SIZE
    segments = [random_pages(prompt, 1, num_kv_heads)]
    own_rows = torch.arange(sequences, dtype=torch.int32, device="cuda")[:, None]
    table = torch.cat([torch.zeros_like(own_rows).expand(-1, prompt), own_rows.expand(-1, own)], dim=1)
    if own:
        segments.append(random_pages(own, sequences, num_kv_heads))
    tails = [torch.randn(sequences, num_kv_heads, 50, HEAD_DIM, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    query = torch.randn(sequences, num_q_heads, 1, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    shared = PagesView(ClosedPages(tuple(segments), table.contiguous()), *tails)
    copied, first = [], 0
    for segment in segments:
        rows = table[:, first : first + segment.capacity]
        copied.append(Segment(*(select_rows(part, rows) for part in segment)))
        first += segment.capacity
    copies = PagesView(ClosedPages(tuple(copied)), *tails)
    # Two pages on from one sequence to the next, and never the row of a neighbour.
    order = (torch.arange(sequences)[:, None] + torch.arange(prompt + own) * 2 % sequences) % sequences
    shuffled = PagesView(ClosedPages(tuple(copied), order.int().cuda()), *tails)
    mask = torch.ones(sequences, 1, 1, shared.seq_len, dtype=torch.bool, device="cuda") if has_mask else None
    options = AttentionOptions(mask)

    def reading(view: PagesView, shares_pages: bool | None = None) -> Callable[[], Tensor]:
        return lambda: cuda.decode(query, view, options, shares_pages=shares_pages)

    candidates = {
        "copies": reading(copies),
        "copies in another order": reading(shuffled),
        "copies in another order, not looked at": reading(shuffled, False),
        "shared": reading(shared),
        "shared, read once": reading(shared, True),
        "shared, read by each": reading(shared, False),
    }
    expected = candidates["copies"]()
    errors = {"copies": check(copies, query, expected, mask)}
    for name in ("shared", "shared, read once", "shared, read by each"):
        errors[name] = relative_error(candidates[name](), expected.double())
    assert max(errors.values()) <= 4e-3, errors
    times = interleaved(candidates, repeats=20)
    nbytes = sum(part.nbytes for segment in segments for part in segment) + sum(tail.nbytes for tail in tails)
    heads = f"{num_q_heads}/{num_kv_heads} heads"
    return {
        "row": f"{sequences} sequences, {heads}, {tokens} tokens shared, {own_tokens + 50} their own"
        + (", mask" if has_mask else ""),
        "median_us": times,
        "relative_error": {name: round(error, 6) for name, error in errors.items()},
        "tb_per_s": round(nbytes / times["shared"] / 1e6, 2),
        "ratio": round(times["copies"] / times["shared"], 2),
        "target": target,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", default=[shape[0] for shape in SHAPES])
    parser.add_argument("--out", default="docs/benchmarks/cuda-shared.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[Row] = []
    for name, *shape in SHAPES:
        if name in options.rows:
            rows.append(shared_row(*shape))  # type: ignore[arg-type]
            print(json.dumps(rows[-1]), flush=True)
            write(rows, Path(options.out), "python -m tests.benchmarks.bench_shared")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
