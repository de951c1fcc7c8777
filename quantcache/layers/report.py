"""What a cache says of itself: what each layer stores, and by which path it was last read."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One row of ``CacheReport``.

    Attributes:
        layer_idx: decoder layer.
        storage: "int8" or "int8, window N", with ", in host memory" while it is offloaded; "empty"; "shared" for a
            layer that reads another one's states; or the transformers layer class that keeps its own states here.
        seq_len: tokens stored.
        nbytes: bytes allocated, slack included.
        kernel: what read the layer last: a backend of ``ops``, "exact" while no page is closed, "restored" after a
            fallback, "native" for a transformers layer, "none" before the first read.
        reason: why the read was a fallback, else None.
        rows_stored: rows of closed pages in memory, each one page of one sequence.
        rows_read: pages that the sequences read, more than are stored where they share some.
    """

    layer_idx: int
    storage: str
    seq_len: int
    nbytes: int
    kernel: str
    reason: str | None
    rows_stored: int = 0
    rows_read: int = 0


@dataclass(frozen=True)
class CacheReport:
    """What ``QuantizedInt8Cache.report()`` returns; ``str()`` of it is a table, with rows where sequences share some.

    Attributes:
        layers: a row for each.
        lost: how the model of the last call went on without the cache, None where it did not.
    """

    layers: list[LayerReport]
    lost: str | None = None

    @property
    def backend(self) -> str:
        """The kernels that read the layers last, each once, in order of the layers."""
        return ", ".join(dict.fromkeys(row.kernel for row in self.layers)) or "none"

    def __str__(self) -> str:
        head: tuple[str, ...] = ("layer", "storage", "tokens", "bytes", "kernel", "reason")
        rows: list[tuple[str, ...]] = [
            (str(r.layer_idx), r.storage, f"{r.seq_len:,}", f"{r.nbytes:,}", r.kernel, r.reason or "")
            for r in self.layers
        ]
        if any(r.rows_stored != r.rows_read for r in self.layers):
            head += ("rows stored", "rows read")
            rows = [
                (*cells, f"{r.rows_stored:,}", f"{r.rows_read:,}") for cells, r in zip(rows, self.layers, strict=True)
            ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]
        lines += [] if self.lost is None else [f"{self.lost}."]
        return "\n".join(line.rstrip() for line in lines)
