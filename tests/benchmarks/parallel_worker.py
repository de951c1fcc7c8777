"""Rows of ``bench_parallel.py``, in one process or in one of two: ``parallel_worker.py DEVICE SECONDS ROW...``.

What is found goes to the standard output, a word and a value in each line: PROCESS, ABOUT, and for every row START and
DONE.
"""

import gc
import json
import os
import statistics
import sys
import time
from datetime import timedelta
from typing import Any

from bench_parallel import COMPILED, FARTHEST, PROBLEM, SIZES, STEPS, WARM_UP, Row, rows_of


class Clock:
    """A logits processor that notes when each token's logits are asked for; ``generate`` waits for every token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.times.append(time.perf_counter())
        return scores

    def median_ms(self) -> float:
        steps = [1e3 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)]
        return round(statistics.median(steps[WARM_UP:]), 3)


class Worker:
    """Rows of one or of two processes, in order."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch = torch
        self.kind = device
        self.rank = int(os.environ.get("RANK", 0))
        self.processes = int(os.environ.get("WORLD_SIZE", 1))
        if device == "cuda":
            torch.cuda.set_device(self.rank)
            # It builds a plan for every new length: half of DynamicCache's time with grouped heads, and not its fault
            # (https://github.com/pytorch/pytorch/pull/155958).
            torch.backends.cuda.enable_cudnn_sdp(False)
        if self.processes > 1:
            torch.distributed.init_process_group(
                "nccl" if device == "cuda" else "gloo",
                timeout=timedelta(seconds=90),
                device_id=torch.device("cuda", self.rank) if device == "cuda" else None,
            )
        self.devices = [torch.device("cuda", index) for index in range(2)] if device == "cuda" else ["cpu", "cpu"]
        self.model: Any = None
        self.model_at: tuple[str, str] | None = None

    def say(self, word: str, rest: str) -> None:
        if self.rank == 0:
            print(word, rest, flush=True)

    def about(self) -> str:
        import accelerate
        import transformers

        torch = self.torch
        names = [torch.cuda.get_device_properties(i).name for i in range(torch.cuda.device_count())]
        nccl = ".".join(map(str, torch.cuda.nccl.version())) if names else None
        versions = {
            "python": sys.version.split()[0], "torch": torch.__version__, "cuda": torch.version.cuda, "nccl": nccl,
            "transformers": transformers.__version__, "accelerate": accelerate.__version__,
        }  # fmt: skip
        return json.dumps({"hardware": {"gpus": names or ["none"]}, "versions": versions})

    def agree(self, fine: bool) -> bool:
        """Whether all processes say so."""
        if self.processes == 1:
            return fine
        torch = self.torch
        flag = torch.tensor([int(fine)], device=self.devices[self.rank])
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
        return bool(flag.item())

    def forget(self) -> None:
        torch = self.torch
        torch._dynamo.reset()  # compiled steps hold on to the cache they were made for
        if self.model is not None:
            vars(self.model).pop("_compiled_call", None)
        gc.collect()
        if self.kind == "cuda":
            for device in self.used():
                with torch.cuda.device(device):
                    torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)

    def used(self) -> list[Any]:
        return [self.devices[self.rank]] if self.processes > 1 else self.devices

    def memory_gb(self) -> list[dict[str, float]] | None:
        """Peak gigabytes (1e9 bytes) of each GPU."""
        torch = self.torch
        if self.kind != "cuda":
            return None
        mine = [
            {
                "allocated": round(torch.cuda.max_memory_allocated(device) / 1e9, 2),
                "reserved": round(torch.cuda.max_memory_reserved(device) / 1e9, 2),
            }
            for device in self.used()
        ]
        if self.processes == 1:
            return mine
        everyone: list[Any] = [None] * self.processes
        torch.distributed.all_gather_object(everyone, mine)
        return [entry for each in everyone for entry in each]

    def place(self, placement: str, size: str) -> None:
        """Have the model for ``size`` where ``placement`` says."""
        geometry = SIZES[size][0]
        if self.model_at == (placement, geometry):
            return
        if placement != "split" or self.model_at != ("one", geometry):
            self.model = self.model_at = None
            self.forget()
            self.model = self.make(geometry)
        if placement == "split":
            self.model = split(self.model, self.devices)
        elif placement == "tp":
            self.model = shared(self.model)
        self.forget()
        self.model_at = placement, geometry

    def make(self, geometry: str) -> Any:
        from bench_compiled import GEOMETRIES
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch = self.torch
        config = Qwen2Config(
            **GEOMETRIES[geometry] | ({"vocab_size": 98} if geometry == "tiny" else {}),
            max_position_embeddings=32768, dtype=torch.bfloat16, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,
        )  # fmt: skip
        torch.manual_seed(0)  # the same weights in every process
        torch.set_default_dtype(torch.bfloat16)
        with torch.device(self.devices[self.rank]):
            model = Qwen2ForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        model.generation_config.pad_token_id = 0
        return model

    def cache(self, kind: str, capacity: int) -> Any:
        from transformers import DynamicCache, StaticCache

        from quantcache import QuantizedInt8Cache

        config = self.model.config
        if kind == "DynamicCache":
            return DynamicCache(config=config)
        if kind == "StaticCache compiled":
            return StaticCache(config=config, max_cache_len=capacity)
        return QuantizedInt8Cache(config, max_cache_len=capacity if kind in COMPILED else None)

    def filled(self, kind: str, size: str) -> Any:
        """A cache that holds random states, each layer's where the model computes it."""
        from quantcache.layers.parallel import device_of_layer

        torch = self.torch
        _, batch, tokens = SIZES[size]
        config = self.model.config
        cache = self.cache(kind, tokens + WARM_UP + STEPS)
        heads = config.num_key_value_heads // self.processes
        shape = (batch, heads, tokens - 1, config.hidden_size // config.num_attention_heads)
        at, states = None, []
        for layer in range(config.num_hidden_layers):
            device = device_of_layer(self.model, layer)
            if device != at:
                states = []
                states = [torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2)]
                at = device
            cache.update(*states, layer)
        return cache

    def logits_error(self) -> float:
        """How far int8 moves the logits behind a short prompt, relative to their norm."""
        from quantcache.layers._host import cache_argument

        torch = self.torch
        ids = torch.randint(0, 90, (2, 260), generator=torch.Generator().manual_seed(1)).to(self.model.device)
        outcomes = []
        for kind in ("int8", "DynamicCache"):
            cache = self.cache(kind, 0)
            for chunk in (ids[:, :250], *ids[:, 250:].split(1, dim=1)):
                logits = self.model(chunk, **cache_argument(cache)).logits[:, -1].float()
            outcomes.append(logits)
        error = float((outcomes[0] - outcomes[1]).norm() / outcomes[1].norm())
        if not error < FARTHEST:
            raise AssertionError(f"int8 must move the logits by less than {FARTHEST} of their norm, got {error}")
        return round(error, 5)

    def decode(self, row: Row) -> dict[str, Any]:
        from transformers import CompileConfig, LogitsProcessorList

        from quantcache.layers._host import cache_argument

        torch = self.torch
        result: dict[str, Any] = {}
        if row.kind == "int8":
            result["logits_error"] = self.logits_error()
        self.forget()
        try:
            cache, problem = self.filled(row.kind, row.size), None
        except Exception as error:
            cache, problem = None, str(error)
        if not self.agree(problem is None):
            if problem is not None and "out of memory" not in problem:
                raise RuntimeError(problem)
            return {"why": "out of memory"}
        _, batch, tokens = SIZES[row.size]
        ids = torch.randint(0, 90, (batch, tokens), generator=torch.Generator().manual_seed(1))
        ids = ids.to(self.model.device)
        options: dict[str, Any] = {}
        if self.kind == "cpu" and row.kind in COMPILED:
            options["compile_config"] = CompileConfig(backend="aot_eager", mode=None)
            options["compile_config"]._compile_all_devices = True
        torch._dynamo.utils.counters.clear()
        clock = Clock()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=WARM_UP + STEPS,
            do_sample=False, logits_processor=LogitsProcessorList([clock]), **options,
        )  # fmt: skip
        ms = clock.median_ms()
        result |= {"ms": ms, "tokens_per_s": round(1e3 * batch / ms, 1), "memory_gb": self.memory_gb()}
        if row.kind in COMPILED:
            counters = torch._dynamo.utils.counters
            result["graphs"] = counters["stats"]["unique_graphs"]
            result["cudagraph_skips"] = counters["inductor"]["cudagraph_skips"]
        return result

    def run(self, row: Row) -> dict[str, Any]:
        torch = self.torch
        try:
            with torch.no_grad():
                self.place(row.placement, row.size)
                return self.decode(row)
        except Exception as error:
            problem = "out of memory" if "out of memory" in str(error) else f"{type(error).__name__}: {error}"[:300]
            if self.processes > 1:
                # The other process may wait for this one: end both, and let the parent go on.
                print(PROBLEM + problem, file=sys.stderr, flush=True)
                os._exit(3)
            return {"why": problem}


