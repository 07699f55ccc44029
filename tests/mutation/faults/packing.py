"""The padding-free encoder: which rows are packed, when it may pack, and what comes out where padding is."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/models/test_unpad.py"
LENGTHS = "tests/models/test_lengths.py"

_rows = partial(Fault, file="fastbert/layers/packing.py")
_plan = partial(Fault, file="fastbert/layers/plan.py")
_encoder = partial(Fault, file="fastbert/layers/encoder.py")
_counts = partial(Fault, file="fastbert/layers/counts.py")

FAULTS = (
    _rows(
        "a mask with holes is taken for a length",
        before="flat = chosen.flatten()",
        after="flat = (torch.arange(chosen.shape[1], device=chosen.device) < chosen.sum(1, keepdim=True)).flatten()",
        tests=(f"{TESTS}::test_true_is_equal_at_every_real_position",),
    ),
    _rows(
        "padding comes out as the token before it",
        before="inverse = torch.where(flat & (places < room), places, -1).to(torch.int32)",
        after="inverse = torch.where(places < room, places, -1).to(torch.int32)",
        tests=(f"{TESTS}::test_true_gives_zeros_where_padding_is",),
    ),
    _rows(
        "a head that reads the first position gets the last",
        before="first[:, 0] = True",
        after="first[:, -1] = True",
        tests=(f"{TESTS}::test_without_padding_the_last_layer_runs_at_the_first_rows_still",),
    ),
    _rows(
        "what is left of the room joins the last sequence",
        before="    if not exact:\n",
        after="    if not exact and False:\n",
        tests=(f"{LENGTHS}::test_what_is_left_of_the_room_is_in_sequences_of_its_own",),
    ),
    _rows(
        "where one has empty sequences at its end, bounds of keys and queries are exchanged",
        before="return longer[0], longer[1]",
        after="return longer[more > 0], longer[more <= 0]",
        tests=(f"{LENGTHS}::test_a_budget", f"{TESTS}::test_auto_is_invisible_where_the_first_position_is_read"),
    ),
    _plan(
        "a first position that is padding is read",
        before="padding = missing(mask, told) if checked else None",
        after="padding = None",
        tests=(f"{TESTS}::test_a_row_of_padding_alone_stays_padded",),
    ),
    _plan(
        "given lengths are believed although a padding position is read",
        before='torch._assert_async(~missing(mask, told), "lengths: given, but a position that is padding is read")',
        after="pass",
        tests=(f"{LENGTHS}::test_a_read_position_that_is_padding_stops",),
    ),
    _counts(
        "given lengths that are too small leave tokens out",
        before="torch._assert_async(fits & (counts.amax() <= room.longest)",
        after="torch._assert_async(fits | (counts.amax() <= room.longest)",
        tests=(f"{LENGTHS}::test_numbers_that_are_wrong_stop",),
    ),
    _encoder(
        "unpad='auto' packs although everything can be seen",
        before='reason = None if self.ALWAYS or (told and told.alone) else "outputs at padded positions can be seen"',
        after="reason = None",
        tests=(
            f"{TESTS}::test_the_encoder_called_by_others_than_the_head_is_seen_everywhere",
            f"{TESTS}::test_a_hook_on_what_lies_between_sees_every_position",
        ),
    ),
    _encoder(
        "hidden states that are asked for come out packed",
        before=" or (_active_collector and _active_collector.get()):",
        after=":",
        tests=(f"{TESTS}::test_what_would_show_packed_rows_stays_padded",),
    ),
    _encoder(
        "a feed-forward in chunks is run whole",
        before="if layer.chunk_size_feed_forward:",
        after="if False:",
        tests=(f"{TESTS}::test_chunks_stay_padded",),
    ),
    Fault(
        "a hook on a layer sees packed rows",
        file="fastbert/layers/by_row.py",
        before="if hooked(module):",
        after="if False:",
        tests=(f"{TESTS}::test_a_hook_on_a_layer_sees_the_padded_batch",),
    ),
    _encoder(
        "a causal encoder is read at its first rows as if they were its last",
        before="and self.layer[-1].attention.self.is_causal:",
        after="and False:",
        tests=(f"{TESTS}::test_a_causal_encoder_is_packed_and_read_whole",),
    ),
    _encoder(
        "gradient checkpointing keeps the last layer",
        before="if layer.gradient_checkpointing and layer.training:",
        after="if False:",
        tests=(f"{TESTS}::test_checkpointing_on_is_off_with_dropout",),
    ),
)
