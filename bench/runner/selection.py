"""Turns the options of a command into jobs. An option with an unknown value raises a one-line BadParameter."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from typer import BadParameter

from bench.core.lengths import Lengths, LengthsError, from_file, from_text
from bench.runner.plan import Job, worker_job

ADAMW = "adamw"  # has no shape of its own but the parameters of a model


def _known(option: str, values: Iterable[str], known: Iterable[str]) -> None:
    names = list(known)
    for value in values:
        if value not in names:
            raise BadParameter(f"--{option} {value}: known are {', '.join(names)}")


def model_jobs(
    names: Sequence[str],
    heads: Sequence[str],
    modes: Sequence[str],
    batches: Sequence[int],
    seqlens: Sequence[int],
    fills: Sequence[float],
    lanes: Sequence[str],
    *,
    lengths: Path | None,
    data: Path | None,
    tokenizer: str | None,
    dry_run: bool,
) -> list[Job]:
    """One job per workload and lane; in a dry run all of them use the tiny model."""
    from bench.models import workloads
    from bench.runner.plan import ceilings_job, model_job

    _known("model", names, [name for name in workloads.CONFIGS if name != "tiny"])
    _known("head", heads, workloads.HEADS)
    _known("mode", modes, ("train", "infer"))
    _known("lane", lanes, workloads.LANES)
    for option, values in (("batch", batches), ("seqlen", seqlens)):
        if any(value < 1 for value in values):
            raise BadParameter(f"--{option}: expected a number from 1 on, got {min(values)}")
    if any(not 0.0 < fill <= 1.0 for fill in fills):
        raise BadParameter(f"--fill: expected a share above 0 and up to 1, got {min(fills)} to {max(fills)}")
    _check_pairs(heads, batches)
    source = _lengths(lengths, data, tokenizer)
    shares = fills if source is None else fills[:1]  # given lengths determine the fill
    chosen = list(workloads.grid(*map(tuple, (names, heads, modes, batches, seqlens, shares))))
    if dry_run:
        chosen = list(dict.fromkeys(workloads.tiny(workload) for workload in chosen))
    if source is not None:
        chosen = [replace(workload, lengths=source) for workload in chosen]
    measuring = [] if dry_run else [ceilings_job()]
    pairs = [(w, name) for w in chosen for name in lanes or workloads.LANES if lanes or workloads.LANES[name].suits(w)]
    return measuring + [model_job(workload, name, details=True) for workload, name in pairs]


def _check_pairs(heads: Sequence[str], batches: Sequence[int]) -> None:
    if "multiple-choice" in heads and any(batch % 2 for batch in batches):
        raise BadParameter("--batch: multiple choice has two choices a question, so the number has to be even")


def latency_jobs(
    name: str,
    head: str,
    batches: Sequence[int],
    seqlens: Sequence[int],
    longest: int,
    lanes: Sequence[str],
    seconds: float,
    dry_run: bool,
) -> list[Job]:
    """Two jobs per batch size, without and with torch.compile; a dry run has one row and four of the tiny model."""
    from bench.models import latency, workloads
    from bench.runner.plan import latency_job

    _known("model", [name], [name for name in workloads.CONFIGS if name != "tiny"])
    _known("head", [head], workloads.HEADS)
    _known("lane", lanes, latency.LANES)
    for option, values, least in (("batch", batches, 1), ("seqlen", seqlens, 1), ("longest", [longest], 0)):
        if any(value < least for value in values):
            raise BadParameter(f"--{option}: expected a number from {least} on, got {min(values)}")
    _check_pairs([head], batches)
    if seconds <= 0:
        raise BadParameter(f"--seconds: expected a number above 0, got {seconds:g}")
    jobs = []
    for batch in batches:
        streams = list(workloads.requests(name, head, (batch,), tuple(seqlens), longest or None))
        if dry_run:
            streams = list(dict.fromkeys(replace(workloads.tiny(stream), batch=min(batch, 4)) for stream in streams))
        for some in (lambda lane: not workloads.LANES[lane].compiled, lambda lane: workloads.LANES[lane].compiled):
            if chosen := tuple(lane for lane in lanes or latency.LANES if some(lane)):
                jobs.append(latency_job(streams, chosen, seconds))
    return list({job.name: job for job in jobs}.values())


def encode_jobs(
    names: Sequence[str],
    poolings: Sequence[str],
    precisions: Sequence[str],
    batches: Sequence[int],
    sentences: int,
    longest: int,
    queries: bool,
    lanes: Sequence[str],
    seconds: float,
    dry_run: bool,
) -> list[Job]:
    """One job per case, with all its lanes; a dry run has the tiny model in their place."""
    from bench.encode import cases
    from bench.encode.texts import FEWEST
    from bench.runner.plan import encode_job

    _known("model", names, [name for name in cases.MODELS if name not in cases.TINY_MODELS])
    _known("pooling", poolings, cases.POOLINGS)
    _known("precision", precisions, cases.PRECISIONS)
    _known("lane", lanes, cases.LANES)
    for option, values, least in (("batch", batches, 1), ("sentences", [sentences], 2)):
        if any(value < least for value in values):
            raise BadParameter(f"--{option}: expected a number from {least} on, got {min(values)}")
    if not FEWEST <= longest <= cases.LONGEST:
        raise BadParameter(f"--longest: expected from {FEWEST} to {cases.LONGEST} tokens, got {longest}")
    if seconds <= 0:
        raise BadParameter(f"--seconds: expected a number above 0, got {seconds:g}")
    chosen = list(cases.cases(*map(tuple, (names, poolings, precisions, batches)), sentences, longest, queries))
    if dry_run:
        chosen = list(dict.fromkeys(cases.tiny(case) for case in chosen))
    return [encode_job([case], tuple(lanes) or None, seconds) for case in chosen]


def _lengths(lengths: Path | None, data: Path | None, tokenizer: str | None) -> Lengths | None:
    if lengths and data:
        raise BadParameter("--lengths and --data: give one of them")
    try:
        if lengths:
            return from_file(lengths)
        return from_text(data, tokenizer) if data else None
    except LengthsError as error:
        raise BadParameter(str(error)) from None


def op_jobs(names: Sequence[str], dtypes: Sequence[str], dry_run: bool) -> list[Job]:
    """The grid of the ops; a dry run has one tiny case of each kind."""
    from bench.core import floors
    from bench.ops import grid
    from bench.runner import plan

    _known("op", names, (*grid.NAMES, ADAMW))
    _known("dtype", dtypes, grid.DTYPES)
    chosen = tuple(name for name in names if name != ADAMW) or (() if names else grid.NAMES)
    jobs = [] if dry_run else [plan.ceilings_job()]
    if dry_run and chosen:
        cases = [asdict(case) for case in grid.tiny_cases(chosen)]
        jobs.append(worker_job("ops", 300.0, kind="ops", cases=cases, directions=list(floors.DIRECTIONS)))
    elif chosen:
        jobs += plan.op_jobs(list(grid.cases(chosen, tuple(dtypes))))
    if not names or ADAMW in names:
        jobs.append(plan.optimizer_job(*(["tiny"] if dry_run else floors.MODELS)))
    return jobs


def tune_jobs(kernels: Sequence[str], dtypes: Sequence[str], architecture: str | None, most: int) -> list[Job]:
    """One job per entry of kernels/core/configs.py, for this machine's GPU or the named architecture."""
    from bench.audit.run import ARCHITECTURES
    from bench.tune import candidates

    _known("kernel", kernels, candidates.ENTRIES)
    _known("dtype", dtypes, candidates.ITEMSIZES)
    _known("arch", [architecture] if architecture else [], ARCHITECTURES)
    architecture = candidates.architecture_here(architecture or "sm_90")
    jobs = candidates.tune_jobs(architecture, tuple(kernels) or tuple(candidates.ENTRIES), tuple(dtypes))
    return [worker_job(f"{job['kernel']} {job['dtype']} {job['width']}", 300.0, kind="tune", most=most, **job) for job in jobs]
