"""Reports a run: a table and a few lines in the terminal, two loss curves in a picture, and results.json."""

import json
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.core.comparison import NOT_MEASURED
from bench.core.records import GIB
from bench.core.schema import ResultsError, parse
from bench.report.figures import STYLE, colour, drawable
from bench.report.tables import quartiles
from bench.train.records import SCHEMA, Comparison, LaneRecord, TrainResults
from fastbert.errors import one_line

RESULTS, PICTURE = "results.json", "losses.png"
NOISY = 60  # steps from which a running mean is drawn
SIZE = (9.0, 5.6)


def table(results: TrainResults) -> Table:
    """A table with one column per lane."""
    gpu = results.environment.gpu
    made = Table(title=f"{results.settings.task}, {results.settings.steps} steps, {results.settings.dtype}, {gpu or 'no GPU'}")
    made.add_column("")
    for lane in results.lanes:
        made.add_column(lane.lane, justify="right")
    names = list(dict.fromkeys(name for lane in results.lanes for name in lane.metrics))
    rows = {
        "attention": lambda lane: lane.attention,
        "optimizer": lambda lane: lane.optimizer,
        **(_OF_RANKS if any(lane.ranks > 1 for lane in results.lanes) else {}),
        "steps": lambda lane: f"{len(lane.losses)}{' (stopped early)' if lane.stopped_early else ''}",
        "final training loss": lambda lane: "not finite" if lane.losses[-1] is None else f"{lane.losses[-1]:.6f}",
        "evaluation loss": lambda lane: f"{lane.final_eval_loss:.6f}",
        **{name: lambda lane, name=name: f"{lane.metrics[name]:.4f}" for name in names},
        "tokens/s": lambda lane: _measured(lane.tokens_per_second, "{:,.0f}"),
        "step time, median [quartiles]": lambda lane: quartiles(lane.seconds, 1e3, "ms") if lane.seconds else NOT_MEASURED,
        "peak memory": lambda lane: _measured(lane.peak_bytes and lane.peak_bytes / GIB, "{:.2f} GiB"),
        "kernel launches": lambda lane: f"{lane.launches:,}",
    }
    for name, cell in rows.items():
        made.add_row(*(Text(one_line(shown)) for shown in (name, *(cell(lane) for lane in results.lanes))))
    return made


_OF_RANKS = {
    "ranks": lambda lane: f"{lane.ranks}",
    "tokens of the fullest rank": lambda lane: f"{lane.imbalance:.3f} x the mean",
}


def _measured(value: float | None, form: str) -> str:
    return NOT_MEASURED if value is None else form.format(value)


def data_lines(results: TrainResults) -> list[str]:
    """Lines about the rows and the length limit."""
    data, settings = results.data, results.settings
    unknown = [f"{data.unknown:.1%} of the tokens are unknown to the model's vocabulary"] if data.unknown > 0.02 else []
    if data.stream:
        return [data.stream, f"rows of up to {data.limit} tokens ({data.limit_from}), {data.eval_rows} to evaluate", *unknown]
    cut = {
        "windows": "their contexts are cut into overlapping windows",
        "split": "they are split into pieces",
        "head": "their beginning is kept",
        "tail": "their end is kept",
        "head+tail": "their beginning and their end are kept",
    }[settings.cut]
    lines = [
        f"{data.train_rows} rows to train on ({data.train_sequences} sequences), {data.eval_rows} to evaluate "
        f"({data.eval_sequences})" + (f", {len(data.labels)} labels" if data.labels else ""),
        f"length limit {data.limit} tokens ({data.limit_from}); the longest has {data.longest}, "
        f"{data.cut:.1%} are over the limit" + (f": {cut}" if data.cut and not data.windows else ""),
    ]
    if data.windows:
        lines.append(f"windows: {data.windows}")
    return [*lines, *unknown]


def comparison_lines(comparison: Comparison) -> list[str]:
    """Lines about the greatest difference of the losses and its meaning."""
    at = f", at step {comparison.greatest_step}" if comparison.greatest else ""
    found = f"greatest difference of the training losses: {comparison.greatest:.2e}{at}"
    if comparison.tolerance is None:
        return [
            found,
            f"dropout is {comparison.dropout:g}: each lane draws its own random bits, so the curves differ by that noise; "
            "--dropout 0 makes them comparable step by step",
        ]
    rule = f"{comparison.tolerance:g} x max(1, loss) in the first {comparison.judged_steps} steps"
    return [found, f"dropout is 0, so the curves must coincide: within {rule}"]


