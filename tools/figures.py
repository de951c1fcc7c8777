"""Figures of the documentation as SVG, each drawn from one measurement, for a light and for a dark page."""

import io
import re
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tools.measurements import GIB, NotMeasuredError, attention_name, load, rows

matplotlib.use("agg")

INT8, EXACT, OTHER = "#0072b2", "#d55e00", "#8a8a8a"
"""Colours that the colour-blind can tell apart (Okabe and Ito); lighter ones on a dark page."""

THEMES = {
    "light": {"ink": "#222222", "grid": "#dddddd", INT8: INT8, EXACT: EXACT, OTHER: OTHER},
    "dark": {"ink": "#e0e0e0", "grid": "#4a4a4a", INT8: "#56b4e9", EXACT: "#e69f00", OTHER: "#a0a0a0"},
}
Theme = dict[str, str]

WIDTH = 5.4
"""Inches, a little more than a phone is wide, so that words of 11 points stay legible there."""


@contextmanager
def drawn(theme: Theme, title: str, height: float = 3.4) -> Iterator[tuple[Any, Axes]]:
    """Axes in a theme's colours on a transparent ground, below a title of one line or two."""
    ink = theme["ink"]
    settings: dict[Any, Any] = {
        "text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": theme["grid"], "xtick.color": ink,
        "ytick.color": ink, "grid.color": theme["grid"], "axes.spines.top": False, "axes.spines.right": False,
        "font.size": 11, "svg.hashsalt": "quantcache", "savefig.transparent": True, "axes.axisbelow": True,
    }  # fmt: skip
    with plt.rc_context(settings):
        figure, axes = plt.subplots(figsize=(WIDTH, height + 0.3 + 0.2 * title.count("\n")), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold")
        try:
            yield figure, axes
        finally:
            plt.close(figure)


_DECIMAL = re.compile(r"-?[1-9]\d*\.\d{3,}")  # not those below 1, which scale glyphs
_MADE_ID = re.compile(r"\b[pm][0-9a-f]{10}\b")


def svg(figure: Any) -> str:
    """The figure's text, the same on every machine: coordinates to a hundredth of a point, names counted."""
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = _DECIMAL.sub(lambda match: f"{float(match[0]):.2f}", out.getvalue())
    names = {name: f"made-{place}" for place, name in enumerate(dict.fromkeys(_MADE_ID.findall(text)))}
    text = _MADE_ID.sub(lambda match: names[match[0]], text)
    return "\n".join(line.rstrip() for line in text.splitlines()) + "\n"


def wrapped(name: str, width: int = 26) -> str:
    """A label in as many lines as it needs next to a plot."""
    return "\n".join(textwrap.wrap(name, width))


def bars(theme: Theme, title: str, names: list[str], values: list[float], label: str, line: float | None = 1.0) -> str:
    """Horizontal bars, the first on top, each with its number."""
    with drawn(theme, title, height=0.5 * len(names) + 1.0) as (figure, axes):
        names = [wrapped(name) for name in names]
        axes.barh(range(len(names)), values, color=theme[INT8], height=0.62)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set(xlabel=label, xlim=(0, 1.12 * max(values)))
        for place, value in enumerate(values):
            axes.text(value + 0.01 * max(values), place, f"{value:.2f}", va="center", color=theme["ink"])
        if line is not None:
            axes.axvline(line, color=theme[EXACT], linewidth=1.2)
        return svg(figure)


def memory(theme: Theme) -> str:
    held = [row for row in load("memory")["held"] if row["model"] == "Llama-3.1-8B"]
    with drawn(theme, "Half the memory") as (figure, axes):
        names = {"DynamicCache": "DynamicCache, bfloat16", "quantcache int8": "QuantizedInt8Cache"}
        for (cache, name), colour in zip(names.items(), (EXACT, INT8), strict=True):
            points = sorted((row["tokens"], row["held_bytes"] / GIB) for row in held if row["cache"] == cache)
            axes.plot(*zip(*points, strict=True), "o-", color=theme[colour], markersize=4)
            axes.annotate(name, points[-1], xytext=(-8, 8), textcoords="offset points", ha="right", color=theme[colour])
        axes.set(xlabel="tokens of context, one sequence", ylabel="cache of Llama-3.1-8B, GiB")
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
        axes.grid(axis="y")
        return svg(figure)


def qwen_memory(theme: Theme) -> str:
    wanted = ("batch", "bf16", "chunks")
    found = [r for r in load("qwen-memory")["rows"] if (r["table"], r["weights"], r["measured_by"]) == wanted]
    with drawn(theme, "Memory over the batch: Qwen-7B with 1,024 tokens each") as (figure, axes):
        for key, name, colour in (
            ("original_without_gib", "original, float cache", OTHER),
            ("original_with_gib", "original, quantised cache", EXACT),
            ("peak_reserved_gib", "quantcache, peak reserved", INT8),
        ):
            points = [(row["batch"], row[key]) for row in found if row[key] is not None]
            axes.plot(*zip(*points, strict=True), "o-", color=theme[colour], markersize=4, label=name)
        axes.set(xlabel="sequences in the batch", ylabel="weights and cache, GiB")
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.legend(frameon=False)
        axes.grid(axis="y")
        return svg(figure)


def quality(theme: Theme) -> str:
    measured = [row for row in load("quality")["rows"] if row.get("prompt_len") == 512]
    model = "SmolLM2-135M"
    kl = {row["cache"]: row["mean_kl"] for row in measured if row["model"] == model}
    if not kl:
        raise NotMeasuredError(f"Not measured yet: `quality.json` has no row of {model}.")
    names = sorted(kl, key=lambda name: kl[name])
    with drawn(theme, "Quality: distance from the exact cache", height=0.5 * len(names) + 1.0) as (figure, axes):
        colours = [theme[INT8 if name == "quantcache int8" else OTHER] for name in names]
        axes.scatter([kl[name] for name in names], range(len(names)), color=colours, s=48, zorder=3)
        axes.set_yticks(range(len(names)), [wrapped(name) for name in names])
        axes.invert_yaxis()
        label = f"KL divergence, nats per token\n({model}; left is better)"
        axes.set(xscale="log", xlabel=label)
        axes.grid(axis="x")
        return svg(figure)


def channels(theme: Theme) -> str:
    report = load("states")
    shown = report["shown"]
    with drawn(theme, "Keys have outlier channels, values do not") as (figure, axes):
        for kind, colour in (("key", INT8), ("value", EXACT)):
            largest = shown["largest_of_channel"][kind]
            axes.plot(largest, "o-", markersize=3, linewidth=0.8, color=theme[colour], label=f"{kind}s")
        label = f"channel (layer {shown['layer']}, head {shown['head']} of {report['model']})"
        axes.set(yscale="log", xlabel=label, ylabel=f"largest magnitude, {report['tokens']:,} tokens")
        axes.legend(frameon=False, loc="upper left")
        axes.grid(axis="y")
        return svg(figure)


def rounding(theme: Theme) -> str:
    """Every key head: its error with one scale per token against that with one scale per channel."""
    report = load("states")
    with drawn(theme, "Rounding error of each head, by what shares a scale") as (figure, axes):
        for kind, colour in (("key", INT8), ("value", EXACT)):
            found = [head["error"] for head in report["heads"] if head["kind"] == kind]
            tokens, columns = ([100 * error[rule] for error in found] for rule in ("per_token", "per_channel"))
            axes.scatter(tokens, columns, s=22, alpha=0.75, color=theme[colour], label=f"{kind}s, one dot per head")
        axes.set(xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
            axis.set_minor_locator(matplotlib.ticker.NullLocator())
            axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        low, high = axes.get_xlim()
        axes.plot([low, high], [low, high], color=theme["grid"], linewidth=1)
        axes.set(xlabel="% of RMS, one scale per token", ylabel="%, one scale per channel")
        axes.legend(frameon=False)
        return svg(figure)


def cuda_attention(theme: Theme) -> str:
    found = rows("cuda-attention", "attention")
    names = [_shape(attention_name(row)) for row in found]
    title = "Attention of one layer, one new token, H200\n(batch x context, heads / KV heads)"
    return bars(theme, title, names, [row["ratio"] for row in found], "times as fast as bfloat16 SDPA")


def _shape(name: str) -> str:
    """``batch 32, 32/8 heads, 8192 tokens, head_dim 128`` in fewer characters; head_dim is 128 if not said."""
    batch, heads, tokens, head_dim, *rest = name.split(", ")
    context = f"{batch.split()[1]} x {int(tokens.split()[0].replace(',', '')):,}"
    width = "" if head_dim == "head_dim 128" else f", {head_dim}"
    new = "".join(f", {count.split()[1]} new tokens" for count in rest)
    return f"{context}, {heads.split()[0]}{width}{new}"


def flashinfer(theme: Theme) -> str:
    """How many times as fast int8 is as FlashInfer's fastest way of reading each format, two dots for a geometry."""
    found = rows("flashinfer")
    with drawn(theme, "Attention beside FlashInfer, H200", height=0.5 * len(found) + 1.4) as (figure, axes):
        for words, name, colour in (("fp8", "its fp8", OTHER), ("bf16", "its bfloat16", EXACT)):
            ratios = [row["times_as_fast_as_flashinfer"].get(words) for row in found]
            axes.scatter(ratios, range(len(found)), s=48, color=theme[colour], zorder=3, label=name)
        axes.set_yticks(range(len(found)), [wrapped(_shape(row["row"])) for row in found])
        axes.invert_yaxis()
        axes.axvline(1, color=theme[INT8], linewidth=1.2)
        axes.set(xlabel="int8, times as fast as FlashInfer's fastest", xlim=(0.8, None))
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 1.14), ncols=2)
        axes.grid(axis="x")
        return svg(figure)


