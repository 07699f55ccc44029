"""Weighs the loss of a rank's part so that the mean over all ranks is the loss of the global batch.

A model's loss is a mean over what it counts in its own rows: rows, or labelled tokens. DistributedDataParallel then averages
gradients over ranks, as if each had counted as much. So the loss of a rank is multiplied by ranks x its own count / the
count of all ranks, each part of a loss with two of them by its own counts. The mean over ranks of the weighted losses, which
Trainer logs, is then the mean over all that was counted. No count leaves the device.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from bench.train.encode import IGNORED

Batch = Mapping[str, Any]


def counted(task: str, batch: Batch) -> Tensor:
    """What each part of the loss of `batch` is a mean over, int64 [parts], as the heads of transformers count it."""
    if task in ("ner", "mlm"):
        counts = [_labelled(batch["labels"])]
    elif task == "clm":
        counts = [_labelled(batch["labels"][:, 1:])]  # token i is predicted at i - 1
    elif task == "pretraining":
        counts = [_labelled(batch["next_sentence_label"]), _labelled(batch["labels"])]
    elif task == "qa":
        counts = [(_inside(batch, name) != _length(batch)).sum() for name in ("start_positions", "end_positions")]
    else:
        counts = [_labelled(batch["labels"])]
    return torch.stack(counts)


def parts(task: str, loss: Tensor, outputs: Mapping[str, Tensor], batch: Batch) -> list[Tensor]:
    """The parts of the model's `loss`, [] each, in the order of `counted`; of two parts those that it does not return."""
    if task == "pretraining":
        next_sentence = cross_entropy(outputs["seq_relationship_logits"].view(-1, 2), batch["next_sentence_label"].view(-1))
        return [next_sentence, loss - next_sentence]
    if task == "qa":
        ends = (("start_logits", "start_positions"), ("end_logits", "end_positions"))
        return [cross_entropy(outputs[end], _inside(batch, name), ignore_index=_length(batch)) / 2 for end, name in ends]
    return [loss]


def weighted(means: Sequence[Tensor], own: Tensor, everyone: Tensor, ranks: int) -> Tensor:
    """The loss of a rank, [], from the means over what it counted.

    Args:
        means: the parts of its loss; of a part that counted nothing, any number or NaN: it adds 0.
        own: its counts, int64 [parts].
        everyone: the counts of all ranks together, int64 [parts]; where one is 0 the loss is NaN, as on one rank.
        ranks: the number of ranks.
    """
    loss = means[0].new_zeros(())
    for mean, count, total in zip(means, own, everyone, strict=True):
        share = (count * ranks / total).to(mean.dtype)
        loss = loss + torch.where(count > 0, mean * share, 0.0 / total)
    return loss


def _labelled(labels: Tensor) -> Tensor:
    return (labels != IGNORED).sum()


def _length(batch: Batch) -> int:
    return batch["input_ids"].shape[-1]


def _inside(batch: Batch, name: str) -> Tensor:
    """Positions as the head sees them: one outside the sequence becomes its length, which is ignored."""
    return batch[name].clamp(0, _length(batch))
