"""The padding-free encoder: which rows are packed, when it may pack, and what comes out where padding is."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/models/test_unpad.py"
LENGTHS = "tests/models/test_lengths.py"

PACKED = "tests/kernels/test_packed_rows.py"
COUNTS = "tests/kernels/test_row_counts.py"

_kernel = partial(Fault, file="kernels/packed_rows.py", op="packed_rows")
_counting = partial(Fault, file="kernels/row_counts.py", op="row_counts")
_rows = partial(Fault, file="fastbert/layers/packing.py")
_plan = partial(Fault, file="fastbert/layers/packing_plan.py")
_encoder = partial(Fault, file="fastbert/layers/encoder.py")

FAULTS = (
    _kernel(
        "a mask with holes is taken for a length",
        before="token = (token != 0).to(tl.int32)",
        after="token = (numbers - row * seqlen < tl.load(counts_ptr + batch)).to(tl.int32)",
        tests=(f"{PACKED}::test_against_the_reference", f"{TESTS}::test_true_is_equal_at_every_real_position"),
        short=True,
    ),
    _kernel(
        "padded positions return the token before them",
        before="tl.store(inverse_ptr + numbers, tl.where(packed, places, -1), inside)",
        after="tl.store(inverse_ptr + numbers, places, inside)",
        tests=(f"{PACKED}::test_against_the_reference", f"{TESTS}::test_true_gives_zeros_where_padding_is"),
        short=True,
    ),
    _kernel(
        "a head that reads the first position gets the second",
        before="read = (cols == 0).to(tl.int32)",
        after="read = (cols == 1).to(tl.int32)",
        tests=(f"{TESTS}::test_without_padding_the_last_layer_runs_at_the_first_rows_still",),
    ),
    _kernel(
        "spare capacity joins the last sequence",
        before="bounds = tl.minimum(every + steps * longest, capacity)",
        after="bounds = tl.minimum(every + steps * 0, capacity) + tl.where(steps > 0, capacity - every, 0)",
        tests=(f"{LENGTHS}::test_spare_capacity_is_in_separate_sequences",),
    ),
    _kernel(
        "spare capacity is not filled",
        before="tl.store(index_ptr + places, tl.full([BLOCK_N], -1, tl.int32), places < capacity)",
        after="tl.store(index_ptr + places, tl.full([BLOCK_N], 0, tl.int32), places < capacity)",
        tests=(f"{PACKED}::test_against_the_reference",),
    ),
    _kernel(
        "with many rows, a program adds up only the rows that it reads at once",
        before="before += tl.where(rows < batch, count, 0)",
        after="before += tl.where((rows < batch) & (start == 0), count, 0)",
        tests=(f"{PACKED}::test_many_rows",),
    ),
    _kernel(
        "rows past the capacity are written",
        before="packed = (wanted != 0) & (places < capacity)",
        after="packed = wanted != 0",
        tests=(f"{PACKED}::test_rows_beyond_the_capacity_are_left_out_and_reported",),
    ),
    _kernel(
        "a row that is read is looked for among all rows, not among the tokens",
        before="tl.store(inner_index_ptr + read_places, tl.where(packed, places, -1), taken)",
        after="tl.store(inner_index_ptr + read_places, numbers.to(tl.int32), taken)",
        tests=(f"{PACKED}::test_against_the_reference",),
    ),
    _kernel(
        "given lengths that are too small leave tokens out",
        before="enough = (n_taken == capacity) if EXACT else (n_taken <= capacity)",
        after="enough = n_taken >= 0",
        tests=(f"{LENGTHS}::test_numbers_that_are_wrong_stop",),
    ),
    _kernel(
        "a given longest row that is too short leaves keys out",
        before="return enough & (most <= longest)",
        after="return enough",
        tests=(f"{PACKED}::test_what_is_claimed_is_compared",),
    ),
    _counting(
        "the last block of a row is not counted",
        before="for start in range(0, seqlen, BLOCK_N):",
        after="for start in range(0, seqlen - 1023, BLOCK_N):",
        tests=(f"{COUNTS}::test_against_the_reference",),
    ),
    _counting(
        "a padded position that is read is noticed in the last block only",
        before="missing |= (read & (token == 0)).to(tl.int32)",
        after="missing = (read & (token == 0)).to(tl.int32)",
        tests=(f"{COUNTS}::test_a_read_position_that_is_padding_is_noticed_wherever_it_is",),
    ),
    _counting(
        "without given positions, no position is read",
        before="read = (cols == 0) & inside",
        after="read = (cols < 0) & inside",
        tests=(f"{TESTS}::test_a_row_of_padding_alone_stays_padded",),
        short=True,
    ),
    _counting(
        "the mask of read positions is read with the strides of the token mask",
        before="batch * read_batch_stride + cols * read_col_stride",
        after="batch * read_batch_stride + cols * tokens_col_stride",
        tests=(f"{COUNTS}::test_layouts",),
    ),
    _counting(
        "the number of read positions is that of the tokens",
        before="n_read += read.to(tl.int32)",
        after="n_tokens += read.to(tl.int32)",
        tests=(f"{COUNTS}::test_against_the_reference",),
        short=True,
    ),
    _rows(
        "keys get no empty sequences if the read rows have more",
        before="    if more:\n",
        after="    if more < 0:\n",
        tests=(f"{LENGTHS}::test_the_keys_have_as_many_sequences_as_what_is_read",),
    ),
    _plan(
        "a first position that is padding is read",
        before="tokens, reads, padding = tokens or found[0], reads or found[1], found[2] and watched",
        after="tokens, reads = tokens or found[0], reads or found[1]",
        tests=(f"{TESTS}::test_a_row_of_padding_alone_stays_padded",),
    ),
    _plan(
        "given lengths are believed although a padding position is read",
        before="checked = (*claims, watched and mask is not None and not counted)",
        after="checked = (*claims, False)",
        tests=(f"{LENGTHS}::test_a_read_position_that_is_padding_stops",),
    ),
    _plan(
        "given lengths are believed where they say that there is no padding",
        before="if reason is not None and read is None and not claims[0]:",
        after="if reason is not None and read is None:",
        tests=(f"{LENGTHS}::test_lengths_that_deny_the_padding_stop",),
    ),
    _encoder(
        "unpad='auto' packs although every position is visible",
        before="reason = None if self.ALWAYS or (reading and reading.hides_padding) else",
        after="reason = None if True else",
        tests=(
            f"{TESTS}::test_the_encoder_called_by_others_than_the_head_is_seen_everywhere",
            f"{TESTS}::test_a_hook_on_what_lies_between_sees_every_position",
        ),
    ),
    _encoder(
        "requested hidden states are packed",
        before="if captured or wants_weights(self, kwargs) or is_recording():",
        after="if wants_weights(self, kwargs):",
        tests=(f"{TESTS}::test_what_would_show_packed_rows_stays_padded",),
    ),
    _encoder(
        "a chunked feed-forward is run whole",
        before="if chunk_size_of(layer):",
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
        "rows of a causal encoder are gathered although nearly all are read",
        before="and not pooled and causal:",
        after="and False:",
        tests=(f"{TESTS}::test_a_causal_encoder_of_which_most_is_read_runs_whole",),
    ),
    Fault(
        "a causal encoder treats the read rows as the last of their sequences",
        file="fastbert/layers/layer.py",
        before="if reads and self_attention_of(self).is_causal:",
        after="if False:",
        tests=(f"{TESTS}::test_a_causal_encoder_is_read_at_requested_rows",),
    ),
    Fault(
        "a causal encoder that runs module by module treats the read rows as the last of their sequences",
        file="fastbert/layers/layer.py",
        before="if layer.attention.self.is_causal:",
        after="if False:",
        tests=(f"{TESTS}::test_a_causal_encoder_is_read_at_requested_rows",),
    ),
    _encoder(
        "gradient checkpointing keeps the last layer",
        before="if layer.gradient_checkpointing and layer.training:",
        after="if False:",
        tests=(f"{TESTS}::test_checkpointing_on_is_off_with_dropout",),
    ),
)
