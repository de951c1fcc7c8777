"""Hypothesis settings, devices, and the guarantee that every test starts with an unpatched transformers."""

import copy
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from transformers import AutoModelForCausalLM

from tests.processes import made_once

os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("default", max_examples=60, deadline=None)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    """Every test starts and ends with transformers' own attention functions."""
    from quantcache.layers import calls, routing

    routing.uninstall()
    calls.unwatch_generate()
    torch.manual_seed(0)
    yield
    routing.uninstall()
    calls.unwatch_generate()


@pytest.fixture
def unknown_eager_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen2's eager attention is a function of which nothing is known, so that it is given restored states."""
    from transformers.models.qwen2 import modeling_qwen2

    own = modeling_qwen2.eager_attention_forward
    monkeypatch.setattr(modeling_qwen2, "eager_attention_forward", lambda *args, **kwargs: own(*args, **kwargs))


class _Deprecations(logging.Handler):
    """transformers logs what it would warn of where a model is traced; that is an error here like any warning."""

    def emit(self, record: logging.LogRecord) -> None:
        if "past_key_values" in record.getMessage() and "deprecated" in record.getMessage():
            raise AssertionError(record.getMessage())


@pytest.fixture(autouse=True)
def nothing_deprecated() -> Iterator[None]:
    """The cache goes to transformers, and is taken from its outputs, under the name that it wants."""
    logger, handler = logging.getLogger("transformers"), _Deprecations()
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)


@pytest.fixture(scope="session")
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in float32 as a folder, which loads in a second where its GGUF file takes many."""

    def save(folder: Path) -> None:
        from quantcache.evaluation.models import load_model

        model, tokenizer, _ = load_model(None, device=torch.device("cpu"), dtype=torch.float32)
        config = copy.deepcopy(model.config)
        del config.quantization_config  # of the file that it comes from, of which the weights have nothing any more
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return made_once(tmp_path_factory, "SmolLM2-135M-Instruct", save)


def devices() -> list[object]:
    """The devices a test runs on: the CPU, and the GPU where there is one."""
    return ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, skip_without_gpu])]


skip_without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

compiler_warnings = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)
"""What inductor says of itself, of TF32, and of the empty graph with which it begins."""
