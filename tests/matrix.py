"""What is asked of every architecture: the operations, and the cells that are refused and why.

An operation is a function of a ``Case`` that raises where its promise is broken. Three measures are used.
``same_reading``: attention over int8 gives what a ``DynamicCache`` with the restored states gives, to float error.
``faithful``: logits are those of the exact model, to the quality that the format promises. ``as_exact``: they are those
of the same calls with a ``DynamicCache``, to that quality, which leaves out what transformers does differently between
a cached and a whole forward pass.
"""

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
import transformers
from packaging.version import parse
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin

from quantcache import FallbackWarning, Int8Tensor, QuantizedInt8Cache
from quantcache.layers import Int8Layer
from quantcache.scheme import PAGE_SIZE
from quantcache.sliding import Int8SlidingLayer
from tests.architectures import SIZES, Architecture
from tests.bounds import assert_within, cast_bound

MAX_MEAN_KL = 1.0e-4
"""Nats a token, the quality that the format promises on a real model; tiny random ones stay below."""

PROMPT = 150


def tokens(length: int, batch: int = 1, seed: int = 2) -> Tensor:
    """Random token ids, none of them special."""
    return torch.randint(2, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


@dataclass
class Case:
    """One model with one attention implementation on one device."""

    architecture: Architecture
    implementation: str
    device: str = "cpu"

    @cached_property
    def model(self) -> Any:
        return self.architecture.make(self.implementation).to(self.device)

    @property
    def config(self) -> Any:
        return self.model.config

    def cache(self, **options: Any) -> Any:
        """An int8 cache as a user makes it for this model."""
        if self.architecture.is_encoder_decoder:
            return QuantizedInt8Cache.for_encoder_decoder(self.config, **options)
        return QuantizedInt8Cache(self.config, **options)

    def exact_cache(self) -> Any:
        if self.architecture.is_encoder_decoder:
            return EncoderDecoderCache(DynamicCache(config=self.config), DynamicCache(config=self.config))
        return DynamicCache(config=self.config)

    def source(self, batch: int) -> dict[str, Tensor]:
        """What the encoder gets, the same for every row, so that rows can be moved about."""
        generator = torch.Generator().manual_seed(7)
        if self.architecture.model_class == "T5ForConditionalGeneration":
            return {"input_ids": tokens(130, seed=7).expand(batch, -1).to(self.device)}
        if self.architecture.model_class == "WhisperForConditionalGeneration":
            features = torch.randn(1, self.config.num_mel_bins, 300, generator=generator)
            return {"input_features": features.expand(batch, -1, -1).to(self.device)}
        return {}

    def named(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Arguments of the model for decoder tokens."""
        prefix = "decoder_" if self.architecture.is_encoder_decoder else ""
        named = {f"{prefix}input_ids": ids.to(self.device)}
        if mask is not None:
            named[f"{prefix}attention_mask"] = mask.to(self.device)
        return named | self.source(ids.shape[0])

    def logits(self, ids: Tensor, cache: Any = None) -> Tensor:
        """Logits of a forward pass over ``ids`` behind what ``cache`` holds."""
        options: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            options = {"past_key_values": cache, "use_cache": True}
        if "VL" in self.architecture.name:  # which otherwise goes on from the positions of its last call
            past = 0 if cache is None else cache.get_seq_length()
            positions = torch.arange(past, past + ids.shape[1], device=self.device)
            options["position_ids"] = positions.expand(3, ids.shape[0], -1)
        with torch.no_grad():
            return self.model(**self.named(ids), **options).logits

    def generate(self, ids: Tensor, cache: Any, mask: Tensor | None = None, **options: Any) -> Any:
        """``generate`` with what every call here wants; Whisper's own is for audio longer than its window."""
        if self.architecture.is_encoder_decoder:
            ids = ids.clone()
            ids[:, 0] = self.config.decoder_start_token_id  # else it is put in front
        options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True} | options
        return GenerationMixin.generate(self.model, **self.named(ids, mask), past_key_values=cache, **options)


class WithExactCache(Case):
    """The same with transformers' own cache: what it refuses has nothing to do with int8."""

    def cache(self, **options: Any) -> Any:
        return self.exact_cache()


def parts(cache: Any) -> list[QuantizedInt8Cache]:
    """The int8 caches in ``cache``."""
    both = (
        [cache.self_attention_cache, cache.cross_attention_cache] if isinstance(cache, EncoderDecoderCache) else [cache]
    )
    return [part for part in both if isinstance(part, QuantizedInt8Cache)]


def int8_layers(cache: Any) -> list[Int8Layer]:
    return [layer for part in parts(cache) for layer in part.layers if isinstance(layer, Int8Layer)]


def restored(cache: Any) -> Any:
    """A ``DynamicCache``, or a pair of them, with what ``cache`` holds."""
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(cache.self_attention_cache.to_dynamic(), cache.cross_attention_cache.to_dynamic())
    return cache.to_dynamic()


def dense(states: Tensor) -> Tensor:
    return states.restore() if isinstance(states, Int8Tensor) else states


def is_native(case: Case) -> bool:
    """Whether no layer of the model is int8."""
    return not any("int8" in storage for storage in case.architecture.storage)


def same_reading(case: Case, cache: Any, ids: Tensor) -> None:
    """The next tokens ``ids`` see in ``cache`` exactly what it restores to."""
    theirs = case.logits(ids, restored(cache))
    ours = case.logits(ids, cache)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=reading_error(case))


