"""Tables of quality, and of what keys and values look like."""

from tools.measurements import NotMeasuredError, load, where
from tools.tables.markdown import number, percent, table


def quality() -> str:
    report = load("quality")
    models = list(dict.fromkeys(row["model"] for row in report["rows"]))
    measured = [row for row in report["rows"] if "mean_kl" in row]
    prompts = {model: max(row["prompt_len"] for row in measured if row["model"] == model) for model in models}
    found = {(row["cache"], row["model"], row["prompt_len"]): row for row in measured}
    refused = {(row["cache"], row["model"]) for row in report["rows"] if "refused" in row}
    sizes = {row["cache"]: row["bytes_per_number"] for row in reversed(measured) if row["bytes_per_number"]}
    body = []
    caches = dict.fromkeys(row["cache"] for row in report["rows"])
    for cache in sorted(caches, key=lambda name: "int8" not in name[:16]):
        cells = []
        for model in models:
            row = found.get((cache, model, prompts[model]))
            if row is None:
                cells += ["refuses" if (cache, model) in refused else "-", ""]
            else:
                cells += [number(row["mean_kl"], 2), percent(row["top1_agreement"])]
        name = f"**{cache}**" if cache == "quantcache int8" else cache
        body.append([name, number(sizes.get(cache)), *cells])
    header = " | bytes per number" + "".join(f" | {model}: KL | same top token" for model in models)
    notes = [WINDOWS] if any("Gemma" in model for model in models) else []
    return "\n\n".join([table(header, body), *notes, where("quality")])


WINDOWS = (
    "Bytes are those of SmolLM2-135M at 8,192 tokens. Of Gemma 3 `QuantizedInt8Cache` quantises the layers of full "
    "attention and leaves the small windows to transformers, exact; the other rows round every layer."
)


def tasks() -> str:
    """Each task with each cache."""
    report = load("tasks")
    body = []
    for task, scores in report["tasks"].items():
        for cache, score in scores.items():
            name = f"**{cache}**" if cache == "int8 cache" else cache
            cells = [f"{score['right']:,} of {score['asked']:,}", percent(score["right"] / score["asked"])]
            cells += [f"{score[alike]:,}" for alike in ("answers_alike", "verdicts_alike")]
            body.append([TASKS.get(task, task), name, *cells, number(score["mean_kl"], 2)])
    header = "task | cache | right | share | answers alike | verdicts alike | KL"
    return f"{report['model']} in {report['dtype']}.\n\n" + table(header, body) + "\n\n" + where("tasks")


TASKS = {"humaneval": "HumanEval", "mmlu": "MMLU", "gsm8k": "GSM8K", "ceval": "C-Eval"}


def original_tasks() -> str:
    """What the original's page has."""
    report = load("original-tasks")
    body = [
        [row["weights"], *(f"{row[task]:.1f}" for task in ("mmlu", "ceval", "gsm8k", "humaneval"))]
        for row in report["rows"]
    ]
    header = f"{report['model']}, weights | MMLU | C-Eval | GSM8K | HumanEval"
    return (
        table(header, body)
        + f"\n\n[Source]({report['source']}) → [original-tasks.json](benchmarks/original-tasks.json)."
    )


def quality_odd_prompt() -> str:
    found = [row for row in load("quality")["rows"] if row.get("prompt_len", 512) != 512]
    if not found:
        raise NotMeasuredError("Not measured yet: `quality.json` has no prompt of another length.")
    body = [[row["model"], row["cache"], str(row["prompt_len"]), number(row["mean_kl"], 2)] for row in found]
    return table(" | cache | prompt | KL", body) + "\n\n" + where("quality")


def states() -> str:
    report = load("states")
    body = []
    for kind in ("key", "value"):
        heads = [head for head in report["heads"] if head["kind"] == kind]
        ratios = sorted(head["largest_over_median_channel"] for head in heads)
        means = [sum(head["error"][rule] for head in heads) / len(heads) for rule in ("per_token", "per_channel")]
        body.append([f"{kind}s", *(number(ratios[at], 2) for at in (len(ratios) // 2, -1)), *map(percent, means)])
    header = f"{report['model']} | largest over median channel: median head | worst head"
    header += " | error, one scale per token | one scale per channel"
    return table(header, body) + "\n\n" + where("states")
