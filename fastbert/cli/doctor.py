"""Implements `fastbert doctor`: what would run on this machine and what not, a test on a tiny model, and a verdict."""

import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderableType
from rich.text import Text
from transformers import BertConfig, BertForSequenceClassification

import fastbert
from fastbert import ops
from fastbert.cli.checks import FAILED, OK, Check, all_checks
from fastbert.cli.environment import environment
from fastbert.verify import VerifyResult

_SHOWN = ("fastbert", "python", "torch", "triton", "transformers")  # of the environment, in the first line
_STYLES = {OK: "green", FAILED: "bold red"}
_SELF_TEST = "self-test"
_FOR_A_BUG_REPORT = "`fastbert env` prints what a bug report needs"
_ROWS, _TOKENS = 2, 16
_TINY = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}


@dataclass(frozen=True)
class Diagnosis:
    """What `fastbert doctor` found. `self_test` is the comparison on a tiny model, None if none could be made."""

    environment: dict[str, Any]
    checks: tuple[Check, ...]
    self_test: VerifyResult | None

    @property
    def ok(self) -> bool:
        """Whether patched models run on the kernels here, and compute what stock does."""
        return all(check.state != FAILED for check in self.checks)

    @property
    def verdict(self) -> str:
        """One line."""
        failed = [check.name for check in self.checks if check.state == FAILED]
        if not failed:
            return "READY: patched models run on the kernels of this machine's GPU"
        if failed == [_SELF_TEST]:
            return "NOT READY: everything is there, but the self-test failed; do not use fastbert here before it passes"
        return f"NOT READY: patched models run stock code here, in whole or in part ({', '.join(dict.fromkeys(failed))})"

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain data, for JSON."""
        return {
            "ok": self.ok,
            "verdict": self.verdict,
            "environment": self.environment,
            "checks": [asdict(check) for check in self.checks],
            "self_test": self.self_test.to_dict() if self.self_test else None,
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        versions = ", ".join(f"{name} {self.environment[name]}" for name in _SHOWN)
        yield Text(textwrap.fill(versions, options.max_width))
        yield ""
        names = max(len(check.name) for check in self.checks)
        indent = " " * (len(FAILED) + names + 4)
        for check in self.checks:
            head = f"{check.state:<{len(FAILED)}}  {check.name:<{names}}  "
            said = textwrap.fill(head + check.found, options.max_width, subsequent_indent=indent, break_on_hyphens=False)
            line = Text(said)
            line.stylize(_STYLES.get(check.state, "yellow"), 0, len(FAILED))
            yield line
            if check.advice:
                advice = textwrap.fill(f"-> {check.advice}", options.max_width, initial_indent=indent, subsequent_indent=indent)
                yield Text(advice)
        yield ""
        yield Text(textwrap.fill(self.verdict, options.max_width))


def examine(begin: Callable[[str], None]) -> Diagnosis:
    """Make all checks and the self-test; `begin` is told what begins."""
    checks = list(all_checks())
    begin("self-test")
    check, result = self_test()
    return Diagnosis(environment(), (*checks, check), result)


def self_test() -> tuple[Check, VerifyResult | None]:
    """Forward and backward of a tiny BERT, patched against eager: on the GPU, or in Triton's interpreter on the CPU."""
    gpu = torch.cuda.is_available()
    if ops.MISSING or not (gpu or ops.INTERPRETED):
        return Check(_SELF_TEST, FAILED, "nothing can run the kernels here", "first do what the checks above advise"), None
    start = time.perf_counter()
    try:
        result = fastbert.verify(*_tiny(torch.device("cuda" if gpu else "cpu")))
    except Exception as error:  # whatever a broken installation raises is what the user came to hear
        said = " ".join(str(error).split()) or "no message"
        return Check(
            _SELF_TEST, FAILED, f"{type(error).__name__}: {said}", "`fastbert env` prints what a bug report needs"
        ), None
    where = "on the GPU" if gpu else "in Triton's interpreter on the CPU"
    found = f"{_words(result)}, {where}, {time.perf_counter() - start:.1f} s"
    return Check(_SELF_TEST, OK if result.ok else FAILED, found, _advice(result)), result


def _tiny(device: torch.device) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A model of two layers in float32, drawn from a fixed seed, and a padded batch for it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**_TINY))
        ids = torch.randint(1, _TINY["vocab_size"], (_ROWS, _TOKENS))
    mask = torch.ones_like(ids)
    mask[-1, _TOKENS // 2 :] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(_ROWS) % 2}
    return model.to(device), {name: tensor.to(device) for name, tensor in batch.items()}


def _words(result: VerifyResult) -> str:
    if not result.kernel_calls:
        return "no call went through a kernel"
    compared = (*result.outputs, *result.gradients)
    equal = sum(comparison.ok for comparison in compared)
    return f"{equal} of {len(compared)} outputs and gradients of a tiny BERT equal eager's, {result.kernel_calls} kernel calls"


def _advice(result: VerifyResult) -> str:
    if result.ok:
        return ""
    reasons = [reason for row in result.report.rows for reason in (*row.fallback_calls, row.reason) if row.state != "active"]
    if not result.kernel_calls and any(reasons):
        return f"the reason is: {next(filter(None, reasons))}"
    return f"do not use fastbert here; `fastbert verify` shows which tensors differ; {_FOR_A_BUG_REPORT}"
