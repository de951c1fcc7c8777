"""Do the C++ kernels and plain torch read and write the blocks of a pool as the specification says?"""

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from quantcache.backends import cpu, dispatch, torch_blocks
from quantcache.backends.cpu import blocks as cpu_blocks
from tests.block_cases import CAUSAL, CHUNKS, DECODING, MIXED, Case, build, layer_of

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 6e-4}

CASES = {
    "decoding": replace(DECODING, stored=(70, 0, 128, 1, 63, 64, 900), new=(1,) * 7),
    "chunks": CHUNKS,
    "mixed": MIXED,
    "padded": replace(MIXED, padding=3),
    "one long": Case((1500,), (1,), 1, 4),
    "odd widths": replace(MIXED, head_dim=20, v_head_dim=13, num_kv_heads=3, group=2),
    "wide keys": replace(MIXED, head_dim=96, v_head_dim=80),
    "one prompt": Case((0,), (300,), 2, 7, 64, 64),
}


@pytest.fixture(params=["torch", "cpu"])
def backend(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "torch":
        return torch_blocks
    if reason := cpu.unavailable():
        pytest.skip(reason)
    return cpu_blocks


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_and_appending(name: str, dtype: torch.dtype, backend: ModuleType) -> None:
    """Bytes are those of the torch backend, and of nobody's blocks."""
    pool, other = (build(replace(CASES[name], dtype=dtype)) for _ in range(2))
    output = backend.attend_blocks(*pool.states, pool.pages, CAUSAL)
    assert pool.error(output) <= TOLERANCE[dtype]
    assert torch.equal(pool.memory, other.memory)
    backend.append_blocks(*pool.states[1:], pool.pages)
    torch_blocks.append_blocks(*other.states[1:], other.pages)
    assert torch.equal(pool.memory, other.memory)


@pytest.mark.parametrize("option", ["softmax_scale", "softcap", "sinks"])
def test_every_option(option: str, backend: ModuleType) -> None:
    pool = build(replace(MIXED, dtype=torch.float32))
    values = {"softmax_scale": 0.5, "softcap": 5.0, "sinks": torch.linspace(-1, 2, MIXED.num_kv_heads * MIXED.group)}
    asked = CAUSAL._replace(**{option: values[option]})
    output = backend.attend_blocks(*pool.states, pool.pages, asked)
    assert pool.error(output, asked) <= TOLERANCE[torch.float32]
    assert pool.error(output, CAUSAL) > 1e-2


@pytest.mark.parametrize("name", ["decoding", "mixed"])
def test_where_blocks_lie_changes_no_bit(name: str, backend: ModuleType) -> None:
    pools = [build(replace(CASES[name], is_shuffled=kind)) for kind in (False, True)]
    ordered, shuffled = (backend.attend_blocks(*pool.states, pool.pages, CAUSAL) for pool in pools)
    assert torch.equal(ordered, shuffled)


@pytest.mark.parametrize("name", ["decoding", "mixed"])
def test_what_is_not_stored_changes_no_bit(name: str, backend: ModuleType) -> None:
    """The pool is NaN everywhere else; here it is zero."""
    pool, zeros = build(CASES[name]), build(CASES[name])
    kept, layout = zeros.memory.clone(), zeros.pages.layout
    zeros.memory.zero_()
    for index, stored in enumerate(zeros.case.stored):
        used = zeros.pages.batch.block_table[index, : layout.blocks_for(stored)].long()
        zeros.memory[used] = kept[used]
        if rest := stored % 64:
            for is_key, block in ((True, used[-2]), (False, used[-1])):
                layout.exact(layer_of(zeros.memory, zeros.case), is_key)[block, :, rest:] = 0
    outputs = [backend.attend_blocks(*each.states, each.pages, CAUSAL) for each in (pool, zeros)]
    assert outputs[0].isfinite().all()
    assert torch.equal(*outputs)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_layers_share_what_a_pass_found_out(dtype: torch.dtype, backend: ModuleType) -> None:
    first, second, alone = (build(replace(MIXED, is_shuffled=False, dtype=dtype), seed) for seed in (0, 1, 1))
    shared = second.pages._replace(batch=first.pages.batch)
    outputs = []
    for pool, pages in ((first, first.pages), (second, shared), (alone, alone.pages)):
        outputs.append(backend.attend_blocks(*pool.states, pages, CAUSAL))
        backend.append_blocks(*pool.states[1:], pages)
    assert torch.equal(outputs[1], outputs[2])
    assert torch.equal(second.memory, alone.memory)


def test_lengths_that_only_the_device_knows_are_asked_for(backend: ModuleType) -> None:
    pool, other = build(MIXED), build(MIXED)
    other.pages.batch.query_lens = other.pages.batch.kv_lens = None
    outputs = [backend.attend_blocks(*each.states, each.pages, CAUSAL) for each in (pool, other)]
    assert torch.equal(*outputs)


def test_the_kernels_of_the_processor_read_blocks() -> None:
    if reason := cpu.unavailable():
        pytest.skip(reason)
    assert dispatch.block_backend_for(torch.device("cpu"), DECODING.layout) == ("cpu", None)
    assert dispatch.BLOCK_BACKENDS["cpu"] is cpu_blocks
