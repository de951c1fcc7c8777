"""Markdown tables, each written from one measurement.

``TABLES`` maps the name that stands in a page to the function that writes the table. A measurement that is missing is
said to be missing, in the table's place.
"""

from collections.abc import Callable

from tools.tables import memory, peers, quality, speed, summary

TABLES: dict[str, Callable[[], str]] = {
    "cuda-attention": speed.cuda_attention,
    "summary": summary.summary,
    "cuda-eager": speed.cuda_eager,
    "cuda-other": speed.cuda_other,
    "compiled-decode": speed.compiled_decode,
    "compiled-account": speed.compiled_account,
    "compiled-lengths": speed.compiled_lengths,
    "compiled-memory": speed.compiled_memory,
    "qwen-memory": speed.qwen_memory,
    "parallel": speed.parallel,
    "cpu-attention": speed.cpu_attention,
    "cpu-generate": speed.cpu_generate,
    "first-use": speed.first_use,
    "files": memory.files,
    "memory-held": memory.memory_held,
    "memory-peers": memory.memory_peers,
    "memory-fits": memory.memory_fits,
    "quality": quality.quality,
    "quality-odd-prompt": quality.quality_odd_prompt,
    "states": quality.states,
    "peers-cpu": lambda: peers.peers("peers-cpu"),
    "peers-gpu": lambda: peers.peers("peers-gpu"),
}