def reading_error(case: Case) -> float:
    """How far logits may be from those of another order of summing.

    They are of the order of 10, sums of up to a few hundred float32 terms through a few layers. The CUDA kernels
    multiply probabilities and values as 16-bit floats, 2**-11 of them off, where torch multiplies float32.
    """
    return 2e-3 if case.device == "cpu" else 1e-2


def close_in_quality(exact: Tensor, scores: Tensor) -> None:
    """The mean divergence of ``scores`` from the ``exact`` logits is what the format promises."""
    log_exact, log_int8 = exact.double().log_softmax(-1), scores.double().log_softmax(-1)
    kl = (log_exact.exp() * (log_exact - log_int8)).sum(-1)
    assert kl.mean() <= MAX_MEAN_KL


def faithful(case: Case, output: Any, cache: Any) -> None:
    """The logits of every generated token are those of the exact model on the same tokens, to the format's quality."""
    sequences, scores = output.sequences, torch.stack(list(output.logits), dim=1)
    exact = case.logits(sequences)[:, -scores.shape[1] - 1 : -1]
    close_in_quality(exact, scores)
    if not is_native(case):
        assert any(layer.pages is not None and layer.pages.num_pages for layer in int8_layers(cache))


def as_exact(case: Case, run: Callable[[Any], Any]) -> Any:
    """``run``, which generates greedily with a cache, gives with an int8 one what it gives with an exact one."""
    cache = case.cache()
    ours, theirs = run(cache), run(case.exact_cache())
    prompt = ours.sequences.shape[1] - len(ours.logits)
    same = (ours.sequences == theirs.sequences).all(0)[prompt:]
    # After a step at which two tokens were as good as equal the texts are two texts.
    steps = len(same) if bool(same.all()) else int((~same).nonzero()[0]) + 1
    exact, int8 = (torch.stack(list(output.logits), dim=1)[:, :steps] for output in (theirs, ours))
    close_in_quality(exact, int8)
    if not is_native(case):
        assert any(layer.pages is not None and layer.pages.num_pages for layer in int8_layers(cache))
        assert steps > 1
    return cache


# The operations. Each states its promise, which the docs print.


