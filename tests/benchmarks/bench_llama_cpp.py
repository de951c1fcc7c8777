"""Decoding SmolLM2-135M-Instruct on a CPU, here and in llama.cpp, in one run.

    pip install xllamacpp    # llama.cpp as a wheel, into an environment of its own
    PYTHONPATH=.:FOLDER python tests/benchmarks/bench_llama_cpp.py [--tokens N ...] [--rounds N] [--threads N]

llama.cpp runs as with ``-ctk q8_0 -ctv q8_0 -fa`` and with 16-bit keys and values, over the weights in float32, which
are those that transformers computes with, and over the 4-bit weights of the file itself, which is what its users run.
Both sides have as many threads as torch. That both are the same model is checked first, by a greedy answer.

The prompt lies in every cache before the clock starts. The candidates then take turns, each answering some tokens;
both sides are timed from outside, by the same clock. What others do on the machine slows a round as a whole, so a
ratio is the median of those of the rounds.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
import xllamacpp
from torch import Tensor
from transformers import DynamicCache

from quantcache import QuantizedInt8Cache
from quantcache.backends import cpu, processor
from quantcache.evaluation.models import DEMO_LABEL, fetch_demo_model, load_model
from quantcache.layers._host import cache_argument
from tests.benchmarks import report

Row = dict[str, Any]
Timed = Callable[[int], float]
"""Seconds of an answer of so many tokens to a prompt that the cache holds."""

PROMPT = "Explain in a few sentences why the sky is blue, and why it turns red in the evening.\n"
SAME_TOKENS = 8
"""Of a greedy answer to ``PROMPT``; later on two ways of summing in float32 may part at a near tie."""

ROOM = 32  # tokens of a context that are left for the answer; llama.cpp takes none behind those of the training

Q8_0, F16 = (xllamacpp.ggml_type.GGML_TYPE_Q8_0, xllamacpp.ggml_type.GGML_TYPE_F16)


class WrongResultError(AssertionError):
    """A candidate's answer is not the model's."""


def with_float32_weights(packed: Path, folder: Path) -> Path:
    """The GGUF file once more, its weights as float32."""
    reader = gguf.GGUFReader(packed)
    target = folder / "float32.gguf"
    writer = gguf.GGUFWriter(target, reader.get_field("general.architecture").contents())
    made_anew = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
    for field in reader.fields.values():
        if not field.name.startswith(made_anew):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def llama_cpp(weights: Path, states: Any, tokens: int) -> Any:
    """llama.cpp's server in this process, for one sequence, with flash attention."""
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.n_ctx, params.n_parallel = tokens, 1
    params.cache_type_k = params.cache_type_v = states
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_ENABLED
    params.cpuparams.n_threads = torch.get_num_threads()
    params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))  # for the prompt, which no clock sees
    params.verbosity = 0
    params.warmup = params.fit_params = False
    return xllamacpp.Server(params)


def their_answer(server: Any, prompt: list[int], new_tokens: int) -> str:
    """Greedy; the server keeps the prompt, and evaluates its last token alone if it comes again."""
    asked = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": True}
    told = server.handle_completions(asked)
    if "choices" not in told:
        raise RuntimeError(f"their_answer: llama.cpp must answer, got {told}.")
    text: str = told["choices"][0]["text"]
    return text


def our_answer(model: Any, prompt: Tensor, new_tokens: int, cache: Any) -> list[int]:
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), **cache_argument(cache), do_sample=False, pad_token_id=0,
        min_new_tokens=new_tokens, max_new_tokens=new_tokens,
    )  # fmt: skip
    found: list[int] = output[0, prompt.shape[1] :].tolist()
    return found


def theirs(server: Any, prompt: list[int]) -> Timed:
    their_answer(server, prompt, 1)  # which reads the prompt

    def timed(new_tokens: int) -> float:
        start = time.perf_counter()
        their_answer(server, prompt, new_tokens)
        return time.perf_counter() - start

    return timed


