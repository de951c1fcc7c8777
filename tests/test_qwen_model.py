"""The Qwen v1 model: its maths, its scaling and its caches, on tiny random checkpoints in the released form."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache, GenerationMixin

from quantcache import QuantizedInt8Cache
from quantcache.adapters import legacy
from quantcache.adapters.qwen import QWenLMHeadModel
from quantcache.adapters.qwen.positions import logn_factors, prompt_alphas, rotary_embedding
from quantcache.backends import dispatch
from quantcache.layers._host import CACHE_NAME, CACHE_NAMES, cache_of
from quantcache.quantization.reference import unpack_metadata
from tests.bounds import assert_within, attention_bound, head_bound
from tests.qwen_checkpoint import HEADS, HIDDEN, LAYERS, SEQ_LENGTH, VOCAB, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("qwen") / "checkpoint")


@pytest.fixture(scope="module")
def model(folder: Path) -> QWenLMHeadModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def long_model(folder: Path) -> QWenLMHeadModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_cache_quantization=True, seq_length=4096
    ).eval()


def transcription(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Logits (1, seq_len, VOCAB) from the published maths, in float32 and without transformers."""
    seq_len, dim = ids.shape[1], HIDDEN // HEADS
    alpha = max(2 ** math.ceil(math.log2(seq_len / SEQ_LENGTH) + 1) - 1, 1)
    base = 10000 * alpha ** (dim / (dim - 2))
    angles = torch.arange(seq_len)[:, None] / base ** (torch.arange(0, dim, 2) / dim)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]
    logn = torch.tensor([max(1.0, math.log(p + 1) / math.log(SEQ_LENGTH)) for p in range(seq_len)])[:, None, None]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weights[name]

    def rotate(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., : dim // 2], x[..., dim // 2 :]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    x = weights["transformer.wte.weight"][ids[0]]
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}."
        qkv = norm(x, at + "ln_1.weight") @ weights[at + "attn.c_attn.weight"].T + weights[at + "attn.c_attn.bias"]
        query, key, value = qkv.view(seq_len, 3, HEADS, dim).unbind(1)
        scores = torch.einsum("qhd,khd->hqk", rotate(query) * logn, rotate(key)) / math.sqrt(dim)
        scores = scores.masked_fill(torch.ones(seq_len, seq_len).triu(1).bool(), -math.inf)
        read = torch.einsum("hqk,khd->qhd", scores.softmax(-1), value).reshape(seq_len, HIDDEN)
        x = x + read @ weights[at + "attn.c_proj.weight"].T
        inner = norm(x, at + "ln_2.weight")
        gated = (inner @ weights[at + "mlp.w1.weight"].T) * functional.silu(inner @ weights[at + "mlp.w2.weight"].T)
        x = x + gated @ weights[at + "mlp.c_proj.weight"].T
    return (norm(x, "transformer.ln_f.weight") @ weights["lm_head.weight"].T)[None]


