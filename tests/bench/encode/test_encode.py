"""`python -m bench encode`: its texts, its lanes and their check in dry runs, its records and its table."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import modeling_flash_attention_utils as utils

import fastbert
from bench.core import schema
from bench.core.pretended import pretended
from bench.core.records import EncodeRecord, Spread
from bench.encode import cases, encoders, flash, run, texts
from bench.encode.cases import BY_NAME, BY_TOKENS, FASTBERT, FLATTENED, LANES, STOCK
from bench.models import gate, workloads
from bench.models.workloads import GRAPHED
from bench.report import tables
from tests.bench.models.test_graph_lanes import replaying

pytest.importorskip("sentence_transformers.sentence_transformer.modules", reason="needs sentence-transformers 6")
SAMPLE = Path(__file__).parents[1] / "data/invented.json"
CASE, QUERIES = (cases.tiny(case) for case in cases.cases(batches=(32,)))
DRY = pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")


def found(case, *lanes):
    return {record.lane: (record.status, record.reason) for record in run.run([case], lanes)}


@pytest.mark.parametrize("roberta", [False, True])
def test_a_text_has_the_tokens_that_were_asked_for(roberta):
    tokenizer = texts.tokenizer(32, roberta)
    lengths = [3, 4, 5, 9, 17, 32, 31]
    encoded = tokenizer(texts.texts(lengths, 0))
    assert [len(ids) for ids in encoded["input_ids"]] == lengths
    flat = [i for ids in encoded["input_ids"] for i in ids]
    assert tokenizer.unk_token_id not in flat and max(flat) == texts.VOCABULARY - 1 and ("token_type_ids" in encoded) != roberta
    assert {ids[0] for ids in encoded["input_ids"]} == {tokenizer.cls_token_id}
    assert tokenizer.pad_token_id == int(roberta)
    assert texts.texts(lengths, 0) == texts.texts(lengths, 0) != texts.texts(lengths, 1)


def test_a_text_without_a_word_is_refused():
    with pytest.raises(ValueError, match="expected 3 tokens or more, got 2"):
        texts.texts([5, 2], 0)


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([], 4, []),
        ([1, 2, 1, 4, 1], 4, [3, 1, 1]),
        ([9, 1, 9], 4, [1, 1, 1]),
        ([2, 2, 2, 2], 4, [2, 2]),
        ([2, 2, 2], 100, [3]),
    ],
)
def test_groups_hold_as_much_as_the_budget(lengths, budget, expected):
    parts = list(encoders.groups(lengths, budget))
    assert [part.stop - part.start for part in parts] == expected
    assert [length for part in parts for length in lengths[part]] == lengths


def test_lanes_are_those_that_suit():
    (base,) = cases.cases(batches=(64,), queries=False)
    assert cases.lanes_of(base) == tuple(LANES) and BY_TOKENS not in cases.lanes_of(dataclasses.replace(base, sentences=1))
    single = cases.lanes_of(dataclasses.replace(base, precision="fp32"))
    assert {FLATTENED, workloads.FLATTENED_FLASH} == set(LANES) - set(single)
    assert base.lengths(1024) == sorted(base.lengths(1024)) and max(base.lengths(1024)) <= 512
    assert sum(base.lengths(1024)) / 1024 == pytest.approx(64, abs=0.5)


def test_sorted_batches_have_little_padding_while_they_are_small():
    """The figures of bench/LOG.md."""
    sizes = list(cases.cases(queries=False))
    assert [case.positions_per_token() for case in sizes] == pytest.approx([1.16, 1.35, 2.60], abs=0.005)
    assert [case.positions_per_token(by_length=False) for case in sizes] == pytest.approx([4.15, 4.84, 6.80], abs=0.005)
    (full,) = cases.cases(batches=(1024,), queries=False)
    assert full.positions_per_token() == 512 * 1024 / sum(full.lengths(1024))


def test_sizes_are_those_of_the_models_in_use():
    base, mini, xlm = (encoders.config(name) for name in ("BERT-base", "MiniLM", "XLM-R base"))
    assert (base.hidden_size, base.num_hidden_layers, base.intermediate_size, base.vocab_size) == (768, 12, 3072, 30522)
    assert (mini.hidden_size, mini.num_hidden_layers, mini.num_attention_heads) == (384, 6, 12)
    assert (xlm.model_type, xlm.vocab_size, xlm.pad_token_id, xlm.max_position_embeddings) == ("xlm-roberta", 250002, 1, 514)
    assert min(base.vocab_size, xlm.vocab_size) >= texts.VOCABULARY


@DRY
class TestLanes:
    @pytest.mark.parametrize("pooling", cases.POOLINGS)
    def test_every_lane_of_many_texts(self, pooling):
        case = dataclasses.replace(CASE, pooling=pooling)
        lanes = (STOCK, FLATTENED, FASTBERT, BY_TOKENS) if pooling == "mean" else (FASTBERT,)
        assert found(case, *lanes) == dict.fromkeys(lanes, ("dry-run", None))

    def test_single_queries(self):
        records = found(QUERIES, FLATTENED, GRAPHED, BY_TOKENS)
        assert list(records) == [FLATTENED, GRAPHED] and records[FLATTENED] == ("dry-run", None)
        status, reason = records[GRAPHED]
        assert status == "dry-run" and reason.startswith("padded: ") and "graphs" in reason

    def test_a_lane_that_runs_padded_says_so(self, monkeypatch):
        patch = fastbert.patch
        monkeypatch.setattr(fastbert, "patch", lambda model: patch(model, unpad=False))
        ((status, reason),) = found(CASE, FASTBERT).values()
        assert status == "dry-run" and reason == "padded: unpad=False"

    def test_our_attention_by_name_flattens(self, monkeypatch):
        assert found(CASE, BY_NAME) == {BY_NAME: ("dry-run", None)}
        assert encoders.make(CASE, LANES[BY_NAME], "cpu")[0].can_flatten_inputs and LANES[BY_NAME].ours

    def test_xlm_roberta(self):
        (case,) = cases.cases(("XLM-R base",), batches=(4,), queries=False)
        lanes = (STOCK, FLATTENED, BY_TOKENS)
        assert found(cases.tiny(case), *lanes) == dict.fromkeys(lanes, ("dry-run", None))

    def test_a_model_that_is_not_patched_is_absent(self, monkeypatch):
        def refuse(model):
            raise fastbert.UnsupportedModelError("nothing to patch")

        monkeypatch.setattr(fastbert, "patch", refuse)
        assert found(CASE, FASTBERT) == {FASTBERT: ("absent", "fastbert: nothing to patch")}

    def test_a_library_that_is_missing_is_named(self):
        (record,) = run.run([CASE], [workloads.PACKED_ENCODERS])
        assert record.status == "absent" and "packed-encoders" in record.reason

    def test_batches_by_tokens_keep_to_the_budget_and_the_order(self, monkeypatch):
        model = encoders.make(CASE, LANES[STOCK], "cpu")
        chosen = texts.texts([9, 3, 20, 4, 12, 3], 0)
        expected = model.encode(chosen, convert_to_tensor=True)
        seen = []
        model.register_forward_pre_hook(lambda module, arguments: seen.append(int(arguments[0]["attention_mask"].sum())))
        torch.testing.assert_close(
            encoders.by_tokens(model, chosen, 24), expected, rtol=0.0, atol=1e-6
        )  # of length 1: roundings
        assert seen == [12, 24, 15]

    def test_a_batch_by_tokens_is_what_the_tokenizer_makes(self):
        model = encoders.make(CASE, LANES[STOCK], "cpu")
        rows = encoders.tokenized(model, texts.texts([9, 3, 20], 0))
        expected = model.tokenizer.pad(rows, return_tensors="pt")
        found = encoders.padded(model, rows)
        assert found.keys() == expected.keys() and len(found) == 3
        assert all(torch.equal(found[name], expected[name]) for name in found)

    def test_a_wrong_embedding_fails(self, monkeypatch):
        made = encoders.encoder
        wrong = lambda model, case, lane: lambda call: made(model, case, lane)(call) * (1.0 if lane is cases.EAGER else 1.001)  # noqa: E731
        monkeypatch.setattr(encoders, "encoder", wrong)
        ((status, reason),) = found(CASE, STOCK).values()
        assert status == "failed" and "differ from eager: embeddings: error" in reason

    def test_embeddings_in_another_order_fail(self, monkeypatch):
        made = encoders.by_tokens
        monkeypatch.setattr(encoders, "by_tokens", lambda *arguments: made(*arguments).flip(0))
        assert found(CASE, BY_TOKENS)[BY_TOKENS][0] == "failed"

    def test_stock_under_our_name_fails(self, monkeypatch):
        monkeypatch.setattr(fastbert, "patch", lambda model: model)
        assert found(CASE, FASTBERT) == {FASTBERT: ("failed", gate.NO_KERNEL)}

    def test_a_graph_that_answers_a_former_query_fails(self, monkeypatch):
        answers = []

        def former(call, output):
            answers.append(output)
            return answers[max(len(answers) - 2, 0)]

        def graphed(model):
            model[0].model.__dict__["forward"] = replaying(model[0].model, former).forward
            return model

        monkeypatch.setattr(fastbert, "graphed", graphed)
        ((status, reason),) = found(dataclasses.replace(QUERIES, fill=1.0), GRAPHED).values()
        assert status == "failed" and "differ from eager" in reason

    def test_a_graph_that_is_not_replayed_fails(self, monkeypatch):
        monkeypatch.setattr(fastbert, "graphed", lambda model: model)
        ((status, reason),) = found(QUERIES, GRAPHED).values()
        assert status == "failed" and gate.NOT_REPLAYED in reason


@DRY
class TestFlattened:
    def test_sequences_that_see_each_other_fail(self, monkeypatch):
        attend, calls = flash.flash_attn_varlen_func, []

        def whole(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **others):
            calls.append(q.shape[0])
            return attend(q, k, v, cu_seqlens_q[[0, -1]], cu_seqlens_k[[0, -1]], max_seqlen_q, max_seqlen_k, **others)

        monkeypatch.setattr(flash, "flash_attn_varlen_func", whole)
        ((status, _),) = found(CASE, FLATTENED).values()
        assert status == "failed"
        tokens = sum(CASE.lengths(CASE.sentences))
        assert sum(calls) % tokens == 0, "real tokens only: sentence-transformers flattened"

    def test_the_name_is_there_within_the_block_only(self):
        with flash.available():
            model = encoders.make(CASE, LANES[FLATTENED], "cpu")
            assert model[0].can_flatten_inputs
            assert "cu_seq_lens_q" in model.preprocess(texts.texts([5, 7], 0))
        assert utils._lazy_imports.__module__ == utils.__name__

    def test_other_names_are_found_as_before(self, monkeypatch):
        asked = []
        monkeypatch.setattr(utils, "_lazy_imports", lambda name, *others, **more: asked.append(name))
        with flash.available():
            utils._lazy_imports("flash_attention_2")
        assert asked == ["flash_attention_2"]


@pytest.mark.gpu
@pytest.mark.skipif(pretended() is not None, reason="a pretended GPU computes no embeddings")
def test_on_a_gpu():
    """Sixteen texts and MiniLM in bf16: every lane passes its check and has a time, and a patched model packs."""
    (case,) = cases.cases(("MiniLM",), batches=(8,), sentences=16, queries=False)
    lanes = (STOCK, FLATTENED, FASTBERT, BY_TOKENS, BY_NAME)
    records = list(run.run([case], lanes, seconds=0.1))
    assert {r.lane: (r.status, r.reason) for r in records} == dict.fromkeys(lanes, ("ok", None))
    assert all(r.seconds.low > 0 and r.peak_bytes > 40e6 and r.first_pass_seconds > 0 for r in records)


def record(lane=STOCK, seconds=0.5, sentences=1024, p99=0.6, **others):
    spread = Spread(seconds * 0.9, seconds, seconds * 1.1, 30)
    case = {"model": "BERT-base", "pooling": "mean", "precision": "bf16", "batch": 32, "sentences": sentences, "longest": 512}
    return EncodeRecord(
        lane,
        "ok",
        others.get("reason"),
        spread,
        [],
        1 << 30,
        **case,
        real_tokens=64.0 * sentences,
        p99=p99,
        first_pass_seconds=2.0,
    )


def test_table():
    missing = dataclasses.replace(record(FLATTENED), status="absent", reason="not here", seconds=None, p99=None)
    records = [record(), record(FASTBERT, 0.25, reason="ran padded"), missing, record(sentences=1, seconds=2e-3)]
    rows = tables.encode(dataclasses.replace(schema.read(SAMPLE), encode=records)).markdown().splitlines()[2:]
    case = "BERT-base, mean pooling, bf16, 1024 texts up to 512 tokens, batches of 32"
    assert rows == [
        f"| {case} | stock | 500 ms [450, 550] | 600 ms | 2,048 | 131,072 | 1.00 GiB | 2.00 s |  |  |",
        f"| {case} | fastbert | 250 ms [225, 275] | 600 ms | 4,096 | 262,144 | 1.00 GiB | 2.00 s | 2.00x | ran padded |",
        f"| {case} | flattened | not measured: not here |  |  |  |  |  |  |  |",
        "| BERT-base, mean pooling, bf16, single queries up to 512 tokens | stock | 2 ms [1.8, 2.2] | 600 ms | 500 | 32,000 | "
        "1.00 GiB | 2.00 s |  |  |",
    ]


def test_written_and_read_again(tmp_path):
    results = dataclasses.replace(schema.read(SAMPLE), encode=[record()])
    schema.write(results, tmp_path / "results.json")
    assert schema.read(tmp_path / "results.json") == results
    for wrong in (record(p99=0.1), record(p99=None)):
        with pytest.raises(ValueError, match="p99"):
            schema.add(results, [wrong])
