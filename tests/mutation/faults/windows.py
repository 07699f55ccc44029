"""Windows over long texts: which tokens stand in them, the forwards by a token budget, and the pooling."""

from functools import partial

from tests.mutation.fault import Fault

TOKENS, MODELS, TRAIN = "tests/test_windows.py", "tests/models/test_windows.py", "tests/bench/train/test_windows.py"
LOOP = f"{MODELS}::test_logits_and_gradients_are_those_of_a_loop"

_windows = partial(Fault, file="fastbert/windows.py")
_lengths = partial(Fault, file="fastbert/lengths.py")

FAULTS = (
    _windows(
        "of head and tail only the head is kept",
        before="return [*range(head), *range(count - (room - head), count)]",
        after="return list(range(room))",
        tests=(f"{TOKENS}::test_the_ends_of_a_text",),
    ),
    _windows(
        "head and tail are halves",
        before="HEAD_SHARE = 128 / 510",
        after="HEAD_SHARE = 1 / 2",
        tests=(f"{TOKENS}::test_head_and_tail_of_the_paper",),
    ),
    _windows(
        "windows of a tokenizer that cuts from the left stand in reverse",
        before="of_text = [own[::-1] for own in of_text]",
        after="pass",
        tests=(f"{TOKENS}::test_settings_of_the_tokenizer",),
    ),
    _windows(
        "windows beyond max_windows are kept",
        before="for i in own[: self.max_windows]]",
        after="for i in own]",
        tests=(f"{TOKENS}::test_windows_beyond_the_most_are_left_out",),
    ),
    _windows(
        "a tokenizer in Python makes a last window of nothing new",
        before="starts = range(0, max(len(ids) - self.stride, 1), room - self.stride)",
        after="starts = range(0, max(len(ids), 1), room - self.stride)",
        tests=(f"{TOKENS}::test_a_tokenizer_in_python",),
    ),
    _windows(
        "a first text that leaves room for the stride only reaches the tokenizer, which panics",
        before="least = self.stride + 1 if",
        after="least = self.stride if",
        tests=(f"{TOKENS}::test_the_longest_first_text",),
    ),
    _windows(
        "rows of several forwards are permuted once more instead of back",
        before="order = _on_device([places[row] for row in range(len(lengths))], device)",
        after="order = _on_device(list(places), device)",
        tests=(LOOP,),
    ),
    _windows(
        "a forward takes windows until its budget is exceeded",
        before="if lengths[row] > room:",
        after="if room <= 0:",
        tests=(f"{MODELS}::test_forwards_hold_the_budget_and_little_padding",),
    ),
    _windows(
        "padding is cut on the right also where it is on the left",
        before="chosen = slice(None, longest) if self._pads_right else slice(-longest, None)",
        after="chosen = slice(None, longest)",
        tests=(f"{MODELS}::test_padding_on_the_left",),
    ),
    _windows(
        "lengths are told of a batch whose first positions are padding",
        before="known_lengths(model, lengths if self._pads_right else None)",
        after="known_lengths(model, lengths)",
        tests=(f"{MODELS}::test_padding_on_the_left",),
    ),
    _windows(
        "a short window weighs as much as a long one",
        before="(part * own).sum(0) / own.sum(0)",
        after="part.mean(0)",
        tests=(f"{TOKENS}::test_pooling",),
    ),
    _windows(
        "the weighted mean rounds every product",
        before="sums_in = torch.promote_types(values.dtype, torch.float32)",
        after="sums_in = values.dtype",
        tests=(f"{TOKENS}::test_a_weighted_mean_stays_in_range",),
    ),
    _windows(
        "RoBERTa's padding index counts as a position",
        before="(0 if module.padding_idx is None else module.padding_idx + 1)",
        after="0",
        tests=(f"{MODELS}::test_positions_that_count_from_behind_the_padding",),
    ),
    _windows(
        "a model sees the padding if its tokenizer names no mask",
        before='dict.fromkeys([*self.tokenizer.model_input_names, "attention_mask"])',
        after="self.tokenizer.model_input_names",
        tests=(f"{MODELS}::test_a_tokenizer_that_names_no_mask",),
    ),
    _lengths(
        "known lengths replace those that the caller gave",
        before="if any(encoder.caller_counts is not None for encoder in encoders):",
        after="if False:",
        tests=(f"{MODELS}::test_lengths_of_the_caller_stay",),
    ),
    _lengths(
        "a compiled model is compiled anew for the lengths of each batch",
        before="encoders = [] if lengths is None or compiled else",
        after="encoders = [] if lengths is None else",
        tests=(f"{MODELS}::test_a_compiled_model_is_not_compiled_for_each_batch",),
    ),
    Fault(
        "bench train pools by the mean whatever was asked for",
        "bench/train/windows.py",
        before='pooling=settings.pooling or "mean",',
        after='pooling="mean",',
        tests=(TRAIN, "-k", "test_both_lanes_coincide and max"),
    ),
    Fault(
        "bench train has a gradient of positive logits only",
        "bench/train/windows.py",
        before="logits = windows.run(model, batch)",
        after="logits = windows.run(model, batch)\n    logits = logits.detach().lerp(logits, logits.gt(0).float())",
        tests=(f"{TRAIN}::test_the_losses_are_those_of_a_loop",),
    ),
)
