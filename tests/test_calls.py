"""Does a call that is given a cache keep it, go on behind what it holds, and say so where a model does not?"""

import contextlib
import copy
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    AttentionInterface,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quantcache import FallbackError, FallbackWarning, QuantizedInt8Cache
from quantcache.layers import calls, routing
from quantcache.layers._host import CACHE_NAME, cache_argument, cache_of
from tests.conftest import compiler_warnings, skip_without_gpu
from tests.file_cases import assert_bit_equal
from tests.test_generate import MAX_MEAN_KL, RETURN, SIZES, prompt

LIMIT = 128
"""Tokens up to which the LongRoPE models below take their short factors."""

IS_NEWEST = Version(transformers.__version__) >= Version("5.24.0")

KINDS = {"growing": {}, "fixed": {"max_cache_len": 400}}
GREEDY = {"do_sample": False, "return_dict_in_generate": True}
WITH_LOGITS = {"do_sample": False, **RETURN}


@pytest.fixture(params=KINDS)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """For the constructor of the cache."""
    return KINDS[request.param]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def longrope(kind: str = "phi3", **changes: Any) -> GenerationMixin:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0 + 0.5 * place for place in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": LIMIT, **factors}
    torch.manual_seed(1)
    if kind == "phi3":
        config = Phi3Config(**SIZES, original_max_position_embeddings=LIMIT, rope_parameters=rope, **changes)
        return Phi3ForCausalLM(config).eval()
    rope |= {"short_mscale": 1.1, "long_mscale": 1.2}
    return PhimoeForCausalLM(PhimoeConfig(**SIZES, num_local_experts=2, rope_parameters=rope, **changes)).eval()


@contextlib.contextmanager
def fed_to(model: GenerationMixin) -> Iterator[list[int]]:
    """Tokens that each forward pass of ``model`` is given."""
    fed: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield fed
    hook.remove()


@torch.no_grad()
def assert_as_exact(model: GenerationMixin, output: Any) -> None:
    """The logits of every step are those of the exact model on the same tokens, with the factors of that length."""
    ids, new = output.sequences, len(output.logits)
    long, short = model(ids).logits, model(ids[:, :LIMIT]).logits
    exact = torch.cat([short, long[:, LIMIT:]], dim=1)[:, -new - 1 : -1].double().log_softmax(-1)
    kl = (exact.exp() * (exact - torch.stack(output.logits, dim=1).double().log_softmax(-1))).sum(-1)
    assert kl.mean() <= MAX_MEAN_KL


# A model that throws its cache away.


@pytest.mark.parametrize("kind", ["phi3", "phimoe"])
@pytest.mark.parametrize("prompt_len", [100, LIMIT, 150])
def test_longrope_goes_on_in_int8_where_its_factors_change(kind: str, prompt_len: int, options: dict[str, Any]) -> None:
    model = longrope(kind)
    if kind == "phimoe":
        options = {**options, "residual_length": 400}  # what is rounded may go to other experts
    cache = QuantizedInt8Cache(model.config, strict=True, **options)
    with fed_to(model) as fed:
        output = model.generate(prompt(prompt_len), max_new_tokens=60, **cache_argument(cache), **WITH_LOGITS)
    assert cache_of(output) is cache
    assert cache.get_seq_length() == prompt_len + 59
    assert cache.report().lost is None
    # The prompt is read once more where the factors change, as with any other cache, and never again.
    again = [LIMIT + 1] if prompt_len <= LIMIT else []
    assert sorted(fed, reverse=True) == sorted([prompt_len, *again] + [1] * (59 - len(again)), reverse=True)
    assert_as_exact(model, output)


