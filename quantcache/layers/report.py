"""What a cache says of itself: what each layer stores, what that saves, and by which path it was last read."""

import html
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH, PAGE_SIZE

_MOST_RUNS: Final = 2
"""Runs of layers that a row of a table names; a model with a window in every other layer has dozens."""


@dataclass(frozen=True)
class LayerReport:
    """What one layer stores.

    Attributes:
        layer_idx: decoder layer.
        storage: "int8" or "int8, window N", with ", in host memory" while it is offloaded; "empty"; "shared" for a
            layer that reads another one's states; or the transformers layer class that keeps its own states here.
        seq_len: tokens stored.
        nbytes: bytes allocated, slack included.
        kernel: what read the layer last: "cuda decode" for few query rows of a KV head and "cuda prefill" for more,
            "cpu" or "torch"; a backend and ", compiled" in a recorded step; "exact" where all that was read was the
            states as the model made them, "restored" after a fallback, "native" for a transformers layer, "none" before
            the first read.
        reason: why the read was a fallback, else None.
        rows_stored: rows of closed pages in memory, each one page of one sequence; of a fixed capacity, which has
            memory for all, those that some sequence reads.
        rows_read: pages that the sequences read, more than are stored where they share some.
        dtype: of the model, as "bfloat16"; None before the first tokens.
        exact_nbytes: bytes of the same tokens in that dtype, in the layer that transformers would have here, without
            slack; of a layer of transformers' own, ``nbytes``.
    """

    layer_idx: int
    storage: str
    seq_len: int
    nbytes: int
    kernel: str
    reason: str | None
    rows_stored: int = 0
    rows_read: int = 0
    dtype: str | None = None
    exact_nbytes: int = 0


