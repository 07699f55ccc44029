"""Writes the files of `python -m bench report`: pictures, one HTML page and one Markdown page."""

import tempfile
from pathlib import Path

from bench.core.records import Results
from bench.report import tables
from bench.report.table import literal

TITLES = {
    "lanes": "Models, the lanes side by side",
    "latencies": "Latency of requests",
    "encode": "Sentence embeddings, end to end",
    "ceilings": "Measured ceilings",
    "tests": "Correctness",
    "breakdown": "Time of a step by kind of kernel",
    "losses": "Losses of the lanes",
    "models": "Every model",
    "ops": "Every op",
    "host": "The host: time, launches and memory of a step",
    "tuning": "Tuning",
    "stages": "What was run",
    "environment": "The machine",
}


def write_markdown(results: Results, folder: Path) -> Path:
    """Write all tables as one page."""
    parts = ["# fastbert: benchmark report", literal(tables.provenance(results))]
    for name, title in TITLES.items():
        parts += [f"## {title}", tables.TABLES[name](results).markdown()]
    path = folder / "report.md"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n")
    return path


def write(results: Results, folder: Path) -> list[Path]:
    """Write report.md, the PNGs and report.html: eight files."""
    from bench.report import figures, page  # matplotlib takes a second to import

    written = [write_markdown(results, folder), *figures.draw(results, folder)]
    html = folder / "report.html"
    html.write_text(page.render(results, written[1:]))
    return [*written, html]


def write_page(results: Results, folder: Path) -> list[Path]:
    """Write report.md, and report.html with the pictures embedded: two files."""
    from bench.report import figures, page

    written = write_markdown(results, folder)
    html = folder / "report.html"
    with tempfile.TemporaryDirectory() as pictures:
        html.write_text(page.render(results, figures.draw(results, Path(pictures))))
    return [written, html]
