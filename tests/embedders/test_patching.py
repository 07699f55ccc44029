"""Patching a SentenceTransformer and back: classes, copies, pickles, saved folders, other processes, report, torch.compile."""

import copy
import io
import json
import pickle
import subprocess
import sys

import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn

import fastbert
from fastbert import forwards
from fastbert.dispatch import FastModule
from fastbert.integrations import sentence_transformers as integration
from fastbert.testing.graphs import recording_graphs
from tests.embedders.tiny import TEXTS, assert_packs, close, embed, features_of, make, row_of
from tests.models.test_patch import classes


def embeddings(model):
    return model.encode(TEXTS, convert_to_tensor=True)


def test_patch_and_unpatch(folder):
    model = make(folder)
    before, expected = classes(model), embeddings(model)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    for _ in range(2):
        fastbert.patch(model)
        assert isinstance(model[0], FastModule) and isinstance(model[1], FastModule)
        torch.testing.assert_close(embeddings(model), expected)
        assert_packs(model)
        assert fastbert.unpatch(model) is model and classes(model) == before
        assert torch.equal(embeddings(model), expected)
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


def test_classes_have_stocks_names(folder):
    model = fastbert.patch(make(folder))
    for fast, stock in ((model[0], Transformer), (model[1], Pooling)):
        cls = type(fast)
        assert issubclass(cls, stock) and isinstance(fast, stock) and cls is not stock
        assert (cls.__module__, cls.__qualname__) == (stock.__module__, stock.__qualname__)


def test_within_a_block(folder):
    model = make(folder)
    with fastbert.patched(model):
        embeddings(model)
        assert_packs(model)
    assert not isinstance(model[0], FastModule)
    fastbert.patch(model)
    with fastbert.patched(model, unpad=False):
        assert not isinstance(model[0], FastModule)
    embeddings(model)
    assert_packs(model)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("way", COPIES)
def test_copies(folder, way):
    model = fastbert.patch(make(folder))
    expected = embeddings(model)
    copied = COPIES[way](model)
    assert classes(copied) == classes(model) and copied[1] is not model[1]
    assert vars(copied[0])["_fastbert_pooling"].pooling is copied[1]
    model[1].pooling_mode = "cls"  # which the copy must not see
    assert torch.equal(embeddings(copied), expected)
    assert_packs(copied)
    fastbert.unpatch(copied)
    assert type(copied[0]) is Transformer and type(copied[1]) is Pooling
    one = COPIES[way](model[1])
    assert type(one) is type(model[1]) and one.pooling_mode == "cls"


def test_a_saved_folder_is_stocks(folder, tmp_path):
    stock, model = make(folder), fastbert.patch(make(folder))
    stock.save_pretrained(str(tmp_path / "stock"))
    model.save_pretrained(str(tmp_path / "patched"))
    for name in ("modules.json", "config.json", "1_Pooling/config.json", "sentence_bert_config.json"):
        assert (tmp_path / "patched" / name).read_text() == (tmp_path / "stock" / name).read_text(), name
    loaded = SentenceTransformer(str(tmp_path / "patched"), device="cpu")
    assert classes(loaded) == classes(stock) and torch.equal(embeddings(loaded), embeddings(stock))
    refs = [module["type"] for module in json.loads((tmp_path / "patched/modules.json").read_text())]
    assert all(ref.startswith("sentence_transformers.") for ref in refs)


def test_other_processes(folder):
    """They get the model pickled, and their embeddings in turn."""
    model = make(folder)
    texts = TEXTS * 4
    expected = model.encode(texts)
    fastbert.patch(model)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        result = model.encode(texts, pool=pool, chunk_size=6)
    finally:
        model.stop_multi_process_pool(pool)
    torch.testing.assert_close(torch.from_numpy(result), torch.from_numpy(expected))


def test_report(folder):
    model = fastbert.patch(make(folder))
    row = row_of(model)
    assert (row.module, row.kernel, row.state, row.reason) == ("1", "pool_rows", "active", "not called yet")
    embeddings(model)
    text = str(fastbert.report(model))
    assert "Pooling" in text and "pool_rows" in text and not [r for r in fastbert.report(model).rows if r.module == "0"]


def test_the_library_is_not_imported():
    code = (
        "import sys, torch, fastbert; from transformers import BertConfig, BertModel;"
        "model = fastbert.patch(BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,"
        "intermediate_size=8, vocab_size=9))); fastbert.report(model); fastbert.unpatch(model);"
        "sys.exit('sentence_transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_table_has_all_of_the_installed_release():
    pairs = [pair for code in integration.CODE.values() for pair in code.pairs]
    assert {forwards.reason(*pair) for pair in pairs} == {None}
    assert sorted(forwards.table("sentence_transformers")) == sorted(forwards.label(*pair) for pair in pairs)


def routed(folder):
    routes = {"query": [*make(folder, "cls")], "document": [*make(folder, "mean")]}
    return SentenceTransformer(modules=[Router(routes, default_route="document")], device="cpu").eval()


def test_routes(folder):
    """Each route's Transformer is told of its own pooling."""
    stock, model = routed(folder), fastbert.patch(routed(folder))
    for encode in ("encode_query", "encode_document", "encode"):
        expected, result = (getattr(m, encode)(TEXTS, convert_to_tensor=True) for m in (stock, model))
        torch.testing.assert_close(result, expected)
    rows = [row for row in fastbert.report(model).rows if row.hf_class in ("Pooling", "BertEncoder")]
    assert [row.kernel_calls for row in rows] == [1, 1, 2, 2] and not any(row.fallback_calls for row in rows)


def test_data_parallel_replicas_count_as_the_model(folder):
    model = fastbert.patch(make(folder))
    replica = model[1]._replicate_for_data_parallel()
    replica(model[0](features_of(model)))
    assert_packs(model)


def test_compiled(folder):
    stock, model = make(folder), fastbert.patch(make(folder))
    expected = embed(stock, features_of(stock))
    model.compile(backend="aot_eager")
    result = embed(model, features_of(model))
    assert result.keys() == expected.keys()
    close(result["output"], expected["output"])
    assert row_of(model).kernel_calls == 0


@pytest.mark.parametrize("place", [0, 1])
def test_one_module_compiled(folder, place):
    stock, model = make(folder), fastbert.patch(make(folder))
    expected = embed(stock, features_of(stock), False)["output"]
    model[place].compile(backend="eager")
    for _ in range(2):
        close(embed(model, features_of(model), False)["output"], expected)


def test_a_compiled_pooling_in_its_place(folder):
    stock, model = make(folder), make(folder)
    model[1] = torch.compile(model[1], backend="eager")
    fastbert.patch(model)
    results = [embed(m, features_of(m), False)["output"] for m in (model, stock)]
    close(*results)


def test_graphs_keep_it_padded(folder):
    stock, model = make(folder), fastbert.patch(make(folder), cuda_graphs=True)
    with recording_graphs():
        for _ in range(2):
            torch.testing.assert_close(*(embed(m, features_of(m), False)["output"] for m in (model, stock)))
    assert list(row_of(model).fallback_calls) == ["CUDA graphs"]


def test_nothing_but_exact_types(folder):
    class Mine(Transformer):
        pass

    model = make(folder)
    model[0].__class__ = Mine
    expected = embeddings(model)
    fastbert.patch(model)
    assert type(model[0]) is Mine and type(model[1]) is Pooling
    torch.testing.assert_close(embeddings(model), expected)
    assert isinstance(model[0], nn.Module)
