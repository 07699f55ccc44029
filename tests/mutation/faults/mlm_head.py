"""Language-model heads and their losses."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/models/test_mlm_head.py"

_fault = partial(Fault, file="fastbert/layers/mlm_heads.py")

FAULTS = (
    _fault(
        "the tied weight has no gradient of the loss",
        before="return ops.linear_cross_entropy(hidden, weight, bias, targets, **options)",
        after="return ops.linear_cross_entropy(hidden, weight.detach(), bias, targets, **options)",
        tests=(TESTS, "-k", "test_training_is_equal and False"),
    ),
    _fault(
        "a causal head predicts the token before",
        before="targets = pad(labels, (0, 1), value=ignored)[..., 1:]",
        after="targets = pad(labels, (1, 0), value=ignored)[..., :-1]",
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
        before="logits = head.decoder(hidden)",
        after="logits = head.decoder(hidden.detach())",
        tests=(f"{TESTS}::test_logits_have_their_gradient",),
    ),
    _fault(
        "the first position, which the second loss reads, is not computed",
        before="labelled[:, :1] = True  # without",
        after="labelled[:, :0] = True  # without",
        tests=(TESTS, "-k", "test_training_is_equal and none"),
    ),
    _fault(
        "without logits a head has none in evaluation either",
        before="without = module.WITHOUT_LOGITS and module.training",
        after="without = module.WITHOUT_LOGITS",
        tests=(f"{TESTS}::test_none_gives_logits_in_evaluation_and_without_labels",),
    ),
    _fault(
        "a hook on the decoder is bypassed",
        before="if not is_plain(decoder, nn.Linear) or not is_plain_tensor(decoder.weight):",
        after="if not isinstance(decoder, nn.Linear):",
        tests=(f"{TESTS}::test_hooks_between_are_called",),
    ),
    _fault(
        "a loss of the user's own is not called",
        before="return module._loss_function is ForCausalLMLoss",
        after="return True",
        tests=(f"{TESTS}::test_a_loss_of_the_users_own",),
    ),
)
