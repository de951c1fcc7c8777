"""First use of the kernels of a wheel, installed alone, with no compiler, no NVRTC and an empty home folder.

    python tests/benchmarks/bench_wheel.py dist/NAME.whl [--out FILE]

The wheel goes into a folder of its own, before what else is installed here. In a new process for each device torch is
imported and, on a GPU, its context made; then each call is the first of its kernel and timed until the device is done.
Results are held against attention over the exact states, and nothing may be built or written.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

PROGRAM = """
import json, os, sys, time

class NoNvrtc:
    def find_spec(self, name, path=None, target=None):
        if name in ("cuda.core", "cuda.bindings.nvrtc"):
            raise ModuleNotFoundError(name, name=name)

sys.meta_path.insert(0, NoNvrtc())

import torch
from torch.nn.functional import scaled_dot_product_attention

device = torch.device(sys.argv[1])
is_gpu = device.type == "cuda"
wait = torch.cuda.synchronize if is_gpu else lambda: None
kinds = [(128, "bfloat16"), (64, "bfloat16"), (256, "float16")] if is_gpu else [(128, "float32")]

def states(heads, tokens, head_dim, dtype):
    return torch.randn(2, heads, tokens, head_dim, device=device, dtype=dtype)

warm = [states(4, 300, head_dim, getattr(torch, dtype)) for head_dim, dtype in kinds]
scaled_dot_product_attention(warm[0], warm[0], warm[0])
wait()
start = time.perf_counter()
import quantcache
from quantcache import QuantizedInt8Cache
from quantcache.backends import dispatch
from quantcache.backends.cuda import nvrtc
from quantcache.quantization.options import AttentionOptions
from quantcache.store import reads
QuantizedInt8Cache()
seconds = {"import quantcache": time.perf_counter() - start}
errors = {}

def timed(name, call):
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    seconds[name] = time.perf_counter() - start
    return result

for head_dim, dtype_name in kinds:
    dtype, kind = getattr(torch, dtype_name), f"head_dim {head_dim}, {dtype_name}"
    cache, written = QuantizedInt8Cache(), []

    def update(tokens):
        written.append((states(4, tokens, head_dim, dtype), states(4, tokens, head_dim, dtype)))
        return cache.update(*written[-1], 0)

    timed(f"store a prompt, {kind}", lambda: update(300))
    for name, tokens in (("decode", 1), ("chunk of 200", 200)):
        query = states(8, tokens, head_dim, dtype)
        update(tokens)
        view = cache.layers[0].pages.view()
        attend = lambda: reads.attention(query, view, AttentionOptions(is_causal=True))
        found = timed(f"attention, {name}, {kind}", attend)
        timed(f"again, {name}, {kind}", attend)
        key, value = (torch.cat(parts, dim=2).double().repeat_interleave(2, dim=1) for parts in zip(*written))
        seen = torch.ones(tokens, key.shape[2], dtype=torch.bool, device=device).tril(key.shape[2] - tokens)
        exact = scaled_dot_product_attention(query.double(), key, value, attn_mask=seen).transpose(1, 2)
        error = errors[f"{name}, {kind}"] = float((found.double() - exact).norm() / exact.norm())
        assert error < 0.02, (name, kind, error)
    assert dispatch.choose_backend(device) == device.type, dispatch.why_chosen(device, dispatch.choose_backend(device))

from quantcache.cli import doctor

print(json.dumps({
    "package": quantcache.__file__,
    "nvrtc": nvrtc.unavailable(),
    "seconds": seconds,
    "relative_error": errors,
    "kernels": {finding.device: finding.kernels for finding in doctor.examine()},
    "home": sorted(os.listdir(os.environ["HOME"])),
}))
"""

DRIVERS_FOLDER = ".nv"
"""Where CUDA's driver keeps its own cache; https://docs.nvidia.com/cuda, "CUDA_CACHE_PATH"."""

MOST_SECONDS = 0.05
"""What the first use of a kernel may take; what takes longer is named in the output."""


def first_use(wheel: Path, device: str) -> dict[str, Any]:
    """What ``PROGRAM`` finds in a new process; three significant digits."""
    with tempfile.TemporaryDirectory() as name:
        folder, home = Path(name, "packages"), Path(name, "home")
        home.mkdir()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
        subprocess.run([*pip, "--target", str(folder), str(wheel)], check=True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("QUANTCACHE_", "XDG_"))}
        path = [str(folder), *(part for part in kept.get("PYTHONPATH", "").split(os.pathsep) if part not in ("", "."))]
        environment = {**kept, "PATH": "", "HOME": str(home), "PYTHONPATH": os.pathsep.join(path)}
        ran = subprocess.run(
            [sys.executable, "-c", PROGRAM, device],
            env=environment,
            cwd=name,
            capture_output=True,
            text=True,
            check=False,
        )
        if ran.returncode:
            raise SystemExit(ran.stderr)
        found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
        if not Path(found.pop("package")).is_relative_to(folder):
            raise SystemExit("Another quantcache was imported than the wheel's.")
        if written := sorted({*found.pop("home")} - {DRIVERS_FOLDER}):
            raise SystemExit(f"Nothing may be written into the home folder, found {', '.join(written)}.")
    for part in ("seconds", "relative_error"):
        found[part] = {key: float(f"{value:.3g}") for key, value in found[part].items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", default="docs/benchmarks/wheel.json")
    options = parser.parse_args()
    wheel = options.wheel.resolve()
    rows = []
    for device in ["cpu", *(["cuda:0"] if torch.cuda.is_available() else [])]:
        rows.append({"row": f"first use, {device.partition(':')[0]}", **first_use(wheel, device)})
        print(json.dumps(rows[-1]), flush=True)
        kernels = {name: took for name, took in rows[-1]["seconds"].items() if not name.startswith(("import", "again"))}
        slow = {name: took for name, took in kernels.items() if took > MOST_SECONDS}
        print(f"over {MOST_SECONDS} s: {slow or 'nothing'}", flush=True)
    report = {
        "command": f"python tests/benchmarks/bench_wheel.py dist/{wheel.name}",
        "hardware": {"gpu": torch.cuda.get_device_properties(0).name}
        if torch.cuda.is_available()
        else {"device": "cpu"},
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "load_average": round(os.getloadavg()[0], 2),
        "wheel_bytes": wheel.stat().st_size,
        "rows": rows,
    }
    Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
