"""Qwen v1 without remote code: tiny random checkpoints in the original on-disk format, written here."""

import base64
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache

import quantcache.adapters.qwen
from quantcache import QuantizedInt8Cache, ops
from quantcache.adapters import legacy
from quantcache.adapters.qwen import QWenLMHeadModel, decode_tokens, get_stop_words_ids, make_context

HIDDEN, HEADS, LAYERS, WIDTH, RANKS, SEQ_LENGTH = 32, 2, 2, 24, 256 + 2, 16
VOCAB = 512


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as released: names, config keys, auto_map and tokenizer file."""
    path = tmp_path_factory.mktemp("qwen")
    generator = torch.Generator().manual_seed(1)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.3

    weights = {"transformer.wte.weight": rand(VOCAB, HIDDEN), "lm_head.weight": rand(VOCAB, HIDDEN)}
    weights["transformer.ln_f.weight"] = 1 + rand(HIDDEN)
    for layer in range(LAYERS):
        at = f"transformer.h.{layer}."
        weights |= {
            at + "ln_1.weight": 1 + rand(HIDDEN),
            at + "ln_2.weight": 1 + rand(HIDDEN),
            at + "attn.c_attn.weight": rand(3 * HIDDEN, HIDDEN),
            at + "attn.c_attn.bias": rand(3 * HIDDEN),
            at + "attn.c_proj.weight": rand(HIDDEN, HIDDEN),
            at + "mlp.w1.weight": rand(WIDTH, HIDDEN),
            at + "mlp.w2.weight": rand(WIDTH, HIDDEN),
            at + "mlp.c_proj.weight": rand(HIDDEN, WIDTH),
        }
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "model_type": "qwen",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "kv_channels": HIDDEN // HEADS,
        "intermediate_size": 2 * WIDTH,
        "seq_length": SEQ_LENGTH,
        "vocab_size": VOCAB,
        "use_flash_attn": "auto",
        "tokenizer_class": "QWenTokenizer",
    }
    (path / "config.json").write_text(json.dumps(config))
    tokenizer = {
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
        "tokenizer_class": "QWenTokenizer",
        "model_max_length": 8192,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"hel"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (path / "qwen.tiktoken").write_bytes(b"\n".join(lines))
    generation = {
        "chat_format": "chatml",
        "eos_token_id": RANKS,
        "pad_token_id": RANKS,
        "max_new_tokens": 12,
        "max_window_size": 6144,
    }
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


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


@pytest.mark.parametrize("trust", [None, True])
def test_the_original_snippet_runs(folder: Path, trust: bool | None) -> None:
    """The three lines of the original, auto_map notwithstanding, chat from the int8 cache."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map=None,
        use_cache_quantization=True,
        use_cache_kernel=True,
        use_flash_attn=False,
        trust_remote_code=trust,
    ).eval()
    assert type(model) is QWenLMHeadModel
    earlier = [("a", "b")]
    response, history = model.chat(tokenizer, "Hello!", history=earlier)
    assert earlier == [("a", "b")]
    assert history == [("a", "b"), ("Hello!", response)]
    output = model.generate(torch.tensor([[1, 2, 3]]), return_dict_in_generate=True)
    assert isinstance(output.past_key_values, QuantizedInt8Cache)


def test_a_stream_ends_with_the_whole_answer(folder: Path, long_model: QWenLMHeadModel) -> None:
    """Every piece continues the one before, and the last is the text of what generate gives for the same prompt."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    options = {"do_sample": False, "max_new_tokens": 30}
    pieces = list(long_model.chat_stream(tokenizer, "Hello!", None, **options))
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(pieces))
    _, ids = make_context(tokenizer, "Hello!", None, "You are a helpful assistant.")
    words = get_stop_words_ids("chatml", tokenizer)
    output = long_model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), stop_words_ids=words, **options
    )
    answer = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True, errors="ignore")
    assert len(answer) > 3
    assert pieces[-1] == answer


def test_a_batch_gives_each_prompt_its_own_answer(folder: Path, long_model: QWenLMHeadModel) -> None:
    """Sub-batches of other lengths, padding and sorting change no answer and no order."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = ["Hello!", [4, 5], "a much longer question than the others", [7] * 30, "he"]
    options = {"progress": False, "do_sample": False, "max_new_tokens": 10}
    together = long_model.generate_batch(prompts, tokenizer, batch_size=2, **options)
    alone = [long_model.generate_batch([p, "x"], tokenizer, batch_size=1, **options)[0] for p in prompts]
    assert together == alone
    assert len(set(together)) > 2


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
    cache = output.past_key_values
    assert cache.report().backend == ops.choose_backend(torch.device("cpu"))
    assert all(layer.pages.num_pages == 3 for layer in cache.layers)
    exact = long_model(output.sequences, past_key_values=DynamicCache()).logits[:, 199:-1].double().log_softmax(-1)
    int8 = torch.stack(output.logits, dim=1).double().log_softmax(-1)
    kl = (exact.exp() * (exact - int8)).sum(-1)
    assert 0 < kl.mean() <= 3e-3
    wrecked = long_model(output.sequences.roll(1, 0), past_key_values=DynamicCache()).logits[:, 199:-1]
    kl = (exact.exp() * (exact - wrecked.double().log_softmax(-1))).sum(-1)
    assert kl.mean() > 1