def test_longrope_keeps_a_conversation_that_grows_past_its_limit() -> None:
    model = longrope()
    cache = QuantizedInt8Cache(model.config)
    first = model.generate(prompt(90), max_new_tokens=20, **cache_argument(cache), **GREEDY).sequences
    for add, fed_first in ((60, 170), (40, 41)):  # all of it where the factors change, then what is new
        ids = torch.cat([first, prompt(add, seed=add)], dim=1)
        with fed_to(model) as fed:
            output = model.generate(ids, max_new_tokens=20, **cache_argument(cache), **WITH_LOGITS)
        assert fed[0] == fed_first
        assert cache_of(output) is cache
        assert_as_exact(model, output)
        first = output.sequences
    assert cache.get_seq_length() == first.shape[1] - 1


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 4}, {"num_return_sequences": 2}])
def test_longrope_changes_its_factors_in_every_mode(how: dict[str, Any]) -> None:
    model = longrope()
    cache = QuantizedInt8Cache(model.config, strict=True)
    how = {"do_sample": True, "top_k": 1, **how} if "num_return_sequences" in how else {"do_sample": False, **how}
    output = model.generate(
        prompt(100), max_new_tokens=60, return_dict_in_generate=True, **cache_argument(cache), **how
    )
    assert cache_of(output) is cache
    # The newest token is stored in the next step, if there is one.
    assert output.sequences.shape[1] - cache.get_seq_length() in (0, 1)
    assert cache.layers[0].pages.num_pages


@compiler_warnings
@pytest.mark.cuda
@skip_without_gpu
@pytest.mark.parametrize("prompt_len", [100, 150])
def test_longrope_changes_its_factors_in_a_compiled_call(prompt_len: int) -> None:
    model, ids = longrope().to("cuda"), prompt(prompt_len).cuda()
    cache = QuantizedInt8Cache.for_generate(model, ids, max_new_tokens=60, strict=True)
    output = model.generate(ids, max_new_tokens=60, **cache_argument(cache), **WITH_LOGITS)
    assert cache_of(output) is cache
    assert int(cache.get_seq_length()) == prompt_len + 59
    assert_as_exact(model, output)


def test_a_window_that_records_its_past_goes_on_recording_it() -> None:
    model = longrope(sliding_window=1500)
    cache = QuantizedInt8Cache(model.config)
    ids = prompt(60).repeat(1, 2)
    output = model.generate(ids, max_new_tokens=60, prompt_lookup_num_tokens=8, **cache_argument(cache), **GREEDY)
    assert cache_of(output) is cache
    assert cache.get_seq_length() == output.sequences.shape[1] - 1


def test_long_factors_from_the_first_token_leave_nothing_to_change() -> None:
    """As docs/generation.md says; the answer to a long prompt is the same."""
    model, exact = longrope(), longrope()
    config = copy.deepcopy(model.config)
    config.rope_parameters["short_factor"] = config.rope_parameters["long_factor"]
    chosen = Phi3ForCausalLM(config).eval()
    chosen.config.original_max_position_embeddings = chosen.config.max_position_embeddings
    chosen.load_state_dict(model.state_dict())
    cache = QuantizedInt8Cache(config)
    with fed_to(chosen) as fed:
        output = chosen.generate(prompt(100), max_new_tokens=60, **cache_argument(cache), **WITH_LOGITS)
    assert fed == [100] + [1] * 59
    assert cache_of(output) is cache
    with torch.no_grad():
        torch.testing.assert_close(chosen(output.sequences).logits, exact(output.sequences).logits, rtol=0, atol=1e-5)


class HandsOver(LlamaForCausalLM):
    """Prepares its steps for a cache of its own."""

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> Any:
        kwargs[CACHE_NAME] = self.own = getattr(self, "own", None) or DynamicCache()
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


class Returns(LlamaForCausalLM):
    """Goes by a cache of its own, whatever it is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kwargs[CACHE_NAME] = self.own = getattr(self, "own", None) or DynamicCache()
        return super().forward(*args, **kwargs)


class PassesOver(LlamaForCausalLM):
    """Caches nothing and says so to nobody."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **{**kwargs, CACHE_NAME: None, "use_cache": False})
        output[CACHE_NAME] = kwargs[CACHE_NAME]
        return output


