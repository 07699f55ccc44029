"""Draws results as PNG pictures. Error bars are quartiles; a picture without data says "not measured"."""

from collections.abc import Callable, Iterable
from pathlib import Path

import matplotlib
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from bench.core import ceilings, comparison, floors
from bench.core.records import GIB, ModelRecord, OpRecord, Results
from bench.report.tables import provenance
from fastbert.errors import one_line

matplotlib.use("Agg")

COLOURS = {
    "fastbert": "#d1495b",
    "fastbert, graphed": "#2f9e77",
    "fastbert, graphed step": "#2f9e77",
    "fastbert + compile": "#8c2f39",
    "fastbert packed": "#8c2f39",
    "fastbert + its AdamW": "#e8919c",
    "stock": "#30638e",
    "stock + compile": "#003d5b",
    "stock + reduce-overhead": "#5c7d95",
    "flattened": "#edae49",
    "eager": "#9aa5b1",
    "compile": "#003d5b",
    "stock + max-autotune": "#7a6c9d",
    "flash_attention_2": "#edae49",
    "flattened, flash_attention_2": "#b8860b",
    "flash-attn": "#edae49",
    "sdpa flash": "#00798c",
    "sdpa efficient": "#30638e",
    "sdpa cudnn": "#66a182",
    "sdpa math": "#c5ccd3",
    "flex": "#a78bba",
    "liger": "#66a182",
    "fused": "#30638e",
    "foreach": "#9fb8cf",
}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebee",
    "axes.edgecolor": "#9aa5b1",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
SIZE = (10.0, 4.8)


def colour(lane: str) -> str:
    return COLOURS.get(lane, "#7f8c8d")


def drawable(text: str) -> str:
    """Text that matplotlib draws as it is: between two dollar signs it would read a formula."""
    return one_line(text).replace("$", r"\$")


def model_frame(records: Iterable[ModelRecord]) -> pandas.DataFrame:
    """One row per timed record with what the pictures need, in sequences, tokens and GiB."""
    rows = []
    for r in records:
        if r.seconds is None:
            continue
        size = f"{r.batch} x {r.seqlen}, fill {r.fill:g}"
        rows.append(
            {
                "workload": f"{drawable(f'{r.model} {r.head}')}\n{drawable(r.mode)}, {size}",
                "lane": r.lane,
                "rate": r.batch / r.seconds.median,
                "slow": r.batch / r.seconds.high,
                "fast": r.batch / r.seconds.low,
                "tokens": r.real_tokens / r.seconds.median,
                "memory": (r.peak_bytes or 0) / GIB,
                "seqlen": r.seqlen,
                "fill": r.fill,
                "mode": r.mode,
                "model": r.model,
                "head": r.head,
            }
        )
    return pandas.DataFrame(rows)


def bars(axes: Axes, results: Results) -> None:
    """Sequences per second of each lane, relative to stock, so that all workloads fit on one axis."""
    frame = model_frame(results.models)
    if frame.empty:
        return _empty(axes)
    cases = frame.groupby("workload", sort=False).filter(lambda case: len(case) > 1 and "stock" in set(case.lane))
    if cases.empty:
        return _empty(axes)
    base = cases.workload.map(cases[cases.lane == "stock"].set_index("workload")["rate"])
    cases = cases.assign(times=cases.rate / base, low=cases.slow / base, high=cases.fast / base)
    _grouped(axes, cases, "times", errors=True)
    axes.axhline(1.0, color="#30638e", linewidth=0.8)
    axes.set_ylabel("sequences per second, stock = 1")


def memory(axes: Axes, results: Results) -> None:
    """Peak memory of a step."""
    frame = model_frame(r for r in results.models if r.peak_bytes)
    if frame.empty:
        return _empty(axes)
    _grouped(axes, frame.groupby("workload", sort=False).filter(lambda case: len(case) > 1), "memory")
    axes.set_ylabel("peak memory, GiB")


