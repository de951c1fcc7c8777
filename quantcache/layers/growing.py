"""``Int8Layer``: an int8 layer that grows without a limit."""

from typing import Any

import torch
from torch import Tensor

from quantcache.layers.base import BaseInt8Layer
from quantcache.store import traced
from quantcache.store.growing import Int8Pages
from quantcache.store.pages import Pages
from quantcache.store.read_log import FallbackPolicy, ReadLog
from quantcache.store.tensor import Int8Tensor


class GrowingInt8Layer(BaseInt8Layer):
    """What layers over ``Int8Pages`` share, with a window and without."""

    pages: Int8Pages | None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """See ``BaseInt8Layer.update``. In a graph of torch.compile it is called when the graph runs."""
        if torch.compiler.is_compiling():
            is_empty = self.get_seq_length() == 0
            states = self._update_traced(key_states, value_states, is_empty, kwargs.get("named"))
            if self.pages is not None:
                self.pages.seq_len += key_states.shape[2]  # for what the graph computes with it from here on
            return states
        pages = self.pages
        if pages is not None and pages.num_pages and not torch.is_grad_enabled():
            # The same in an eighth less of the host's time, which a decode step waits for: no gradient, nothing exact.
            return Int8Tensor.pair(pages.append(*self.checked(key_states, value_states)), self.read_log)
        return super().update(key_states, value_states)

    def _stored(self, pages: Pages) -> tuple[Tensor, Tensor]:
        if not torch.compiler.is_compiling():
            return super()._stored(pages)
        assert isinstance(pages, Int8Pages)
        traced.look(self._handle, traced.ITSELF)
        return traced.newest(self._handle, traced.ITSELF, self.get_mask_sizes(0)[0], *pages.no_states())

    def fork(self, policy: FallbackPolicy) -> "GrowingInt8Layer":
        """A layer of the same tokens, to go on with alone; see ``Int8Pages.fork``.

        Args:
            policy: of its cache.
        """
        made = type(self).__new__(type(self))
        pages = self.pages and self.pages.fork()
        read_log = ReadLog(policy, self.read_log.kernel, self.read_log.reason)
        made.__setstate__(vars(self) | {"pages": pages, "read_log": read_log})
        return made

    def reset(self) -> None:
        """Forget everything, shapes included, and give the memory back."""
        self.pages = None
        self.is_initialized = False
        self._accepted = ()
        self.read_log = ReadLog(self.read_log.policy)
        traced.forget(self)


class Int8Layer(GrowingInt8Layer):
    """Keys and values of one decoder layer in int8, all of them; see ``BaseInt8Layer`` for the arguments."""

    reader: str | None = None
    """The backend that attention takes, for a layer that holds nothing yet; None for the best there is."""

    @property
    def storage(self) -> str:
        """See ``BaseInt8Layer.storage``."""
        return "int8"

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that ``query_length`` new tokens will see."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def _new_pages(self, key_states: Tensor, value_states: Tensor) -> Int8Pages:
        pages = Int8Pages(key_states, value_states, self.residual_length)
        pages.reader = self.reader
        return pages
