"""Pre-training text that is streamed: who reads what, rows, masks, batches, and where a run goes on."""

from functools import partial

from tests.mutation.fault import Fault

TESTS = "tests/bench/stream"
MASKING, DOCUMENTS, SEQUENCES, LOADER = (f"{TESTS}/test_{name}.py" for name in ("masking", "documents", "sequences", "loader"))
TRAINING = "tests/bench/train/test_stream.py"
RESUMED = f"{TRAINING}::test_an_interrupted_run_goes_on_with_the_next_batch"

_masking, _documents, _sequences, _tokens, _reader, _loader = (
    partial(Fault, file=f"bench/stream/{name}.py")
    for name in ("masking", "documents", "sequences", "tokens", "reader", "loader")
)

FAULTS = (
    _masking(
        "special tokens are predicted",
        before="< MASKED)[word] & ~special",
        after="< MASKED)[word]",
        tests=(f"{MASKING}::test_15_percent_of_80_10_10_and_no_special_token",),
    ),
    _masking(
        "all rows have the masks of one draw",
        before="numpy.random.PCG64(draw)",
        after="numpy.random.PCG64(0)",
        tests=(f"{MASKING}::test_a_rows_masks_are_its_own",),
    ),
    _masking(
        "a short row may have no label",
        before="if not len(places):",
        after="if False:",
        tests=(f"{MASKING}::test_a_short_row_has_a_label_and_one_without_text_has_none",),
    ),
    _documents(
        "a reader gets one piece of an epoch",
        before="order[reader::readers]",
        after="order[reader : reader + 1]",
        tests=(f"{DOCUMENTS}::test_in_an_epoch_every_document_has_one_reader",),
    ),
    _documents(
        "a shared shard is divided by lines",
        before="documents += not goes_on",
        after="documents += 1",
        tests=(f"{DOCUMENTS}::test_in_an_epoch_every_document_has_one_reader",),
    ),
    _documents(
        "a reader forgets that it is inside a document",
        before="documents=documents, inside=inside)",
        after="documents=documents, inside=False)",
        tests=(f"{DOCUMENTS}::test_a_block_ends_with_a_document_unless_that_is_long",),
    ),
    _sequences(
        "a row may begin with a separator",
        before="if first == last and with_separator:",
        after="if False:",
        tests=(f"{SEQUENCES}::test_filling_rows_of_8",),
    ),
    _sequences(
        "one of two rows keeps its B and is labelled as if it did not",
        before="((found[j][0], found[i][1]), True)",
        after="((found[j][0], found[j][1]), True)",
        tests=(f"{SEQUENCES}::test_pairs_are_half_neighbours_and_no_token_is_read_twice",),
    ),
    _sequences(
        "a random B may be of the same document",
        before="if waiting and owners[waiting[-1]] != owners[i]:",
        after="if waiting:",
        tests=(f"{SEQUENCES}::test_pairs_are_half_neighbours_and_no_token_is_read_twice",),
    ),
    _sequences(
        "a segment is cut at its end alone",
        before="front = int(drawn.binomial(count, 0.5))",
        after="front = 0",
        tests=(f"{SEQUENCES}::test_the_longer_segment_is_cut_at_both_ends",),
    ),
    _tokens(
        "a name of a special token in the text is that token",
        before="self.tokenizer.encode_special_tokens = True",
        after="self.tokenizer.encode_special_tokens = False",
        tests=(f"{SEQUENCES}::test_special_tokens_in_the_text_are_text_in_every_process",),
    ),
    _reader(
        "what a reader gave beyond its budget is forgotten",
        before="beyond = self.state.beyond - self.stream.budget",
        after="beyond = -self.stream.budget",
        tests=(f"{LOADER}::test_every_reader_gives_the_same_number_of_tokens",),
    ),
    _reader(
        "a resumed block begins at its first row",
        before="row = self._rows[self.state.taken]",
        after="row = self._rows[self.numbers['rows'] % len(self._rows)]",
        tests=(f"{LOADER}::test_resumed_behind_any_batch",),
    ),
    _loader(
        "an iteration begins where the loader did",
        before="number, states = self._states[-1]",
        after="number, states = self._states[0]",
        tests=(f"{LOADER}::test_batches_made_ahead_are_not_lost",),
    ),
    _loader(
        "rows stand in the order of the workers",
        before="key=lambda share: share.reader)",
        after="key=lambda share: 0)",
        tests=(f"{LOADER}::test_ranks_and_workers_change_nothing",),
    ),
    _loader(
        "a loader draws from dropout's generator",
        before=', "generator": torch.Generator()}',
        after="}",
        tests=(f"{LOADER}::test_dropout_goes_on_from_where_it_was",),
    ),
    Fault(
        "a resumed Trainer skips batches of a stream that has skipped them",
        file="bench/train/model.py",
        before="ignore_data_skip=settings.stream,",
        after="ignore_data_skip=False,",
        tests=(RESUMED,),
    ),
    Fault(
        "a checkpoint has the place of a batch per step, whatever the accumulation",
        file="bench/train/lanes.py",
        before="self.state.global_step * self.args.gradient_accumulation_steps)",
        after="self.state.global_step)",
        tests=(RESUMED,),
    ),
)
