"""Writes docs/supported.md from the matrix: ``python -m tests.supported``."""

import inspect
from collections.abc import Iterable
from pathlib import Path

from transformers.models.gptj import modeling_gptj

from quantcache.layers.releases import TESTED
from tests.architectures import ARCHITECTURES, Architecture
from tests.causal_models import LEFT_OUT, NEEDS_CONFIG, NO_CONFIG_NEEDED, NO_FIXED_CAPACITY
from tests.matrix import BY_IMPLEMENTATION, OPERATIONS
from tests.refusals import OLDER_REFUSED, REFUSED

PAGE = Path(__file__).parent.parent / "docs" / "supported.md"
IMPLEMENTATIONS = ("sdpa", "eager", "flex_attention")
NATIVE = {
    "DynamicSlidingWindowLayer": "small window, transformers' own",
    "LinearAttentionLayer": "linear attention or convolution, transformers' own",
    "LinearAttentionAndFullAttentionLayer": "both in one, transformers' own",
}


def reading(architecture: Architecture, implementation: str) -> str:
    """How the int8 layers of a model are read by an attention implementation: "int8", "restored", "own" or "-"."""
    if implementation not in architecture.implementations:
        return "-"
    if not any("int8" in storage for storage in architecture.storage):
        return "own"
    return "restored" if architecture.restores or (implementation == "eager" and architecture.eager) else "int8"


def reading_here(architecture: Architecture, implementation: str) -> str:
    """``reading`` with the transformers that is installed: in older ones GPT-J has attention of its own."""
    if (architecture.name, implementation) == ("GPT-J", "eager") and not hasattr(
        modeling_gptj, "eager_attention_forward"
    ):
        return "restored"
    return reading(architecture, implementation)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _models() -> str:
    return table(
        ("model", "layers", *(f"`{name}`" for name in IMPLEMENTATIONS), "note"),
        (
            (
                architecture.name,
                "; ".join(NATIVE.get(storage, storage) for storage in dict.fromkeys(architecture.storage)),
                *(reading(architecture, implementation) for implementation in IMPLEMENTATIONS),
                architecture.note or architecture.restores or architecture.eager,
            )
            for architecture in ARCHITECTURES
        ),
    )


def _operations() -> str:
    def promise(name: str) -> str:
        return " ".join((inspect.getdoc(OPERATIONS[name]) or "").split())

    def asked_of(name: str) -> str:
        also = [f"`{implementation}`" for implementation, names in BY_IMPLEMENTATION.items() if name in names]
        if name == "output_attentions":
            return "`eager`"
        return ", ".join(["the first implementation of each model", *also])

    return table(("operation", "promise", "with"), ((name, promise(name), asked_of(name)) for name in OPERATIONS))


def _versions() -> str:
    return table(("", "oldest tested", "newest tested"), ((name, *tested) for name, tested in sorted(TESTED.items())))


def _refusals() -> str:
    return table(
        ("model", "operation", "refused by", "because"),
        (
            (model, operation, refusal.by, refusal.reason)
            for (model, operation), refusal in (REFUSED | OLDER_REFUSED).items()
        ),
    )


def listed(model_types: Iterable[str]) -> str:
    return ", ".join(f"`{model_type}`" for model_type in sorted(model_types))


def _by_reason(reasons: dict[str, str]) -> str:
    """A row for each reason, with the model types that have it."""
    rows = (
        (listed(one for one in reasons if reasons[one] == reason), reason) for reason in dict.fromkeys(reasons.values())
    )
    return table(("model types", "because"), rows)


def page() -> str:
    """The text of docs/supported.md."""
    return f"""<!-- Written by `python -m tests.supported` from the tests; a test compares them. -->
# What is supported

Every row below is a tiny model of the real architecture with random weights. `tests/test_matrix.py` runs every
operation on every model, on the CPU and, with `pytest -m cuda`, on a GPU, with the oldest and the newest transformers
that quantcache supports.

## Versions

{_versions()}

Python 3.10 and newer. A newer torch or transformers can be installed and is expected to work; `quantcache doctor` then
says that it is untested, and `make test-newest` runs what it could break. transformers 5.24 renamed the argument of the
cache from `past_key_values` to `cache`: use the name of the version you have. With a newer one the old name works and
warns until transformers 6; an older one does not know the new name.

## Models

"int8" under an attention implementation: attention reads the int8 bytes. "restored": it is given the restored keys and
values, one layer at a time, which is correct and slower; no other call of the table is, but for the operations below that
say so. "own": no layer is int8. "-": the model does not have it in
transformers on a CPU. The columns hold for a cache made with `QuantizedInt8Cache(model.config)`.

{_models()}

"int8 window" is a sliding window of more than 1024 tokens, of which only the pages in reach are kept; smaller windows,
linear attention and convolutions are small and stay transformers' own; a "shared" layer reads the states of another.
Encoder-decoder models take `QuantizedInt8Cache.for_encoder_decoder(model.config)`. `flash_attention_2`, `3` and `4` read
int8 with their windows, softcaps, sinks and padding; a position bias restores.

## Causal model types

These are all model types that `AutoModelForCausalLM` of transformers {TESTED["transformers"].newest} knows.
`tests/test_causal_models.py` makes a tiny random model of each and compares its logits, three windows after the first
token, with those of `DynamicCache(config=...)`: with `QuantizedInt8Cache(model.config)`, with its windows in int8, with
`QuantizedInt8Cache()` and with `max_cache_len`. CI runs one of each kind, and all with `-m slow`.

`QuantizedInt8Cache()` gives what `QuantizedInt8Cache(model.config)` gives with {len(NO_CONFIG_NEEDED)} of them:
{listed(NO_CONFIG_NEEDED)}.

{len(NEEDS_CONFIG)} need a cache made from their config; `QuantizedInt8Cache()` refuses them at the first call:

{_by_reason({model_type: need.because for model_type, need in NEEDS_CONFIG.items()})}

`max_cache_len` does not suit {listed(NO_FIXED_CAPACITY)}, nor does transformers' `StaticCache`.

{len(LEFT_OUT)} cannot be compared:

{_by_reason(LEFT_OUT)}

## Operations

{_operations()}

## Refused

{_refusals()}

A cell that transformers refuses is refused with its own `DynamicCache` too. Beyond the cells of the table:

| what | refused with | because |
| --- | --- | --- |
| an encoder-decoder model given one cache, made with its config | `ValueError` | self- and cross-attention need one each |
| `crop` in a full window, by more than it keeps, without `activate_past_recording()` | `ValueError` | the tokens that the next query sees are gone |
| `crop` by a positive number, or by more tokens than there are | `ValueError` | nothing sensible can be meant |
| a prompt that holds no token beyond those in a kept cache | `ValueError` | there is nothing to go on with |
| `strict=True` and a model that goes on without the cache | `FallbackError` | it was asked for |
| keys and values of two dtypes outside autocast | `TypeError` | attention cannot take them either |
| `strict=True` and a read that restores | `FallbackError` | it was asked for |
| a config whose model transformers cannot cache | `ValueError` | there is nothing to derive the layers from |
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
