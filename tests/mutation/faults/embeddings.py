"""embedding_layernorm: three rows named by ids, and the sums over tokens that are the tables' gradients."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/kernels/embedding_layernorm/test_embedding_layernorm.py"
PACKED = "tests/kernels/embedding_layernorm/test_packed.py"
MODEL = "tests/models/test_embeddings.py"
PACKED_MODEL = "tests/models/test_packed_embeddings.py"

_op = partial(Fault, file="kernels/embedding_layernorm/__init__.py", op="embedding_layernorm")
_rows = partial(Fault, file="kernels/embedding_layernorm/rows.py", op="embedding_layernorm")
_runs = partial(Fault, file="kernels/embedding_layernorm/gradients.py", op="embedding_layernorm")
_sums = partial(Fault, file="kernels/embedding_layernorm/sums.py", op="embedding_layernorm")
_ids = partial(Fault, file="kernels/embedding_layernorm/ids.py", op="embedding_layernorm")
_layer = partial(Fault, file="fastbert/layers/embeddings.py")
_model = partial(Fault, file="fastbert/layers/model.py")

FAULTS = (
    _runs(
        "partial sums of a frequent word are never added up",
        before="max(n_pieces - 1, 0) * col_blocks,",
        after="0,",
        tests=(f"{TESTS}::test_runs_longer_than_a_piece",),
        short=True,
    ),
    _runs(
        "the padding row has a gradient",
        before='"skip": -1 if skip is None else skip,',
        after='"skip": -1,',
        tests=(f"{MODEL}::test_the_padding_row_has_no_gradient",),
        short=True,
    ),
    _runs(
        "only the first of several tokens with the same id has a gradient",
        before="taken = steps < length[:, None]",
        after="taken = steps < tl.minimum(length, 1)[:, None]",
        tests=(f"{TESTS}::test_shapes",),
    ),
    _runs(
        "at most sixteen partial sums of a run are added up",
        before="more = tl.sum(same.to(tl.int32), axis=0) == BLOCK_M",
        after="more = tl.sum(same.to(tl.int32), axis=0) < 0",
        tests=(f"{TESTS}::test_one_run_longer_than_are_joined_at_once",),
    ),
    _sums(
        "every type gets the gradient of all tokens",
        before="dz = tl.where(ids[None, :, None] == types, dz, 0.0)",
        after="dz = tl.where(ids[None, :, None] >= 0 * types, dz, 0.0)",
        tests=(f"{TESTS}::test_numbers_of_types",),
    ),
    _sums(
        "sums over places read past the last token",
        before="mask = (outer < end) & (inner < n_inner) & (tokens < n_tokens)",
        after="mask = (outer < end) & (inner < n_inner)",
        tests=(f"{TESTS}::test_memory",),
    ),
    _rows(
        "positions are counted from 0 whatever the offset is",
        before="(offset + place).to(tl.int64)",
        after="(offset * 0 + place).to(tl.int64)",
        tests=(f"{TESTS}::test_offset",),
    ),
    _rows(
        "every sequence has the types of the first",
        before="named_rows(type_ids_ptr, batch * strides[3] + place, token_mask, n_types)",
        after="named_rows(type_ids_ptr, place, token_mask, n_types)",
        tests=(TESTS, "-k", "test_every_way_to_name_rows and float32"),
    ),
    _rows(
        "the backward uses another dropout seed than the forward",
        before="dy = dropout(dy, keep_mask(tl.load(seed_ptr), rows, cols, P_DROP), P_DROP)",
        after="dy = dropout(dy, keep_mask(tl.load(seed_ptr) + 1, rows, cols, P_DROP), P_DROP)",
        tests=(f"{TESTS}::test_dropout",),
    ),
    _sums(
        "the gradient of positions starts at row 0",
        before="place = row - offset",
        after="place = row",
        tests=(f"{TESTS}::test_offset",),
    ),
    _sums(
        "weight and bias have each other's gradient",
        before="col_mask & (row == 1)",
        after="col_mask & (row == 0)",
        tests=(f"{TESTS}::test_shapes",),
    ),
    _sums(
        "only the partial sums that are read at once are added up",
        before="for start in range(0, n_rows, BLOCK_M):",
        after="for start in range(0, tl.minimum(n_rows, BLOCK_M), BLOCK_M):",
        tests=(f"{TESTS}::test_many_partial_sums",),
    ),
    _sums(
        "a position has the gradient of its first type only",
        before="n_rows = tl.where((place >= 0) & (place < n_inner), n_pieces * n_types, 0)",
        after="n_rows = tl.where((place >= 0) & (place < n_inner), n_pieces, 0)",
        tests=(f"{TESTS}::test_numbers_of_types",),
    ),
    _sums(
        "a type's gradient leaves out the last place",
        before="tl.where(row < n_types, n_pieces * n_inner, 0)",
        after="tl.where(row < n_types, n_pieces * n_inner - 1, 0)",
        tests=(f"{TESTS}::test_shapes",),
    ),
    _sums(
        "types of all sequences are those of the first sequence's neighbours",
        before="batch.to(tl.int64) * type_batch_stride + place",
        after="batch.to(tl.int64) * seqlen + place",
        tests=(TESTS, "-k", "test_every_way_to_name_rows and float32"),
    ),
    _runs(
        "tokens with the same id are in reverse order",
        before="ids, NO_ID) << PLACE_BITS) | places",
        after="ids, NO_ID) << PLACE_BITS) | (16383 - places)",
        tests=(f"{TESTS}::test_ids_are_brought_into_order",),
    ),
    _runs(
        "all tokens with the same id get the same place",
        before="ids, NO_ID) << PLACE_BITS) | places",
        after="ids, NO_ID) << PLACE_BITS) | (places & 0)",
        tests=(f"{TESTS}::test_shapes",),
    ),
    _runs(
        "memory behind the last id counts as a small id",
        before="_keys(other_ids, others), LARGEST)",
        after="_keys(other_ids, others), 0)",
        tests=(f"{TESTS}::test_ids_are_brought_into_order",),
    ),
    _runs(
        "an id is compared only with the first thousand",
        before="for start in range(0, n_places, BLOCK_N):",
        after="for start in range(0, BLOCK_N, BLOCK_N):",
        tests=(f"{TESTS}::test_ids_are_brought_into_order",),
    ),
    _layer(
        "a hook that was added to a part after patching is not noticed",
        before="            or part._forward_hooks\n",
        after="",
        tests=(f"{MODEL}::test_hooks_on_an_embedding_see_its_calls", f"{MODEL}::test_what_changed_is_noticed_by_the_next_call"),
    ),
    _layer(
        "a padding row of the types is not noticed",
        before="        and type_.padding_idx is None\n",
        after="",
        tests=(f"{MODEL}::test_what_changed_is_noticed_by_the_next_call",),
    ),
    _layer(
        "a table that moved or changed its dtype is not noticed",
        before="alike = all(type(tensor) is kind and tensor.dtype is dtype and tensor.device == device for tensor in tensors)",
        after="alike = True",
        tests=(f"{MODEL}::test_what_changed_is_noticed_by_the_next_call",),
    ),
    _op(
        "types are read with the stride of the positions",
        before='"type_batch_stride": batch_stride(token_type_ids, shape)',
        after='"type_batch_stride": batch_stride(position_ids, shape)',
        tests=(TESTS, "-k", "test_every_way_to_name_rows and float32"),
    ),
    _op(
        "the id after a table's last row is accepted",
        before="high >= table.shape[0]",
        after="high > table.shape[0]",
        tests=(f"{TESTS}::test_an_id_outside_of_its_table",),
    ),
    _ids(
        "packed positions are counted from 0 whatever the offset is",
        before="(offset + place).to(tl.int64)",
        after="place.to(tl.int64)",
        tests=(f"{PACKED}::test_offset",),
    ),
    _ids(
        "packed types are those of the first sequence",
        before="type_ids_ptr + batch * type_batch_stride + place",
        after="type_ids_ptr + place",
        tests=(PACKED, "-k", "test_every_way_to_name_rows and float32"),
    ),
    _ids(
        "spare capacity reads before the first id",
        before="tl.maximum(tl.load(index_ptr + rows, mask, other=0), 0)",
        after="tl.load(index_ptr + rows, mask, other=0)",
        tests=(f"{PACKED}::test_the_stand_ins", f"{PACKED}::test_memory"),
    ),
    _sums(
        "packed rows are summed by their packed positions",
        before="tokens = tl.load(rows_ptr + tokens, mask, other=-1).to(tl.int64)",
        after="tokens = tl.where(mask, tokens, -1)",
        tests=(f"{PACKED}::test_many_short_sequences",),
    ),
    _sums(
        "a place without a row reads before the first row",
        before="            mask = mask & (tokens >= 0)\n",
        after="",
        tests=(f"{PACKED}::test_memory", f"{PACKED}::test_many_short_sequences"),
    ),
    _op(
        "given positions of packed tokens are replaced by counted ones",
        before="places = inverse.view(-1, ids.shape[-1]) if position_ids is None else None",
        after="places = inverse.view(-1, ids.shape[-1])",
        tests=(PACKED, "-k", "test_every_way_to_name_rows and float32"),
    ),
    _layer(
        "packed embeddings are of the whole batch",
        before="if rows is None or rows.index is None:",
        after="if True:",
        tests=(f"{PACKED_MODEL}::test_only_tokens_are_embedded",),
    ),
    _model(
        "embeddings are deferred although a hook sees them",
        before="            and not hooked(embeddings)\n",
        after="",
        tests=(f"{PACKED_MODEL}::test_whoever_watches_sees_what_stock_gives",),
    ),
    _model(
        "embeddings are deferred although a hook sees the encoder's input",
        before="            and not hooked(encoder)\n",
        after="",
        tests=(f"{PACKED_MODEL}::test_whoever_watches_sees_what_stock_gives",),
    ),
    _model(
        "embeddings are deferred although the model's mask method was replaced",
        before='            and "_create_attention_masks" not in vars(self)\n',
        after="",
        tests=(f"{PACKED_MODEL}::test_whoever_watches_sees_what_stock_gives",),
    ),
    _model(
        "embeddings are deferred although a mask function was replaced",
        before="            and not masks_replaced(self.PART.family.path)\n",
        after="",
        tests=(f"{PACKED_MODEL}::test_masks_made_by_somebody_else_see_what_stock_gives",),
    ),
    _model(
        "positional position_ids are passed twice",
        before="if len(args) <= 3 and",
        after="if len(args) <= 4 and",
        tests=(f"{PACKED_MODEL}::test_positions_in_order_pack_as_well",),
    ),
    Fault(
        "deferred embeddings are not computed if the batch stays padded",
        file="fastbert/layers/encoder.py",
        before="hidden_states = hidden_states if embed is None else embed(None)",
        after="pass",
        tests=(f"{PACKED_MODEL}::test_requested_hidden_states_are_padded",),
    ),
)
