"""Tables of continuous batching: what requests take, and how fast they are answered."""

from quantcache.planning import find_geometry, plan_requests
from tools.measurements import load, where
from tools.tables.markdown import number, table

MODELS = ("Llama-3.1-8B", "Qwen2.5-7B", "Qwen3-32B")
NEW_TOKENS = 128


def request_blocks() -> str:
    """Computed by the planner, to which the tests compare the manager."""
    body = []
    for name in MODELS:
        for prompt_len in (512, 2048, 8192):
            made = plan_requests(find_geometry(name), prompt_len=prompt_len, new_tokens=NEW_TOKENS)
            sizes = (number(nbytes / 2**20) for nbytes in (made.bf16_nbytes, made.int8_nbytes))
            ratio = f"{made.bf16_nbytes / made.int8_nbytes:.2f}"
            body.append([name, f"{prompt_len:,} + {NEW_TOKENS}", f"{made.int8_blocks}", *sizes, ratio])
    header = " | tokens of a request | int8 blocks | 16-bit blocks, MiB | int8 blocks, MiB | requests in as much memory"
    return table(header, body)


def serving_gpu() -> str:
    body = []
    for job in load("serving-gpu")["jobs"]:
        ours = job["ways"]["int8 blocks"]
        for way, row in job["ways"].items():
            speed = row.get("whole_job_tokens_per_second", row["new_tokens_per_second"])
            ratio = "" if way == "int8 blocks" else f"**{job['times_as_fast_as'][way]:.2f}**"
            part = "" if row["new_tokens"] == ours["new_tokens"] else f", from {row['new_tokens']:,} tokens"
            told = "" if job["share"] == 1 else f", {ours['requests']} of them"
            body.append([f"{job['job']}{told}", f"{way}{part}", number(speed), number(row["peak_gib"]), ratio])
    header = "job | way | new tokens/s | peak over the weights, GiB | int8 blocks, times as fast"
    return table(header, body) + "\n\n" + where("serving-gpu")


def serving_load() -> str:
    """What became of many short requests, in a sentence."""
    load_run = load("serving-load")
    memory, report = load_run["memory"], load_run["report"]
    first, last = (f"{nbytes / 2**20:,.0f} MiB" for nbytes in (memory[1], memory[-1]))
    return (
        f"{load_run['requests']:,} requests, {load_run['at_once']} at a time: {load_run['answered']:,} were answered, "
        f"{load_run['refused']:,} were malformed or too long and were refused, and the clients of "
        f"{load_run['cancelled']:,} left. Then {report['blocks_used']} of {report['blocks']} blocks were in use; the "
        f"server had {first} of memory after a fifth of the requests, and {last} at the end.\n\n"
        + where("serving-load")
    )
