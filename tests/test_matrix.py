"""Does every operation keep its promise on every architecture? The table of docs/supported.md, cell by cell."""

from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from quantcache.store.read_log import ReadLog
from tests.architectures import ARCHITECTURES, Architecture
from tests.cases import NEWEST, Case, WithExactCache, host_warnings, quiet_flex
from tests.conftest import devices
from tests.matrix import BY_IMPLEMENTATION, OPERATIONS, RESTORING
from tests.refusals import OLDER_REFUSED, REFUSED
from tests.supported import reading_here

SHORT = ("forward pass", "greedy decoding", "fixed capacity", "beam search", "prompt lookup")
"""Operations of the short form, each by another way into transformers, with a model's first implementation."""


def is_short(architecture: Architecture, implementation: str, operation: str) -> bool:
    return operation in SHORT and implementation == architecture.implementations[0]


FOUND = [
    (architecture, implementation, operation)
    for architecture in ARCHITECTURES
    for implementation in architecture.implementations
    for operation in OPERATIONS
    if implementation == architecture.implementations[0] or operation in BY_IMPLEMENTATION[implementation]
    if operation != "output_attentions" or implementation == "eager"
]


def marked() -> Iterator[Any]:
    """Every cell as a parameter. ``.ci/run`` has the short form, and of the others, by operation, every third model."""
    alike = Counter(cell[1:] for cell in FOUND if not is_short(*cell))
    seen = Counter[tuple[str, str]]()
    for cell in FOUND:
        if is_short(*cell):
            yield pytest.param(*cell)
            continue
        # Another one for each operation, so that no model is left out.
        first = list(OPERATIONS).index(cell[2]) % min(3, alike[cell[1:]])
        is_third = seen[cell[1:]] % 3 == first
        seen[cell[1:]] += 1
        yield pytest.param(*cell, marks=[pytest.mark.slow] if is_third else [pytest.mark.slow, pytest.mark.sweep])


CELLS = list(marked())


def identity(value: object) -> str:
    return value.name if isinstance(value, Architecture) else str(value)


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str, str], Case]:
    """One model for all operations on it; none of them changes it."""
    return {}


@pytest.fixture
def restored_reads(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """The reasons of all reads that a report calls "restored", as they come."""
    found: list[str | None] = []

    def listening(noted: Any) -> Any:
        def note(log: ReadLog, *given: Any) -> None:
            noted(log, *given)
            if log.kernel == "restored":
                found.append(log.reason)

        return note

    for name in ("fell_back", "cut_gradients"):
        monkeypatch.setattr(ReadLog, name, listening(getattr(ReadLog, name)))
    return found


@pytest.mark.filterwarnings("ignore::quantcache.FallbackWarning")
@host_warnings
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize(("architecture", "implementation", "operation"), CELLS, ids=identity)
def test_the_operation_keeps_its_promise(
    models: dict[tuple[str, str, str], Case],
    architecture: Architecture,
    implementation: str,
    operation: str,
    device: str,
    restored_reads: list[str | None],
) -> None:
    """And a report says "restored" only where the page does."""
    key = (architecture.name, implementation, device)
    if key not in models:
        models.clear()
        models[key] = Case(architecture, implementation, device)
    case = models[key]
    refusal = (REFUSED if NEWEST else REFUSED | OLDER_REFUSED).get((architecture.name, operation))
    with quiet_flex() if implementation == "flex_attention" else nullcontext():
        if refusal is None:
            OPERATIONS[operation](case)
            restores = operation in RESTORING or reading_here(architecture, implementation) == "restored"
            assert restores or not restored_reads
            return
        with pytest.raises(refusal.error, match=refusal.match):
            OPERATIONS[operation](case)
        if refusal.by == "transformers":
            with pytest.raises(refusal.error, match=refusal.match):
                OPERATIONS[operation](WithExactCache(architecture, implementation, device))
