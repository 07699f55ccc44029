"""Reports per module whether it runs on a kernel, how often it was called, and why it fell back."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from fastbert import display
from fastbert.patch import _check_model, switches_of

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table


@dataclass(frozen=True)
class Row:
    """The report of one module. Calls are counted since the last `patch` that changed the model; those inside torch.compile
    are not counted.
    A model with CUDA graphs has a row more, whose kernel calls are replays."""

    module: str
    hf_class: str
    kernel: str | None
    state: str  # "active", "fell back" (all calls did), "module by module" (for a layer) or "untouched"
    reason: str
    kernel_calls: int
    fallback_calls: dict[str, int]


@dataclass(frozen=True)
class Report:
    """The rows of `fastbert.report`, as data (`rows`, `to_dicts`) and as a table (print, rich, notebook)."""

    model: str
    rows: tuple[Row, ...]

    def to_dicts(self) -> list[dict[str, Any]]:
        """One plain dictionary per module, for JSON or a data frame."""
        return [asdict(row) for row in self.rows]

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "Iterator[RenderableType]":
        """One line a group of modules if they fit, and two if not; reasons are numbered and stand below."""
        from rich.text import Text

        groups, notes = self._grouped(), display.Notes()
        marked = [(*cells[:-1], notes.mark(cells[-1])) for cells in groups]
        yield Text(self._title())
        if not groups:
            return
        wide = display.table(_HEADINGS, marked, right=_NUMBERS)
        yield ""
        yield wide if display.fits(wide, console, options) else _narrow(marked, options.max_width)
        if lines := notes.lines(options.max_width):
            yield ""
            yield from lines

    def __str__(self) -> str:
        return display.as_text(self)

    def _repr_html_(self) -> str:
        return display.html_table(self._title(), _HEADINGS, self._grouped())

    def _title(self) -> str:
        with_kernel = [row for row in self.rows if row.kernel not in (None, _GRAPHS) and row.state != _BY_MODULE]
        active = sum(row.state == "active" for row in with_kernel)
        return f"fastbert on {self.model}: {active} of {len(with_kernel)} modules that have a kernel are active"

    def _grouped(self) -> list[tuple[str, ...]]:
        """The rows as cells; rows that differ only in the layer number are merged, with their calls added up."""
        groups: dict[tuple, list[Row]] = {}
        for row in self.rows:
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.module)
            reasons = tuple(row.fallback_calls)
            groups.setdefault((pattern, row.hf_class, row.state, row.reason, reasons), []).append(row)
        return [_cells(rows) for rows in groups.values()]


_BY_MODULE = "module by module"  # a layer whose own modules have rows
_GRAPHS = "CUDA graphs"  # in place of a kernel
_NO_KERNEL = "-"
_HEADINGS = ("module", "Hugging Face class", "kernel", "state", "kernel calls", "fell back", "reason")
_PADDING_VISIBLE = "unpad='auto', and outputs at padded positions are visible"
_NUMBERS = ("kernel calls", "fell back")
_NARROW = ("module", "state", "kernel\ncalls", "fell\nback", "reason")
_REST = 40  # columns of the narrow table that are not the module's


def _narrow(groups: list[tuple[str, ...]], width: int) -> "Table":
    """The table with class and kernels below the module's name."""
    of_module = max(width - _REST, 20)
    rows = []
    for module, hf_class, kernel, *rest in groups:
        parts = hf_class if kernel == _NO_KERNEL else f"{hf_class}: {kernel}"
        rows.append((f"{display.fold_name(module, of_module)}\n{display.fold_words(parts, of_module, '  ')}", *rest))
    return display.table(_NARROW, rows, right=_NARROW[2:4])


