"""`graphed` and `warmup`: a patched model answers from CUDA graphs."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

# pyright: reportPrivateUsage=false, reportUnnecessaryIsInstance=false
# The first, because _check_model is private to fastbert; the second, because callers without a type checker are checked too.
from fastbert.errors import UnsupportedModelError
from fastbert.patch import _check_model, is_disabled

# What imports triton or transformers is imported inside the functions, as in fastbert/patch.py.

Model = TypeVar("Model", bound=nn.Module)


def graphed(
    model: Model,
    *,
    buckets: Sequence[tuple[int, int]] | None = None,
    max_graphs: int = 64,
    reuse_outputs: bool = False,
) -> Model:
    """Let a patched model replay its forward from CUDA graphs in inference, and return the model.

    At small batches the host takes several times as long to issue a forward as a GPU to compute it. A graph is issued at once.
    Forwards under `torch.inference_mode()` or `torch.no_grad()` in eval mode are captured at the first call of their bucket
    and replayed from then on; a batch may be smaller than its bucket. All other calls run the ordinary way, and `report`
    counts them with their reasons: train mode, recorded gradients, labels, hidden states or attention weights, a cache,
    position ids, embeddings in place of ids, hooks inside the model, masks with more than two dimensions.

    Results are those of an ordinary call. Weights that are changed in place are seen; if any is replaced or moved, or
    anything else in the model changes, graphs are captured anew. Any number of threads and streams may call the model; their
    replays take turns. Called again, it replaces the options and drops all graphs. `unpatch` takes graphs away too.

    Args:
        model: a model patched by `fastbert.patch`, on a GPU or to be moved there. Its outermost BertFor* or BertModel is
            graphed, so a SentenceTransformer, a CrossEncoder or the model of a pipeline works.
        buckets: the (rows, length) shapes of graphs. A batch takes the smallest that holds it; one that fits none runs the
            ordinary way. By default shapes are rounded up by a rule with two steps to an octave (fastbert/graphs/buckets.py).
            A model that packs (see `unpad`) also rounds the number of its tokens, in either case.
        max_graphs: how many graphs are kept; the least recently used is dropped. While all are in use, a new shape is
            captured at its second call.
        reuse_outputs: return the graph's own output tensors instead of copies. Any later call may overwrite them.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or `reuse_outputs` is not a bool.
        ValueError: buckets that are not pairs of integers from 1 on, or a `max_graphs` that is not an integer from 1 on.
        UnsupportedModelError: the model is not patched, or contains no BertModel or BertFor* of transformers.
    """
    from fastbert.graphs.buckets import checked
    from fastbert.graphs.options import Options

    _check_model(model)
    if type(max_graphs) is not int or max_graphs < 1:
        raise ValueError(f"max_graphs: expected an integer from 1 on, got {max_graphs!r}")
    if not isinstance(reuse_outputs, bool):
        raise TypeError(f"reuse_outputs: expected True or False, got {reuse_outputs!r}")
    from fastbert.graphs import classes

    options = Options(checked(buckets), max_graphs, reuse_outputs)
    if is_disabled():
        return model
    if not classes.is_patched(model):
        raise UnsupportedModelError(f"model: expected one patched by fastbert.patch, got a stock {type(model).__name__}")
    for root in classes.checked_roots(model):
        classes.set_graphs(root, options)
    return model


def warmup(model: nn.Module, shapes: Sequence[tuple[int, int]], *, choices: int = 2) -> None:
    """Capture the graphs of a graphed model for batches of these shapes, so that no request waits for it.

    A batch without padding is run for each shape. A model that packs has a graph for each number of tokens too: give the
    shapes of such batches as they come, or (1, tokens).

    Args:
        model: a model after `fastbert.graphed`.
        shapes: (rows, length) pairs.
        choices: the number of choices per row, for BertForMultipleChoice.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: the model has no graphs, or a shape is not a pair of integers from 1 on.
        RuntimeError: a shape cannot be captured; the message says why.
    """
    from fastbert.graphs import classes
    from fastbert.graphs.buckets import shapes as checked

    _check_model(model)
    sizes = checked("shapes", shapes)
    graphed_roots = [(root, graphs) for root in classes.roots(model) if (graphs := classes.graphs_of(root)) is not None]
    if not graphed_roots:
        raise ValueError("model: expected one that fastbert.graphed was called on")
    for root, graphs in graphed_roots:
        device = next(root.parameters()).device
        for rows, length in sizes:
            by_choice = (choices,) if type(root).__name__.endswith("ForMultipleChoice") else ()
            ids = torch.zeros(rows, *by_choice, length, dtype=torch.int64, device=device)
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
            replays, fallbacks, failed = graphs.replays, graphs.fallbacks.copy(), None
            try:
                with torch.inference_mode():
                    root(**inputs)
            except Exception as error:
                failed = error
            if failed or graphs.replays == replays:
                reason = ", ".join(graphs.fallbacks - fallbacks) or repr(failed)
                raise RuntimeError(f"shapes: {(rows, length)} runs without a graph: {reason}") from failed
