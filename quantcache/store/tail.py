"""The buffers of an exact tail that grows: keys and values (batch, num_kv_heads, capacity, head_dim)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantcache.quantization.scheme import TAIL_STEP
from quantcache.store import writes
from quantcache.store.offloading import write_access


def write_tail(
    key_states: Tensor, value_states: Tensor, key_buffer: Tensor, value_buffer: Tensor, used: int, backend: str
) -> None:
    """Write new tokens behind the first ``used`` of the buffers."""
    with write_access(key_buffer):
        writes.append_tail(key_states, value_states, key_buffer, value_buffer, used, backend)


def roomier(key_buffer: Tensor, value_buffer: Tensor, used: int, tokens: int, backend: str) -> tuple[Tensor, Tensor]:
    """Larger buffers, for at least ``tokens`` tokens, that begin with the first ``used`` of these."""
    capacity = -(-tokens // TAIL_STEP) * TAIL_STEP
    key_made, value_made = (
        buffer.new_empty(*buffer.shape[:2], capacity, buffer.shape[3]) for buffer in (key_buffer, value_buffer)
    )
    if used:
        tails = first_tokens(key_buffer, used), first_tokens(value_buffer, used)
        writes.append_tail(*tails, key_made, value_made, 0, backend)
    return key_made, value_made


def first_tokens(buffer: Tensor, tokens: int) -> Tensor:
    """Of a buffer (batch, num_kv_heads, capacity, head_dim) the first ``tokens``, sharing memory."""
    return buffer if buffer.shape[2] == tokens else buffer.narrow(2, 0, tokens)


def copied(key_states: Tensor, value_states: Tensor, backend: str = "torch", room: int = 0) -> tuple[Tensor, Tensor]:
    """Buffers of their own for some tokens, with ``room`` for more behind them."""
    tokens = key_states.shape[2]
    return roomier(key_states, value_states, tokens, tokens + room, backend)


def gathers_together(device: torch.device) -> bool:
    """Whether tails of several layers are gathered together: where a launch takes longer than the bytes."""
    return device.type != "cpu"


def take_rows(parts: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """The sequences ``rows`` (int64, on the device) of tensors alike, each (batch, ...), in other memory."""
    if len(parts) > 1 and gathers_together(rows.device):
        return joint_rows(parts, rows)
    return [part.index_select(0, rows) for part in parts]


def joint_rows(parts: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """``take_rows`` in two operations, into memory that the results share."""
    return list(torch.stack(list(parts)).index_select(1, rows).unbind())


class TailsTaken:
    """Sequences of the tails of layers alike, which are gathered when they are read, of all layers together.

    Until then a cache that is reordered has moved no byte.

    Args:
        rows: int64 on the host, the sequences to take.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._sources: list[tuple[Tensor, Tensor]] = []
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, buffers: tuple[Tensor, Tensor]) -> "LateTail":
        """Those of the tail with these buffers, which nobody writes from now on."""
        self._sources.append(buffers)
        return LateTail(self, len(self._sources) - 1, buffers)

    def take(self, place: int) -> tuple[Tensor, Tensor]:
        """The buffers of the tail that came as number ``place``."""
        if place not in self._taken:
            device = self._sources[place][0].device
            waiting = [other for other in range(len(self._sources)) if other not in self._taken]
            places = waiting if gathers_together(device) else [place]
            on_device = self.rows.to(device)
            keys, values = (take_rows([self._sources[at][which] for at in places], on_device) for which in (0, 1))
            self._taken.update(zip(places, zip(keys, values, strict=True), strict=True))
        return self._taken[place]


@dataclass(frozen=True)
class LateTail:
    """The buffers of a tail, once they are asked for.

    Attributes:
        group: what it is taken with.
        place: its number there.
        source: the buffers that it is taken from.
    """

    group: TailsTaken
    place: int
    source: tuple[Tensor, Tensor]

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.group.rows)

    def take(self) -> tuple[Tensor, Tensor]:
        """The buffers."""
        return self.group.take(self.place)
