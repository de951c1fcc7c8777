"""What is asked of every architecture: operations, functions of a ``Case`` that raise where their promise is broken.

Their docstrings are the promises that docs/supported.md prints.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import EncoderDecoderCache

from quantcache import FallbackWarning, QuantizedInt8Cache
from quantcache.layers._host import cache_argument
from quantcache.layers.base import BaseInt8Layer
from quantcache.layers.growing import Int8Layer
from quantcache.layers.sliding import Int8SlidingLayer
from quantcache.quantization.scheme import PAGE_SIZE
from quantcache.store import reads
from tests.bounds import assert_within, cast_bound
from tests.cases import (
    NEWEST,
    PROMPT,
    Case,
    as_exact,
    close_in_quality,
    faithful,
    int8_layers,
    is_native,
    parts,
    reading_error,
    restored,
    same_reading,
    tokens,
)


def forward(case: Case) -> None:
    """The prompt attends exactly; what is stored lies within half a scale; a step reads just that."""
    ids = tokens(PROMPT, 2)
    cache, exact = case.cache(), case.exact_cache()
    assert torch.equal(case.logits(ids, cache), case.logits(ids, exact))
    exact_parts = [exact.self_attention_cache, exact.cross_attention_cache] if len(parts(cache)) == 2 else [exact]
    for ours, theirs in zip(parts(cache), exact_parts, strict=True):
        for layer, other in zip(ours.layers, theirs.layers, strict=True):
            if isinstance(layer, BaseInt8Layer) and layer.get_seq_length():
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
        (reads.restore(view, True), keys, key_scale),
        (reads.restore(view, False), values, value_scale),
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


def fixed_capacity(case: Case) -> None:
    """`max_cache_len`, here without compiling: every token's logits are those of the growing cache."""
    cache = QuantizedInt8Cache(case.config.get_text_config(decoder=True), max_cache_len=PROMPT + 40)
    output = case.generate(tokens(PROMPT, 2), cache, max_new_tokens=30, disable_compile=True)
    as_exact(case, lambda each: output if each is cache else greedy_of_two(case, each), cache)
    assert int(cache.get_seq_length()) == PROMPT + 30 - 1


def greedy_of_two(case: Case, cache: Any) -> Any:
    return case.generate(tokens(PROMPT, 2), cache, max_new_tokens=30)


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
    if case.device != "cpu" and not NEWEST and any("Sliding" in storage for storage in case.architecture.storage):
        pytest.skip("with transformers 5.17 the draft's own DynamicCache fails on a GPU once its window is full")
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
        if case.architecture.is_encoder_decoder and not parts(cache):
            cache = case.exact_cache()  # transformers feeds all of ids once more behind what its own cache holds
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
    """The prompt's gradients are those of `DynamicCache`; later ones stop at earlier tokens, which are restored,
    with a warning."""
    sums = []
    for cache in (case.cache(), case.exact_cache()):
        case.model.zero_grad()
        case.model(
            **case.named(tokens(PROMPT)), **cache_argument(cache), use_cache=True
        ).logits.square().mean().backward()
        sums.append([p.grad.clone() for p in case.model.parameters() if p.grad is not None])
    case.model.zero_grad(set_to_none=True)
    for ours, theirs in zip(*sums, strict=True):
        # Threads add up the gradients of an embedding in whatever order they come.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.abs().max()))
    if not is_native(case):
        cache = case.cache()
        case.model(**case.named(tokens(20)), **cache_argument(cache), use_cache=True)
        with pytest.warns(FallbackWarning, match="gradients are enabled, and stop at the tokens of earlier calls"):
            case.model(**case.named(tokens(1)), **cache_argument(cache), use_cache=True)


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
    """`output_attentions=True`: a weight for each token of the cache, and each row sums to one; int8 layers are
    restored for them."""
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
                case.model(**source, **cache_argument(cache), use_cache=True)
                for layer in int8_layers(cache):
                    assert layer.dtype == dtype
                theirs = case.model(**step, **cache_argument(restored(cache)), use_cache=True).logits
                ours = case.model(**step, **cache_argument(cache), use_cache=True).logits
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
    "fixed capacity": fixed_capacity,
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

RESTORING = ("output_attentions", "gradients")
"""Operations for which layers are restored whatever the implementation, as their promises say."""

BY_IMPLEMENTATION: dict[str, tuple[str, ...]] = {
    "eager": ("forward pass", "greedy decoding", "left padding", "output_attentions"),
    "flex_attention": ("forward pass", "greedy decoding", "left padding"),
}
"""What is asked of an implementation that is not the model's first."""