def forward(case: Case) -> None:
    """The prompt attends exactly; what is stored lies within half a scale; a step reads just that."""
    ids = tokens(PROMPT, 2)
    cache, exact = case.cache(), case.exact_cache()
    assert torch.equal(case.logits(ids, cache), case.logits(ids, exact))
    exact_parts = [exact.self_attention_cache, exact.cross_attention_cache] if len(parts(cache)) == 2 else [exact]
    for ours, theirs in zip(parts(cache), exact_parts, strict=True):
        for layer, other in zip(ours.layers, theirs.layers, strict=True):
            if isinstance(layer, Int8Layer) and layer.get_seq_length():
                assert layer.get_seq_length() == other.get_seq_length()
                within_half_a_scale(layer, other.keys, other.values)
    same_reading(case, cache, tokens(1, 2, seed=3))
    same_reading(case, cache, tokens(7, 2, seed=4))


def within_half_a_scale(layer: Int8Layer, keys: Tensor, values: Tensor) -> None:
    """The restored states of ``layer`` lie within half a scale of the exact ones; its tail is exact."""
    pages = layer.pages
    assert pages is not None
    assert pages.first_page == 0
    closed = pages.num_pages * PAGE_SIZE
    assert closed
    view = pages.view()
    key_scale = torch.cat([s.key_metadata[..., 0].view(torch.bfloat16) for s in view.segments])
    value_scale = torch.cat([s.value_metadata[..., 0].view(torch.bfloat16) for s in view.segments])
    # (P, batch, heads, head_dim) and (P, batch, heads, page): one scale for each element of the closed pages
    key_scale = key_scale.float().repeat_interleave(PAGE_SIZE, 0).permute(1, 2, 0, 3)
    value_scale = value_scale.float().permute(1, 2, 0, 3).flatten(2, 3)[..., None].expand(values[:, :, :closed].shape)
    for ours, theirs, scale in (
        (view.restore_keys(), keys, key_scale),
        (view.restore_values(), values, value_scale),
    ):
        assert torch.equal(ours[:, :, closed:], theirs[:, :, closed:])
        bound = cast_bound(theirs[:, :, :closed], 0.5 * scale)
        assert_within(ours[:, :, :closed], theirs[:, :, :closed], bound, unit=scale)


def greedy(case: Case) -> None:
    """Every token's logits are the exact model's, to the quality of the format."""
    cache = case.cache()
    output = case.generate(tokens(PROMPT), cache, max_new_tokens=30)
    faithful(case, output, cache)
    assert cache.get_seq_length() == PROMPT + 30 - 1


def sampling(case: Case) -> None:
    """As greedy, with `num_return_sequences`."""
    cache = case.cache()
    torch.manual_seed(5)
    output = case.generate(tokens(PROMPT), cache, max_new_tokens=20, do_sample=True, num_return_sequences=3)
    faithful(case, output, cache)


def beams(case: Case, **options: Any) -> None:
    ids, cache = tokens(PROMPT, 2), case.cache()
    torch.manual_seed(5)
    output = case.generate(
        ids, cache, max_new_tokens=15, num_beams=3, num_return_sequences=2, output_scores=True, **options
    )
    log_probs = case.logits(output.sequences)[:, PROMPT - 1 : -1].log_softmax(-1)
    chosen = log_probs.gather(-1, output.sequences[:, PROMPT:, None]).mean(dim=(1, 2))
    # A sequence whose cache rows were mixed up has the score of another sequence: 0.1 and more away.
    torch.testing.assert_close(output.sequences_scores, chosen, rtol=0, atol=1e-2)


def beam_search(case: Case) -> None:
    """Each sequence has the score that the exact model gives it."""
    beams(case)


def beam_sampling(case: Case) -> None:
    """As beam search, over sampled beams."""
    beams(case, do_sample=True)


def prompt_lookup(case: Case) -> None:
    """Drafts taken from the prompt, many of them rejected: the logits stay the exact model's."""
    ids = tokens(30).repeat(1, 5)
    cache = case.cache()
    output = case.generate(ids, cache, max_new_tokens=40, prompt_lookup_num_tokens=5)
    faithful(case, output, cache)


def assisted(case: Case) -> None:
    """A draft model that is mostly wrong: the logits stay the exact model's."""
    draft = copy.deepcopy(case.model)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.dim() > 1:
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).to(
                    parameter
                )
    cache = case.cache()
    output = case.generate(tokens(PROMPT), cache, max_new_tokens=40, assistant_model=draft)
    faithful(case, output, cache)


