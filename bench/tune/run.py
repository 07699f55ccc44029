"""Times the candidates of one entry of kernels/core/configs.py that compile without spills and pass the check.

Tuning never happens at run time: its result is committed to configs.py together with its measurement.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from bench.audit.run import compiling_environment
from bench.core.records import TuneRecord
from bench.tune.candidates import ENTRIES, candidates, present, shipped
from fastbert.kernels.core.configs import Config

PRESENT, CANDIDATE = "present", "candidate"
COMPILERS = {True: 8, False: 1}  # processes, with a GPU and without; a machine with a GPU has more cores
ROWS = {"attention": (16, 512), "rows": (32, 512)}  # batch and length for timing
SHOWN = ("registers", "spills", "local_bytes", "shared_bytes", "shared_limit", "occupancy", "wide_share")


def run(
    kernel: str, architecture: str, dtype: str, width: int, most: int = 24, configs: Sequence[dict[str, int]] | None = None
) -> Iterator[TuneRecord]:
    """Yield one record per candidate, the present configuration first: at most `most` of them, or those that `configs` gives
    as differences from the present one."""
    if configs is None:
        tried = candidates(kernel, architecture, dtype, width)[:most]
    else:
        now = present(kernel, architecture, dtype, width)
        tried = list(dict.fromkeys([now, *(replace(now, **changes) for changes in configs)]))
    gpu = torch.cuda.is_available()
    # A fork has everything imported. Without a GPU this process runs triton's interpreter, which cannot compile, so it spawns.
    context = get_context("fork" if gpu else "spawn")
    with compiling_environment(), ProcessPoolExecutor(min(COMPILERS[gpu], len(tried)), mp_context=context) as pool:
        audits = list(pool.map(audited, [(kernel, architecture, dtype, width, config) for config in tried]))
    timer = _Timer(kernel, architecture, dtype, width) if gpu else None
    for config, audit in zip(tried, audits, strict=True):
        lane = PRESENT if config == present(kernel, architecture, dtype, width) else CANDIDATE
        reason = rejection(audit)
        found: dict[str, Any] = {"seconds": None, "runs": [], "reason": reason}
        if reason and lane == CANDIDATE:
            found["status"] = "failed"
        else:
            found |= timer(config) if timer else {"status": "dry-run"}
        yield TuneRecord(
            lane=lane,
            peak_bytes=None,
            kernel=kernel,
            architecture=architecture,
            dtype=dtype,
            width=width,
            config={name: value for name, value in vars(config).items() if value is not None},
            audit={name: audit[name] for name in ("reason", *SHOWN) if name in audit},
            **found,
        )


def rejection(audit: dict[str, Any]) -> str | None:
    """Why a candidate is not timed, or None."""
    if "reason" in audit:
        return audit["reason"]
    if audit["shared_bytes"] > audit["shared_limit"]:
        return f"{audit['shared_bytes']} bytes of shared memory, over the limit of {audit['shared_limit']}"
    if audit["spills"] or audit["local_bytes"]:
        return f"{audit['spills']} spills, {audit['local_bytes']} bytes of stack"
    return None


def audited(job: tuple[str, str, str, int, Config]) -> dict[str, Any]:
    """The audit's record of a candidate's kernel; {"reason": ...} if it does not compile.

    Runs in its own process, which must not have imported triton under the interpreter.
    """
    from bench.audit import compile as compiling
    from bench.audit import sass
    from bench.core.hardware import ARCHITECTURES
    from fastbert.testing.specs import SPECS

    kernel, architecture, dtype, width, config = job
    entry = ENTRIES[kernel]
    variant = SPECS[entry.op].variant(dtype, width, **entry.extra)
    with shipped(kernel, architecture, dtype, config):
        launches = compiling.record(architecture, variant)
    launched = next(one for one in launches if one.kernel.__name__ == entry.function)
    try:
        compiled = compiling.compile_here(architecture, launched)
    except Exception as error:
        return {"reason": f"does not compile: {str(error).strip().splitlines()[-1][:200]}"}
    tool = str(compiling._TOOLS / "nvdisasm")
    (listing,) = sass.disassemble([sass.code(compiled.asm["cubin"])], ARCHITECTURES[architecture].nvdisasm_name, tool)
    return compiling.describe(architecture, variant, launched, compiled, listing)


class _Timer:
    """Checks and times configurations on the GPU, all on the same inputs and reference."""

    def __init__(self, kernel: str, architecture: str, dtype: str, width: int) -> None:
        from bench.ops.check import Checker
        from bench.ops.grid import Case
        from bench.ops.run import make_inputs
        from bench.ops.table import OPS

        entry = ENTRIES[kernel]
        quarter = dict.fromkeys(("bias_gelu", "feed_forward"), width // 4)
        hidden = {"attention": 1024, "linear_cross_entropy": 1024, **quarter}.get(entry.op, width)
        batch, seqlen = ROWS["attention" if entry.op == "attention" else "rows"]
        if "length" in entry.extra:
            batch, seqlen = 32, entry.extra["length"] + 1
        self.case = Case(entry.op, dtype, hidden, batch, seqlen, p=entry.extra.get("p", 0.0))
        self.inputs = make_inputs(self.case)
        self.lane = OPS[entry.op].lanes[entry.lane]
        self.checker = Checker(OPS[entry.op], self.case, self.inputs[0])
        self.direction, self.where = entry.direction, (kernel, architecture, dtype)

    def __call__(self, config: Config) -> dict[str, Any]:
        from bench.core import timing
        from bench.ops.run import judge, steps

        with shipped(*self.where, config):
            try:
                status, reason, function = judge(self.case, self.lane, self.checker)
                if function is None:
                    return {"status": status, "reason": reason}
                prepare, call = steps(function, self.inputs, self.case.p, self.direction)
                seconds, runs = timing.measure(prepare, call)
            except Exception as error:  # the GPU may refuse a launch; only this candidate is lost
                return {"status": "error", "reason": f"{type(error).__name__}: {error}"[:300]}
        return {"status": "ok", "seconds": seconds, "runs": runs}


def best(records: list[TuneRecord]) -> list[tuple[TuneRecord, TuneRecord]]:
    """For each timed entry: its fastest configuration and the present one."""
    pairs = []
    for case in dict.fromkeys(record.case for record in records):
        timed = [record for record in records if record.case == case and record.seconds]
        now = next((record for record in timed if record.lane == PRESENT), None)
        if now:
            pairs.append((min(timed, key=lambda record: record.seconds.median), now))
    return pairs
