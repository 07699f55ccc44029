"""What the benchmark says of encode: its texts, its batches, its checks and the parts of its time."""

from functools import partial

from tests.mutation.fault import Fault

ENCODE = "tests/bench/encode/test_encode.py"
LANES = f"{ENCODE}::TestLanes"

_encoders = partial(Fault, file="bench/encode/encoders.py")
_run = partial(Fault, file="bench/encode/run.py")

FAULTS = (
    _encoders(
        "a batch by tokens takes one text too many",
        before="if i > start and total + length > budget:",
        after="if i > start and total > budget:",
        tests=(f"{ENCODE}::test_groups_hold_as_much_as_the_budget",),
    ),
    _encoders(
        "a batch by tokens has its tokens in the order of columns",
        before="padding.masked_scatter(real, torch.tensor(list(chain.from_iterable(values))))",
        after="padding.t().masked_scatter(real.t(), torch.tensor(list(chain.from_iterable(values)))).t()",
        tests=(f"{LANES}::test_a_batch_by_tokens_is_what_the_tokenizer_makes",),
    ),
    _run(
        "a lane of graphs has a time without a replay",
        before="if lane.model.graphed and replays.count == replayed:",
        after="if lane.model.graphed and replays.count < replayed:",
        tests=(f"{LANES}::test_a_graph_that_is_not_replayed_fails",),
    ),
    _run(
        "a lane of fastbert has a time without a kernel",
        before="if lane.ours and counts.total() == launched:",
        after="if lane.ours and counts.total() < launched:",
        tests=(f"{LANES}::test_stock_under_our_name_fails",),
    ),
    Fault(
        "an ending of a word counts as none of the text's tokens",
        file="bench/encode/texts.py",
        before="tokens -= 2 if ending else 1",
        after="tokens -= 1",
        tests=(f"{ENCODE}::test_a_text_has_the_tokens_that_were_asked_for",),
    ),
    Fault(
        "a part that is issued in pieces has the time of the last",
        file="bench/host/run.py",
        before="parts[part] = parts.get(part, 0.0) + now - last",
        after="parts[part] = now - last",
        tests=("tests/bench/host/test_host.py::test_a_part_in_pieces_has_the_time_of_all_of_them",),
    ),
)