def cpu_generate(theme: Theme) -> str:
    found = rows("cpu-attention", "generate()")
    names = [row["row"].removeprefix("generate(), ").replace("8192", "8,192") for row in found]
    title = "generate() on a CPU of two cores"
    return bars(theme, title, names, [row["ratio"] for row in found], "times as fast as DynamicCache")


def _generate(theme: Theme, name: str, title: str) -> str:
    found = rows(name)
    names = [row["row"] + ("" if row["cudnn"] is not False else ", no cuDNN") for row in found]
    return bars(theme, title, names, [row["ratio"] for row in found], "times as fast as the stock cache")


def generate_gpu(theme: Theme) -> str:
    return _generate(theme, "generate-gpu", "Calls of generate() on a GPU")


def generate_cpu(theme: Theme) -> str:
    return _generate(theme, "generate-cpu", "Calls of generate() on a CPU")


def peers(theme: Theme) -> str:
    """Attention of one layer: how many times as fast as DynamicCache each cache is, one dot per geometry."""
    report = load("peers-cpu")
    groups = [group for name, group in report["groups"].items() if name.startswith("attention")]
    names = list(dict.fromkeys(row["cache"] for group in groups for row in group if row["cache"] != "DynamicCache"))
    with drawn(theme, "Attention of one layer on a CPU, every cache", height=0.5 * len(names) + 1.0) as (figure, axes):
        for place, name in enumerate(names):
            ratios = [row["times_as_fast_as_dynamic"] for group in groups for row in group if row["cache"] == name]
            colour = theme[INT8 if name == report["subject"] else OTHER]
            axes.scatter(ratios, [place] * len(ratios), color=colour, s=40, zorder=3)
        axes.set_yticks(range(len(names)), [wrapped(name) for name in names])
        axes.invert_yaxis()
        axes.set(xscale="log", xlabel="times as fast as DynamicCache\n(one dot for each model)")
        axes.axvline(1, color=theme[EXACT], linewidth=1.2)
        axes.grid(axis="x")
        return svg(figure)


