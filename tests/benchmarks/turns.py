"""Calls of ``generate()`` that take turns by steps, so that a host that is now faster, now slower is so for all."""

import itertools
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
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

    def per_token(self) -> list[float]:
        """Seconds of each step behind the first, divided by the tokens of all of them."""
        tokens = self.marks[-1][1] - self.marks[0][1]
        return [(end - begin) / tokens for (begin, _), (end, _) in itertools.pairwise(self.marks)]


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


def _stay_together() -> None:
    """Keep this thread on the last of the processors that the process may use."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(os.getpid()))})


class Turns:
    """A thread for each of some calls, which run in turn; to be left as a context manager.

    A thread stays for later calls of its name, since torch keeps by thread what it has prepared, as cuDNN's plans. All
    run on one processor, where the system lets them, since processors, too, are now faster and now slower.

    Args:
        names: of the calls.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._threads = {name: ThreadPoolExecutor(1, initializer=_stay_together) for name in names}

    def __enter__(self) -> "Turns":
        return self

    def __exit__(self, *raised: object) -> None:
        for thread in self._threads.values():
            thread.shutdown()

    def take(self, calls: Mapping[str, Callable[[PassOn], Result]]) -> dict[str, Result]:
        """What the calls return, each of which runs only when it is its turn.

        One that is done leaves the others to themselves.

        Args:
            calls: by name, in the order of their turns; each is given what it has to call behind each step.

        Raises:
            Exception: what one of the calls raised, once all have ended.
        """
        ring = _Ring(list(calls))

        def run(name: str, call: Callable[[PassOn], Result]) -> Result:
            ring.waiting[name].acquire()
            try:
                return call(lambda: ring.pass_on(name))
            finally:
                ring.leave()

        begun = {name: self._threads[name].submit(run, name, call) for name, call in calls.items()}
        ring.waiting[ring.order[0]].release()
        wait(begun.values())
        return {name: done.result() for name, done in begun.items()}


def in_pairs(calls: Mapping[str, Callable[[PassOn], Result]], pairs: int) -> dict[str, list[Result]]:
    """What the calls return in each of ``pairs``, every other time in the other order.

    One more comes before, which prepares what a thread keeps.
    """
    runs: dict[str, list[Result]] = {name: [] for name in calls}
    with Turns(calls) as turns:
        turns.take(calls)
        for index in range(pairs):
            found = turns.take({name: calls[name] for name in sorted(calls, reverse=index % 2 == 0)})
            for name, result in found.items():
                runs[name].append(result)
    return runs


def typical(runs: Sequence[Sequence[float]]) -> float:
    """Seconds of a run in steps: the sum of the medians of each step, or of runs of different steps the median."""
    if len(set(map(len, runs))) > 1:
        return statistics.median(map(sum, runs))
    return sum(map(statistics.median, zip(*runs, strict=True)))
