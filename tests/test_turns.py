"""Do calls of the benchmarks take turns, and does only their own time count?"""

import functools
import os
import threading

import pytest
import torch

from tests.benchmarks import turns
from tests.benchmarks.turns import PassOn, Turns, in_pairs, typical


def test_calls_go_on_one_at_a_time_and_one_that_is_done_leaves_the_others_to_themselves() -> None:
    seen: list[tuple[str, int]] = []

    def call(name: str, steps: int, pass_on: PassOn) -> int:
        for step in range(steps):
            seen.append((name, step))
            pass_on()
        return steps

    steps = {"one": 2, "two": 4, "three": 1}
    calls = {name: lambda pass_on, name=name, count=count: call(name, count, pass_on) for name, count in steps.items()}
    with Turns(steps) as taking:
        assert taking.take(calls) == steps
    assert [name for name, _ in seen] == ["one", "two", "three", "one", "two", "two", "two"]
    assert all([step for who, step in seen if who == name] == list(range(count)) for name, count in steps.items())


def test_what_a_call_raises_is_raised_once_the_others_are_done() -> None:
    ended = []

    def fails(pass_on: PassOn) -> None:
        pass_on()
        raise LookupError("one fails")

    def ends(pass_on: PassOn) -> None:
        for _ in range(3):
            pass_on()
        ended.append(True)

    with Turns(["one", "two"]) as taking, pytest.raises(LookupError, match="one fails"):
        taking.take({"one": fails, "two": ends})
    assert ended == [True]


def test_what_others_take_meanwhile_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.zeros(2, 7, dtype=torch.int64)
    passed = 0.0

    def now() -> float:
        nonlocal passed
        passed += 1
        return passed

    def others() -> None:
        nonlocal passed
        passed += 100

    monkeypatch.setattr(turns, "now", now)
    clock = turns.Clock(others)
    for tokens in (1, 3, 5):
        assert clock(ids[:, :tokens], None).tolist() == [False, False]
    assert clock.first() == 1
    assert clock.per_token() == [1 / 4, 1 / 4]
    assert [tokens for _, tokens in clock.marks] == [1, 3, 5]


def test_a_thread_stays_for_the_calls_of_its_name() -> None:
    with Turns(["one", "two"]) as taking:
        found = [taking.take({name: lambda _: threading.get_ident() for name in ("one", "two")}) for _ in "ab"]
    assert found[0] == found[1]
    assert found[0]["one"] != found[0]["two"]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not say where a thread may run")
def test_the_threads_share_a_processor_and_leave_the_others_to_this_one() -> None:
    before = os.sched_getaffinity(0)
    with Turns(["one", "two"]) as taking:
        found = taking.take({name: lambda _: os.sched_getaffinity(0) for name in ("one", "two")})
    assert found["one"] == found["two"] == {max(before)}
    assert os.sched_getaffinity(0) == before


def test_pairs_change_places_and_one_more_comes_before_them() -> None:
    begun: list[str] = []

    def call(name: str, pass_on: PassOn) -> int:
        begun.append(name)
        pass_on()
        return len(begun)

    found = in_pairs({name: functools.partial(call, name) for name in ("one", "two")}, 2)
    assert begun == ["one", "two", "two", "one", "one", "two"]
    assert found == {"one": [4, 6], "two": [4, 6]}


def test_a_step_counts_with_its_median() -> None:
    assert typical([[1, 2, 30], [10, 2, 3], [1, 20, 3]]) == 6
    assert typical([[1, 2, 3], [10, 2]]) == 9  # which took other steps
