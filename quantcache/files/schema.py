"""The layouts of a prompt cache: which tensors a file holds, and what must hold between them.

The page in the documentation specifies them; another one comes with any change that this code could not read.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from quantcache.files.container import Container
from quantcache.files.description import check
from quantcache.files.header import Entry
from quantcache.quantization.scheme import PAGE_SIZE

LAYOUT, SHARED_LAYOUT = LAYOUTS = 1, 2
"""Of the second some layer has a row table, and is stored without what its sequences share."""

INPUT_IDS: Final = "input_ids"
"""int64 (batch, seq_len): the tokens whose keys and values are stored."""

PAGE_PARTS: Final = ("key_qdata", "key_metadata", "value_qdata", "value_metadata")
"""Of these, the closed pages; the first axis counts them."""

TAILS: Final = ("key_tail", "value_tail")
PARTS: Final = (*PAGE_PARTS, *TAILS)
"""What an int8 layer has in a file: ``layers.{layer_idx}.{part}``."""

ROW_TABLE: Final = "row_table"
"""What a layer has besides in ``SHARED_LAYOUT`` whose sequences share rows; see ``shared``."""

_TAIL_DTYPES: Final = ("F16", "BF16", "F32", "F64")


def parts_of(has_row_table: bool) -> tuple[str, ...]:
    """The parts of a layer in a file."""
    return (*PARTS, ROW_TABLE) if has_row_table else PARTS


def layout_of(names: Collection[str]) -> int:
    """The layout of a file with such tensors."""
    return SHARED_LAYOUT if any(name.endswith(f".{ROW_TABLE}") for name in names) else LAYOUT


def part_name(layer_idx: int, part: str) -> str:
    """The name of a layer's tensor in the file."""
    return f"layers.{layer_idx}.{part}"


@dataclass(frozen=True)
class StoredPages:
    """What a file holds of one int8 layer; checked, not read.

    Attributes:
        layer_idx: decoder layer.
        num_pages: closed pages.
        batch: sequences.
        tail_len: exact tokens behind the pages.
        first_page: pages dropped before the first one stored.
        num_rows: rows of the pages, where a row table says which are read; None: one for each page and sequence.
    """

    layer_idx: int
    num_pages: int
    batch: int
    tail_len: int
    first_page: int
    num_rows: int | None = None

    @property
    def held(self) -> int:
        """Tokens stored."""
        return self.num_pages * PAGE_SIZE + self.tail_len

    @property
    def seq_len(self) -> int:
        """Tokens fed, those dropped included."""
        return self.first_page * PAGE_SIZE + self.held


def check_pages(container: Container, layer_idx: int, residual_length: int, first_page: int = 0) -> StoredPages:
    """Find the tensors of one int8 layer and check what must hold between them.

    Args:
        container: the file.
        layer_idx: decoder layer.
        residual_length: newer tokens a page waits for.
        first_page: pages dropped before those stored.

    Raises:
        CacheFileError: one is missing, or has another dtype or shape than the layout says.
    """
    found: dict[str, Entry] = {}
    for part in PARTS:
        name = part_name(layer_idx, part)
        if name not in container.entries:
            raise container.refuse(f"layer {layer_idx} must have the tensor {name}", "none")
        found[part] = container.entries[name]

    def demand(part: str, dtype: str, shape: tuple[int, ...]) -> None:
        entry = found[part]
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise container.refuse(
                f"{part_name(layer_idx, part)} must be {dtype} {shape}", f"{entry.dtype} {entry.shape}"
            )

    tails = found["key_tail"], found["value_tail"]
    for part, entry in zip(TAILS, tails, strict=True):
        if entry.dtype not in _TAIL_DTYPES or len(entry.shape) != 4 or 0 in (*entry.shape[:2], entry.shape[3]):
            raise container.refuse(
                f"{part_name(layer_idx, part)} must be one of {', '.join(_TAIL_DTYPES)} with the shape "
                "(batch, num_kv_heads, tokens, head_dim)",
                f"{entry.dtype} {entry.shape}",
            )
    batch, num_kv_heads, tail_len, head_dim = tails[0].shape
    v_head_dim = tails[1].shape[3]
    demand("value_tail", tails[0].dtype, (batch, num_kv_heads, tail_len, v_head_dim))
    if tail_len >= PAGE_SIZE + residual_length:
        raise container.refuse(
            f"the tail of layer {layer_idx} must be shorter than a page and residual_length, "
            f"{PAGE_SIZE + residual_length}",
            tail_len,
        )
    if found["key_tail"].nbytes == 0 and not any(found["key_qdata"].shape[:1]):
        raise container.refuse(f"layer {layer_idx} must hold tokens", "none")
    num_pages = found["key_qdata"].shape[0] if found["key_qdata"].shape else 0
    rows, num_rows = (num_pages, batch, num_kv_heads), None
    table = container.entries.get(part_name(layer_idx, ROW_TABLE))
    if table is not None and container.description.get("layout") == SHARED_LAYOUT:
        rows, num_rows = (num_pages, 1, num_kv_heads), num_pages
        found[ROW_TABLE], num_pages = table, table.shape[-1] if table.shape else 0
        demand(ROW_TABLE, "I32", (batch, num_pages))
        if not num_pages <= num_rows <= batch * num_pages:
            raise container.refuse(
                f"layer {layer_idx} must have from {num_pages} to {batch * num_pages} rows of pages", num_rows
            )
    demand("key_qdata", "I8", (*rows, PAGE_SIZE, head_dim))
    demand("key_metadata", "I16", (*rows, head_dim, 2))
    demand("value_qdata", "I8", (*rows, PAGE_SIZE, v_head_dim))
    demand("value_metadata", "I16", (*rows, PAGE_SIZE, 2))
    return StoredPages(layer_idx, num_pages, batch, tail_len, first_page, num_rows)


def check_description(container: Container) -> dict[str, Any]:
    """The description of a file, once its form is known to be right.

    Raises:
        CacheFileError: a newer layout, or a field that is missing, unknown, of another type or out of range.
    """
    description = container.description
    layout = description.get("layout")
    if type(layout) is not int or layout not in LAYOUTS:
        written = description.get("quantcache")
        raise container.refuse(
            f"the layout must be {LAYOUT} or {SHARED_LAYOUT}, which this version of quantcache reads",
            f"{layout!r}, written by quantcache {written}" if isinstance(written, str) else repr(layout),
            "Use a newer quantcache." if type(layout) is int and layout > max(LAYOUTS) else "",
        )
    if layout != (fitting := layout_of(container.entries)):
        raise container.refuse(f"the layout of a file with such tensors must be {fitting}", layout)
    check(description, container.refuse)
    return dict(description)
