"""Closed pages in host memory, for a cache that keeps only the layer at work on the GPU.

A closed page never changes. So it travels to the host once, when it is closed, and from then on only back: a decode
step moves each int8 byte over the bus in one direction, a quarter of what moving bfloat16 both ways takes.
"""

import functools
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from quantcache.store.segments import Segment, drop_beyond, pages_between


@functools.cache
def copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The stream on which pages come back to ``device``, beside the one that computes; None where there are none."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


class HostCopy:
    """Copies of a layer's segments in host memory, pinned for a GPU.

    Args:
        segments: copies to begin with, in the order of the layer's segments.
        num_pages: pages of them that hold what the layer holds.
    """

    def __init__(self, segments: list[Segment] | None = None, num_pages: int = 0) -> None:
        self.segments = segments or []
        self.num_pages = num_pages

    @property
    def nbytes(self) -> int:
        """Bytes of host memory."""
        return sum(segment.nbytes for segment in self.segments)

    def save(self, segments: list[Segment], num_pages: int) -> None:
        """Copy the pages that are not here yet; on a GPU the copy is queued behind the work that writes them.

        Args:
            segments: the layer's segments; those known from the last call come first, unchanged.
            num_pages: closed pages in them.
        """
        first = 0
        for index, segment in enumerate(segments):
            if index == len(self.segments):
                self.segments.append(Segment(*(_host_memory(part) for part in segment)))
            copy = self.segments[index]
            start, stop = max(self.num_pages - first, 0), min(num_pages - first, segment.capacity)
            if start < stop:
                _copy(segment.narrow(start, stop), copy.narrow(start, stop))
            first += segment.capacity
        self.num_pages = num_pages

    def load(self, device: torch.device, stream: torch.cuda.Stream | None) -> tuple[list[Segment], torch.Event | None]:
        """The segments on ``device`` again.

        Args:
            device: where to.
            stream: what copies, beside the current stream; None: the current stream.

        Returns:
            The segments, and what the current stream must wait for before it reads them.
        """
        # Memory comes from the current stream, on which it is read and let go. What was queued there until now may
        # still use it, or be on the way to the host; hence the wait.
        made = [Segment(*(torch.empty_like(part, device=device) for part in copy)) for copy in self.segments]
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(device))
        beside: AbstractContextManager[object] = nullcontext() if stream is None else torch.cuda.stream(stream)
        first = 0
        with beside:
            for copy, segment in zip(self.segments, made, strict=True):
                used = min(self.num_pages - first, segment.capacity)
                _copy(copy.narrow(0, used), segment.narrow(0, used))
                first += segment.capacity
                if stream is not None:
                    for part in segment:
                        part.record_stream(stream)  # a cache that is dropped meanwhile must not hand the memory on
        return made, None if stream is None else stream.record_event()

    def forget(self, segments: int, pages: int) -> None:
        """Drop the oldest ``segments``, which hold ``pages`` pages."""
        self.segments = self.segments[segments:]
        self.num_pages = max(self.num_pages - pages, 0)

    def narrow(self, num_pages: int) -> "HostCopy":
        """Of the first ``num_pages``, without slack, sharing memory."""
        return HostCopy(list(pages_between(self.segments, 0, num_pages)), min(self.num_pages, num_pages))

    def crop(self, num_pages: int) -> None:
        """Forget pages beyond ``num_pages``, and the segments that then hold none."""
        drop_beyond(self.segments, num_pages)
        self.num_pages = min(self.num_pages, num_pages)


def _host_memory(part: Tensor) -> Tensor:
    return torch.empty(part.shape, dtype=part.dtype, device="cpu", pin_memory=part.device.type == "cuda")


def _copy(source: Segment, target: Segment) -> None:
    # Other devices do not order a copy to the host before what reads it there.
    non_blocking = "cuda" in (source.key_qdata.device.type, target.key_qdata.device.type)
    with write_access(target.key_qdata):
        for part, copy in zip(source, target, strict=True):
            copy.copy_(part, non_blocking=non_blocking)


def write_access(memory: Tensor) -> AbstractContextManager[None]:
    """What a write into ``memory`` needs: tensors made in inference mode can only be written there."""
    if memory.is_inference() and not torch.is_inference_mode_enabled():
        return torch.inference_mode()
    return nullcontext()
