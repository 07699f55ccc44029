"""Breaks down the time of a step: by phase, from events, and by kind of kernel, from torch's profiler."""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

# The first match wins. These are kernel names of cuBLAS, torch, inductor, flash-attn and fastbert.
PARTS = (
    ("attention", r"attention|flash|fmha|softmax|sdp"),
    ("products", r"gemm|nvjet|cutlass|cublas|xmma|wgmma"),
    ("layer norm", r"layer_?norm|layernorm|native_norm"),
    ("activation", r"gelu"),
    ("optimizer", r"adam|multi_tensor|foreach"),
    ("loss", r"nll|cross_entropy|log_softmax"),
    ("embedding", r"embedding|indexing|index_|gather|scatter"),
    ("dropout", r"dropout"),
    ("compiled", r"^triton_"),
    ("copies", r"memcpy|memset|copy|fill"),
    ("elementwise", r"elementwise|vectorized|reduce"),
)


def part_of(kernel: str) -> str:
    """The kind of work of a kernel with this name; "other" if no pattern matches."""
    return next((part for part, pattern in PARTS if re.search(pattern, kernel, re.IGNORECASE)), "other")


def by_part(step: Callable[[int], Any], steps: int = 3) -> dict[str, float]:
    """Seconds of GPU time per step by kind of kernel, largest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(steps):
            step(i)
        torch.cuda.synchronize()
    seconds: Counter[str] = Counter()
    for event in profile.key_averages():
        seconds[part_of(event.key)] += event.self_device_time_total / 1e6 / steps
    return {part: total for part, total in seconds.most_common() if total > 0}


class Phases:
    """Seconds of forward, backward and optimizer in one step. Call mark() between them and read() when the GPU is idle."""

    def __init__(self) -> None:
        self.events = [("", self._now())]

    def mark(self, name: str) -> None:
        self.events.append((name, self._now()))

    def read(self) -> dict[str, float]:
        torch.cuda.synchronize()
        pairs = zip(self.events, self.events[1:], strict=False)
        return {name: before.elapsed_time(after) / 1e3 for (_, before), (name, after) in pairs}

    @staticmethod
    def _now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