@pytest.mark.parametrize("seq_len", [1, 16, 17, 40, 70])
def test_logits_are_those_of_the_published_maths(folder: Path, model: QWenLMHeadModel, seq_len: int) -> None:
    """Within and beyond seq_length, with NTK and log-n scaling, up to float32 rounding."""
    ids = torch.randint(0, VOCAB, (1, seq_len))
    expected = transcription(load_file(folder / "model.safetensors"), ids)
    torch.testing.assert_close(model(ids).logits, expected, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_decoding_reads_quantised_pages_and_stays_faithful(long_model: QWenLMHeadModel) -> None:
    """Behind 200 tokens every step reads int8, and predicts what the exact cache predicts.

    The weights of this model are large, which makes it far more sensitive than a trained one; other tokens in the cache
    move its predictions hundreds of times farther than the limit.
    """
    ids = torch.randint(0, VOCAB, (2, 200))
    output = long_model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=40,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    cache = cache_of(output)
    assert cache.report().backend == dispatch.choose_backend(torch.device("cpu"))
    assert all(layer.pages.num_pages == 3 for layer in cache.layers)
    exact = long_model(output.sequences, past_key_values=DynamicCache()).logits[:, 199:-1].double().log_softmax(-1)
    int8 = torch.stack(output.logits, dim=1).double().log_softmax(-1)
    kl = (exact.exp() * (exact - int8)).sum(-1)
    assert 0 < kl.mean() <= 3e-3
    wrecked = long_model(output.sequences.roll(1, 0), past_key_values=DynamicCache()).logits[:, 199:-1]
    kl = (exact.exp() * (exact - wrecked.double().log_softmax(-1))).sum(-1)
    assert kl.mean() > 1


@torch.no_grad()
def test_every_step_stays_within_the_bound_of_its_pages(folder: Path, tmp_path: Path) -> None:
    """Int8 against float logits, left-padded, in one layer with a silent MLP, where the bound can be derived."""
    weights = {name: w for name, w in load_file(folder / "model.safetensors").items() if ".h.1." not in name}
    weights["transformer.h.0.mlp.c_proj.weight"].zero_()
    weights["transformer.wte.weight"] *= 5
    for part, factor in ((0, 0.005), (2, 0.1)):  # flat attention, small values: or the worst case says nothing
        rows = slice(part * HIDDEN, (part + 1) * HIDDEN)
        weights["transformer.h.0.attn.c_attn.weight"][rows] *= factor
        weights["transformer.h.0.attn.c_attn.bias"][rows] *= factor
    write_checkpoint(tmp_path, weights, num_hidden_layers=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, seq_length=4096).eval()
    block = model.transformer.h[0]
    ids = torch.randint(0, VOCAB, (2, 220))
    mask = (torch.arange(220) >= torch.tensor([[0], [30]])).long()
    int8, exact, states = QuantizedInt8Cache(model.config, strict=True), DynamicCache(), []
    block.ln_2.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    for start, stop in ((0, 200), *((i, i + 1) for i in range(200, 220))):
        options = {"attention_mask": mask[:, :stop], "logits_to_keep": 1}
        states.clear()
        expected = model(ids[:, start:stop], past_key_values=exact, **options).logits[:, -1]
        hidden = states[-1][:, -1]
        got = model(ids[:, start:stop], past_key_values=int8, **options).logits[:, -1]
        if start == 0:
            assert torch.equal(got, expected)  # the prompt attends at full precision
            continue
        query, _, _ = block.attn.c_attn(block.ln_1(model.transformer.wte(ids[:, start:stop]))).chunk(3, -1)
        # Rotation turns pairs of channels into each other: either is at most the length of the pair.
        pair = query.view(2, HEADS, 1, 2, -1).norm(dim=-2).repeat(1, 1, 1, 2)
        pages = int8.layers[0].pages
        key_scale = torch.cat([unpack_metadata(s.key_metadata)[0] for s in pages.segments])[: pages.num_pages]
        value_scale = torch.cat([unpack_metadata(s.value_metadata)[0] for s in pages.segments])[: pages.num_pages]
        values = exact.layers[0].values
        change = attention_bound(pair, block.attn.scaling, key_scale, value_scale, values)
        bound = head_bound(
            hidden, change, block.attn.c_proj.weight, model.transformer.ln_f.weight, model.lm_head.weight, 1e-6
        )
        slack = 1e-5 * expected.abs().amax()  # float32 arithmetic in another order
        assert bound.max() < 0.2 * expected.abs().max()
        assert_within(got, expected, bound + slack, unit=bound)
        assert (got - expected).abs().max() > slack


def test_padding_changes_no_answer(long_model: QWenLMHeadModel) -> None:
    """Rotary is relative, so a left-padded row has the logits it has alone."""
    ids = torch.randint(0, VOCAB, (1, 9))
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)), 1)
    alone = long_model(ids).logits
    torch.testing.assert_close(long_model(padded, attention_mask=mask).logits[:, 4:], alone, atol=1e-4, rtol=1e-4)


def test_scaling_factors_are_rounded_once(model: QWenLMHeadModel) -> None:
    """Angles and log-n factors are those of float64 arithmetic, bit for bit; so the original computes them."""
    config = model.config
    dim = config.kv_channels
    for prompt_len in (SEQ_LENGTH, SEQ_LENGTH + 1, 2 * SEQ_LENGTH, 5 * SEQ_LENGTH):
        (alpha,) = prompt_alphas(config, SEQ_LENGTH, None, prompt_len)
        assert alpha == {16: 1, 17: 3, 32: 3, 80: 15}[prompt_len]
        base = float(10000 * alpha ** (dim / (dim - 2)))
        inv_freq = 1.0 / base ** (torch.arange(0, dim, 2).float() / dim)
        angles = torch.outer(torch.arange(prompt_len).float(), inv_freq).repeat(1, 2)
        cos, sin = rotary_embedding(torch.arange(prompt_len), [alpha], config)
        assert torch.equal(cos[0, 0], angles.cos())
        assert torch.equal(sin[0, 0], angles.sin())
    factors = logn_factors(config, SEQ_LENGTH, 3, 100, torch.device("cpu"))
    expected = [max(1.0, math.log(place, SEQ_LENGTH)) for place in range(4, 101)]
    assert torch.equal(factors.flatten(), torch.tensor(expected))
    assert logn_factors(config, SEQ_LENGTH, 0, SEQ_LENGTH, torch.device("cpu")) is None


