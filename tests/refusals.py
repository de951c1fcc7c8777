"""The cells of the matrix that are refused, and why."""

from dataclasses import dataclass

RECURRENT = ("Qwen3-Next", "Qwen3.5", "Jamba", "Falcon-H1")
HYBRIDS = (*RECURRENT, "LFM2")


@dataclass(frozen=True)
class Refusal:
    """A cell that cannot work.

    Attributes:
        by: who says so, "transformers" (with any cache) or "quantcache".
        error: what is raised.
        match: what it says.
        reason: what the docs say.
    """

    by: str
    error: type[Exception] | tuple[type[Exception], ...]
    match: str
    reason: str


_STATEFUL = Refusal(
    "transformers",
    ValueError,
    "assisted generation is not supported with stateful models",
    "drafts cannot be taken back from the recurrent state of a linear-attention layer",
)


OLDER_REFUSED: dict[tuple[str, str], Refusal] = {
    # before 5.23
    ("Qwen2.5-VL", "chunked prefill"): Refusal(
        "transformers",
        (RuntimeError, ValueError),
        "agree in batch|[Ss]izes of tensors",
        "before 5.23 the model mixes up its positions between chunks",
    ),
    ("Llama 4", "fixed capacity"): Refusal(
        "transformers",
        TypeError,
        "unexpected keyword argument 'block_sequence_ids'",
        "before 5.23 masks of a fixed capacity cannot be made for windows in chunks, for `StaticCache` either",
    ),
    ("Bloom", "fixed capacity"): Refusal(
        "transformers",
        ValueError,
        "too many values to unpack",
        "before 5.23 the model makes its mask for the class `StaticCache` alone",
    ),
}

REFUSED: dict[tuple[str, str], Refusal] = {
    **{
        (name, "fixed capacity"): Refusal(
            "quantcache",
            ValueError,
            "an encoder-decoder model keeps self- and cross-attention apart",
            "the two caches of an encoder-decoder model grow",
        )
        for name in ("T5", "Whisper")
    },
    ("GPT-Neo", "fixed capacity"): Refusal(
        "quantcache",
        ValueError,
        r"max_cache_len needs a model that does not take the number of keys for a position, got .*'gpt_neo'",
        "it takes the number of keys for the position of the query; transformers' `StaticCache` gives it wrong tokens",
    ),
    **{(name, operation): _STATEFUL for name in RECURRENT for operation in ("assisted decoding", "prompt lookup")},
    **{
        (name, "crop"): Refusal(
            "quantcache",
            ValueError,
            r"QuantizedInt8Cache.crop: layer 0, a LinearAttention\w+, keeps a recurrent state",
            "a recurrent state cannot forget tokens, which transformers' own cache ignores without a word; "
            "go back to a `copy.deepcopy` of the cache",
        )
        for name in RECURRENT
    },
    **{
        (name, "without a config"): Refusal(
            "quantcache",
            ValueError,
            "a hybrid model, whose layers hold more than keys and values, needs a cache made from its config",
            "which layers are linear attention is known from the config alone",
        )
        for name in HYBRIDS
    },
    ("Whisper", "chunked prefill"): Refusal(
        "transformers", TypeError, "WhisperDecoder", "Whisper's decoder is not given its tokens in chunks"
    ),
}
"""Cells of (architecture, operation) that are refused, and why."""
