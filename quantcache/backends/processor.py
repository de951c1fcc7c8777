"""What this machine's processor can do, as its operating system tells it. Loads no torch."""

import functools
import platform
import subprocess
from pathlib import Path
from typing import Final

_UNITS: Final = {"bfloat16": {"avx512_bf16", "amx_bf16", "bf16"}, "float16": {"avx512_fp16", "amx_fp16", "asimdhp"}}
"""Instructions that multiply numbers of a dtype, as Linux names them on x86-64 and ARM; each is enough."""

_SHOWN: Final = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "i8mm", "sve", *_UNITS["bfloat16"], "amx_fp16")
"""What decides speed here."""


@functools.cache
def features() -> frozenset[str]:
    """Instructions the processor has, as Linux names them; none where the system does not tell."""
    try:
        if platform.system() == "Darwin":
            asked = ["/usr/sbin/sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
            told = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=False).stdout.strip()
            return frozenset({"bf16"} if told == "1" else ())
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    named = (line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features")))
    return frozenset(next(named, "").split())


def shown_features() -> list[str]:
    """Those of ``features`` that decide speed here, sorted."""
    return sorted(features().intersection(_SHOWN))


def computes_in(dtype: str) -> bool:
    """Whether the processor multiplies numbers of ``dtype``, torch's name of it; otherwise it goes by float32."""
    return dtype not in _UNITS or not features().isdisjoint(_UNITS[dtype])


def name() -> str:
    """What the processor is called, or its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
