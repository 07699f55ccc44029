"""Every fault, a file an area."""

from tests.mutation.fault import Fault
from tests.mutation.faults import (
    attention,
    attention_backward,
    attention_backward_short,
    elementwise,
    embeddings,
    encoder_layer,
    feed_forward,
    forwards,
    inference_graphs,
    launching,
    layer,
    layernorm,
    layers,
    linear_cross_entropy,
    mlm_head,
    optimizer,
    packing,
    patching,
    reports,
    training_graphs,
)

AREAS = (
    layernorm,
    elementwise,
    embeddings,
    attention,
    attention_backward,
    attention_backward_short,
    linear_cross_entropy,
    encoder_layer,
    feed_forward,
    launching,
    optimizer,
    layers,
    layer,
    mlm_head,
    packing,
    patching,
    forwards,
    inference_graphs,
    reports,
    training_graphs,
)
FAULTS: tuple[Fault, ...] = tuple(fault for area in AREAS for fault in area.FAULTS)
