"""``Int8SlidingLayer``: an int8 layer that drops what fell out of the model's attention window."""

import torch
from torch import Tensor

from quantcache.layers import _host
from quantcache.layers.growing import GrowingInt8Layer
from quantcache.quantization.scheme import DEFAULT_RESIDUAL_LENGTH, PAGE_SIZE
from quantcache.store.growing import Int8Pages
from quantcache.store.read_log import FallbackPolicy


class Int8SlidingLayer(GrowingInt8Layer):
    """Keys and values of one sliding-window or chunked-attention layer in int8, in bounded memory.

    It holds whole pages, so a few more tokens than the window; the model's mask hides them, as ``get_mask_sizes`` tells
    it which tokens there are. ``residual_length`` tokens more are kept, so that a rollback of up to that many needs no
    ``activate_past_recording``.

    Args:
        sliding_window: tokens that a query sees, itself included.
        residual_length: see ``BaseInt8Layer``.
        policy: see ``BaseInt8Layer``.
    """

    is_sliding = True

    def __init__(
        self, sliding_window: int, residual_length: int = DEFAULT_RESIDUAL_LENGTH, policy: FallbackPolicy | None = None
    ) -> None:
        super().__init__(residual_length, policy)
        self.sliding_window = sliding_window
        _host.note_window(self, sliding_window)
        self._records_past = False

    def __repr__(self) -> str:
        return f"Int8SlidingLayer(window={self.sliding_window}, seq_len={self.get_seq_length()}, nbytes={self.nbytes})"

    @property
    def storage(self) -> str:
        """What the report calls it."""
        return f"int8, window {self.sliding_window}"

    @property
    def record_past(self) -> bool:
        """Whether nothing is dropped before the next ``crop``, so that it can take back any number of tokens."""
        return self._records_past

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._records_past = value
        if self.pages is not None:
            self.pages.keeps_past = value

    def activate_past_recording(self) -> None:
        """Drop nothing before the next ``crop``."""
        self.record_past = True

    def fill(self, key_states: Tensor, value_states: Tensor, seq_len: int) -> None:
        """Take over the newest tokens of a sequence from a layer of another kind.

        The page in which they begin is filled up with copies of the first of them, which no query sees.

        Args:
            key_states: (batch, num_kv_heads, held, head_dim), the newest ``held`` of ``seq_len`` tokens.
            value_states: (batch, num_kv_heads, held, v_head_dim).
            seq_len: tokens of the sequence.
        """
        first_page, missing = divmod(seq_len - key_states.shape[2], PAGE_SIZE)
        pages = self._new_pages(key_states, value_states, first_page)
        pages.append(*(_filled_up(states, missing) for states in (key_states, value_states)))
        self._hold(pages, key_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that ``query_length`` new tokens will see."""
        offset = 0 if self.pages is None else self.pages.first_page * PAGE_SIZE
        return self.get_seq_length() - offset + query_length, offset

    def get_max_length(self) -> int:
        """The window."""
        return self.sliding_window

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens, see ``BaseInt8Layer.crop``, and then what fell out of the window.

        Args:
            tokens_to_remove: minus the number of tokens.

        Raises:
            ValueError: also where tokens that the next query would see are gone; the layer is then as it was.
        """
        super().crop(tokens_to_remove)
        if self.pages is not None and self._records_past:
            self.pages.keeps_past = False
            self.pages.drop_prefix()
            self.pages.keeps_past = True

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise what ``crop`` would raise, and do nothing else."""
        super().check_crop(tokens_to_remove)
        if self.pages is None or not tokens_to_remove:
            return
        seq_len, gone = self.get_seq_length(), self.pages.first_page * PAGE_SIZE
        # The next query, at seq_len + tokens_to_remove, sees the window - 1 tokens before it.
        if gone and seq_len + tokens_to_remove - (self.sliding_window - 1) < gone:
            most = seq_len - (self.sliding_window - 1) - gone
            raise ValueError(
                f"Int8SlidingLayer.crop: at most {most} of {seq_len} tokens can be removed once "
                f"the window of {self.sliding_window} is full, got {-tokens_to_remove}. "
                "Call activate_past_recording() before the update that may be taken back."
            )

    def reset(self) -> None:
        """Forget everything, see ``GrowingInt8Layer.reset``, and stop recording the past."""
        super().reset()
        self._records_past = False

    def _exact_tokens(self) -> int:
        """Tokens that transformers' own layer would hold: those that the next one sees."""
        return min(self.get_seq_length(), self.sliding_window - 1)

    def _new_pages(self, key_states: Tensor, value_states: Tensor, first_page: int = 0) -> Int8Pages:
        keep_tokens = self.sliding_window - 1 + self.residual_length
        pages = Int8Pages(key_states, value_states, self.residual_length, keep_tokens, first_page)
        pages.keeps_past = self._records_past
        return pages


def _filled_up(states: Tensor, missing: int) -> Tensor:
    return torch.cat([states[:, :, :1].expand(-1, -1, missing, -1), states], dim=2)
