"""What tests of distributed training share: a global batch split by rank, and the stock run in one process to compare with."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastbert
from tests.models.tiny import MLM, Kind, make, make_batch

STEPS = 2
# With torch's eps of 1e-8, AdamW makes whole steps of gradients that are rounding errors, such as that of a key's bias.
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-4}
# Ranks differ in their padding, so in packed sequences they have different numbers of tokens.
_PADDING = ("right", "one token", "none", "holes")


class Run(NamedTuple):
    """What a training run leaves: the loss of each micro-batch as [step][micro][rank], and the trained parameters."""

    losses: list[list[list[float]]]
    parameters: dict[str, Tensor]


def batch_of(rank: int, kind: Kind = MLM, step: int = 0) -> dict[str, Tensor]:
    """The rows of this rank in the global batch of a step, or of a micro-batch if steps are counted so."""
    batch = make_batch(kind, mask=_PADDING[rank % len(_PADDING)], seed=10 + rank + 100 * step)
    if kind is MLM and "attention_mask" in batch:
        batch["labels"][batch["attention_mask"] == 0] = -100
    return {name: tensor.cpu() for name, tensor in batch.items()}


def model_of(kind: Kind = MLM, **overrides: Any) -> nn.Module:
    """The model that every rank starts from. It is in training mode, without dropout."""
    return make(kind, attention="sdpa", **overrides).cpu().train()


def stock_run(
    kind: Kind = MLM,
    world: int = 2,
    *,
    steps: int = STEPS,
    micro: int = 1,
    clip: float | None = None,
    prepare: Callable[[nn.Module], Any] | None = None,
    share: Callable[[int, int], float] | None = None,
    **overrides: Any,
) -> Run:
    """Train the stock model with torch's AdamW in one process on the batches of all ranks.

    The loss is the mean over ranks and micro-batches, as data parallelism has it; `share(step, rank)` replaces a rank's
    share 1 / world in it.
    """
    model = model_of(kind, **overrides)
    if prepare is not None:
        prepare(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **OPTIMIZER)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        losses.append([[0.0] * world for _ in range(micro)])
        for part in range(micro):
            for rank in range(world):
                weight = 1 / world if share is None else share(step, rank)
                if weight:
                    loss = model(**batch_of(rank, kind, step * micro + part)).loss
                    (loss * weight / micro).backward()
                    losses[step][part][rank] = loss.item()
        if clip is not None:
            nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
    return Run(losses, {name: p.detach() for name, p in model.named_parameters()})


def stock_gradients(kind: Kind = MLM, world: int = 2) -> dict[str, Tensor]:
    """The gradients of the first step."""
    model = model_of(kind)
    for rank in range(world):
        (model(**batch_of(rank, kind)).loss / world).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_losses(found: Iterable[Iterable[float]], expected: Run, rank: int, **bounds: float) -> None:
    """Compare the losses of a rank, [step][micro], with the same rows in the stock run."""
    own = [[micro[rank] for micro in step] for step in expected.losses]
    torch.testing.assert_close(torch.tensor(list(map(list, found))), torch.tensor(own), **bounds)


def assert_parameters(found: Mapping[str, Tensor], expected: Mapping[str, Tensor] | Run, atol: float = 2e-6) -> None:
    """Compare trained parameters, or gradients, by their names without wrappers. A step moves a parameter by up to 1e-3."""
    expected = expected.parameters if isinstance(expected, Run) else expected
    found, expected = ({plain_name(name): tensor for name, tensor in named.items()} for named in (found, expected))
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    for name, tensor in found.items():
        whole = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()
        close = torch.testing.assert_close
        close(whole, expected[name].detach(), rtol=0.0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


def plain_name(name: str) -> str:
    """The parameter's name in the model itself."""
    for wrapper in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
        name = name.replace(wrapper, "")
    return name.removeprefix("module.")


def assert_launched(
    kind: Kind = MLM, *, calls: int = STEPS, recomputed: bool = False, without: Iterable[str] = (), **overrides: Any
) -> None:
    """Check that every kernel ran in all `calls` forwards and backwards; `recomputed` layers run another forward."""
    from fastbert.kernels.core.launch import counts
    from fastbert.testing.models import expected_launches, of_layers

    model = make(kind, **overrides)
    expected = expected_launches(model, forward=calls, backward=calls)
    expected = Counter({name: n for name, n in expected.items() if name not in without})
    if recomputed:
        expected += expected_launches(model.bert.encoder, forward=calls, backward=0)
    found = Counter({name: n for name, n in of_layers(counts).items() if not name.startswith("adamw")})
    assert found == expected, found


def assert_layers(model: nn.Module, state: str = "active", reason: str = "") -> None:
    """Check how `fastbert.report` says that the layers ran."""
    rows = [row for row in fastbert.report(model).rows if row.hf_class == "BertLayer"]
    assert rows, "no layers in the report"
    for row in rows:
        ran = row.kernel_calls and not row.fallback_calls if state == "active" else not row.kernel_calls
        assert row.state == state and ran and reason in row.reason, row


def assert_packed(model: nn.Module) -> None:
    """Check that the encoder packed each batch that has padding."""
    (row,) = [row for row in fastbert.report(model).rows if row.hf_class == "BertEncoder"]
    assert row.state == "active" and row.fallback_calls.keys() <= {"a batch without padding"}, row


@contextmanager
def named(name: str) -> Iterator[None]:
    """Say in an error which scenario of several failed, and count launches from zero."""
    from fastbert.kernels.core.launch import counts

    counts.clear()
    try:
        yield
    except BaseException as error:
        error.add_note(f"in the scenario: {name}")
        raise
