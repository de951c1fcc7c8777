"""Does every operation keep its promise on every architecture? The table of docs/supported.md, cell by cell."""

from contextlib import nullcontext

import pytest

from tests.architectures import ARCHITECTURES, Architecture
from tests.cases import NEWEST, Case, WithExactCache, host_warnings, quiet_flex
from tests.conftest import devices
from tests.matrix import BY_IMPLEMENTATION, OPERATIONS
from tests.refusals import OLDER_REFUSED, REFUSED

SHORT = ("forward pass", "greedy decoding", "fixed capacity", "beam search", "prompt lookup")
"""Operations of the short form, each by another way into transformers, with a model's first implementation."""

CELLS = [
    pytest.param(
        *(architecture, implementation, operation),
        marks=[] if operation in SHORT and implementation == architecture.implementations[0] else pytest.mark.slow,
    )
    for architecture in ARCHITECTURES
    for implementation in architecture.implementations
    for operation in OPERATIONS
    if implementation == architecture.implementations[0] or operation in BY_IMPLEMENTATION[implementation]
    if operation != "output_attentions" or implementation == "eager"
]


def identity(value: object) -> str:
    return value.name if isinstance(value, Architecture) else str(value)


@pytest.fixture(scope="module")
def models() -> dict[tuple[str, str, str], Case]:
    """One model for all operations on it; none of them changes it."""
    return {}


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
) -> None:
    key = (architecture.name, implementation, device)
    if key not in models:
        models.clear()
        models[key] = Case(architecture, implementation, device)
    case = models[key]
    refusal = (REFUSED if NEWEST else REFUSED | OLDER_REFUSED).get((architecture.name, operation))
    with quiet_flex() if implementation == "flex_attention" else nullcontext():
        if refusal is None:
            OPERATIONS[operation](case)
            return
        with pytest.raises(refusal.error, match=refusal.match):
            OPERATIONS[operation](case)
        if refusal.by == "transformers":
            with pytest.raises(refusal.error, match=refusal.match):
                OPERATIONS[operation](WithExactCache(architecture, implementation, device))