def chunked_prefill(case: Case) -> None:
    """`prefill_chunk_size`: what is stored and read is what the whole prompt gives, to the quality of the format."""
    as_exact(case, lambda cache: case.generate(tokens(PROMPT), cache, max_new_tokens=20, prefill_chunk_size=40))


def left_padding(case: Case) -> None:
    """Rows of different lengths: as greedy for each, with more than a page of padding."""
    ids = tokens(160, 2)
    mask = torch.ones_like(ids)
    mask[0, :70] = 0
    ids[0, :70] = 0
    as_exact(case, lambda cache: case.generate(ids, cache, mask, max_new_tokens=20))


def conversation(case: Case) -> None:
    """A kept cache carries several turns; after `reset()` it is as new."""

    def run(cache: Any) -> Any:
        first = case.generate(tokens(120), cache, max_new_tokens=2).sequences
        ids = torch.cat([first.cpu(), tokens(60, seed=3)], dim=1)
        return case.generate(ids, cache, max_new_tokens=10)

    cache = as_exact(case, run)
    cache.reset()
    assert cache.get_seq_length() == 0
    first = case.generate(tokens(120), case.cache(), max_new_tokens=10)
    assert torch.equal(case.generate(tokens(120), cache, max_new_tokens=10).sequences, first.sequences)


def prefix(case: Case) -> None:
    """A deep-copied or pickled cache goes on as the original does, and shares nothing with it."""
    cache = case.cache()
    case.logits(tokens(PROMPT), cache)
    branches = [copy.deepcopy(cache), pickle.loads(pickle.dumps(cache)), cache]
    case.logits(tokens(90, seed=8), copy.deepcopy(cache))
    steps = [case.logits(tokens(3, seed=4), branch) for branch in branches]
    assert torch.equal(steps[0], steps[2])
    assert torch.equal(steps[1], steps[2])


def candidates(case: Case) -> None:
    """Custom decoding as contrastive search does it: repeat the cache, try each candidate, keep one row."""
    ids, cache, top_k, steps = tokens(PROMPT, 2), case.cache(), 3, []
    logits = case.logits(ids, cache)[:, -1]
    for step in range(8):
        steps.append(logits)
        tried = logits.topk(top_k).indices
        cache.batch_repeat_interleave(top_k)
        seen = case.logits(tried.reshape(-1, 1).cpu(), cache)[:, -1].unflatten(0, (2, top_k))
        # Any rule will do that takes now this candidate and now that one.
        chosen = torch.tensor([step % top_k, (step + 1) % top_k], device=case.device)
        rows = torch.arange(2, device=case.device)
        cache.batch_select_indices(rows * top_k + chosen)
        ids = torch.cat([ids, tried[rows, chosen][:, None].cpu()], dim=1)
        logits = seen[rows, chosen]
    close_in_quality(case.logits(ids)[:, PROMPT - 1 : -1], torch.stack(steps, dim=1))


def streaming(case: Case) -> None:
    """Tokens arrive as they are made."""

    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    streamer = Streamer()
    output = case.generate(tokens(PROMPT), case.cache(), max_new_tokens=10, streamer=streamer)
    assert streamer.seen[-11:] == [*output.sequences[0, -10:].tolist(), -1]


def batch_operations(case: Case) -> None:
    """`reorder_cache`, `batch_select_indices`, `batch_repeat_interleave` give the rows asked for, byte for byte."""
    cache = case.cache()
    case.logits(tokens(PROMPT, 3), cache)
    case.logits(tokens(2, 3, seed=5), cache)
    for name, argument, rows in (
        ("reorder_cache", torch.tensor([2, 0, 0], device=case.device), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([2, 1], device=case.device), [2, 1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1]),
    ):
        exact, batch = restored(cache), len(rows)
        exact.reorder_cache(torch.tensor(rows, device=case.device))  # every layer of the host has this one
        getattr(cache, name)(argument)
        ids = tokens(1, batch, seed=6)
        torch.testing.assert_close(
            case.logits(ids, cache), case.logits(ids, exact), rtol=1e-4, atol=reading_error(case)
        )