def test_every_row_of_a_padded_batch_has_its_own_scaling(folder: Path) -> None:
    """NTK counts a row's real tokens: rows on either side of seq_length give what they give alone, also decoding.

    Log-n counts padding, as in the original, and is left out.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_logn_attn=False).eval()
    lengths = [40, 12, 30]
    rows = [torch.randint(0, VOCAB, (1, length)) for length in lengths]
    ids = torch.cat([torch.nn.functional.pad(row, (40 - row.shape[1], 0)) for row in rows])
    mask = torch.stack([(torch.arange(40) >= 40 - length).long() for length in lengths])
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    together = model.generate(ids, attention_mask=mask, **options)
    for row, alone in enumerate(rows):
        expected = model.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert torch.equal(together[row, 40:], expected[0, alone.shape[1] :])


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_is_taken_under_either_name(long_model: QWenLMHeadModel, name: str) -> None:
    ids = torch.arange(2, 42)[None]
    options = {"max_new_tokens": 29, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = long_model.generate(ids, **options)
    assert expected[0, 40:44].tolist() == [396, 346, 480, 488]
    cache = QuantizedInt8Cache(long_model.config)
    assert torch.equal(long_model.generate(ids, **{name: cache}, **options), expected)
    assert cache.get_seq_length() == 68

    again = DynamicCache(config=long_model.config)
    for part in (ids[:, :30], ids[:, 30:]):
        output = long_model(part, **{name: again})
        assert cache_of(output) is again
    torch.testing.assert_close(output.logits, long_model(ids).logits[:, 30:])
    assert cache_of(long_model.transformer(ids[:, :3], **{name: again})) is again
    assert again.get_seq_length() == 43


def test_a_cache_that_never_came_is_noticed(model: QWenLMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers hands it on under another name, or not at all."""
    ids = torch.arange(2, 42)[None]
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    prepare = GenerationMixin.prepare_inputs_for_generation

    def renamed(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(self, *args, **kwargs)
        return {**inputs, "state": inputs.pop(CACHE_NAME)}

    def lost(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(self, *args, **kwargs)
        return {name: value for name, value in inputs.items() if name != CACHE_NAME}

    monkeypatch.setattr(QWenLMHeadModel, "prepare_inputs_for_generation", renamed)
    with pytest.raises(TypeError, match="the cache must come as cache or past_key_values, got it as state"):
        model.generate(ids, **options)
    monkeypatch.setattr(QWenLMHeadModel, "prepare_inputs_for_generation", lost)
    with pytest.raises(RuntimeError, match="must hand the model the cache that generate was given, got 0 tokens"):
        model.generate(ids, **options)


def test_two_caches_are_refused(model: QWenLMHeadModel) -> None:
    ids = torch.arange(2, 42)[None]
    two = {name: DynamicCache() for name in CACHE_NAMES}
    with pytest.raises(ValueError, match="generate: one of cache and past_key_values must be given, got both"):
        model.generate(ids, **two)
    with pytest.raises(ValueError, match="forward: one of cache and past_key_values must be given, got both"):
        model(ids, **two)


@torch.no_grad()
@pytest.mark.parametrize("quantized", [False, True])
def test_the_scaling_follows_the_cache(folder: Path, quantized: bool) -> None:
    """Copies, rollbacks and selected rows continue as the prompt began; a reset cache begins anew."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_cache_quantization=quantized).eval()
    ids, more = torch.randint(0, VOCAB, (3, SEQ_LENGTH - 2)), torch.randint(0, VOCAB, (3, 8))
    cache = cache_of(model(ids))
    expected = model(more, past_key_values=cache).logits  # passes seq_length, with the factor of the prompt
    cache.crop(-8)
    torch.testing.assert_close(model(more, past_key_values=copy.deepcopy(cache)).logits, expected)
    selected = copy.deepcopy(cache)
    order = torch.tensor([2, 0, 2])
    selected.reorder_cache(order)
    torch.testing.assert_close(model(more[order], past_key_values=selected).logits, expected[order])
    cache.crop(-5)  # below what a new prompt of this length would be scaled by, and up again
    torch.testing.assert_close(
        model(torch.cat((ids[:, -5:], more), 1), past_key_values=cache).logits[:, 5:], expected, atol=1e-5, rtol=1e-5
    )
    if quantized:  # transformers' own cache keeps its length in some versions
        cache.reset()
        long = torch.randint(0, VOCAB, (3, 3 * SEQ_LENGTH))
        torch.testing.assert_close(model(long, past_key_values=cache).logits, model(long).logits)


def test_a_chunked_prompt_is_causal_and_keeps_its_scaling(model: QWenLMHeadModel) -> None:
    """A prompt beyond seq_length in chunks gives the tokens it gives at once."""
    ids = torch.randint(0, VOCAB, (1, 40))
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    for cache in (None, DynamicCache(), QuantizedInt8Cache()):  # 48 tokens are exact in each
        chunked = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=8,
            prefill_chunk_size=7,
            past_key_values=cache,
        )
        assert torch.equal(whole, chunked)


def test_decoding_keeps_the_scaling_of_the_prompt(model: QWenLMHeadModel) -> None:
    """Two interleaved generations, one of them past seq_length, do not disturb each other."""
    short, long = torch.randint(0, VOCAB, (1, 12)), torch.randint(0, VOCAB, (1, 40))
    alone = model.generate(short, do_sample=False, max_new_tokens=12)
    cache = DynamicCache()
    tokens = model(short, past_key_values=cache).logits[:, -1:].argmax(-1)
    got = [short, tokens]
    for _ in range(alone.shape[1] - 13):
        model(long)
        tokens = model(tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
        got.append(tokens)
    assert torch.equal(torch.cat(got, 1), alone)


def test_beams_run_on_the_int8_cache(long_model: QWenLMHeadModel) -> None:
    """Beam search, which the original refuses with a quantised cache, finds no worse a sequence than greedy does."""
    ids = torch.randint(0, VOCAB, (2, 150))
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "eos_token_id": None}
    beams = long_model.generate(ids, num_beams=3, do_sample=False, return_dict_in_generate=True, **options)
    assert all(layer.pages.num_pages for layer in cache_of(beams).layers)
    greedy = long_model.generate(ids, do_sample=False, **options)

    @torch.no_grad()
    def likelihood(sequences: Tensor) -> Tensor:
        logits = long_model(sequences, past_key_values=DynamicCache()).logits[:, 149:-1].log_softmax(-1)
        return logits.gather(-1, sequences[:, 150:, None]).sum((1, 2))

    assert (likelihood(beams.sequences) >= likelihood(greedy) - 1e-2).all()


@pytest.mark.parametrize("quantized", [False, True])
def test_generate_takes_a_legacy_tuple(model: QWenLMHeadModel, quantized: bool) -> None:
    """generate(past_key_values=<tuple>), of either form, continues as the cache it came from."""
    ids = torch.randint(0, VOCAB, (1, 10))
    past = legacy.to_legacy(cache_of(model(ids[:, :-1])), quantized=quantized)
    restored = legacy.from_legacy(past)  # shorter than a page, so exact in any cache
    options = {"do_sample": False, "max_new_tokens": 4, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, past_key_values=restored, **options)
    assert torch.equal(model.generate(ids, past_key_values=past, **options), expected)
    if not quantized:
        assert torch.equal(model.generate(ids, **options), expected)
    with torch.no_grad():
        one = model(ids[:, -1:], past_key_values=past)
    assert int(one.logits[0, -1].argmax()) == int(expected[0, 10])
    # What was float stays exact where the config asks for no quantisation.
    assert isinstance(cache_of(one), QuantizedInt8Cache) == quantized


def test_a_static_cache_gives_the_same_tokens(model: QWenLMHeadModel) -> None:
    ids = torch.randint(0, VOCAB, (2, 20))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)


def test_training_has_a_loss_and_gradients(model: QWenLMHeadModel) -> None:
    """Labels give the mean of the next tokens' losses; return_dict=False gives a tuple that begins with it."""
    ids = torch.randint(0, VOCAB, (2, 12))
    assert model.loss_type == "ForCausalLM"
    loss, logits = model(ids, labels=ids, use_cache=False, return_dict=False)
    expected = functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in model.parameters())
    model.zero_grad()


def test_rejected_drafts_change_no_token(model: QWenLMHeadModel) -> None:
    """Prompt-lookup decoding, beyond seq_length, gives the greedy tokens: drafts are causal among themselves."""
    ids = torch.randint(0, VOCAB, (1, 6)).repeat(1, 5)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    drafted = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, prompt_lookup_num_tokens=3
    )
    assert torch.equal(plain, drafted)
