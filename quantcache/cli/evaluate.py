"""``quantcache eval``: how close the answers stay, for several caches side by side."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from quantcache.cli.arguments import AsJson, Device, Model, Plot, check_target, open_device

if TYPE_CHECKING:
    from quantcache.evaluation.quality import Results, Settings


def evaluate(
    spec: Model = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="prose, code, or a UTF-8 file; may be given several times.",
            show_default="prose and code",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="owner/name:column on the hub (owner/name/config:column@split), in place of --text."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(metavar="N", min=1, help="Sequences of text.")] = 2,
    tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Tokens of each sequence.")] = 1024,
    prompt: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of the first call, the prompt.")] = 512,
    chunk: Annotated[
        int, typer.Option(metavar="N", min=1, help="Tokens of each later call; 1 is how generate() decodes, and slow.")
    ] = 16,
    greedy: Annotated[
        int, typer.Option(metavar="N", min=0, help="Length of the greedy answers that are compared.")
    ] = 64,
    needle: Annotated[
        int, typer.Option(metavar="N", min=0, help="Tokens of the text that hides a number; 0 for no test.")
    ] = 1024,
    caches: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Some of int8, bf16-cache, bf16, fp8, hqq, quanto.", show_default="all there are"
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", help="Instead of all this, some of humaneval, mmlu, gsm8k, ceval through every cache."
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with the tasks' questions.",
            show_default="HumanEval and MMLU from PyPI",
            file_okay=False,
        ),
    ] = None,
    shots: Annotated[int, typer.Option(metavar="N", min=0, help="Tasks: questions shown with their answers.")] = 5,
    questions: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Tasks: at most so many of each, evenly from its topics.", show_default="all"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Tasks: programs or questions at a time.")] = 10,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Tasks: keep answers in this file, and go on from those in it.", dir_okay=False
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Measure the KL divergence of several caches from the exact cache in float32, and more.

    Every compared prediction has read the prompt and all that followed from the cache.

    [bold]Examples[/bold]

    quantcache eval

    quantcache eval --model Qwen/Qwen2.5-0.5B --text notes.txt --plot out.png

    quantcache eval --tasks humaneval,mmlu --questions 2000 --resume done.jsonl
    """
    if tasks is not None:
        if plot is not None:
            raise typer.BadParameter("tasks have no plot, leave it out or leave out --tasks", param_hint="--plot")
        from quantcache.cli.tasks import evaluate_tasks, task_settings

        asked = task_settings(tasks, shots, questions, batch, caches)
        evaluate_tasks(spec, open_device(device, spec), asked, data, resume, as_json)
        return
    if tokens <= prompt:
        raise typer.BadParameter(f"must be less than --tokens, {tokens}, got {prompt}", param_hint="--prompt")
    check_target(plot)
    where = open_device(device, spec)
    from quantcache.cli.terminal import machine, open_model
    from quantcache.evaluation.quality import Settings, check_settings, measure, to_json

    wanted = None if caches is None else [name.strip() for name in caches.split(",")]
    settings = Settings(text or ["prose", "code"], dataset, rows, tokens, prompt, chunk, greedy, needle, wanted)
    check_settings(settings)
    if plot is not None:
        import matplotlib.figure  # noqa: F401 - before minutes are spent
    console = Console(stderr=as_json)
    model, tokenizer, label = open_model(spec, where, console, "float32")
    console.print(f"[bold]{label}[/bold] in float32 on {where}; the reference is the exact cache", highlight=False)
    results = measure(model, tokenizer, settings, console)
    if plot is not None:
        draw(results, label, plot)
    if as_json:
        print(json.dumps(to_json(results, settings, machine(model, label)), indent=1))
        return
    for table in tables(results, settings):
        console.print(table)
    for name, reason in results.left_out.items():
        console.print(f"left out: {name}: {reason}", style="dim", soft_wrap=True, markup=False, highlight=False)
    console.print(f"{results.seconds:.0f} s", style="dim")


def tables(results: "Results", settings: "Settings") -> list[Table]:
    """The comparison, and the needles."""
    some = next(iter(results.comparisons.values()))
    title = f"{some.tokens:,} predictions through the cache; "
    title += f"perplexity with the exact cache {some.exact_perplexity:.4f}"
    table = Table(*("", "mean KL", "p99 KL", "same top-1", "perplexity"), title=title, box=SIMPLE_HEAD)
    layers = Table(*("", "worst layer, K", "V"), title="errors of what the layers hold", box=SIMPLE_HEAD)
    if results.greedy:
        layers.add_column("greedy answer differs at token")
    for name, result in results.comparisons.items():
        both = ([e for e in errors if not math.isnan(e)] for errors in (result.key_errors, result.value_errors))
        worst = [f"{max(errors, default=math.nan):.2%}" for errors in both]
        gained = f"{result.perplexity - result.exact_perplexity:+.4f}"
        kl = f"{result.mean_kl:.1e}", f"{result.p99_kl:.1e}"
        table.add_row(name, *kl, f"{result.top1_agreement:.2%}", gained)
        cells = [name, *worst]
        if results.greedy:
            places = results.greedy[name]
            cells.append(", ".join("never" if place is None else str(place) for place in places))
        layers.add_row(*cells)
    table.caption = "KL in nats per token"
    layers.caption = "relative to the RMS of exact keys and values"
    if not results.needles:
        return [table, layers]
    rows = next(iter(results.needles.values()))
    title = f"a number hidden in {settings.needle_tokens:,} tokens, so deep: loss of the right answer in nats"
    hidden = Table("", *(f"{found.depth:.0%}" for found in rows), title=title, box=SIMPLE_HEAD)
    hidden.caption = "* where it was the most likely one"
    for name, answers in results.needles.items():
        hidden.add_row(name, *(f"{found.loss:.4f}{' *' if found.found else ''}" for found in answers))
    return [table, layers, hidden]


def draw(results: "Results", label: str, file: Path) -> None:
    """Divergences of all caches, and errors over the layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = list(results.comparisons)
    places = list(range(len(names)))
    means = [result.mean_kl for result in results.comparisons.values()]
    tails = [result.p99_kl for result in results.comparisons.values()]
    # Points: on an axis of powers of ten the length of a bar says nothing.
    left.plot(means, places, "o", label="mean")
    left.plot(tails, places, "s", fillstyle="none", label="99th percentile")
    left.grid(axis="x", alpha=0.3)
    left.set(yticks=places, yticklabels=names, title=label)
    left.set(xlabel="KL divergence from the exact cache, nats per token")
    if max(means) > 0:
        left.set_xscale("log")
    left.invert_yaxis()
    left.legend()
    for name, result in results.comparisons.items():
        (line,) = right.plot(result.key_errors, label=f"{name}, K")
        right.plot(result.value_errors, color=line.get_color(), linestyle=":", label=f"{name}, V")
    right.set(xlabel="layer", ylabel="relative RMS error", yscale="log", title="what the layers hold")
    right.legend(fontsize="x-small")
    figure.savefig(file, dpi=150)
