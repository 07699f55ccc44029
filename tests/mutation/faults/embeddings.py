"""embedding_layernorm: three rows named by ids, and the sums over tokens that are the tables' gradients."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/kernels/test_embedding_layernorm.py"
MODEL = "tests/models/test_embeddings.py"

_op = partial(Fault, file="kernels/embedding_layernorm.py", op="embedding_layernorm")
_rows = partial(Fault, file="kernels/embedding_rows.py", op="embedding_layernorm")
_sums = partial(Fault, file="kernels/embedding_gradients.py", op="embedding_layernorm")

FAULTS = (
    _sums(
        "partial sums of a word that many tokens are, are never added up",
        before="max(n_pieces - 1, 0) * col_blocks,",
        after="0,",
        tests=(f"{TESTS}::test_runs_longer_than_a_piece",),
        short=True,
    ),
    _sums(
        "the padding row has a gradient",
        before='"skip": -1 if skip is None else skip,',
        after='"skip": -1,',
        tests=(f"{MODEL}::test_the_padding_row_has_no_gradient",),
        short=True,
    ),
    _sums(
        "of tokens with one id only the first has a gradient",
        before="taken = steps < length[:, None]",
        after="taken = steps < tl.minimum(length, 1)[:, None]",
        tests=(f"{TESTS}::test_shapes",),
    ),
    _sums(
        "of the partial sums of a run sixteen are added up at most",
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
        before="named_rows(type_ids_ptr, batch * type_batch_stride + place, token_mask, n_types)",
        after="named_rows(type_ids_ptr, place, token_mask, n_types)",
        tests=(TESTS, "-k", "test_every_way_to_name_rows and float32"),
    ),
    _rows(
        "the backward drops by another seed than the forward",
        before="dy = dropout(dy, keep_mask(tl.load(seed_ptr), rows, cols, P_DROP), P_DROP)",
        after="dy = dropout(dy, keep_mask(tl.load(seed_ptr) + 1, rows, cols, P_DROP), P_DROP)",
        tests=(f"{TESTS}::test_dropout",),
    ),
    _op(
        "the gradient of positions starts at row 0",
        before="dpositions[offset : offset + seqlen] = by_position",
        after="dpositions[:seqlen] = by_position",
        tests=(f"{TESTS}::test_offset",),
    ),
    _op(
        "types are read by the stride of the positions",
        before='"type_batch_stride": _batch_stride(token_type_ids, batch)',
        after='"type_batch_stride": _batch_stride(position_ids, batch)',
        tests=(TESTS, "-k", "test_every_way_to_name_rows and float32"),
    ),
    _op(
        "the id after a table's last row is accepted",
        before="high >= table.shape[0]",
        after="high > table.shape[0]",
        tests=(f"{TESTS}::test_an_id_outside_of_its_table",),
    ),
)
