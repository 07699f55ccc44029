"""The stated operations and bytes against independent counts: torch's own counter, and sums written out by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.core import flops
from bench.models import batches
from bench.models.workloads import LANES, Workload, make
from bench.ops import grid

ROWS, SEQLEN = 4, 16


@pytest.mark.parametrize("head", batches.HEADS)
def test_the_formula_is_what_torch_counts(head):
    """Full rows, eager attention: nothing is computed that the formula leaves out."""
    workload = Workload("tiny", head, "train", ROWS, SEQLEN, 1.0, "fp32")
    model = make(workload, LANES["eager"], "cpu")
    batch = batches.make(head, model.config, [SEQLEN] * ROWS, SEQLEN, 0, "cpu")
    with FlopCounterMode(display=False) as counter:
        loss = model(**batch).loss
        forward = counter.get_total_flops()
        loss.backward()
    assert flops.step_flops(model.config, head, "infer", [SEQLEN] * ROWS) == forward
    assert flops.step_flops(model.config, head, "train", [SEQLEN] * ROWS) == counter.get_total_flops()


def test_bert_base_by_hand():
    config = Workload("BERT-base", "classification", "infer", 1, 512, 1.0).config()
    layer = 2 * 512 * (4 * 768 * 768 + 2 * 768 * 3072) + 2 * (2 * 512 * 512 * 768)
    assert flops.forward_flops(config, "classification", [512]) == 12 * layer + 2 * (768 * 768 + 768 * 2)


def test_padding_has_no_operations():
    config = Workload("tiny", "mlm", "train", 2, 16, 0.5).config()
    alone = [flops.forward_flops(config, "mlm", [n]) for n in (5, 11)]
    assert flops.forward_flops(config, "mlm", [5, 11]) == sum(alone)


def test_mfu_is_the_share_of_the_measured_ceiling():
    assert flops.mfu(4e14, 2.0, 8e14) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("op", "direction", "moved"),
    [
        ("dropout_add_layernorm", "forward", 4 * 2048 * 768 * 2),
        ("bias_gelu", "backward", 3 * 2048 * 3072 * 2),
        ("gelu_layernorm", "both", 5 * 2048 * 768 * 2),
        ("attention", "forward", 4 * 2048 * 768 * 2),
    ],
)
def test_stated_bytes(op, direction, moved):
    assert grid.Case(op, "bf16", 768, 4, 512).moved(direction) == moved


def test_the_decoder_counts_rows_and_classes():
    case = grid.Case("linear_cross_entropy", "bf16", 768, 1, 614)
    assert case.operations("forward") == 2 * 614 * 768 * 30522
    assert case.operations("backward") == 2 * case.operations("forward")
    tiny = next(grid.tiny_cases(("linear_cross_entropy",)))
    assert tiny.operations("forward") == 2 * 18 * 48 * 101


def test_attention_counts_pairs_of_one_sequence():
    full = grid.Case("attention", "bf16", 768, 4, 512)
    assert full.operations("forward") == 4 * (4 * 512**2 * 64) * 12
    assert full.operations("backward") == 2.5 * full.operations("forward")
    assert full.operations("both") == 3.5 * full.operations("forward")
    padded = grid.Case("attention", "bf16", 768, 4, 512, fill=0.5)
    assert padded.operations("forward") == 4 * sum(n * n for n in padded.lengths) * 768
    assert padded.moved("forward") == pytest.approx(full.moved("forward") / 2, rel=0.01)


def test_batches_hold_the_lengths_they_were_given():
    config = Workload("tiny", "mlm", "train", 4, 16, 0.5).config()
    for head in batches.HEADS:
        batch = batches.make(head, config, [3, 16, 7, 9], 16, 1, "cpu")
        assert sorted(batch["attention_mask"].view(-1, 16).sum(1).tolist()) == [3, 7, 9, 16], head
        again = batches.make(head, config, [3, 16, 7, 9], 16, 1, "cpu")
        assert all(torch.equal(batch[name], again[name]) for name in batch), head
    assert "attention_mask" not in batches.make("mlm", config, [16] * 4, 16, 1, "cpu")
