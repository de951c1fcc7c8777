"""The constants of the number format: what a page is and how its metadata is packed.

A *page* is 64 consecutive tokens of one layer. Keys share a scale along the tokens of a page (granularity
``per_channel``), values along the channels of a token (``per_token``). Both are affine:

    restored = scale * (q - zero_point)

``q`` is int8, ``scale`` bfloat16 and ``zero_point`` int16, the last two packed as one pair of 16-bit words. A
bfloat16 scale spans the whole range of float32, and 8 significant bits times a 16-bit integer is exact in float32,
so restoring to float32 adds no rounding of its own.
"""

from typing import Final

PAGE_SIZE: Final = 64
"""Tokens in a page."""

DEFAULT_RESIDUAL_LENGTH: Final = 32
"""Newer tokens that must exist before a page is quantised."""

MAX_RESIDUAL_LENGTH: Final = 1 << 30
"""Kernels count tokens in int32, in which a page more than these must fit."""

QMIN: Final = -128
QMAX: Final = 127

MAX_STEPS: Final = 254
"""Scales between the smallest and the largest element of a group. Rounding each end outwards adds at most one step,
which makes 255, all that ``QMIN..QMAX`` has."""

MAX_ABS_STEPS: Final = 32512
"""Scales between zero and the largest magnitude of a group, so that ``zero_point`` stays inside int16. It floors the
scale of nearly constant groups at 1/32512 of their magnitude: 64 times finer than bfloat16, 16 times than float16."""

MIN_SCALE: Final = 2.0**-120
"""Scale of an all-zero group. Far enough above the smallest normal float32 that half and a quarter of it are normal."""

METADATA_SCALE: Final = 0
METADATA_ZERO_POINT: Final = 1
"""Places of the two 16-bit words in the last axis of a metadata tensor."""

MAX_NATIVE_WINDOW: Final = 1024
"""Sliding-window layers up to this window stay transformers' own: with a tail of up to 95 exact tokens and the page
that is half out of the window, int8 saves least where there is least to save."""

TAIL_STEP: Final = 16
"""Tokens by which the tail's buffer grows: one small allocation in 16 steps, at most 16 unused tokens."""

SEGMENT_GROWTH: Final = 16
"""A new segment holds one sixteenth of the pages there are, at least one, so slack stays under 1/16 of the pages.
Two pages at least would put a head_dim of 128 above 0.55 of bfloat16 at 2048 tokens."""

WINDOW_SEGMENTS: Final = 8
"""Segments that hold a window's pages; what fell out of it is given back a segment at a time. Each takes the host a
launch and four allocations to fill, which with sixteen took a quarter of the host's time for 512 new tokens."""