def context(theme: Theme) -> str:
    """One token after contexts of several lengths."""
    (row,) = (row for row in load("compiled-decode")["rows"] if "ms_by_tokens" in row)
    found = row["ms_by_tokens"]
    kinds = {
        "StaticCache": ("StaticCache, compiled", OTHER, "-"),
        "DynamicCache eager, no cuDNN": ("DynamicCache, eager, without cuDNN", EXACT, "--"),
        "int8 eager": ("int8, eager", INT8, "--"),
        "int8": ("int8, compiled", INT8, "-"),
    }
    with drawn(theme, "Time of a token over the context\n(Qwen2.5-7B's geometry, one sequence, H200)") as (
        figure,
        axes,
    ):
        for kind, (name, colour, style) in kinds.items():
            tokens = [int(count) for count in found[kind]]
            axes.plot(tokens, list(found[kind].values()), f"o{style}", color=theme[colour], markersize=4, label=name)
        axes.set(xlabel="tokens of context", ylabel="ms per token", xscale="log", ylim=(0, None))
        axes.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
        axes.set_xticks([int(count) for count in found["int8"]])
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.legend(frameon=False, fontsize=9.5, loc="upper left", bbox_to_anchor=(0, 0.86))
        axes.grid(axis="y")
        return svg(figure)


