"""Faults of DistilBERT's adapter."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/models/test_distilbert.py"
_layout = partial(Fault, file="fastbert/layers/layout.py")
_layer = partial(Fault, file="fastbert/layers/layer.py")

FAULTS = (
    _layout(
        "DistilBERT's attention output is dropped",
        before='dropouts=("attention.dropout", None, "ffn.dropout")',
        after='dropouts=("attention.dropout", "ffn.dropout", "ffn.dropout")',
        tests=(f"{TESTS}::test_the_attention_output_is_not_dropped",),
    ),
    _layout(
        "DistilBERT's layer takes its norms in the wrong order",
        before='norms=("sa_layer_norm", "output_layer_norm")',
        after='norms=("output_layer_norm", "sa_layer_norm")',
        tests=(f"{TESTS}::test_a_head_is_equal[base-sdpa]",),
        short=True,
    ),
    _layout(
        "the chunk size of DistilBERT's feed-forward is not noticed",
        before='return layer._modules.get("ffn", layer).chunk_size_feed_forward',
        after='return getattr(layer, "chunk_size_feed_forward", 0)',
        tests=(f"{TESTS}::test_what_the_op_does_not_take_is_stock",),
    ),
    _layer(
        "the rows that DistilBERT's last layer reads miss the residual",
        before="return layer.output_layer_norm(layer.ffn(attended) + attended)",
        after="return layer.output_layer_norm(layer.ffn(attended) + rows)",
        tests=(f"{TESTS}::test_packed_tokens_module_by_module",),
    ),
    Fault(
        "DistilBERT's attention leaves out its output product",
        file="fastbert/layers/attention.py",
        before="        return self.out_lin(attended)\n",
        after="        return attended\n",
        tests=(f"{TESTS}::test_packed_tokens_module_by_module",),
    ),
    Fault(
        "a carried mask is lost by gradient checkpointing",
        file="fastbert/layers/masks.py",
        before="        return self  # gradient checkpointing detaches what it passes on\n",
        after="        return super().detach()\n",
        tests=(f"{TESTS}::test_a_carried_mask_survives_being_detached",),
    ),
    Fault(
        "DistilBERT's own loss function is replaced",
        file="fastbert/layers/lm_parts.py",
        before='(None, IGNORED, "mean", 0.0)',
        after='(None, IGNORED, "mean", loss.label_smoothing)',
        tests=(f"{TESTS}::test_a_loss_of_ones_own_is_stocks",),
    ),
)
