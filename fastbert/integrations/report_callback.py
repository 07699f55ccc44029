"""A TrainerCallback that logs `fastbert.report`. Importing this module imports transformers."""

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback

from fastbert.report import report

logger = logging.getLogger("fastbert")


class ReportCallback(TrainerCallback):
    """Logs `fastbert.report(model)` after the first step and at the end of training.

    It logs at level INFO on the logger "fastbert", in the first process per machine only.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Log after the first step, which has called every module."""
        if state.global_step == 1:
            self._log(state, model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Log with the calls of the whole training."""
        self._log(state, model)

    def _log(self, state: Any, model: nn.Module | None) -> None:
        if state.is_local_process_zero and model is not None:
            logger.info("step %d\n%s", state.global_step, report(model))