def draw(results: TrainResults, path: Path) -> None:
    """Draw both loss curves in one plot, evaluation losses as points, and fastbert's difference from stock below."""
    both = len(results.lanes) > 1
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        ratios = {"height_ratios": [3, 1]} if both else {}
        axes = figure.subplots(2 if both else 1, 1, sharex=True, squeeze=False, gridspec_kw=ratios)[:, 0]
        _curves(axes[0], results)
        if both:
            _difference(axes[1], *results.lanes)
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        settings = results.settings
        name = f"{settings.task} on {Path(settings.data).name}"
        figure.suptitle(drawable(f"Training loss, {name}"), x=0.01, ha="left", fontweight="bold", fontsize=13)
        figure.supxlabel(drawable(_provenance(results)), fontsize=7, color="#66707a")
        figure.savefig(path, dpi=130)


def _curves(axes: Axes, results: TrainResults) -> None:
    for i, lane in enumerate(results.lanes):
        losses = _numbers(lane)
        steps = range(1, len(losses) + 1)
        # Equal curves coincide, so a wide one is drawn first and a thin dashed one on top.
        style = {"linewidth": 4.0, "alpha": 0.55} if i == 0 else {"linewidth": 1.6, "linestyle": "--"}
        if len(losses) >= NOISY:
            axes.plot(steps, losses, color=colour(lane.lane), linewidth=0.6, alpha=0.3)
            axes.plot(steps, _running_mean(losses), color=colour(lane.lane), label=f"{lane.lane}, running mean", **style)
        else:
            axes.plot(steps, losses, color=colour(lane.lane), label=lane.lane, **style)
        points = list({point.step: point.loss for point in lane.evaluations}.items())
        if not points or points[-1][0] != len(losses):
            points.append((len(losses), lane.final_eval_loss))
        marker = {"marker": "o", "markersize": 9, "alpha": 0.55} if i == 0 else {"marker": "x", "markersize": 6}
        label = f"{lane.lane}, evaluation"
        axes.plot(*zip(*points, strict=True), color=colour(lane.lane), linestyle="none", label=label, **marker)
    axes.set_ylabel("loss")
    axes.legend(ncols=2, fontsize=8)


def _difference(axes: Axes, stock: LaneRecord, fast: LaneRecord) -> None:
    apart = [b - a for a, b in zip(_numbers(stock), _numbers(fast), strict=False)]
    axes.axhline(0.0, color="#9aa5b1", linewidth=0.8)
    marker = "." if len(apart) < NOISY else ""
    axes.plot(range(1, len(apart) + 1), apart, color=colour("fastbert"), linewidth=1.0, marker=marker)
    if not any(apart):
        axes.set_ylim(-1e-6, 1e-6)
    axes.set_ylabel("fastbert − stock")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _numbers(lane: LaneRecord) -> list[float]:
    return [float("nan") if loss is None else loss for loss in lane.losses]


def _running_mean(losses: list[float]) -> list[float]:
    """The mean over the last tenth of the steps so far, at most 50."""
    means = []
    for i in range(len(losses)):
        window = losses[max(0, i + 1 - min(max((i + 1) // 10, 1), 50)) : i + 1]
        means.append(sum(window) / len(window))
    return means


def _provenance(results: TrainResults) -> str:
    here, settings = results.environment, results.settings
    dropout = f"dropout {results.comparison.dropout:g}; " if results.comparison else ""
    kernels = here.gpu or "no GPU: kernels in Triton's interpreter"
    return (
        f"{settings.dtype}, batch {settings.batch} x {settings.accumulation}, lr {settings.lr:g}, seed {settings.seed}; "
        f"{dropout}{kernels}; torch {here.torch}, transformers {here.transformers}; commit {here.commit or 'unknown'}"
    )


def show(results: TrainResults, console: Console) -> None:
    """Print the report to the terminal."""
    for line in data_lines(results):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(table(results))
    if results.environment.gpu is None:
        console.print("no GPU: the kernels ran in Triton's interpreter, times and memory are not measured", soft_wrap=True)
    if results.comparison:
        for line in comparison_lines(results.comparison):
            console.print(line, highlight=False, soft_wrap=True)
        for problem in results.comparison.problems:
            console.print(f"failed: {problem}", highlight=False, soft_wrap=True, markup=False, style="red")


def read(path: Path) -> TrainResults:
    """Read the results in `path`.

    Raises:
        ResultsError: the file is not of this command and schema, or a field is missing, unknown or of the wrong type.
    """
    try:
        text = path.read_text()
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != SCHEMA or "lanes" not in data:
            raise ValueError("not results of `python -m bench train`")
        return parse(TrainResults, text, "results")
    except (OSError, ValueError, RecursionError) as error:
        raise ResultsError(f"{path}: {error}") from None
