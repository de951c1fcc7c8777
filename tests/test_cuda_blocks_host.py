"""Do the CUDA kernels get what they need of a pool? On the CPU, with a stand-in for the driver."""

from dataclasses import replace

import pytest
import torch

from quantcache.backends import cuda, torch_blocks
from quantcache.backends.blocks import BlockLayout
from quantcache.backends.cuda import blocks as cuda_blocks
from tests import emulated_cuda
from tests.block_cases import CAUSAL, CHUNKS, DECODING, MIXED, Case, build

CASES = {
    "decoding": DECODING,
    "chunks": CHUNKS,
    "mixed": MIXED,
    "padded": replace(DECODING, padding=4),
    "one long": Case((5000,), (1,), 1, 4),
    "many heads": Case((900, 40), (1, 1), 8, 20, 64, 64, torch.float16),
    "unequal head_dims": replace(MIXED, head_dim=192, v_head_dim=208, dtype=torch.float16),
    "one prompt": Case((0,), (200,), 2, 7, 96, 96),
    "long after long": Case((3000,), (300,), 1, 1),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return emulated_cuda.emulate(monkeypatch)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("is_recorded", [False, True])
def test_attention_and_appending(name: str, is_recorded: bool, launched: list[str]) -> None:
    """As the torch backend, with lengths that the host knows and without."""
    pool, expected = build(CASES[name]), build(CASES[name])
    if is_recorded:
        pool.pages.batch.query_lens = pool.pages.batch.kv_lens = None
    output = cuda.attend_blocks(*pool.states, pool.pages, CAUSAL)
    assert pool.error(output) < 1e-2
    assert torch.equal(output, torch_blocks.attend_blocks(*pool.states, expected.pages, CAUSAL))
    kinds = {count > 1 for count in pool.case.new}
    assert {"attention", "prefill"} >= set(launched) - {"merge_parts"} >= {("attention", "prefill")[k] for k in kinds}
    if not is_recorded:
        assert len(set(launched) - {"merge_parts"}) == len(kinds)
    launched.clear()
    cuda.append_blocks(*pool.states[1:], pool.pages)
    torch_blocks.append_blocks(*pool.states[1:], expected.pages)
    assert launched == ["append_blocks"]
    assert torch.equal(pool.memory, expected.memory)


PROMPTS = {
    "alone": ((0,), (300,), 0),
    "two, and one that decodes": ((70, 0, 0), (1, 256, 400), 0),
    "behind a chunk": ((5, 64, 0), (1, 300, 300), 1),
    "between chunks": ((200, 0, 640, 0), (5, 256, 300, 1), 3),
    "too short": ((0, 0), (255, 90), 2),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_a_long_prompt_with_nothing_stored_goes_to_torch(
    name: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no sequence outside of those that the kernel has to take goes to the kernel."""
    stored, new, of_kernel = PROMPTS[name]
    taken = []
    attend = cuda_blocks.attend_several

    def noted(call: cuda_blocks._Call) -> None:
        taken.append(len(call.pages.batch.block_table))
        attend(call)

    monkeypatch.setattr(cuda_blocks, "attend_several", noted)
    pool = build(Case(stored, new, 1, 3, 64, 64))
    assert pool.error(cuda.attend_blocks(*pool.states, pool.pages, CAUSAL)) < 1e-2
    assert taken == [of_kernel] * (of_kernel > 0)
    for options in (CAUSAL._replace(softcap=5.0), CAUSAL._replace(sinks=torch.linspace(-1, 2, 3))):
        taken.clear()
        assert pool.error(cuda.attend_blocks(*pool.states, pool.pages, options), options) < 1e-2
        assert taken == [len(new)]


@pytest.mark.parametrize("arch", emulated_cuda.GENERATIONS)
def test_every_gpu_has_room(arch: str, launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    emulated_cuda.become(monkeypatch, arch)
    for head_dim in (64, 128, 256):
        pool = build(replace(MIXED, head_dim=head_dim, v_head_dim=head_dim))
        assert pool.error(cuda.attend_blocks(*pool.states, pool.pages, CAUSAL)) < 1e-2
    assert {"attention", "prefill"} <= set(launched)


@pytest.mark.parametrize("case", [DECODING, MIXED], ids=["decoding", "mixed"])
def test_every_option(case: Case, launched: list[str]) -> None:
    pool = build(case)
    sinks = torch.linspace(-1, 2, case.num_kv_heads * case.group)
    for asked in (CAUSAL._replace(softmax_scale=0.5), CAUSAL._replace(softcap=5.0), CAUSAL._replace(sinks=sinks)):
        output = cuda.attend_blocks(*pool.states, pool.pages, asked)
        assert pool.error(output, asked) < 1e-2
        assert pool.error(output, CAUSAL) > 1e-2


def test_tokens_that_are_nobodys_are_zero(launched: list[str]) -> None:
    """In a recorded step, where there may be more of them than sequences have."""
    pool = build(replace(DECODING, padding=3))
    pool.pages.batch.query_lens = pool.pages.batch.kv_lens = None
    padded = [torch.cat([states, states.new_full((1, *states.shape[1:]), 7)[:, :, :3]], 2) for states in pool.states]
    output = cuda.attend_blocks(*padded, pool.pages, CAUSAL)
    assert pool.error(output.contiguous()) < 1e-2
    assert not output[:, 4:].any()


def test_layers_of_a_forward_pass_share_the_scratch(launched: list[str]) -> None:
    """Which is the pass's own: what one recorded graph writes to, no other does."""
    pool, other = build(CASES["one long"]), build(CASES["one long"])
    for _ in range(3):
        cuda.attend_blocks(*pool.states, pool.pages, CAUSAL)
    (scratch,) = pool.pages.batch.memo.values()
    cuda.attend_blocks(*other.states, other.pages, CAUSAL)
    (others,) = other.pages.batch.memo.values()
    assert scratch.data_ptr() != others.data_ptr()


def test_states_that_kernels_cannot_read_are_copied(launched: list[str]) -> None:
    pool = build(replace(MIXED, head_dim=16, v_head_dim=16))
    for states in pool.states[1:]:
        shifted = torch.empty(states.numel() + 1, dtype=states.dtype)[1:].view_as(states).copy_(states)
        assert shifted.data_ptr() % 16
    expected = cuda.attend_blocks(*pool.states, pool.pages, CAUSAL)
    shifted = [torch.empty(s.numel() + 1, dtype=s.dtype)[1:].view_as(s).copy_(s) for s in pool.states]
    assert torch.equal(cuda.attend_blocks(*shifted, pool.pages, CAUSAL), expected)


def test_a_pool_that_kernels_cannot_read_is_refused(launched: list[str]) -> None:
    pool = build(DECODING)
    memory = torch.empty(pool.memory.numel() + 8, dtype=torch.uint8)[8:].view_as(pool.memory)
    pages = pool.pages._replace(pool=memory[:, : pool.pages.layout.page_bytes])
    with pytest.raises(ValueError, match="pages must begin at multiples of 16 bytes"):
        cuda.attend_blocks(*pool.states, pages, CAUSAL)
    table = pool.pages.batch.block_table
    pool.pages.batch.block_table = table.t().contiguous().t()
    with pytest.raises(ValueError, match="rows of block_table must be contiguous"):
        cuda.append_blocks(*pool.states[1:], pool.pages)
    assert not launched


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (BlockLayout(2, 128, 128, torch.float32), "blocks of 16-bit models, got torch.float32"),
        (BlockLayout(2, 96, 80, torch.bfloat16), "blocks of 16-bit models"),
        (BlockLayout(2, 72, 72, torch.float16), "in steps of 16, got 72"),
        (BlockLayout(2, 128, 128, torch.bfloat16), None),
    ],
    ids=str,
)
def test_what_is_not_covered_is_said(layout: BlockLayout, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.nvrtc, "unavailable", lambda: None)
    found = cuda.unsupported_blocks(layout)
    assert found is None if reason is None else reason in str(found)