def _grouped(axes: Axes, frame: pandas.DataFrame, column: str, errors: bool = False) -> None:
    """One group per workload (the first six), one bar per lane."""
    workloads = list(frame.workload.unique())[:6]
    names = [name for name in COLOURS if name in set(frame.lane)]
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        rows = frame[frame.lane == name].drop_duplicates("workload").set_index("workload").reindex(workloads)
        places = [place + (i - (len(names) - 1) / 2) * width for place in range(len(workloads))]
        spread = [rows[column] - rows.low, rows.high - rows[column]] if errors else None
        drawn = axes.bar(places, rows[column], width * 0.92, color=colour(name), label=name, yerr=spread, ecolor="#222")
        labels = ["" if pandas.isna(value) else f"{value:.2f}" for value in rows[column]]
        axes.bar_label(drawn, labels, padding=3, fontsize=7, rotation=90 if len(names) > 4 else 0)
    axes.set_xticks(range(len(workloads)), workloads, fontsize=8)
    axes.margins(y=0.16)
    axes.grid(axis="x", visible=False)
    axes.legend(ncols=3, fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.16))


def roofline(left: Axes, right: Axes, results: Results) -> None:
    """Memory-bound ops against the measured copy bandwidth; attention under both measured ceilings."""
    copy, product = results.ceiling(ceilings.COPY), results.ceiling(ceilings.PRODUCT)
    whole = floors.GRADIENTS_IN_FORWARD
    timed = [r for r in results.ops if r.seconds and (r.direction == floors.BOTH) == (r.op in whole)]
    moving, multiplying = [r for r in timed if not r.operations], [r for r in timed if r.operations]
    left.set_title("ops over rows")
    right.set_title("attention")
    if not moving or not copy:
        _empty(left)
    else:
        _scatter(left, moving, lambda r: r.moved / 1e6, lambda r: r.moved / r.seconds.median / 1e12)
        left.axhline(copy / 1e12, color="#222", linestyle="--", linewidth=1)
        label = f"copy, measured: {copy / 1e12:.2f} TB/s"
        left.text(0.02, copy / 1e12, label, transform=left.get_yaxis_transform(), va="bottom", fontsize=8)
        left.set(xscale="log", xlabel="stated bytes, MB", ylabel="achieved, TB/s", ylim=(0, None))
    if not multiplying or not copy or not product:
        return _empty(right)
    _scatter(right, multiplying, lambda r: r.operations / r.moved, lambda r: r.operations / r.seconds.median / 1e12)
    steps = [min(r.operations / r.moved for r in multiplying) / 2, product / copy, 4 * product / copy]
    right.plot(steps, [min(x * copy, product) / 1e12 for x in steps], color="#222", linestyle="--", linewidth=1)
    right.set(xscale="log", yscale="log", xlabel="stated operations per byte", ylabel="achieved, TFLOP/s")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())


def _scatter(axes: Axes, records: list[OpRecord], x: Callable[[OpRecord], float], y: Callable[[OpRecord], float]) -> None:
    for name in [name for name in COLOURS if any(r.lane == name for r in records)]:
        mine = [r for r in records if r.lane == name]
        axes.scatter([x(r) for r in mine], [y(r) for r in mine], s=22, color=colour(name), alpha=0.75, label=name)
    axes.legend(fontsize=7, ncols=2)


def scaling(left: Axes, right: Axes, results: Results) -> None:
    """Real tokens per second of BERT-base MLM training over the length, and over the share of real tokens."""
    frame = model_frame(r for r in results.models if (r.model, r.head, r.mode) == ("BERT-base", "mlm", "train"))
    left.set_title("over sequence length (16,384 tokens)")
    right.set_title("over fill (32 x 512)")
    if frame.empty:
        _empty(left)
        return _empty(right)
    lengths = frame.groupby("lane").seqlen.nunique()
    for name in [name for name in COLOURS if lengths.get(name, 0) > 1]:  # a single point makes no line
        mine = frame[frame.lane == name]
        for full, style in ((True, "-"), (False, ":")):
            line = mine[(mine.fill >= 0.99) if full else (mine.fill.between(0.45, 0.55))].sort_values("seqlen")
            label = f"{name}, fill {'1.0' if full else '0.5'}"
            left.plot(line.seqlen, line.tokens / 1e3, style, marker="o", color=colour(name), label=label)
        line = mine[mine.seqlen == 512].sort_values("fill")
        right.plot(line.fill, line.tokens / 1e3, marker="o", color=colour(name), label=name)
    left.set(xscale="log", xlabel="S", ylabel="thousand real tokens per second", ylim=(0, None))
    left.set_xticks(sorted(frame.seqlen.unique()), [str(s) for s in sorted(frame.seqlen.unique())], minor=False)
    left.minorticks_off()
    right.set(xlabel="fill: real tokens / all positions", ylim=(0, None))
    if left.lines:
        left.legend(fontsize=7)