def quality_bytes(theme: Theme) -> str:
    """What a cache costs in memory, and what it costs in quality."""
    measured = [row for row in load("quality")["rows"] if row.get("prompt_len") == 512]
    found = [row for row in measured if row["model"] == "SmolLM2-135M" and row["bytes_per_number"]]
    with drawn(theme, "Quality against memory (SmolLM2-135M)") as (figure, axes):
        for row in found:
            own = row["cache"] == "quantcache int8"
            axes.scatter(row["bytes_per_number"], row["mean_kl"], s=48, color=theme[INT8 if own else OTHER], zorder=3)
        # Words for those that stand alone; the others are in the table.
        for cache, (name, places) in BESIDE_DOTS.items():
            row = next((row for row in found if row["cache"] == cache), None)
            if row is not None:
                at = (row["bytes_per_number"], row["mean_kl"])
                axes.annotate(name, at, xytext=places, textcoords="offset points", fontsize=9.5, va="center")
        axes.set(xlabel="bytes per number", ylabel="KL divergence, nats per token", yscale="log", xlim=(0.4, 2.35))
        axes.grid(axis="y")
        return svg(figure)


BESIDE_DOTS = {
    "quantcache int8": ("quantcache int8", (8, -4)),
    "QuantizedCache hqq 8 bit": ("hqq, 8 bit", (8, 8)),
    "QuantizedCache fp8": ("fp8", (-24, 4)),
    "original Qwen rule": ("original Qwen rule", (8, 0)),
    "int8 a token and head, symmetric": ("int8, a scale per token", (8, 2)),
    "QuantizedCache hqq 4 bit": ("4 bit", (8, 0)),
    "keys and values rounded to bfloat16": ("bfloat16 cache", (-40, 11)),
    "model in bfloat16, exact cache": ("bfloat16 model", (-40, 11)),
}
"""What stands beside a dot, and where, in points."""


def page(theme: Theme) -> str:
    """What one page holds: which numbers share a scale. A drawing, not a measurement."""
    columns, lines = 12, 8
    with drawn(theme, "Which numbers share a scale", height=2.9) as (figure, axes):
        axes.set_axis_off()
        axes.set_aspect("equal")
        for left, title, per_channel in ((0, "key page", True), (columns + 4, "value page", False)):
            shared = 4 if per_channel else 3
            for column in range(columns):
                for line in range(lines):
                    face = theme[INT8] if shared == (column if per_channel else line) else "none"
                    axes.add_patch(Rectangle((left + column, -line), 0.9, 0.9, facecolor=face, edgecolor=theme["grid"]))
            for place in range(columns if per_channel else lines):
                at = (left + place, -lines - 0.5) if per_channel else (left + columns + 0.5, -place)
                face = theme[EXACT] if place == shared else "none"
                axes.add_patch(Rectangle(at, 0.9, 0.9, facecolor=face, edgecolor=theme[EXACT]))
            axes.text(left + columns / 2, 1.6, title, ha="center", weight="bold")
            says = "one scale per channel" if per_channel else "one scale per token"
            axes.text(left + columns / 2, -lines - 2.2, says, ha="center", color=theme[EXACT])
        axes.text(-0.8, -lines / 2 + 1, "64 tokens →", rotation=-90, ha="center", va="center")
        axes.set(xlim=(-1.8, 2 * columns + 6), ylim=(-lines - 2.6, 3))
        return svg(figure)


_DRAWERS = (
    context,
    memory,
    qwen_memory,
    quality_bytes,
    quality,
    channels,
    rounding,
    cuda_attention,
    flashinfer,
    cpu_generate,
    generate_gpu,
    generate_cpu,
    peers,
    page,
)
FIGURES: dict[str, Callable[[Theme], str]] = {draw.__name__.replace("_", "-"): draw for draw in _DRAWERS}
"""Each by the name that stands in a page, which is its function's."""