LOST = {
    HandsOver: "HandsOver went on without the cache: it went by a DynamicCache of its own",
    Returns: "Returns went on without the cache: it went by a DynamicCache of its own",
    PassesOver: "PassesOver went on without the cache: it stored nothing there",
}


@pytest.mark.parametrize("kind", LOST)
def test_a_model_that_goes_on_without_the_cache_is_told_of_once(kind: Any, options: dict[str, Any]) -> None:
    model = kind(llama().config).eval()
    cache, reason = QuantizedInt8Cache(model.config, **options), LOST[kind]
    with pytest.warns(FallbackWarning, match=re.escape(f"QuantizedInt8Cache: {reason}.")) as seen:
        model.generate(prompt(20), max_new_tokens=3, **cache_argument(cache), **GREEDY)
    assert len(seen) == 1
    assert cache.report().lost == reason
    assert str(cache.report()).endswith(f"\n{reason}.")
    model.own = None
    model.generate(prompt(20), max_new_tokens=3, **cache_argument(cache), **GREEDY)  # warns no second time
    plain = LlamaForCausalLM(model.config).eval()
    plain.generate(prompt(20), max_new_tokens=3, **cache_argument(cache), **GREEDY)
    assert cache.report().lost is None


@pytest.mark.parametrize("kind", LOST)
def test_a_strict_cache_is_not_gone_on_without(kind: Any, options: dict[str, Any]) -> None:
    model = kind(llama().config).eval()
    cache = QuantizedInt8Cache(model.config, strict=True, **options)
    with pytest.raises(FallbackError, match=re.escape(f"every model must keep the cache, got: {LOST[kind]}.")):
        model.generate(prompt(20), max_new_tokens=3, **cache_argument(cache), **GREEDY)
    assert cache.report().lost == LOST[kind]
    cache.reset()
    assert cache.report().lost is None


def checkpointing(attention: str = "sdpa") -> LlamaForCausalLM:
    """A model that passes over its cache, as all do in training with gradient checkpointing."""
    model = llama().train()
    model.set_attn_implementation(attention)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


STORED_NOTHING = "LlamaForCausalLM went on without the cache: it asked for the sizes of its masks and stored nothing"


@pytest.mark.filterwarnings("ignore:(?!QuantizedInt8Cache):UserWarning")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_forward_pass_that_stores_nothing_is_told_of_at_once(attention: str, options: dict[str, Any]) -> None:
    model = checkpointing(attention)
    cache = QuantizedInt8Cache(model.config, **options)
    reason = f"{STORED_NOTHING}, which gradient checkpointing does in training"
    with pytest.warns(FallbackWarning, match=f"^QuantizedInt8Cache: {reason}."):
        model(prompt(20), **cache_argument(cache))
    model(prompt(20), **cache_argument(cache))  # warns no second time
    assert cache.report().lost == reason
    with torch.no_grad():
        model.eval()(prompt(20), **cache_argument(cache))
    assert cache.report().lost is None


@pytest.mark.filterwarnings("ignore:(?!QuantizedInt8Cache):UserWarning")
@pytest.mark.parametrize("stored", [0, 20, 200])
def test_a_forward_pass_that_stores_nothing_in_a_strict_cache_raises(stored: int, options: dict[str, Any]) -> None:
    if stored and options:
        pytest.skip("torch refuses the mask, which is as wide as the capacity")
    model = checkpointing()
    cache = QuantizedInt8Cache(model.config, strict=True, **options)
    with torch.no_grad():
        _ = model(prompt(stored), **cache_argument(cache)) if stored else None
    with pytest.raises(FallbackError, match=f"every model must keep the cache, got: {STORED_NOTHING}, which gradient"):
        model(prompt(1 if stored else 20), **cache_argument(cache))
    assert cache.get_seq_length() == stored


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attention_of_the_models_own_code_that_stores_nothing_is_in_the_report() -> None:
    model = checkpointing("eager")
    cache = QuantizedInt8Cache(model.config)
    routing.uninstall()  # as where a model asks transformers for no function
    assert cache.report().lost is None
    model(prompt(20), **cache_argument(cache))
    assert cache.report().lost == "A model asked this cache for the sizes of its masks and stored nothing"
    with torch.no_grad():
        model.eval()(prompt(20), **cache_argument(cache))
    assert cache.report().lost is None