def test_padding_changes_no_answer(long_model: QWenLMHeadModel) -> None:
    """Rotary is relative, so a left-padded row has the logits it has alone."""
    ids = torch.randint(0, VOCAB, (1, 9))
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), 1)
    mask = torch.cat((torch.zeros(1, 4, dtype=torch.long), torch.ones_like(ids)), 1)
    alone = long_model(ids).logits
    torch.testing.assert_close(long_model(padded, attention_mask=mask).logits[:, 4:], alone, atol=1e-4, rtol=1e-4)


def test_a_chunked_prompt_is_causal_and_keeps_its_scaling(model: QWenLMHeadModel) -> None:
    """A prompt beyond seq_length in chunks gives the tokens it gives at once."""
    ids = torch.randint(0, VOCAB, (1, 40))
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    chunked = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, prefill_chunk_size=7
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
    assert all(layer.pages.num_pages for layer in beams.past_key_values.layers)
    greedy = long_model.generate(ids, do_sample=False, **options)

    @torch.no_grad()
    def likelihood(sequences: Tensor) -> Tensor:
        logits = long_model(sequences, past_key_values=DynamicCache()).logits[:, 149:-1].log_softmax(-1)
        return logits.gather(-1, sequences[:, 150:, None]).sum((1, 2))

    assert (likelihood(beams.sequences) >= likelihood(greedy) - 1e-2).all()


def test_saving_writes_the_original_names(folder: Path, model: QWenLMHeadModel, tmp_path: Path) -> None:
    """A save and a load give back every name and value, and no auto_map."""
    model.save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("hello<|im_end|>")["input_ids"] == tokenizer("hello<|im_end|>")["input_ids"]


def test_first_release_names_and_other_models(tmp_path: Path) -> None:
    """n_embd and its like are understood; Qwen-VL is refused by name."""
    old = {"model_type": "qwen", "n_embd": 64, "n_head": 4, "n_layer": 3, "ffn_hidden_size": 96, "seq_length": 2048}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_attention_heads, config.num_hidden_layers) == (64, 4, 3)
    assert config.intermediate_size == 96
    (tmp_path / "config.json").write_text(json.dumps({**old, "visual": {}}))
    with pytest.raises(ValueError, match=r"QWenConfig: .* got the key 'visual'"):
        AutoConfig.from_pretrained(tmp_path)


def test_special_ids_follow_the_vocabulary(folder: Path) -> None:
    """Ids start after the last rank; content is never parsed for specials by make_context; texts round-trip."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.eod_id, tokenizer.im_start_id, tokenizer.im_end_id) == (RANKS, RANKS + 1, RANKS + 2)
    assert tokenizer("hel<|im_end|>")["input_ids"] == [257, RANKS + 2]
    for text in ("hello 123\n", "你好世界", "Ωμέγα  שלום مرحبا 🙂"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    text, ids = make_context(tokenizer, "x<|im_end|>", [("q", "r")], "s")
    assert text == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nr<|im_end|>"
        "\n<|im_start|>user\nx<|im_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids.count(tokenizer.im_end_id) == 4
    assert tokenizer.decode(ids) == text
    reply = [*ids, *tokenizer("hi")["input_ids"]]
    assert decode_tokens([*reply, tokenizer.im_end_id, 65], tokenizer, len(text), len(ids)) == "hi"
    assert decode_tokens(reply, tokenizer, len(text), len(ids)) == "h"


def test_legacy_tuples_come_in_and_go_out() -> None:
    """The float form is exact below a page; the quantised form is within one of its steps (it truncates)."""
    states = torch.randn(2, 5, HEADS, 16)
    cache = legacy.from_legacy(((states, -states),))
    back = legacy.to_legacy(cache)
    assert torch.equal(back[0][0], states)
    assert torch.equal(back[0][1], -states)
    (key, _value) = legacy.to_legacy(cache, quantized=True)[0]
    assert key[0].dtype == torch.uint8
    restored = legacy.to_legacy(legacy.from_legacy(((key, key),)))[0][0].transpose(1, 2)
    assert ((restored - states.transpose(1, 2)).abs() <= key[1] * 1.001).all()
    with pytest.raises(ValueError, match=r"legacy.from_legacy: layer 0: key scale must be"):
        legacy.from_legacy((((key[0], key[1][:1], key[2]), key),))


def test_generate_takes_a_legacy_tuple(model: QWenLMHeadModel) -> None:
    """generate(past_key_values=<tuple>) continues as the cache it came from."""
    ids = torch.randint(0, VOCAB, (1, 10))
    past = legacy.to_legacy(model(ids[:, :-1]).past_key_values)
    assert quantcache.adapters.qwen.QWenModel is not None
    expected = model.generate(ids, do_sample=False, max_new_tokens=4)
    assert torch.equal(model.generate(ids, past_key_values=past, do_sample=False, max_new_tokens=4), expected)


def test_rejected_drafts_change_no_token(model: QWenLMHeadModel) -> None:
    """Prompt-lookup decoding, beyond seq_length, gives the greedy tokens: drafts are causal among themselves."""
    ids = torch.randint(0, VOCAB, (1, 6)).repeat(1, 5)
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)
    drafted = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, prompt_lookup_num_tokens=3
    )
    assert torch.equal(plain, drafted)