def split(model: Any, devices: list[Any]) -> Any:
    """The layers of ``model`` in two halves, as ``device_map`` has them."""
    from accelerate import dispatch_model

    layers = model.config.num_hidden_layers
    half = layers // 2
    devices = [device if isinstance(device, str) else device.index for device in devices]
    places = {f"model.layers.{index}": devices[index >= half] for index in range(layers)}
    places |= {"model.embed_tokens": devices[0], "model.rotary_emb": devices[0]}
    places |= {"model.norm": devices[1], "lm_head": devices[1]}
    return dispatch_model(model, device_map=places, skip_keys=model._skip_keys_device_placement)


def shared(model: Any) -> Any:
    """The heads of ``model`` spread over the processes by its own plan, as ``from_pretrained`` does with a checkpoint.

    Every process has made the whole model, with the same weights; of a weight that is cut it keeps its part alone.
    """
    import torch
    from torch.distributed.tensor import DTensor
    from transformers.distributed import DistributedConfig

    config, _, mesh = type(model).prepare_distribute_model(DistributedConfig(tp_plan="auto"))
    model = type(model).maybe_distribute_model(model, config, mesh)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if isinstance(weight, DTensor):
                part = DTensor.from_local(
                    weight.to_local().clone(), weight.device_mesh, weight.placements, run_check=False,
                    shape=weight.shape, stride=weight.stride(),
                )  # fmt: skip
                module._parameters[name] = torch.nn.Parameter(part, requires_grad=False)
    return model


def work(names: list[str], device: str, budget: float) -> None:
    deadline = time.monotonic() + budget
    print("PROCESS", os.getpid(), flush=True)
    known = {row.name: row for sizes in (["gqa", "mha"], ["tiny"]) for row in rows_of(sizes)}
    rows = [known[name] for name in names]
    worker = Worker(device)
    worker.say("ABOUT", worker.about())
    for index, row in enumerate(rows):
        # Rows that must be there come first in this process; the time of those behind is kept for them.
        kept = sum(later.seconds for later in rows[index + 1 :] if not later.is_optional)
        has_time = time.monotonic() + row.seconds + kept < deadline or not row.is_optional
        worker.say("START", row.name)
        result = worker.run(row) if worker.agree(has_time) else {"why": "no time left"}
        worker.say("DONE", json.dumps(result))
    if worker.processes > 1:
        worker.torch.distributed.destroy_process_group()


if __name__ == "__main__":
    work(sys.argv[3:], sys.argv[1], float(sys.argv[2]))