@dataclass(frozen=True)
class CacheReport:
    """What ``QuantizedInt8Cache.report()`` returns; ``str()`` of it is a table, and a notebook shows one.

    Attributes:
        layers: what each layer stores.
        lost: how the model of the last call went on without the cache, None where it did not.
        int8_from: tokens at which int8 begins; all tokens of a shorter context are exact.
    """

    layers: list[LayerReport]
    lost: str | None = None
    int8_from: int = PAGE_SIZE + DEFAULT_RESIDUAL_LENGTH

    @property
    def backend(self) -> str:
        """The kernels that read the layers last, each once, in order of the layers."""
        return ", ".join(dict.fromkeys(row.kernel for row in self.layers)) or "none"

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all layers."""
        return sum(row.nbytes for row in self.layers)

    @property
    def exact_nbytes(self) -> int:
        """Bytes of the same tokens in the model's dtype."""
        return sum(row.exact_nbytes for row in self.layers)

    @property
    def saved_nbytes(self) -> int:
        """Bytes that are saved; negative where a short context's slack is more than that."""
        return self.exact_nbytes - self.nbytes

    @property
    def saved_share(self) -> float:
        """``saved_nbytes`` as a share of ``exact_nbytes``, 0 for an empty cache."""
        return self.saved_nbytes / self.exact_nbytes if self.exact_nbytes else 0.0

    @property
    def why_exact(self) -> str | None:
        """Why "exact" stands in the table, None where it does not."""
        exact = [row for row in self.layers if row.kernel == "exact"]
        if not exact:
            return None
        if max(row.seq_len for row in exact) < self.int8_from:
            return f"int8 begins at {self.int8_from} tokens; a shorter context stays exact"
        return "a prompt is attended to as the model made it; what follows reads int8"

    def __str__(self) -> str:
        head, *rows = self._cells()
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        return "\n".join(line.rstrip() for line in (*lines, *self._notes()))

    def _repr_html_(self) -> str:
        head, *rows = (list(map(html.escape, row)) for row in self._cells())
        parts = ["<table><thead><tr>", *(f"<th>{cell}</th>" for cell in head), "</tr></thead><tbody>"]
        for row in rows:
            parts += ["<tr>", *(f"<td>{cell}</td>" for cell in row), "</tr>"]
        return "".join([*parts, "</tbody></table>", *(f"<p>{html.escape(note)}</p>" for note in self._notes())])

    def plot(self) -> Any:
        """Bars of what each layer takes, beside what its tokens take in the model's dtype.

        Returns:
            A ``matplotlib.figure.Figure``, which a notebook shows; ``.savefig(path)`` writes it.

        Raises:
            ImportError: matplotlib is missing.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise ImportError(
                f"CacheReport.plot: matplotlib must be installed, got: {error}. Install it: pip install matplotlib.",
                name=error.name,
            ) from error
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes, places = figure.subplots(), [row.layer_idx for row in self.layers]
        mib = 1 << 20
        axes.bar(places, [row.exact_nbytes / mib for row in self.layers], color="lightgrey", label=self._exact_name())
        axes.bar(places, [row.nbytes / mib for row in self.layers], width=0.5, label="this cache")
        title = f"{human_bytes(self.nbytes)}, saved {self._saved(self)}"
        axes.set(xlabel="layer", ylabel="MiB", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
        return figure

    def _cells(self) -> list[tuple[str, ...]]:
        """The table: a head, a row for each group of layers that are alike, and a total."""
        head = ("layers", "storage", "tokens", "size", f"in {self._exact_name()}", "saved", "read by")
        rows = []
        groups = self._groups(lambda row: (row.storage, row.seq_len, row.kernel, row.reason, row.dtype))
        for group in groups:
            one, part = group[0], CacheReport(group)
            tokens, sizes = f"{one.seq_len:,}", (human_bytes(part.nbytes), human_bytes(part.exact_nbytes))
            rows.append((_runs(group), one.storage, tokens, *sizes, self._saved(part), one.kernel))
        sizes = human_bytes(self.nbytes), human_bytes(self.exact_nbytes)
        rows.append(("all", "", "", *sizes, self._saved(self), ""))
        if all(row.rows_stored == row.rows_read for row in self.layers):
            return [head, *rows]
        parts = [*(CacheReport(group) for group in groups), self]
        stored = (sum(layer.rows_stored for layer in part.layers) for part in parts)
        read = (sum(layer.rows_read for layer in part.layers) for part in parts)
        counted = [(f"{one:,}", f"{other:,}") for one, other in zip(stored, read, strict=True)]
        return [(*head, "rows stored", "rows read"), *((*row, *c) for row, c in zip(rows, counted, strict=True))]

    def _notes(self) -> list[str]:
        """Sentences below the table."""
        notes = [
            f"{_runs(group)}: {group[0].kernel}, {group[0].reason}."
            for group in self._groups(lambda row: (row.kernel, row.reason))
            if group[0].reason is not None
        ]
        notes += [] if self.why_exact is None else [f"exact: {self.why_exact}."]
        return notes if self.lost is None else [*notes, f"{self.lost}."]

    def _groups(self, key: Callable[[LayerReport], Hashable]) -> list[list[LayerReport]]:
        """Layers that are alike by ``key``, neighbours or not, in the order of their first."""
        groups: dict[Hashable, list[LayerReport]] = {}
        for layer in self.layers:
            groups.setdefault(key(layer), []).append(layer)
        return list(groups.values())

    def _exact_name(self) -> str:
        """What the model's dtype is called where all layers have one."""
        dtypes = {row.dtype for row in self.layers if row.dtype is not None}
        return dtypes.pop() if len(dtypes) == 1 else "its dtype"

    @staticmethod
    def _saved(part: "CacheReport") -> str:
        return f"{human_bytes(part.saved_nbytes)} ({part.saved_share:.0%})" if part.exact_nbytes else ""


def human_bytes(nbytes: float) -> str:
    """A size in the unit that suits it, in powers of 1024."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:,.0f} bytes" if unit == "bytes" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:,.2f} TiB"


def _runs(layers: list[LayerReport]) -> str:
    """The indices of layers as ``0-4, 6-10, ... (35)``, with their number where not all are named."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][1] == layer.layer_idx - 1:
            runs[-1][1] = layer.layer_idx
        else:
            runs.append([layer.layer_idx, layer.layer_idx])
    named = [str(first) if first == last else f"{first}-{last}" for first, last in runs[:_MOST_RUNS]]
    return ", ".join(named) if len(runs) <= _MOST_RUNS else f"{', '.join(named)}, ... ({len(layers)})"