def report(model: nn.Module) -> Report:
    """Report for each BERT module in `model` what it runs on. A layer that runs as one op is one row with its kernels.

    Returns:
        A `Report` to print, to show in a notebook, or to read by its `rows`.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    from fastbert.dispatch import Calls, calls, kind_of
    from fastbert.graphs.classes import graphs_of
    from fastbert.registry import BY_FAST, BY_STOCK, LAYER, STOCK_ONLY, sentence_transformers

    _check_model(model)
    sentence_transformers()
    switches = switches_of(model)
    rows: list[Row] = []
    inside = None  # the name prefix of the active layer op that the current modules belong to
    for name, module in model.named_modules():
        if (graphs := graphs_of(module)) is not None:
            rows.append(_graphs_row(name, module, graphs))
        cls = kind_of(module)
        entry = BY_FAST.get(cls) or BY_STOCK.get(cls)
        if entry is not None and entry.kernel is None:
            continue  # a head or model that launches nothing itself
        if entry is not None and cls in BY_FAST:
            if inside is not None and name.startswith(inside) and calls(module) == Calls():
                continue
            rows.append(_swapped_row(name, module, entry))
            if entry.kernel == LAYER:
                inside = f"{name}." if rows[-1].state == "active" else None
        elif (row := _row_by_name(name, module)) is not None:
            rows.append(row)
        elif entry is not None:
            reason = _stock_reason(module, entry, switches)
            rows.append(_stock_row(name, cls, None if reason == _PADDING_VISIBLE else entry.kernel, reason))
        elif cls in STOCK_ONLY:
            rows.append(_stock_row(name, cls, None, "no kernel for it in this version"))
        elif isinstance(module, tuple(BY_STOCK)):
            reason = "a subclass, whose forward may differ: only exact types are patched"
            rows.append(_stock_row(name, cls, None, reason))
    return Report(type(model).__name__, tuple(rows))


def _graphs_row(name: str, module: nn.Module, graphs: Any) -> Row:
    """The row of a model whose forward is replayed from CUDA graphs. The modules inside it are counted where they are called:
    at a capture, and in calls that are not replayed."""
    fell_back = bool(graphs.fallbacks) and not graphs.replays
    state = "fell back" if fell_back else "active"
    called = graphs.replays or graphs.fallbacks
    reason = "; ".join([f"{len(graphs)} graphs", *graphs.fallbacks]) if called else "not called yet"
    return Row(name, type(module).__name__, _GRAPHS, state, reason, graphs.replays, dict(graphs.fallbacks))


def _swapped_row(name: str, module: nn.Module, entry: Any) -> Row:
    from fastbert.dispatch import calls, forward_replaced
    from fastbert.registry import LAYER

    tally = calls(module)
    # accelerate's hooks also replace the forward, but call the previous one.
    if forward_replaced(module) and not hasattr(module, "_old_forward"):
        reason = "its forward was replaced on the module itself"
        return Row(name, entry.stock.__name__, entry.kernel, "untouched", reason, tally.kernel, dict(tally.fallbacks))
    fell_back = bool(tally.fallbacks) and not tally.kernel
    reason = "; ".join([*tally.fallbacks, *_other_failures(entry.kernel, tally)])
    state = "active"
    if entry.kernel == LAYER:
        ahead = None if tally.kernel or fell_back else _module_by_module_reason(module)
        if fell_back or ahead:
            state, reason = _BY_MODULE, ahead or reason
            fell_back = True
    elif fell_back:
        state = "fell back"
    return Row(
        name,
        entry.stock.__name__,
        entry.kernel,
        state,
        reason if tally.kernel or fell_back else "not called yet",
        tally.kernel,
        dict(tally.fallbacks),
    )


def _module_by_module_reason(layer: nn.Module) -> str | None:
    """Why a layer that was not called yet will run module by module, if that is known."""
    from fastbert.layers.layer_state import state_of

    return state_of(layer).reason


def _row_by_name(name: str, module: nn.Module) -> Row | None:
    """The row of an attention module that selects the kernel by name, as any transformers model may; else None."""
    from fastbert.dispatch import Calls, calls
    from fastbert.integrations.attention import OURS

    tally, named = calls(module), getattr(getattr(module, "config", None), "_attn_implementation", None)
    if named not in OURS or tally == Calls():
        return None
    state = "active" if tally.kernel else "fell back"
    reason = "; ".join(["selected by name", *tally.fallbacks, *_other_failures("attention", tally)])
    return Row(name, type(module).__name__, "attention", state, reason, tally.kernel, dict(tally.fallbacks))


# The kernels that an op launches beside its own.
_HELPERS = {"attention": ("key_bounds",), "gather_rows": ("packed_rows", "row_counts"), "gelu_layernorm": ("column_sums",)}


def _other_failures(kernel: str, tally: Any) -> list[str]:
    """Failed kernels of an op that no counted call tells of, as a backward is no call: they are recorded per process."""
    from fastbert import ops
    from fastbert.registry import LAYER

    launched = [name for op in kernel.split(", ") for name in (op, *_HELPERS.get(op, ()))]
    if kernel == LAYER:
        launched.append("column_sums")
    failed = [
        f"{name} failed: {why}"
        for name, why in (ops.failures.reasons.items() if ops.failures else ())
        if any(name.startswith(f"{op}_") for op in launched)
    ]
    return [reason for reason in failed if reason not in tally.fallbacks]


def _stock_row(name: str, cls: type, kernel: str | None, reason: str) -> Row:
    return Row(name, cls.__name__, kernel, "untouched", reason, 0, {})


def _stock_reason(module: nn.Module, entry: Any, switches: dict[str, bool] | None) -> str:
    if switches is None:
        return "not patched"
    wanted = entry.wanted(switches)
    if not wanted:
        return f"{entry.disabled_switch(switches)}=False"
    if (reason := entry.stock_reason(module)) is not None:
        return reason
    if entry.own_code is not None:
        return "no Transformer comes straight before it"
    return _PADDING_VISIBLE if wanted == "auto" else "not patched"


def _cells(rows: list[Row]) -> tuple[str, ...]:
    first = rows[0]
    fallbacks: Counter[str] = Counter()
    for row in rows:
        fallbacks.update(row.fallback_calls)
    return (
        _span([row.module or "(the model)" for row in rows]),
        first.hf_class,
        first.kernel or _NO_KERNEL,
        first.state,
        str(sum(row.kernel_calls for row in rows)),
        str(fallbacks.total()),
        first.reason,
    )


def _span(names: list[str]) -> str:
    """Abbreviates layer.0.output, layer.1.output, layer.2.output to layer.0-2.output."""
    first, last = names[0].split("."), names[-1].split(".")
    return ".".join(a if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))