@torch.no_grad()
def test_a_question_by_hand_is_no_forward_pass(options: dict[str, Any]) -> None:
    model, other = llama(), llama()
    cache = QuantizedInt8Cache(model.config, strict=True, **options)
    for tokens in (20, 1, 1):
        for _ in range(3):
            assert cache.get_mask_sizes(tokens, 0)[1] == 0
            other(prompt(5))  # whose attention is that of no cache
        model(prompt(tokens), **cache_argument(cache))
    assert cache.report().lost is None
    assert int(cache.get_seq_length()) == 22


@torch.no_grad()
@pytest.mark.parametrize("stored", [0, 30])
def test_a_forward_pass_that_is_stopped_is_none_that_stores_nothing(stored: int, options: dict[str, Any]) -> None:
    model, other = llama(), llama()
    cache = QuantizedInt8Cache(model.config, strict=True, **options)
    _ = model(prompt(stored), **cache_argument(cache)) if stored else None

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    for _ in range(3):
        hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(prompt(4), **cache_argument(cache))
        hook.remove()
        other(prompt(5))
    model(prompt(4), **cache_argument(cache))
    assert cache.report().lost is None
    assert int(cache.get_seq_length()) == stored + 4


class LooksFirst(LlamaForCausalLM):
    """Asks once more than its masks need."""

    def forward(self, input_ids: Tensor, **kwargs: Any) -> Any:
        kwargs[CACHE_NAME].get_mask_sizes(input_ids.shape[1], 0)
        return super().forward(input_ids, **kwargs)


@compiler_warnings
@torch.no_grad()
@pytest.mark.parametrize("how", ["as it is", "compiled", "masks made by hand"])
def test_a_model_that_asks_twice_and_stores_is_not_told_of(how: str, options: dict[str, Any]) -> None:
    model = LooksFirst(llama().config).eval()
    model.forward = torch.compile(model.forward, backend="eager") if how == "compiled" else model.forward
    cache = QuantizedInt8Cache(model.config, strict=True, **options)
    for tokens in (100, 1):
        if how == "masks made by hand":
            cache.get_mask_sizes(tokens, 0)
        model(input_ids=prompt(tokens), **cache_argument(cache))
    assert cache.report().lost is None
    assert int(cache.get_seq_length()) == 101


def test_a_cache_that_reaches_an_attention_function_was_passed_over() -> None:
    """A model takes an argument that it does not know for an option of its attention function, and hands it on."""
    cache, states = QuantizedInt8Cache(), torch.ones(1, 2, 3, 16)
    module = torch.nn.Module()
    with pytest.raises(TypeError, match=f"^Module: the cache must come as {CACHE_NAME}, got it as past_key_values, "):
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, states, states, states, None, past_key_values=cache)
    cache.update(states, states, 0)  # by a model that knows it
    ALL_ATTENTION_FUNCTIONS["sdpa"](module, states, states, states, None, past_key_values=cache)
    ALL_ATTENTION_FUNCTIONS["sdpa"](module, states, states, states, None, past_key_values=DynamicCache())


# A cache that is not empty.


