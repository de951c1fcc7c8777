"""``Pages``: what the bytes of one layer are to whoever asks, growing or of fixed capacity."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from quantcache.backends import dispatch
from quantcache.store import reads
from quantcache.store.segments import MadeOnce, RowTable
from quantcache.store.tail import LateTail, TailsTaken
from quantcache.store.view import PagesView


class Pages(ABC):
    """The keys and values of one layer: closed int8 pages and an exact tail.

    Every operation computes into memory that nobody reads and then assigns, or copies once: one that fails at any
    point, for lack of memory too, leaves what is stored as it was.
    """

    residual_length: int

    first_page: int = 0
    """Pages dropped; the first token held is ``first_page * page_size``."""

    num_pages: int
    """Closed pages held."""

    tail_len: int
    """Tokens in the tail."""

    seq_len: int
    """Tokens stored so far, those dropped included."""

    capacity: int | None = None
    """Tokens that fit, which is the length that readers see; None: no limit."""

    is_offloaded = False
    """Whether the closed pages are in host memory alone."""

    _backend: tuple[str, str | None] | None = None

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated: codes, metadata, tail, their slack, and host copies; what sequences share counts once."""

    @property
    @abstractmethod
    def rows_stored(self) -> int:
        """Rows of the closed pages in memory; sequences that share them read more than there are."""

    @abstractmethod
    def _tail_buffers(self) -> tuple[Tensor, Tensor]:
        """Keys and values (batch, num_kv_heads, at least tail_len, head_dim), with every token written."""

    @abstractmethod
    def view(self) -> PagesView:
        """All tokens held, for reading."""

    @abstractmethod
    def stored(self, shares: bool = False) -> PagesView:
        """As ``view``, for copying: offloaded pages are those in host memory.

        Args:
            shares: give stored rows once, and a row table where sequences read others than their own; if False, every
                sequence reads its own row.
        """

    @abstractmethod
    def append(self, key_states: Tensor, value_states: Tensor) -> PagesView:
        """Store new tokens and return what their queries read.

        In the view the pages that this call closes are still exact, so a chunk always sees itself unquantised. The tail
        of the view of an empty layer is the arguments themselves.

        Args:
            key_states: (batch, num_kv_heads, query_len, head_dim), shapes, dtype and device as at construction.
            value_states: (batch, num_kv_heads, query_len, v_head_dim).
        """

    @abstractmethod
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        A page that loses some of its tokens is reopened: the restored values of the rest become the tail.

        Args:
            tokens_to_remove: from 0 to the number of tokens held.
        """

    @abstractmethod
    def replace(self, key_states: Tensor, value_states: Tensor) -> None:
        """Hold other states for the tokens held; numbers that share no scale with a change keep their bytes.

        Args:
            key_states: (batch, num_kv_heads, tokens, head_dim), as ``view`` restores to but for the changes.
            value_states: (batch, num_kv_heads, tokens, v_head_dim).
        """

    @abstractmethod
    def index_select(self, indices: "Indices") -> None:
        """Take the sequences ``indices`` (1-D, integers or bool) of the batch, in that order, byte for byte."""

    @abstractmethod
    def moved(self, device: torch.device) -> "Pages":
        """The same bytes on another device, in memory of their own; these stay as they are.

        Pages that are offloaded stay in host memory, unless ``device`` is the CPU.
        """

    @abstractmethod
    def offload(self) -> None:
        """Keep the closed pages in host memory alone; the tail stays. Views that exist keep their pages."""

    @abstractmethod
    def fetch(self, stream: torch.cuda.Stream | None = None) -> None:
        """Begin to bring offloaded pages back, on ``stream`` if there is one; what reads them waits for them."""

    @property
    def backend(self) -> tuple[str, str | None]:
        """``dispatch.backend_for`` the states; the first question for a CPU builds its kernels."""
        if self._backend is None:  # asked once, since asking takes as long as a launch
            self._backend = dispatch.backend_for(*self._tail_buffers())
        return self._backend

    @property
    def is_empty(self) -> bool:
        """Whether no token is held."""
        return not self.num_pages and not self.tail_len

    @property
    def key_tail(self) -> Tensor:
        """Exact keys behind the closed pages, (batch, num_kv_heads, tail_len, head_dim)."""
        return self._tail_buffers()[0][:, :, : self.tail_len]

    @property
    def value_tail(self) -> Tensor:
        """Exact values behind the closed pages, (batch, num_kv_heads, tail_len, v_head_dim)."""
        return self._tail_buffers()[1][:, :, : self.tail_len]

    @property
    def batch_size(self) -> int:
        """Sequences stored."""
        return self._tail_buffers()[0].shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tail is, and the pages when they are read."""
        return self._tail_buffers()[0].device

    def restore(self) -> tuple[Tensor, Tensor]:
        """Keys and values held, dense, in the model's dtype."""
        return reads.restore_both(self.view())

    def repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch ``repeats`` times, copies side by side."""
        self.index_select(Selection.repeating(self.batch_size, repeats))


class Selection(MadeOnce):
    """Sequences to take of several layers: checked, moved to a device, and made of a row table once for all of them.

    Args:
        indices: see ``checked_indices``; also as a list.
    """

    def __init__(self, indices: Tensor | Sequence[int]) -> None:
        super().__init__()
        self.indices = indices if isinstance(indices, Tensor) else torch.tensor(indices, device="cpu")

    @classmethod
    def repeating(cls, batch: int, repeats: int) -> "Selection":
        """Every sequence ``repeats`` times, copies side by side."""
        return cls(torch.arange(batch, device="cpu").repeat_interleave(repeats))

    def rows(self, batch: int) -> Tensor:
        """``checked_indices`` of ``batch`` sequences."""
        return self._once(batch, lambda: checked_indices(self.indices, batch))

    def on(self, device: torch.device, batch: int) -> Tensor:
        """``rows`` on ``device``."""
        return self._once((device, batch), lambda: self.rows(batch).to(device))

    def changes(self, batch: int) -> bool:
        """Whether it is anything else than all ``batch`` sequences in the order there is."""
        return self._once(("changes", batch), lambda: self.rows(batch).tolist() != list(range(batch)))

    def tail(self, tail: tuple[Tensor, Tensor] | LateTail) -> LateTail:
        """Of a tail's buffers (batch, ...), or of one that is to be taken yet; gathered with those of layers alike."""
        late = tail if isinstance(tail, LateTail) else None
        buffers = tail.source if isinstance(tail, LateTail) else tail
        kind = tuple((buffer.shape, buffer.dtype, buffer.device) for buffer in buffers)

        def made() -> tuple[TailsTaken, TailsTaken | None]:
            rows = self.rows(late.batch if late else len(buffers[0]))
            return (TailsTaken(late.group.rows[rows]), late.group) if late else (TailsTaken(rows), None)

        # With the group there was, so that no other takes its place in memory.
        return self._once(("tails", late and id(late.group), kind), made)[0].of(buffers)

    def of(self, table: RowTable | None, batch: int, pages: int) -> RowTable:
        """The table of the sequences taken, where ``table`` was that of all, None if each reads its own rows."""
        held = table or self._once(("identity", batch, pages), lambda: RowTable.identity(batch, pages))
        # With the table itself, so that no other takes its place in memory.
        return self._once(("of", id(held)), lambda: (RowTable(held.rows[self.rows(batch).numpy()]), held))[0]


