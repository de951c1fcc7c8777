"""``quantcache plan``: a table, JSON or a picture of what a cache takes. Loads no torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from quantcache.cli.arguments import AsJson, Batch, Plot, check_target
from quantcache.cli.hub import look_for
from quantcache.layers.report import human_bytes

if TYPE_CHECKING:
    from quantcache.planning import Geometry, Plan, ServingPlan


def plan(
    spec: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A preset (see --list), a folder, a config.json, or a hub id.")
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="GPU", help="Memory of the GPU: 24, 80GB, 2x80GB, or a name such as h100 or A100-80GB."),
    ] = None,
    gpus: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many such GPUs weights and cache are spread over, evenly.")
    ] = 1,
    batch: Batch = 1,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens",
            "-t",
            metavar="N",
            help="Tokens of context of each sequence, as 8192 or 8k.",
            show_default="8192",
        ),
    ] = None,
    new_tokens: Annotated[
        int,
        typer.Option(
            metavar="N", min=0, help="How many of them are generated; of requests, how many follow the prompt."
        ),
    ] = 512,
    requests: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Plan for so many requests at the same time under continuous batching, in blocks."
        ),
    ] = None,
    prompt_len: Annotated[
        str | None,
        typer.Option(
            "--prompt-len", metavar="N", help="Tokens of each request's prompt, as 2048 or 2k.", show_default="2048"
        ),
    ] = None,
    overhead: Annotated[
        float,
        typer.Option(
            metavar="X", min=0.0, max=0.99, help="Share of the GPU for the driver, activations and fragmentation."
        ),
    ] = 0.1,
    list_models: Annotated[
        bool, typer.Option("--list", metavar="", help="List the presets, which need no file.")
    ] = False,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Compute the size of a cache and what fits on a GPU, before anything is loaded.

    [bold]Examples[/bold]

    quantcache plan Llama-3.1-8B --gpu rtx4090

    quantcache plan Qwen/Qwen2.5-7B --gpu 80GB --batch 32 --tokens 32768

    quantcache plan Qwen2.5-7B --gpu h100 --requests 64 --prompt-len 2k

    quantcache plan ./my-model --json
    """
    from quantcache import planning
    from quantcache.planning.gpus import parse_gpu

    if list_models:
        list_presets()
        return
    if spec is None:
        raise typer.BadParameter("name a model, or pass --list", param_hint="MODEL")
    try:
        memory = None if gpu is None else parse_gpu(gpu) * gpus
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpu") from error
    count, prompt = _count(tokens or "8192", "--tokens"), _count(prompt_len or "2048", "--prompt-len")
    check_meant(requests, batch, tokens, prompt_len, plot)
    check_target(plot)
    if plot is not None:
        import matplotlib.figure  # noqa: F401 - before anything is fetched
    if not planning.is_preset(spec) and spec.count("/") == 1:
        look_for(spec)
    geometry = planning.find_geometry(spec)
    if requests is not None:
        served = planning.plan_requests(
            geometry, requests=requests, prompt_len=prompt, new_tokens=new_tokens, gpu_nbytes=memory, overhead=overhead
        )
        show_requests(served, as_json)
        return
    made = planning.plan(
        geometry, batch=batch, tokens=count, new_tokens=new_tokens, gpu_nbytes=memory, overhead=overhead
    )
    if plot is not None:
        draw(geometry, made, plot)
    if as_json:
        print(json.dumps(made.to_dict(), indent=1))
        return
    console = Console()
    console.print(f"{_title(made)}; layers: {_layers(made)}", highlight=False)
    for table in tables(made):
        console.print(table)
    if plot is not None:
        console.print(f"drawn: {plot}", soft_wrap=True)


def check_meant(
    requests: int | None, batch: int, tokens: str | None, prompt_len: str | None, plot: Path | None
) -> None:
    """Refuse options of one kind of plan in the other.

    Raises:
        typer.BadParameter: it names the option.
    """
    if requests is None and prompt_len is not None:
        raise typer.BadParameter("needs --requests; a sequence has --tokens", param_hint="--prompt-len")
    others = {"--batch": batch != 1, "--tokens": tokens is not None, "--plot": plot is not None}
    wrong = [option for option, given in others.items() if given and requests is not None]
    if wrong:
        raise typer.BadParameter(
            "is for one batch; requests have --prompt-len and --new-tokens, and come and go", param_hint=wrong[0]
        )


def list_presets() -> None:
    """Print the names of the presets and where their facts are from."""
    from quantcache.planning import PRESETS_SOURCE, find_geometry, plan, preset_names

    console = Console()
    table = Table(Column("preset", no_wrap=True), "weights", "layers", "bytes a token, bf16", "int8")
    for name in preset_names():
        geometry = find_geometry(name)
        made = plan(geometry, tokens=1)
        weights = f"{(made.num_params or 0) / 1e9:.2f} B"
        table.add_row(name, weights, _layers(made), f"{made.bf16_per_token:,}", f"{made.int8_per_token:,}")
    console.print(table)
    facts = f"Geometries are facts from {PRESETS_SOURCE}. 0 bytes a token: every layer has a window."
    console.print(facts, style="dim")


