"""Calls of ``generate()`` that take turns by steps, so that a host that is now faster, now slower is so for all."""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import StoppingCriteria

Result = TypeVar("Result")

PassOn = Callable[[], None]
"""What a call calls behind each of its steps; it returns when it is that call's turn again."""


def stay() -> None:
    """What a call that takes no turns passes on."""


def now() -> float:
    """Seconds, once a GPU that is in use is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(StoppingCriteria):
    """Notes when each step of ``generate()`` is done, and how many tokens there are then. Stops nothing.

    Args:
        pass_on: called behind each step; what others take meanwhile does not count.
    """

    def __init__(self, pass_on: PassOn = stay) -> None:
        self.start, self.marks = now(), list[tuple[float, int]]()
        self._pass_on, self._others = pass_on, 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = now()
        self.marks.append((done - self._others, input_ids.shape[1]))
        self._pass_on()
        self._others += now() - done
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def first(self) -> float:
        """Seconds to the first token."""
        return self.marks[0][0] - self.start

    def per_token(self) -> float:
        """Seconds of each token behind the first."""
        (begin, had), (end, have) = self.marks[0], self.marks[-1]
        return (end - begin) / (have - had)


class _Ring:
    """Who goes on when another has passed on."""

    def __init__(self, names: list[str]) -> None:
        self.waiting = {name: threading.Semaphore(0) for name in names}
        self.order = names

    def pass_on(self, name: str) -> None:
        """Let the next one go on until it is the turn of ``name`` again."""
        self.order = [*self.order[1:], name]
        self.waiting[self.order[0]].release()
        self.waiting[name].acquire()

    def leave(self) -> None:
        """Let the next one go on, for good."""
        self.order = self.order[1:]
        if self.order:
            self.waiting[self.order[0]].release()


def taken_in_turn(calls: Mapping[str, Callable[[PassOn], Result]]) -> dict[str, Result]:
    """What the calls return, each of which runs in a thread of its own and only when it is its turn.

    A call that is done leaves the others to themselves.

    Args:
        calls: by name; each is given what it has to call behind each step.

    Raises:
        Exception: what the first of the calls raised, once all have ended.
    """
    ring, results, raised = _Ring(list(calls)), dict[str, Result](), list[BaseException]()

    def run(name: str, call: Callable[[PassOn], Result]) -> None:
        ring.waiting[name].acquire()
        try:
            results[name] = call(lambda: ring.pass_on(name))
        except BaseException as error:  # raised where the calls were asked for
            raised.append(error)
        finally:
            ring.leave()

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in calls.items()]
    for thread in threads:
        thread.start()
    ring.waiting[ring.order[0]].release()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]
    return {name: results[name] for name in calls}