def latency(left: Axes, right: Axes, results: Results) -> None:
    """Median and 99th percentile of a request over its length, for one row and for the largest batch of few rows."""
    for axes, batch in ((left, 1), (right, 8)):
        axes.set_title(f"{batch} row{'s' * (batch > 1)}")
        found = [r for r in results.latency if r.seconds and r.p99 and (r.batch, r.lengths) == (batch, "full")]
        if not found:
            _empty(axes)
            continue
        for name in [name for name in COLOURS if any(r.lane == name for r in found)]:
            line = sorted(
                (r.seqlen, r.seconds.median * 1e3, r.p99 * 1e3) for r in found if r.lane == name and r.seconds and r.p99
            )
            seqlens, medians, tails = zip(*line, strict=True)
            axes.plot(seqlens, medians, marker="o", color=colour(name), label=name)
            axes.plot(seqlens, tails, ":", color=colour(name), linewidth=1)
        ticks = sorted({r.seqlen for r in found})
        axes.set(xscale="log", xlabel="S", ylabel="ms until the answer is read: p50, dotted p99", ylim=(0, None))
        axes.set_xticks(ticks, [str(s) for s in ticks], minor=False)
        axes.minorticks_off()
        axes.legend(fontsize=7)


def losses(axes: Axes, results: Results) -> None:
    """Losses of the first workload that has any: all lanes from the same weights on the same batches, dropout off."""
    cases = comparison.by_case(r for r in results.models if r.losses)
    if not cases:
        return _empty(axes)
    records = next(iter(cases.values()))
    for i, record in enumerate(records):
        # Equal curves coincide, so wide ones are drawn first and dashed ones on top.
        style = {"linewidth": 6 - i if i < 5 else 1, "linestyle": "-" if i % 2 == 0 else "--", "alpha": 0.8}
        style |= {"color": colour(record.lane), "label": drawable(record.lane)}
        axes.plot(range(1, len(record.losses) + 1), record.losses, **style)
    axes.set(xlabel="step", ylabel="loss, dropout off")
    axes.set_title(drawable(f"{records[0].model} {records[0].head}"))
    axes.legend(fontsize=8)


def _empty(axes: Axes) -> None:
    axes.text(
        0.5, 0.5, comparison.NOT_MEASURED, ha="center", va="center", transform=axes.transAxes, color="#9aa5b1", fontsize=14
    )
    axes.set_xticks([])
    axes.set_yticks([])


# By name of the file: title, number of axes, and the function that draws on them.
FIGURES: dict[str, tuple[str, int, Callable[..., None]]] = {
    "speed": ("Speed by lane", 1, bars),
    "memory": ("Peak memory by lane", 1, memory),
    "roofline": ("Ops under the ceilings of this machine", 2, roofline),
    "scaling": ("Training speed over length and padding", 2, scaling),
    "losses": ("Losses of the lanes", 1, losses),
    "latency": ("Latency of requests by length", 2, latency),
}


def with_data(results: Results) -> list[str]:
    """The figures that have data."""
    timed = {r.lane: r for r in results.models if r.seconds}
    there = {
        "speed": "stock" in timed and len(timed) > 1,
        "memory": len(timed) > 1,
        "roofline": bool(results.ceilings) and any(r.seconds for r in results.ops),
        "scaling": len({r.seqlen for r in results.models if r.seconds and (r.head, r.mode) == ("mlm", "train")}) > 1,
        "losses": any(r.losses for r in results.models),
        "latency": any(r.seconds and r.batch in (1, 8) and r.lengths == "full" for r in results.latency),
    }
    return [name for name in FIGURES if there[name]]


def draw(results: Results, folder: Path, only: Iterable[str] = tuple(FIGURES), prefix: str = "") -> list[Path]:
    """Draw the figures, all by default, into `folder`; returns their paths in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name in only:
            title, count, draw_on = FIGURES[name]
            figure = Figure(figsize=SIZE, layout="constrained")
            draw_on(*figure.subplots(1, count, squeeze=False)[0], results)
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold", fontsize=13)
            figure.supxlabel(drawable(provenance(results)), fontsize=7, color="#66707a")
            paths.append(folder / f"{prefix}{name}.png")
            figure.savefig(paths[-1], dpi=130)
    return paths
