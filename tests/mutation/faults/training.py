"""`bench train` on several ranks: the parts of batches, the weights of losses, the evaluation, what is recorded."""

from functools import partial

from tests.mutation.fault import Fault

HERE = "tests/bench/train"
BATCHES, WEIGHTS, TALLY = f"{HERE}/test_sharding.py", f"{HERE}/test_weighting.py", f"{HERE}/test_tally.py"
MEAN = f"{WEIGHTS}::test_the_mean_over_ranks_is_the_loss_of_all_rows"

_sharding = partial(Fault, file="bench/train/sharding.py")
_weighting = partial(Fault, file="bench/train/weighting.py")

FAULTS = (
    _sharding(
        "rows are dealt to ranks by their number",
        before="(tokens + lengths[place], count + 1, rank)",
        after="(tokens + 1, count + 1, rank)",
        tests=(f"{BATCHES}::test_tokens_are_dealt_evenly",),
    ),
    _sharding(
        "rows with spans are padded to the longest of their rank",
        before="yield [(batch[place], longest) for place in deal(lengths, self.ranks)[self.rank]]",
        after="own = deal(lengths, self.ranks)[self.rank]; yield [(batch[i], max(lengths[j] for j in own)) for i in own]",
        tests=("tests/bench/train/test_tasks.py::test_rows_with_spans_are_padded_alike_on_every_rank",),
    ),
    _sharding(
        "every epoch has the same batches",
        before='crc32(f"{seed} {epoch}".encode())',
        after='crc32(f"{seed}".encode())',
        tests=(f"{BATCHES}::test_the_order_is_of_seed_and_epoch",),
    ),
    _sharding(
        "the last batch of an epoch is what is left",
        before="order.tensor_split(-(-rows // batch))",
        after="order.split(batch)",
        tests=(f"{BATCHES}::test_an_epoch_has_every_row_once_in_batches_of_equal_size",),
    ),
    _weighting(
        "each rank's loss counts as much",
        before="share = (count * ranks / total).to(mean.dtype)",
        after="share = torch.ones_like(mean)",
        tests=(MEAN,),
    ),
    _weighting(
        "the weight of clm counts the label of the first token",
        before='[_labelled(batch["labels"][:, 1:])]',
        after='[_labelled(batch["labels"])]',
        tests=(MEAN,),
    ),
    _weighting(
        "a rank without labels makes the loss NaN",
        before="torch.where(count > 0, mean * share, 0.0 / total)",
        after="mean * share",
        tests=(MEAN,),
    ),
    _weighting(
        "answers outside the sequence are counted",
        before="ignore_index=_length(batch)) / 2",
        after="ignore_index=-1) / 2",
        tests=(MEAN,),
    ),
    Fault(
        "the loss of an evaluation is a mean over rows, whatever they count",
        "bench/train/evaluation.py",
        before="for total, count in sums.sum(0).tolist())",
        after="for total, count in [(own, 1) for own in (sums[..., 0] / sums[..., 1].clip(1)).mean(0)])",
        tests=(f"{HERE}/test_evaluation.py",),
    ),
    Fault(
        "the checksum of a batch is of its padding too",
        "bench/train/batches.py",
        before="value[start:end][mask[start:end]] if of_tokens",
        after="value[start:end] if of_tokens",
        tests=(f"{TALLY}::test_a_checksum_is_of_the_rows_whatever_batch_they_are_in",),
    ),
    Fault(
        "all ranks draw the same dropout",
        "bench/train/lanes.py",
        before="if ranks.rank():  # Trainer",
        after="if False:  # Trainer",
        tests=(f"{TALLY}::test_each_rank_draws_dropout_of_its_own",),
    ),
    Fault(
        "other ranks train on when one has failed",
        "bench/train/ranks.py",
        before="said = next((other for other in gathered(said) if other is not None), None)",
        after="gathered(said)",
        tests=(f"{HERE}/test_ranks.py::test_a_fault_of_any_rank_is_one_line_and_ends_all",),
    ),
)