MODES = {
    "plain": lambda: {},
    "prompt lookup": lambda: {"prompt_lookup_num_tokens": 4},
    "assistant": lambda: {"assistant_model": llama()},
    "no cache": lambda: {"use_cache": False},
    "in chunks": lambda: {"prefill_chunk_size": 16},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_kept_cache_goes_on_behind_what_it_holds(
    mode: str, loaded: bool, options: dict[str, Any], tmp_path: Path
) -> None:
    how = MODES[mode]()
    if mode in ("prompt lookup", "assistant") and options and IS_NEWEST:
        pytest.skip("transformers refuses drafts over a cache of fixed capacity")
    if mode == "in chunks" and not IS_NEWEST:
        pytest.skip("older transformers begins its chunks from the front, which is refused; see below")
    if loaded and options:
        pytest.skip("a file is loaded as a cache that grows")
    model = llama()
    cache = QuantizedInt8Cache(model.config, **options)
    first = model.generate(prompt(60).repeat(1, 2), max_new_tokens=30, do_sample=False, **cache_argument(cache))
    if loaded:
        cache.save(tmp_path / "prompt", model=model, input_ids=first)
        cache = QuantizedInt8Cache.load(tmp_path / "prompt", model=model)
    ids = torch.cat([first, prompt(27, seed=3)], dim=1)
    with fed_to(model) as fed:
        output = model.generate(ids, max_new_tokens=30, **cache_argument(cache), **GREEDY, **how)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    assert torch.equal(output.sequences, expected)
    assert fed[0] < 28 + 16  # and a draft
    assert cache_of(output) is cache
    assert cache.get_seq_length() == expected.shape[1] - 1


def test_only_new_tokens_with_the_mask_of_all_go_on(options: dict[str, Any]) -> None:
    model = llama()
    whole = prompt(150)
    expected = model.generate(whole, max_new_tokens=20, do_sample=False)[:, 150:]
    for how in ({}, {"use_cache": False}):
        cache = QuantizedInt8Cache(model.config, **options)
        with torch.no_grad():
            model(whole[:, :120], **cache_argument(cache))
        output = model.generate(
            whole[:, 120:], attention_mask=torch.ones_like(whole), max_new_tokens=20, **how, **cache_argument(cache),
            do_sample=False,
        )  # fmt: skip
        assert torch.equal(output[:, 30:], expected)
        assert cache.get_seq_length() == 169


def test_embeddings_go_on_behind_what_is_stored() -> None:
    model, cache = llama(), QuantizedInt8Cache()
    ids = prompt(150)
    embeds = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        model(ids[:, :120], **cache_argument(cache))
    with pytest.raises(ValueError, match="inputs_embeds must go on behind the 120 tokens in the cache, got 100"):
        model.generate(inputs_embeds=embeds[:, :100], max_new_tokens=20, **cache_argument(cache), do_sample=False)
    output = model.generate(inputs_embeds=embeds, max_new_tokens=20, **cache_argument(cache), do_sample=False)
    assert torch.equal(output, model.generate(ids, max_new_tokens=20, do_sample=False)[:, 150:])


@pytest.mark.parametrize("length", [120, 30])
def test_a_prompt_that_does_not_go_on_is_refused(length: int, options: dict[str, Any]) -> None:
    model = llama()
    cache = QuantizedInt8Cache(model.config, **options)
    with torch.no_grad():
        model(prompt(120), **cache_argument(cache))
    before = copy.deepcopy(cache)
    message = f"QuantizedInt8Cache: the prompt must go on behind the 120 tokens in the cache, got {length}. Pass the"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(prompt(length), max_new_tokens=20, **cache_argument(cache), **GREEDY)
    assert cache.get_seq_length() == 120
    assert_bit_equal(cache, before)
    with pytest.raises(ValueError, match=r"in the cache, got 1\. Pass"):
        model.generate(max_new_tokens=20, **cache_argument(cache), **GREEDY)  # begins with a token of its own


def test_chunks_from_the_front_are_refused_where_transformers_makes_them() -> None:
    if IS_NEWEST:
        pytest.skip("this transformers leaves out what is stored")
    model, cache = llama(), QuantizedInt8Cache()
    with torch.no_grad():
        model(prompt(120), **cache_argument(cache))
    message = "LlamaForCausalLM must be fed what follows the 120 tokens in the cache, got the first 16 again, from an"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(prompt(150), max_new_tokens=20, prefill_chunk_size=16, **cache_argument(cache), **GREEDY)
    assert cache.get_seq_length() == 120


@pytest.mark.parametrize("where", ["positional", "by name"])
def test_a_prompt_is_checked_wherever_it_stands(where: str, tmp_path: Path) -> None:
    model, ids = llama(), prompt(100)
    cache = QuantizedInt8Cache()
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    cache.save(tmp_path / "prompt", model=model, input_ids=ids)
    cache = QuantizedInt8Cache.load(tmp_path / "prompt", model=model)
    other = prompt(120, seed=9)
    given = {"positional": ((other,), {"input_ids": None}), "by name": ((None,), {"input_ids": other})}[where]
    with pytest.raises(ValueError, match="the prompt must begin with the 100 stored tokens"):
        model.generate(*given[0], **given[1], max_new_tokens=2, **cache_argument(cache))
    with pytest.raises(ValueError, match="the prompt must begin with the 100 stored tokens"):
        model.generate(inputs=other, max_new_tokens=2, **cache_argument(cache))


def test_a_batch_of_other_size_is_told_how_to_go_on(options: dict[str, Any]) -> None:
    model = llama()
    cache = QuantizedInt8Cache(model.config, **options)
    first = model.generate(prompt(60, batch=2), max_new_tokens=3, do_sample=False, **cache_argument(cache))
    ids = torch.cat([first, prompt(10, batch=2)], dim=1)
    advice = "batch_repeat_interleave(3) to continue each stored sequence 3 times, or reset() for new sequences."
    advice = f"Use a cache without max_cache_len for {advice}" if options else f"Use {advice}"
    with pytest.raises(ValueError, match=re.escape(f"the batch the layer holds, 2, got 6. {advice}")):
        model.generate(ids, num_beams=3, max_new_tokens=9, do_sample=False, **cache_argument(cache))
    if not options:
        cache.batch_repeat_interleave(3)
        output = model.generate(ids, num_beams=3, max_new_tokens=9, do_sample=False, **cache_argument(cache))
        assert torch.equal(output, model.generate(ids, num_beams=3, max_new_tokens=9, do_sample=False))


# An encoder-decoder cache that holds another call's sequence.


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(1)
    return T5ForConditionalGeneration(T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
        eos_token_id=None, pad_token_id=0,
    )).eval()  # fmt: skip


