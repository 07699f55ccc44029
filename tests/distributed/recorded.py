"""Records in which order a backward runs through the layers and an engine issues its collectives."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups
from torch.nn.parallel import DistributedDataParallel
from transformers.modeling_layers import GradientCheckpointingLayer

Events = list[str]


@contextmanager
def recording(layers: nn.ModuleList) -> Iterator[Events]:
    """`with recording(model.bert.encoder.layer) as events`: notes where each layer's forward and backward begin.

    Tensor hooks tell, set where layers are called: a hook on a layer would be a reason not to run it as one op.
    """
    events: Events = []
    call = GradientCheckpointingLayer.__call__

    def recorded(layer: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = f"layer {list(layers).index(layer)}"
        events.append(f"forward of {name}")
        result = call(layer, hidden_states, *args, **kwargs)
        result.register_hook(lambda _: events.append(f"backward of {name}"))
        return result

    GradientCheckpointingLayer.__call__ = recorded
    try:
        yield events
    finally:
        GradientCheckpointingLayer.__call__ = call


def place_of(name: str) -> str:
    """The part of the model that a parameter or module belongs to."""
    before, _, after = name.partition("encoder.layer.")
    if after:
        return f"layer {after.partition('.')[0]}"
    return "embeddings" if "embeddings" in name else "head"


def note_buckets(parallel: DistributedDataParallel, events: Events) -> None:
    """Note each bucket of DDP when its all-reduce is issued."""
    places = {parameter: place_of(name) for name, parameter in parallel.named_parameters()}

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        inside = dict.fromkeys(places[parameter] for parameter in bucket.parameters())
        events.append(f"all-reduce of {', '.join(sorted(inside, reverse=True))}")
        return default_hooks.allreduce_hook(None, bucket)

    parallel.register_comm_hook(None, hook)


@contextmanager
def noting_collectives(events: Events) -> Iterator[None]:
    """Note each all-gather and reduce-scatter of FSDP2 when it is issued."""
    gather, post_backward = groups.foreach_all_gather, groups.FSDPParamGroup.post_backward
    unshard, reduce = groups.FSDPParamGroup.unshard, groups.foreach_reduce
    current: list[str] = []

    def name_of(group: Any) -> str:
        return place_of(group._module_fqn or "") if group._module_fqn else "the rest"

    def noted_unshard(group: Any, *args: Any, **kwargs: Any) -> Any:
        current.append(name_of(group))
        try:
            return unshard(group, *args, **kwargs)
        finally:
            current.pop()

    def noted_post_backward(group: Any, *args: Any, **kwargs: Any) -> Any:
        current.append(name_of(group))
        try:
            return post_backward(group, *args, **kwargs)
        finally:
            current.pop()

    def noted_gather(*args: Any, **kwargs: Any) -> Any:
        events.append(f"all-gather of {current[-1]}")
        return gather(*args, **kwargs)

    def noted_reduce(*args: Any, **kwargs: Any) -> Any:
        events.append(f"reduce-scatter of {current[-1]}")
        return reduce(*args, **kwargs)

    groups.foreach_all_gather, groups.foreach_reduce = noted_gather, noted_reduce
    groups.FSDPParamGroup.unshard, groups.FSDPParamGroup.post_backward = noted_unshard, noted_post_backward
    try:
        yield
    finally:
        groups.foreach_all_gather, groups.foreach_reduce = gather, reduce
        groups.FSDPParamGroup.unshard, groups.FSDPParamGroup.post_backward = unshard, post_backward