def cropping(case: Case) -> None:
    """`crop` forgets the newest tokens: up to `residual_length` without a trace, further within a page's bound."""
    cache = case.cache()
    cache.activate_past_recording()
    case.logits(tokens(PROMPT, 2), cache)
    cache.crop(0)
    for draft in (20, 110):  # within residual_length, and so far that a page is reopened
        case.logits(tokens(draft, 2, seed=5), cache)
        cache.crop(-draft)
        assert cache.get_seq_length() == PROMPT
        branch = copy.deepcopy(cache)
        same_reading(case, copy.deepcopy(cache), tokens(1, 2, seed=6))
        ids = torch.cat([tokens(PROMPT, 2), tokens(1, 2, seed=6)], dim=1)
        close_in_quality(case.logits(ids)[:, -1:], case.logits(ids[:, -1:], branch))


def gradients(case: Case) -> None:
    """The prompt's gradients are those of `DynamicCache`; later ones stop at earlier tokens, with a warning."""
    sums = []
    for cache in (case.cache(), case.exact_cache()):
        case.model.zero_grad()
        case.model(
            **case.named(tokens(PROMPT)), past_key_values=cache, use_cache=True
        ).logits.square().mean().backward()
        sums.append([p.grad.clone() for p in case.model.parameters() if p.grad is not None])
    case.model.zero_grad(set_to_none=True)
    for ours, theirs in zip(*sums, strict=True):
        # A GPU adds up gradients in whatever order they come.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0 if case.device == "cpu" else 1e-4 * theirs.abs().max())
    if not is_native(case):
        cache = case.cache()
        case.model(**case.named(tokens(20)), past_key_values=cache, use_cache=True)
        with pytest.warns(FallbackWarning, match="gradients are enabled, and stop at the tokens of earlier calls"):
            case.model(**case.named(tokens(1)), past_key_values=cache, use_cache=True)


def offloading(case: Case) -> None:
    """`offloading=True` gives the same logits, with the pages in host memory between two reads."""
    cache, resident = case.cache(offloading=True), case.cache()
    for step, length in enumerate((PROMPT, 1, 3, 1)):
        ids = tokens(length, 2, seed=step)
        assert torch.equal(case.logits(ids, cache), case.logits(ids, resident))


def conversion(case: Case) -> None:
    """From `DynamicCache` and back: the same bytes as if the tokens had come to the int8 cache."""
    cache, exact = case.cache(), case.exact_cache()
    case.logits(tokens(PROMPT, 2), cache)
    case.logits(tokens(PROMPT, 2), exact)
    if case.architecture.is_encoder_decoder:
        both = exact.self_attention_cache, exact.cross_attention_cache
        converted = EncoderDecoderCache(*(QuantizedInt8Cache.from_dynamic(one, case.config) for one in both))
    else:
        converted = QuantizedInt8Cache.from_dynamic(exact, case.config)
    ids = tokens(1, 2, seed=3)
    assert torch.equal(case.logits(ids, converted), case.logits(ids, cache))


def attentions(case: Case) -> None:
    """`output_attentions=True`: a weight for each token of the cache, and each row sums to one."""
    cache = case.cache()
    output = case.generate(tokens(PROMPT), cache, max_new_tokens=5, output_attentions=True)
    steps = output.decoder_attentions if case.architecture.is_encoder_decoder else output.attentions
    weights = [layer for layer in steps[-1] if layer is not None]
    assert weights
    assert weights[-1].shape[-2:] == (1, PROMPT + 4)
    if "GPT-OSS" not in case.architecture.name:  # whose sinks take a share
        torch.testing.assert_close(weights[-1].sum(-1), torch.ones_like(weights[-1][..., 0]))
    faithful(case, output, cache)