@torch.no_grad()
def test_an_encoder_decoder_is_not_given_one_cache_without_a_config() -> None:
    """With a config the cache knows that it is one of two."""
    model, cache = t5(), QuantizedInt8Cache()
    for call in (model, model.generate):
        with pytest.raises(
            ValueError, match=r"needs two caches, got one. Use \w+=QuantizedInt8Cache.for_encoder_decoder"
        ):
            call(prompt(20), decoder_input_ids=prompt(7), **cache_argument(cache))
        assert cache.get_seq_length() == 0
    model(prompt(20), decoder_input_ids=prompt(7), **cache_argument(QuantizedInt8Cache.for_encoder_decoder()))


@pytest.mark.parametrize("quantize_cross_attention", [True, False])
def test_a_second_call_of_an_encoder_decoder_begins_anew(quantize_cross_attention: bool) -> None:
    model = t5()
    cache = QuantizedInt8Cache.for_encoder_decoder(
        model.config, strict=True, quantize_cross_attention=quantize_cross_attention
    )
    for seed, length in ((2, 120), (5, 150), (6, 90)):
        output = model.generate(prompt(length, seed=seed), max_new_tokens=105, **cache_argument(cache), **GREEDY)
        expected = model.generate(prompt(length, seed=seed), max_new_tokens=105, do_sample=False)
        assert torch.equal(output.sequences, expected)
        assert cache_of(output) is cache
        assert cache.get_seq_length() == 105
        assert {layer.get_seq_length() for layer in cache.cross_attention_cache.layers} == {length}


