"""Compares fastbert's losses with stock's and checks the difference."""

from bench.train.records import Comparison, LaneRecord, Settings

# Relative to max(1, loss). Without dropout only the order of sums and the rounding differ.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-2}
JUDGED = 50  # steps; later, different orders of summation diverge, as do stock runs on two GPUs


def compare(settings: Settings, dropout: float, stock: LaneRecord, fast: LaneRecord) -> Comparison:
    """Compare the records of the two lanes."""
    problems = []
    if not fast.launches and fast.resumed_at < len(fast.losses):
        problems.append("no kernel of fastbert was launched in its lane")
    if _other_batches(stock, fast):
        problems.append("the lanes did not see the same batches")
    pairs = list(zip(stock.losses, fast.losses, strict=False))
    apart = [(abs(a - b), step) for step, (a, b) in enumerate(pairs, 1) if a is not None and b is not None]
    problems += [f"step {step}: only one lane's loss is finite" for step in _lopsided(pairs)[:1]]
    greatest, greatest_step = max(apart, default=(0.0, 0), key=lambda found: found[0])
    judged = [(a, b, step) for step, (a, b) in enumerate(pairs[:JUDGED], 1) if a is not None and b is not None]
    tolerance = TOLERANCE[settings.dtype] if dropout == 0 else None
    if tolerance is not None:
        beyond = [step for a, b, step in judged if abs(a - b) > tolerance * max(1.0, abs(a))]
        if beyond:
            problems.append(f"step {beyond[0]}: the losses are further apart than {tolerance:g} x max(1, loss)")
        if not judged:
            problems.append("no step has a finite loss in both lanes")
    return Comparison(greatest, greatest_step, dropout, tolerance, len(judged) if tolerance else 0, problems)


def _lopsided(pairs: list[tuple[float | None, float | None]]) -> list[int]:
    return [step for step, (a, b) in enumerate(pairs, 1) if (a is None) != (b is None)]


def _other_batches(stock: LaneRecord, fast: LaneRecord) -> bool:
    """Whether a step of both lanes had different inputs. Steps before a resumption were compared when they ran."""
    first = max(stock.resumed_at, fast.resumed_at)
    mine, other = stock.checksums[first - stock.resumed_at :], fast.checksums[first - fast.resumed_at :]
    return any(a != b for a, b in zip(mine, other, strict=False))