def tables(made: "Plan") -> list[Table]:
    """The cache, and what fits."""
    size = Table("", "bf16 cache", "int8 cache", "int8 / bf16")
    per_token, nbytes = (made.bf16_per_token, made.int8_per_token), (made.bf16_nbytes, made.int8_nbytes)
    size.add_row("one more token, bytes", *(f"{each:,}" for each in per_token), _ratio(*per_token))
    size.add_row(f"{made.batch} x {made.tokens:,} tokens", *map(human_bytes, nbytes), _ratio(*nbytes))
    if made.gpu_nbytes is None:
        return [size]
    asked = f"batch at {made.tokens:,} tokens", f"tokens at batch {made.batch}"
    fits = Table(
        "weights", "size", "cache", "left for it", *asked, title=f"what fits in {human_bytes(made.gpu_nbytes)}"
    )
    for fit in made.fits:
        beyond = made.max_positions is not None and fit.longest_context > made.max_positions
        room = human_bytes(fit.free_nbytes) if fit.free_nbytes > 0 else "nothing"
        answers = f"{fit.largest_batch:,}", f"{fit.longest_context:,}{' *' if beyond else ''}"
        end = fit.cache == "int8"
        fits.add_row(fit.weights, human_bytes(fit.weights_nbytes), fit.cache, room, *answers, end_section=end)
    if not made.fits:
        fits.caption = "how many weights this model has is not known here; give a folder with its safetensors files"
    elif any("*" in str(cell) for cell in fits.columns[-1]._cells):
        fits.caption = f"* the model was made for {made.max_positions:,} tokens"
    return [size, fits]


def show_requests(made: "ServingPlan", as_json: bool) -> None:
    """Print what requests take in blocks, and what fits."""
    if as_json:
        print(json.dumps(made.to_dict(), indent=1))
        return
    console = Console()
    console.print(f"{_title(made)}; continuous batching", highlight=False)
    size = Table("", "16 bits", "int8", "int8 / 16 bits")
    blocks, nbytes = (made.bf16_blocks, made.int8_blocks), (made.bf16_nbytes, made.int8_nbytes)
    pools = made.bf16, made.int8
    size.add_row("tokens of a block", *(f"{each.tokens:,}" for each in pools), "")
    size.add_row("a block", *(human_bytes(each.nbytes) for each in pools), "")
    size.add_row("blocks of a request", *(f"{each:,}" for each in blocks), "")
    each = tuple(total // made.requests for total in nbytes)
    size.add_row(f"{made.prompt_len:,} + {made.new_tokens:,} tokens", *map(human_bytes, each), _ratio(*each))
    size.add_row(f"{made.requests:,} such requests", *map(human_bytes, nbytes), _ratio(*nbytes))
    console.print(size)
    if made.gpu_nbytes is None:
        return
    fits = Table(
        *("weights", "size", "blocks", "left for them", "requests at once", f"all {made.requests:,}?"),
        title=f"what fits in {human_bytes(made.gpu_nbytes)}",
    )
    for fit in made.fits:
        room = human_bytes(fit.free_nbytes) if fit.free_nbytes > 0 else "nothing"
        answers = f"{fit.num_requests:,}", "yes" if fit.num_requests >= made.requests else "no"
        kind = "16 bits" if fit.cache == "bf16" else fit.cache
        fits.add_row(fit.weights, human_bytes(fit.weights_nbytes), kind, room, *answers, end_section=kind == "int8")
    longest = made.prompt_len + made.new_tokens
    if not made.fits:
        fits.caption = "how many weights this model has is not known here; give a folder with its safetensors files"
    elif made.max_positions is not None and longest > made.max_positions:
        fits.caption = f"the model was made for {made.max_positions:,} tokens, a request has {longest:,}"
    console.print(fits)


def draw(geometry: "Geometry", made: "Plan", file: Path) -> None:
    """Bytes of both caches over the context, with what the GPU has left next to the weights in bf16.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    from quantcache.planning import GIB
    from quantcache.planning.fit import MOST
    from quantcache.planning.sizes import exact_nbytes, int8_nbytes

    room = next((fit.free_nbytes for fit in made.fits if fit.weights == "bf16"), None)
    # Beyond where the last cache meets what is left, so that the picture shows it.
    longest = max((fit.longest_context for fit in made.fits if fit.weights == "bf16"), default=0)
    end = max(2 * made.tokens, longest * 9 // 8 if longest < MOST else 0)
    lengths = sorted({max(1, end * step // 128) for step in range(1, 129)})
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(lengths, [exact_nbytes(geometry, made.batch, n, "bfloat16") / GIB for n in lengths], label="bf16 cache")
    axes.plot(lengths, [int8_nbytes(geometry, made.batch, n) / GIB for n in lengths], label="int8 cache")
    if room is not None and room > 0:
        axes.axhline(room / GIB, color="grey", linestyle="--", label="left next to bf16 weights")
    axes.set(xlabel=f"tokens, batch {made.batch}", ylabel="GiB", title=made.model, xlim=(0, None), ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    figure.savefig(file, dpi=150)


def _count(text: str, option: str) -> int:
    from quantcache.planning.gpus import parse_count

    try:
        return parse_count(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _title(made: "Plan | ServingPlan") -> str:
    params = "" if made.num_params is None else f", {made.num_params / 1e9:.2f} B weights"
    return f"[bold]{made.model}[/bold]{params}"


def _ratio(bf16: int, int8: int) -> str:
    return f"{int8 / bf16:.3f}" if bf16 else ""


def _layers(made: "Plan") -> str:
    return ", ".join(f"{count} {kind}" for kind, count in made.layers.items())