def ours(model: Any, prompt: list[int], make: Callable[[], Any]) -> Timed:
    """Random states stand for a prompt that was read."""
    config, ids = model.config, torch.tensor([prompt])
    shape = (1, len(prompt) - 1, config.num_key_value_heads, config.hidden_size // config.num_attention_heads)
    states = [torch.randn(shape).transpose(1, 2) for _ in range(2)]

    def timed(new_tokens: int) -> float:
        cache = make()
        for layer in range(config.num_hidden_layers):
            cache.update(*states, layer)
        start = time.perf_counter()
        our_answer(model, ids, new_tokens, cache)
        return time.perf_counter() - start

    return timed


def check_same_model(model: Any, tokenizer: Any, server: Any) -> None:
    """Raises WrongResultError where the greedy answers to a prompt differ."""
    prompt = tokenizer(PROMPT).input_ids
    own = tokenizer.decode(our_answer(model, torch.tensor([prompt]), SAME_TOKENS, DynamicCache()))
    their = their_answer(server, prompt, SAME_TOKENS)
    if own != their:
        raise WrongResultError(f"check_same_model: llama.cpp must answer {own!r}, got {their!r}.")


def row(tokens: int, rounds: int, new_tokens: int, model: Any, tokenizer: Any, files: dict[str, Path]) -> Row:
    """One length of context: every candidate in turn."""
    prompt = torch.randint(1000, 20000, (tokens - ROOM,)).tolist()
    servers = {
        "llama.cpp q8_0, float32 weights": llama_cpp(files["float32"], Q8_0, tokens),
        "llama.cpp f16, float32 weights": llama_cpp(files["float32"], F16, tokens),
        "llama.cpp q8_0, 4-bit weights": llama_cpp(files["packed"], Q8_0, tokens),
    }
    check_same_model(model, tokenizer, servers["llama.cpp f16, float32 weights"])
    candidates = {
        "int8": ours(model, prompt, QuantizedInt8Cache),
        "DynamicCache": ours(model, prompt, DynamicCache),
    } | {name: theirs(server, prompt) for name, server in servers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds + 1):
        for name, timed in candidates.items():
            taken = timed(new_tokens)
            if index:  # the first round warms up
                seconds[name].append(taken)
    ratios = {
        name: round(statistics.median(b / a for a, b in zip(seconds["int8"], found, strict=True)), 3)
        for name, found in seconds.items()
        if name != "int8"
    }
    return {
        "row": f"{DEMO_LABEL}, {tokens:,} tokens",
        "tokens_per_s": {name: round(new_tokens / statistics.median(found), 2) for name, found in seconds.items()},
        "times_as_fast_as": ratios,
        "load_average": round(os.getloadavg()[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 8192])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=16, help=f"tokens of an answer, {ROOM} at most")
    parser.add_argument("--threads", type=int, help="of either side, instead of torch's own choice")
    parser.add_argument("--out", default="docs/benchmarks/llama-cpp.json")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, tokenizer, _ = load_model(None, "cpu")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        packed = fetch_demo_model()
        files = {"packed": packed, "float32": with_float32_weights(packed, Path(folder))}
        for tokens in options.tokens:
            rows.append(row(tokens, options.rounds, options.new, model, tokenizer, files))
            print(json.dumps(rows[-1]), flush=True)
            write(rows, Path(options.out))  # after each row: a run that is cut short keeps what it has


def write(rows: list[Row], out: Path) -> None:
    """The file, with the rows that there are."""
    result = {
        "command": shlex.join(["PYTHONPATH=.:FOLDER", "python", "tests/benchmarks/bench_llama_cpp.py", *sys.argv[1:]]),
        "hardware": {"processor": processor.name(), "threads": torch.get_num_threads(), "isa": cpu.isa()},
        "versions": report.versions("xllamacpp"),
        "llama_cpp_system": xllamacpp.get_system_info().strip(" |"),
        "rows": rows,
    }
    report.write(result, out)


if __name__ == "__main__":
    main()