Indices = Tensor | Sequence[int] | Selection
"""What says which sequences to take; see ``checked_indices``."""


def as_selection(indices: Indices) -> Selection:
    """``indices`` as a ``Selection``, or the one that they are."""
    return indices if isinstance(indices, Selection) else Selection(indices)


def no_tokens(key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
    """Of keys and values (batch, num_kv_heads, any, head_dim) the first none, sharing memory."""
    return key_states[:, :, :0], value_states[:, :, :0]


def checked_indices(indices: Tensor, batch: int) -> Tensor:
    """Sequences to take as int64 on the host.

    Args:
        indices: 1-D; integers from -batch to batch - 1, or bool (batch,).
        batch: sequences there are.

    Raises:
        TypeError: neither integers nor bool.
        ValueError: indices on a device that holds no numbers.
        IndexError: another shape, or a sequence that is not there.
    """
    place = "Int8Layer.batch_select_indices"
    if indices.is_meta:
        raise ValueError(
            f"{place}: indices must be on a device that holds numbers, such as the CPU, got {indices.device}."
        )
    if indices.dtype != torch.bool and (indices.is_floating_point() or indices.is_complex()):
        raise TypeError(f"{place}: indices must be integers or bool, got {indices.dtype}.")
    if indices.dim() != 1 or (indices.dtype == torch.bool and len(indices) != batch):
        raise IndexError(f"{place}: indices must be 1-D, bool ones ({batch},), got {tuple(indices.shape)}.")
    rows = indices.to("cpu")
    rows = rows.nonzero()[:, 0] if rows.dtype == torch.bool else rows.long()
    for row in rows.tolist():
        if not -batch <= row < batch:
            raise IndexError(f"{place}: indices must be below the batch of {batch} sequences, got {row}.")
    return torch.where(rows < 0, rows + batch, rows)
