"""One file of the caches of several processes, each of which holds some KV heads.

What is written is what one process would write: rank 0 takes every tensor from all ranks, some pages at a time, with
the heads in the order of the ranks. So a file says nothing of how many processes made it, and any number can load it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, distributed

from quantcache.files import pages, schema
from quantcache.files.header import Entry
from quantcache.layers.parallel import Ranks
from quantcache.store.view import PagesView

_HEADS_OF_PAGES: Final = 2
_HEADS_OF_STATES: Final = 1
"""Axis of the KV heads: in (pages, batch, num_kv_heads, ...), and in (batch, num_kv_heads, tokens, head_dim)."""

Pieces = Callable[[], Iterable[Tensor]]


def head_axis(part: str) -> int:
    """The axis of the KV heads in a part of a layer, of int8 pages or of transformers' keys and values."""
    return _HEADS_OF_PAGES if part in schema.PAGE_PARTS else _HEADS_OF_STATES


def _is_whole(name: str) -> bool:
    """Whether every rank takes all of a tensor, which has no heads."""
    return name == schema.INPUT_IDS or name.endswith(f".{schema.ROW_TABLE}")


def check_part(place: str, name: str, part: str) -> None:
    """Refuse what is not known to be cut by heads.

    Raises:
        NotImplementedError: ``part`` is no keys and no values.
    """
    if part not in (*schema.PARTS, "keys", "values"):
        raise NotImplementedError(
            f"{place}: of several processes, a file can hold keys and values alone, got {name}. "
            "Save and load caches of this model in one process."
        )


def check_shares(entries: Mapping[str, Entry], ranks: Ranks | None) -> None:
    """Refuse a file whose heads the ranks cannot share.

    Raises:
        NotImplementedError: see ``check_part``.
        ValueError: a number of heads that the ranks do not divide.
    """
    for name, entry in entries.items() if ranks is not None else ():
        if _is_whole(name):
            continue
        part = name.split(".", 2)[2]
        check_part("QuantizedInt8Cache.load", name, part)
        heads = entry.shape[head_axis(part)]
        if ranks is not None and ranks.is_split and heads % ranks.size:
            raise ValueError(
                f"QuantizedInt8Cache.load: the number of ranks must divide the KV heads, {heads} in {name}, "
                f"got {ranks.size} ranks."
            )


def local_heads(name: str, whole: Tensor, ranks: Ranks | None) -> Tensor:
    """This rank's part of the tensor ``name`` of a file, in memory of its own where it is not all of it."""
    if ranks is None or _is_whole(name) or not ranks.is_split:
        return whole
    axis = head_axis(name.split(".", 2)[2])
    share = whole.shape[axis] // ranks.size
    return whole.narrow(axis, ranks.rank * share, share).contiguous()


def whole_spec(
    part: str, spec: tuple[torch.dtype, tuple[int, ...]], ranks: Ranks
) -> tuple[torch.dtype, tuple[int, ...]]:
    """Dtype and shape of the tensor of all ranks, from those of one rank's."""
    dtype, shape = spec
    axis = head_axis(part)
    return dtype, (*shape[:axis], ranks.whole_heads(shape[axis]), *shape[axis + 1 :])


def whole_pages(view: PagesView, part: str, ranks: Ranks) -> Iterator[Tensor]:
    """As ``pages.pages_pieces``, of all ranks; on rank 0, the others yield nothing. Every rank must exhaust it.

    Args:
        view: what this rank has of the layer.
        part: which tensor.
        ranks: who takes part.
    """
    if part not in schema.PAGE_PARTS:
        yield from whole_states(getattr(view, part), ranks)
        return
    segments = [getattr(segment, part) for segment in view.segments]
    if not segments:
        return
    a_page = segments[0][:1].nbytes * ranks.size
    step = max(1, pages.STAGED_BYTES // a_page)
    # The same cut on every rank, wherever its segments end.
    for start in range(0, view.num_pages, step):
        yield from _gathered(_rows(segments, start, start + step), _HEADS_OF_PAGES, ranks)


def whole_states(states: Tensor, ranks: Ranks) -> Iterator[Tensor]:
    """As ``whole_pages``, of keys or values (batch, num_kv_heads, tokens, head_dim)."""
    if states.numel():
        yield from _gathered(states, _HEADS_OF_STATES, ranks)


def _rows(parts: Iterable[Tensor], start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of tensors that lie one behind the other."""
    found, first = [], 0
    for part in parts:
        low, high = max(start - first, 0), min(stop - first, len(part))
        if low < high:
            found.append(part[low:high])
        first += len(part)
    return torch.cat(found)


def _gathered(local: Tensor, axis: int, ranks: Ranks) -> Iterator[Tensor]:
    if not ranks.is_split:
        if ranks.rank == 0:
            yield local
        return
    # As bytes, since NCCL knows no int16.
    sent = local.to(ranks.device).contiguous().view(torch.uint8)
    received = [torch.empty_like(sent) for _ in range(ranks.size)] if ranks.rank == 0 else None
    distributed.gather(sent, received, dst=ranks.first, group=ranks.group)
    if received is not None:
        yield torch.cat(received, dim=axis).view(local.dtype)


def agree(ranks: Ranks, told: Mapping[str, Any], failure: Exception | None) -> None:
    """Have all ranks go on, or none.

    Args:
        ranks: who takes part; every rank must call this.
        told: what must be the same on all.
        failure: why this rank cannot go on.

    Raises:
        Exception: ``failure``, on the rank that has it.
        ValueError: another rank has one, or was told something else.
    """
    everyone: list[Any] = [None] * ranks.size
    mine = None if failure is None else f"{type(failure).__name__}: {failure}"
    distributed.all_gather_object(everyone, (dict(told), mine), group=ranks.group)
    if failure is not None:
        raise failure
    for rank, (_, problem) in enumerate(everyone):
        if problem is not None:
            raise ValueError(f"QuantizedInt8Cache.save: every rank must be able to save, rank {rank} got {problem}")
    for rank, (other, _) in enumerate(everyone):
        for name in told:
            if other[name] != everyone[0][0][name]:
                raise ValueError(
                    f"QuantizedInt8Cache.save: every rank must hold the same {name}, got "
                    f"{repr(everyone[0][0][name])[:200]} on rank 0 and {repr(other[name])[:200]} on rank {rank}."
                )


def write_together(
    ranks: Ranks, order: Iterable[str], pieces: Mapping[str, Pieces], write: Callable[[Callable[[str], Any]], None]
) -> None:
    """Let rank 0 write what all ranks have; returns on every rank once the file is there.

    Args:
        ranks: who takes part; every rank must call this, after ``agree``.
        order: of the tensors in the file.
        pieces: of each of them, from ``whole_pages`` and ``whole_states``.
        write: writes the file on rank 0, given what yields the pieces of a name.

    Raises:
        OSError: the file cannot be written.
    """
    # Made before they run. Whatever happens to the file, rank 0 takes all that the others send, so that none waits.
    streams = {name: iter(pieces[name]()) for name in order}
    failure: Exception | None = None
    if ranks.rank == 0:
        try:
            write(streams.__getitem__)
        except Exception as error:
            failure = error
    for stream in streams.values():
        for _ in stream:
            pass
    message = [None if failure is None else f"{type(failure).__name__}: {failure}"]
    distributed.broadcast_object_list(message, src=ranks.first, group=ranks.group)
    if failure is not None:
        raise failure
    if message[0] is not None:
        raise OSError(f"QuantizedInt8Cache.save: rank 0 must be able to write the file, got {message[0]}.")
