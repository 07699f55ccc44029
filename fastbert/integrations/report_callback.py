"""A TrainerCallback that logs fastbert.report. Importing it imports transformers."""

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback

from fastbert.report import report

logger = logging.getLogger("fastbert")


class ReportCallback(TrainerCallback):
    """Logs what runs on a kernel and what does not (`fastbert.report`), after the first step and at the end.

    The level is INFO, on the logger "fastbert"; only the first process of a machine logs.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """The first step has called every module, so its fallbacks are known."""
        if state.global_step == 1:
            self._log(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """With the calls of the whole training counted."""
        self._log(state, model)

    def _log(self, state: Any, model: nn.Module | None) -> None:
        if state.is_local_process_zero and model is not None:
            logger.info("step %d\n%s", state.global_step, report(model))