def test_an_encoder_decoder_goes_on_from_its_own_tokens() -> None:
    model, source = t5(), prompt(120)
    cache = QuantizedInt8Cache.for_encoder_decoder(model.config)
    first = model.generate(source, max_new_tokens=50, do_sample=False, **cache_argument(cache))
    expected = model.generate(source, max_new_tokens=80, do_sample=False)
    output = model.generate(
        source, decoder_input_ids=first, max_new_tokens=30, do_sample=False, **cache_argument(cache)
    )
    assert torch.equal(output, expected)
    assert cache.get_seq_length() == 80


@pytest.mark.parametrize("condition_on_prev_tokens", [False, True])
def test_whisper_hears_more_than_one_window(condition_on_prev_tokens: bool) -> None:
    torch.manual_seed(1)
    model = WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=200, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_source_positions=50,
        max_target_positions=200, num_mel_bins=8, decoder_start_token_id=1, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, init_std=0.3, begin_suppress_tokens=None, suppress_tokens=None,
    )).eval()  # fmt: skip
    model.generation_config.no_timestamps_token_id = 100
    model.generation_config.is_multilingual = False
    sound = torch.randn(1, 8, 330, generator=torch.Generator().manual_seed(3))
    options = {
        "max_new_tokens": 60, "do_sample": False, "return_timestamps": True,
        "condition_on_prev_tokens": condition_on_prev_tokens,
    }  # fmt: skip
    cache = QuantizedInt8Cache.for_encoder_decoder(model.config)
    began: list[int] = []
    hook = model.model.encoder.register_forward_hook(lambda *_: began.append(cache.get_seq_length()))
    heard = model.generate(sound, **options, **cache_argument(cache))
    hook.remove()
    assert len(began) > 1
    assert set(began) == {0}
    assert torch.equal(heard, model.generate(sound, **options))


# What is watched, and what is not.


def test_other_caches_pass_through_untouched() -> None:
    model = llama()
    QuantizedInt8Cache()
    for cache in (DynamicCache(), EncoderDecoderCache(DynamicCache(), DynamicCache())):
        assert calls._policies(cache) == []
    cache = DynamicCache()
    with torch.no_grad():
        model(prompt(40), **cache_argument(cache))
    before = cache.get_seq_length()
    model.generate(prompt(40), max_new_tokens=2, do_sample=False, **cache_argument(cache))
    assert cache.get_seq_length() > before + 2, "transformers does not feed the prompt again any more"


def test_what_others_wrapped_since_is_named() -> None:
    sdpa, generate = AttentionInterface._global_mapping["sdpa"], GenerationMixin.generate
    QuantizedInt8Cache()
    our_sdpa, our_generate = AttentionInterface._global_mapping["sdpa"], GenerationMixin.generate

    def later(*args: Any, **kwargs: Any) -> Any: ...

    place = re.escape(f"({__name__}.test_what_others_wrapped_since_is_named.<locals>.later)")
    try:
        AttentionInterface.register("sdpa", later)
        GenerationMixin.generate = later
        with pytest.warns(
            UserWarning, match=rf"^uninstall: what others put .*: sdpa {place}. Call uninstall\(\) again"
        ):
            routing.uninstall()
        with pytest.warns(UserWarning, match=rf"^unwatch_generate: .*: GenerationMixin.generate {place}. Call unwatch"):
            calls.unwatch_generate()
        assert AttentionInterface._global_mapping["sdpa"] is later
        assert GenerationMixin.generate is later
        AttentionInterface.register("sdpa", our_sdpa)  # the other wrapper is taken out
        GenerationMixin.generate = our_generate
        routing.uninstall()
        calls.unwatch_generate()
        assert AttentionInterface._global_mapping["sdpa"] is sdpa
        assert GenerationMixin.generate is generate
    finally:
        AttentionInterface.register("sdpa", sdpa)
        GenerationMixin.generate = generate