def half_precision(case: Case) -> None:
    """bfloat16 and float16 models: the cache holds their dtype and reads what it restores to."""
    original = case.model
    try:
        for dtype in (torch.bfloat16, torch.float16):
            case.model = copy.deepcopy(original).to(dtype)
            cache = case.cache()
            source = case.named(tokens(PROMPT, 2))
            source = {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.items()}
            step = {k: v[:, :1] if k.endswith("input_ids") and v.shape[1] == PROMPT else v for k, v in source.items()}
            with torch.no_grad():
                case.model(**source, past_key_values=cache, use_cache=True)
                for layer in int8_layers(cache):
                    assert layer.dtype == dtype
                theirs = case.model(**step, past_key_values=restored(cache), use_cache=True).logits
                ours = case.model(**step, past_key_values=cache, use_cache=True).logits
            # Logits of the order of 10 in 8 or 11 bits, rounded at each of some twenty places.
            tolerance = 60 * torch.finfo(dtype).eps
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=10 * tolerance)
    finally:
        case.model = original


def autocast(case: Case) -> None:
    """A float32 model under autocast, whose keys and values may come in two dtypes."""
    cache, exact = case.cache(), case.exact_cache()
    with torch.autocast(case.device, torch.bfloat16):
        case.logits(tokens(PROMPT, 2), cache)
        case.logits(tokens(PROMPT, 2), exact)
        ours, theirs = (case.logits(tokens(1, 2, seed=3), one) for one in (cache, exact))
    # bfloat16 all the way; int8 adds less than bfloat16 does
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0.1, atol=1.0)


def without_config(case: Case) -> None:
    """`QuantizedInt8Cache()` keeps every attention layer whole in int8, and refuses layers that are something else."""
    encoder_decoder = case.architecture.is_encoder_decoder
    cache = QuantizedInt8Cache.for_encoder_decoder() if encoder_decoder else QuantizedInt8Cache()
    output = case.generate(tokens(PROMPT), cache, max_new_tokens=10)
    assert int8_layers(cache)
    assert not any(isinstance(layer, Int8SlidingLayer) for layer in int8_layers(cache))
    sequences, scores = output.sequences, torch.stack(list(output.logits), dim=1)
    close_in_quality(case.logits(sequences)[:, -11:-1], scores)


Operation = Callable[[Case], None]

OPERATIONS: dict[str, Operation] = {
    "forward pass": forward,
    "greedy decoding": greedy,
    "sampling": sampling,
    "beam search": beam_search,
    "beam sampling": beam_sampling,
    "assisted decoding": assisted,
    "prompt lookup": prompt_lookup,
    "chunked prefill": chunked_prefill,
    "left padding": left_padding,
    "a conversation": conversation,
    "a copied prefix": prefix,
    "custom decoding": candidates,
    "streaming": streaming,
    "batch operations": batch_operations,
    "crop": cropping,
    "gradients": gradients,
    "offloading": offloading,
    "conversion": conversion,
    "16-bit models": half_precision,
    "autocast": autocast,
    "without a config": without_config,
    "output_attentions": attentions,
}

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

NEWEST = parse(transformers.__version__) >= parse("5.23")

OLDER_REFUSED: dict[tuple[str, str], Refusal] = {
    # before 5.23
    ("Qwen2.5-VL", "chunked prefill"): Refusal(
        "transformers",
        (RuntimeError, ValueError),
        "agree in batch|[Ss]izes of tensors",
        "before 5.23 the model mixes up its positions between chunks",
    ),
}

REFUSED: dict[tuple[str, str], Refusal] = {
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

BY_IMPLEMENTATION: dict[str, tuple[str, ...]] = {
    "eager": ("forward pass", "greedy decoding", "left padding", "output_attentions"),
    "flex_attention": ("forward pass", "greedy decoding", "left padding"),
}
"""What is asked of an implementation that is not the model's first."""


@contextmanager
def quiet_flex() -> Iterator[None]:
    """flex_attention uncompiled: compiling takes half a minute a model on a CPU, and is not what is asked here."""
    with torch.compiler.set_stance("force_eager"):
        yield
