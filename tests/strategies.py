"""The only place that invents inputs."""
# ruff: noqa: RUF001 (text in many scripts has letters that look alike)

import torch
from hypothesis import strategies as st
from torch import Tensor

from quantcache.quantization.scheme import PAGE_SIZE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_KINDS = ("normal", "constant", "huge_channel", "huge_token", "grid", "any_bits", "offset", "tiny", "top")


def make_states(kind: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Finite states of one kind; (batch, num_kv_heads, seq_len, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(shape, generator=generator)
    info = torch.finfo(dtype)
    if kind == "constant":
        states = torch.full(shape, float(states.flatten()[0]))
    elif kind == "huge_channel":
        states[..., seed % shape[-1]] += 1e4
    elif kind == "huge_token":
        states[..., seed % shape[-2], :] *= 1e4
    elif kind == "grid":  # ties and exact codes
        states = (states * 8).round() / 2
    elif kind == "offset":
        states = states * 1e-3 + 300.0
    elif kind == "tiny":
        states = states * info.smallest_normal
    elif kind == "top":
        states = states.sign() * info.max * torch.rand(shape, generator=generator).round(decimals=2)
    elif kind == "any_bits":
        word = torch.int32 if dtype == torch.float32 else torch.int16
        bounds = torch.iinfo(word)
        bits = torch.randint(bounds.min, bounds.max, shape, generator=generator, dtype=torch.int64).to(word)
        states = bits.view(dtype).nan_to_num(0.0, info.max, info.min)
    return states.clamp(info.min, info.max).to(dtype)


def broken(states: Tensor, seed: int = 0) -> Tensor:
    """``states`` (batch, num_kv_heads, seq_len, head_dim) with NaN and infinities among them.

    Here and there in the last sequence; in the first one a channel of its first page and a token have nothing else.
    """
    generator = torch.Generator().manual_seed(seed)
    states = states.clone()
    kinds = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=states.dtype)
    places = torch.rand(states[-1].shape, generator=generator) < 0.1
    states[-1][places] = kinds[torch.randint(0, 3, (int(places.sum()),), generator=generator)]
    states[0, 0, :PAGE_SIZE, -1] = kinds[torch.randint(0, 3, (PAGE_SIZE,), generator=generator)]
    states[0, 0, 20] = kinds[torch.randint(0, 3, (states.shape[3],), generator=generator)]
    return states


SENTENCES = {
    "English": "It's 3:45 p.m.; I'll pay $1,234.50 for 2 (two) tickets — won't you?",
    "German": "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg, 1987.",
    "French": "Où est passé le garçon naïf ? À Noël, là-bas…",
    "Vietnamese": "Tiếng Việt có sáu thanh điệu, và nhiều dấu.",
    "Turkish": "İstanbul'da ılık bir gün, 23 Nisan 1920.",
    "Greek": "Η γρήγορη καφέ αλεπού πηδάει, 42 φορές.",
    "Russian": "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Hebrew": "שלום עולם, זהו משפט בעברית עם נִקּוּד.",
    "Arabic": "مرحبا بالعالم، هذا نَصٌّ عربيّ ٢٠٢٤.",
    "Hindi": "नमस्ते दुनिया, यह हिन्दी का एक वाक्य है।",
    "Tamil": "வணக்கம் உலகம், இது தமிழ்.",
    "Thai": "สวัสดีชาวโลก นี่คือประโยคภาษาไทย",
    "Georgian": "გამარჯობა მსოფლიო.",
    "Amharic": "ሰላም ለዓለም።",
    "Chinese": "你好，世界！通义千问在2023年8月发布，参数约70亿。",
    "Japanese": "吾輩は猫である。名前はまだ無い。カタカナもある。",
    "Korean": "안녕하세요 세계, 한국어 문장입니다.",
    "emoji": "🙂 👩‍👩‍👧‍👦 🇨🇳 ✅️ 🏳️‍🌈",
    "decomposed": "e\u0301a\u0308o\u0302 \u1112\u1161\u11ab \u212b",
    "marks out of order": "a\u0301\u0323 \u0b15\u0d3c\u0b3c \u05d3\u05bc\u05b7",
    "code": "def f(x):\n    return {'a': x**2}  # café\n\n\tif x != 0x1F:\r\n        pass\n",
    "spaces": "  leading, trailing   \n\n \n  and \u00a0 unusual \u3000 ones  ",
    "symbols": "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋ ≠ √2 ½ Ⅷ ① ﷽ \u200b\ufeff",
}
"""Text in many scripts, written for these tests."""


def texts() -> st.SearchStrategy[str]:
    """Any letters, numbers, punctuation, symbols and spaces of the Basic Multilingual Plane."""
    return st.text(st.characters(max_codepoint=0xFFFF, categories=("L", "N", "P", "S", "Z")), max_size=60)


@st.composite
def kv_states(draw: st.DrawFn) -> Tensor:
    """Whole pages of states of every kind, dtype and stride."""
    pages = draw(st.integers(1, 2))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), pages * PAGE_SIZE, draw(st.sampled_from([1, 8, 96])))
    dtype, kind, seed = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(_KINDS)), draw(st.integers(0, 2**31))
    if draw(st.booleans()):  # as a model hands them over: (batch, seq_len, heads, head_dim), transposed
        batch, heads, seq_len, head_dim = shape
        return make_states(kind, (batch, seq_len, heads, head_dim), dtype, seed).transpose(1, 2)
    return make_states(kind, shape, dtype, seed)


def random_states(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Keys and values from N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    key, value = torch.randn(2, *shape, generator=generator, device="cpu").to(device=device, dtype=dtype)
    return key, value


Operation = tuple[str, int]
"""What happens to a layer, and its number: tokens of an update or a crop, a seed of an order."""


_NUMBERS = {
    "update": st.sampled_from([1, 1, 1, 7, 33, 64, 100, 230]),
    "crop": st.sampled_from([0, 1, 5, 32, 33, 64, 150]),
    "reorder": st.integers(0, 99),
    "select": st.integers(0, 99),
    "repeat": st.just(2),
    "offload": st.just(0),
    "reset": st.just(0),
}
_OPERATIONS = [*["update"] * 14, *["crop"] * 5, "reorder", "select", "select", "repeat", *["offload"] * 4, "reset"]


@st.composite
def schedules(draw: st.DrawFn, longest: int = 60) -> list[Operation]:
    """Up to ``longest`` operations on a layer: decoding, chunks, rollbacks, batch operations, offloading, resets."""
    length = draw(st.integers(1, longest))  # a list left to itself is mostly short
    return [(name, draw(_NUMBERS[name])) for name in (draw(st.sampled_from(_OPERATIONS)) for _ in range(length))]
