"""What the soak trains: a masked language model and a classifier on one encoder, with everything that a checkpoint holds.

Steps differ by their number, in turn: the head, whether the batch has padding (without it nothing is packed), and the
precision. Odd steps run in bfloat16 under autocast, which no kernel computes in Triton's interpreter, so their calls fall back
to stock code; the optimizer's kernel runs in every step. That halves the time of a step and makes every step follow one of the
other way.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

import fastbert

VOCABULARY, ROWS, LENGTH = 19, 2, 8
KINDS = 8  # of steps
OPTIONS = {"mlm_logits": "none"}  # with which a head for masked words lets its encoder pack


def two_heads() -> nn.ModuleDict:
    """The model, untrained: two heads on one encoder of one layer, with dropout."""
    config = BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    )
    classify, mlm = BertForSequenceClassification(config), BertForMaskedLM(config)
    mlm.bert = classify.bert
    mlm.tie_weights()
    return nn.ModuleDict({"mlm": mlm, "classify": classify}).train()


def on_kernels(step: int) -> bool:
    """Whether the model of this step runs on kernels."""
    return step % 2 == 0


def head_of(step: int) -> str:
    return "mlm" if step // 2 % 2 else "classify"


def batch_of(step: int) -> dict[str, Tensor]:
    """The batch of a step: counting in steps of one or two, which are the two classes, from anywhere."""
    drawn = torch.Generator().manual_seed(step)
    first = torch.randint(VOCABULARY - 1, (ROWS, 1), generator=drawn)
    label = torch.randint(2, (ROWS,), generator=drawn)
    ids = 1 + (first + torch.arange(LENGTH) * (1 + label[:, None])) % (VOCABULARY - 1)
    mask = torch.ones_like(ids)
    if step // 4 % 2:
        mask = (torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (ROWS, 1), generator=drawn)).long()
        mask[0, -1] = 0
    if head_of(step) == "classify":
        return {"input_ids": ids * mask, "attention_mask": mask, "labels": label}
    chosen = (torch.rand(ids.shape, generator=drawn) < 0.3) & mask.bool()
    chosen[:, 1] = True
    return {"input_ids": (ids * ~chosen) * mask, "attention_mask": mask, "labels": ids.where(chosen, -100)}


class Training:
    """A training loop's state: model, optimizer, random numbers, and how many steps are done, which is the place in the data.

    `stock` trains the model unpatched, with torch's AdamW. The `seed` of the random numbers does not change the first weights.
    """

    def __init__(self, stock: bool = False, seed: int = 1) -> None:
        torch.manual_seed(0)
        self.model = two_heads()
        if not stock:
            fastbert.patch(self.model, **OPTIONS)
        optimizer = torch.optim.AdamW if stock else fastbert.AdamW
        self.optimizer = optimizer(fastbert.param_groups(self.model, lr=1e-3, weight_decay=0.01))
        self.done = 0
        torch.manual_seed(seed)

    def forward(self) -> Tensor:
        """The loss of the next step."""
        within: AbstractContextManager = nullcontext()
        if not on_kernels(self.done):
            within = torch.autocast("cpu", torch.bfloat16)
        with within:
            return self.model[head_of(self.done)](**batch_of(self.done)).loss

    def step(self) -> float:
        """Take the next step; returns its loss."""
        loss = self.forward()
        loss.backward()
        self.update()
        return loss.item()

    def update(self) -> None:
        """The end of a step, whose gradients are there."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.done += 1

    def again(self, random: Tensor) -> None:
        """Make ready for repeating a step before whose beginning the state of the random numbers was `random`."""
        self.optimizer.zero_grad()
        torch.set_rng_state(random)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights, optimizer state and random numbers, by name."""
        yield from self.model.named_parameters()
        names = {param: name for name, param in self.model.named_parameters()}
        for param, state in self.optimizer.state.items():
            for name, value in state.items() if state.get("step") else ():  # before its first step it may exist or not
                yield f"{name} of {names[param]}", value
        yield "random numbers", torch.get_rng_state()

    def digest(self) -> str:
        """A digest of all that a checkpoint holds: equal if and only if every bit is."""
        found = hashlib.sha256(str(self.done).encode())
        for name, tensor in sorted(self.tensors(), key=lambda named: named[0]):
            found.update(name.encode())
            found.update(tensor.detach().numpy().tobytes())
        return found.hexdigest()[:16]

    def state(self) -> dict[str, Any]:
        """A checkpoint, which shares no memory with the training."""
        content = io.BytesIO()
        self._write(content)
        return torch.load(io.BytesIO(content.getvalue()), weights_only=True)

    def _write(self, file: Any) -> None:
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "done": self.done,
            },
            file,
        )

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, in this process or another."""
        self.optimizer.zero_grad()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        self.done = state["done"]

    def save(self, path: Path, wrap: Any = lambda file: file) -> None:
        """Write a checkpoint; until it is complete, the one before stays in its place. `wrap` may watch the file as it is
        written."""
        draft = path.with_suffix(".draft")
        with draft.open("wb") as file:
            self._write(wrap(file))
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)

    def load(self, path: Path) -> None:
        """Go on from the checkpoint in a file."""
        self.restore(torch.load(path, weights_only=True))
