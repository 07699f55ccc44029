"""Language-model heads and their losses."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/models/test_mlm_head.py"
HOST = "tests/models/test_heads_host.py"

_fault = partial(Fault, file="fastbert/layers/mlm_heads.py")

FAULTS = (
    _fault(
        "the tied weight gets no gradient from the loss",
        before="run(module, ops.linear_cross_entropy, hidden, weight, bias, targets, **options)",
        after="run(module, ops.linear_cross_entropy, hidden, weight.detach(), bias, targets, **options)",
        tests=(TESTS, "-k", "test_training_is_equal and False"),
    ),
    _fault(
        "a causal head predicts the token before",
        before="targets = pad_labels(labels, (0, 1), value=ignored)[..., 1:]",
        after="targets = pad_labels(labels, (1, 0), value=ignored)[..., :-1]",
        tests=(TESTS, "-k", "test_training_is_equal and False"),
    ),
    _fault(
        "the number of items is ignored",
        before='"reduction": "mean" if items is None else "sum"',
        after='"reduction": "mean"',
        tests=(f"{TESTS}::test_the_causal_loss_counts_items_as_stock_does",),
    ),
    _fault(
        "logits have no gradient",
        before="logits = linear(hidden, weight, bias)",
        after="logits = linear(hidden.detach(), weight, bias)",
        tests=(f"{TESTS}::test_logits_have_their_gradient",),
    ),
    _fault(
        "the first position, which the second loss reads, is not computed",
        before="labelled[:, :1] = True  # the pooler",
        after="labelled[:, :0] = True  # the pooler",
        tests=(TESTS, "-k", "test_training_is_equal and none"),
    ),
    _fault(
        'mlm_logits="none" omits logits in evaluation too',
        before="without = module.WITHOUT_LOGITS and module.training",
        after="without = module.WITHOUT_LOGITS",
        tests=(f"{TESTS}::test_none_gives_logits_in_evaluation_and_without_labels",),
    ),
    _fault(
        "a hook on the decoder is bypassed",
        before="if not is_plain(decoder, nn.Linear) or not (",
        after="if not isinstance(decoder, nn.Linear) or not (",
        tests=(f"{TESTS}::test_hooks_between_are_called",),
    ),
    _fault(
        "a user's loss function is not called",
        before="return module._loss_function is ForCausalLMLoss",
        after="return True",
        tests=(f"{TESTS}::test_a_loss_of_the_users_own",),
    ),
    _fault(
        "spare capacity has the label of the first row",
        before="index.clamp(min=0)).masked_fill_(index < 0, ignored)",
        after="index.clamp(min=0))",
        tests=(f"{HOST}::test_spare_capacity_has_no_label",),
    ),
    _fault(
        "under autocast the loss is a 16-bit number",
        before='options.setdefault("out_dtype", torch.float32)',
        after='options.setdefault("out_dtype", dtype)',
        tests=(f"{TESTS}::test_under_autocast",),
    ),
    _fault(
        "the decoder's weight is cast for the loss and again for the logits",
        before="logits = linear(hidden, weight, bias)",
        after="logits = linear(hidden, head.decoder.weight, head.decoder.bias)",
        tests=(f"{HOST}::test_autocast_casts_the_weight_once",),
    ),
    _fault(
        "rows are counted twice",
        before="_, capacity, _ = count(None, labelled, counts)",
        after="_, capacity, _ = count(None, labelled, ops.row_counts(None, labelled))",
        tests=(f"{HOST}::test_a_head_launches_no_more_than_it_must",),
    ),
    _fault(
        "arguments unknown to stock are passed on",
        before="if not args and (takes_any or kwargs.keys() <= known):",
        after="if not args:",
        tests=(f"{HOST}::test_an_argument_of_an_unknown_name",),
    ),
)
