"""Arguments of a forward: hidden states, attentions, tuples, embeddings, positions, chunks."""

import pytest
import torch

import fastbert
from fastbert.testing.models import check, expected_launches
from tests.models.tiny import BASE, CLM, HEADS, LENGTH, MLM, ROWS, make, make_batch


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_hidden_states(attention):
    results = check(make(attention=attention), make_batch() | {"output_hidden_states": True})
    assert {f"hidden_states[{i}]" for i in range(3)} <= results.keys()


def test_attentions():
    # transformers captures them at BertSelfAttention, by a hook on its call.
    model = make()
    # The kernel keeps no weights, so attention falls back to eager if they are requested.
    expected = expected_launches(model, without=["attention"])
    results = check(model, make_batch() | {"output_attentions": True, "output_hidden_states": True}, expected=expected)
    assert results["attentions[1]"].shape == (ROWS, HEADS, LENGTH, LENGTH)


def test_hidden_states_requested_in_the_config():
    results = check(make(output_hidden_states=True), make_batch())
    assert "hidden_states[2]" in results


def test_last_hidden_state_is_the_last_of_the_hidden_states():
    model = fastbert.patch(make(BASE))
    outputs = model(**make_batch(BASE), output_hidden_states=True)
    assert torch.equal(outputs.last_hidden_state, outputs.hidden_states[-1])


@pytest.mark.parametrize("kind", [BASE, MLM], ids=str)
def test_tuple(kind):
    model, batch = make(kind), make_batch(kind) | {"return_dict": False}
    results = check(model, batch)
    assert "[0]" in results
    assert type(fastbert.patch(model)(**batch)) is tuple


def test_output_is_of_the_same_class_with_the_same_keys():
    model, batch = make(), make_batch()
    stock = model(**batch)
    patched = fastbert.patch(model)(**batch)
    assert type(patched) is type(stock) and list(patched) == list(stock)


def test_embeddings_as_input_and_their_gradient():
    model, batch = make(), make_batch()
    embeddings = model.get_input_embeddings()(batch.pop("input_ids")).detach() + 0.5
    results = check(model, batch | {"inputs_embeds": embeddings.requires_grad_()})
    assert results["gradient of inputs_embeds"].abs().max() > 0


def test_embeddings_that_are_a_view():
    # Transposed in memory: the modules after the embeddings get unusual strides.
    model, batch = make(), make_batch()
    ids = batch.pop("input_ids")
    embeddings = model.get_input_embeddings()(ids.T).detach().transpose(0, 1)
    assert not embeddings.is_contiguous()
    check(model, batch | {"inputs_embeds": embeddings})


def test_positions():
    positions = torch.arange(LENGTH).flip(0).expand(ROWS, -1) + 3
    check(make(), make_batch() | {"position_ids": positions.to(make().device)})


def test_segments_left_out():
    batch = make_batch()
    del batch["token_type_ids"]
    check(make(), batch)


def test_only_token_ids():
    check(make(BASE), {"input_ids": make_batch()["input_ids"]})


def test_feed_forward_in_chunks():
    # Chunks along the sequence are views with gaps: three calls of each feed-forward kernel per layer.
    model = make(chunk_size_feed_forward=3)
    layers = model.config.num_hidden_layers
    expected = expected_launches(model)
    for way in ("fwd", "bwd"):
        expected[f"bias_gelu_{way}_kernel"] = 3 * layers
        expected[f"dropout_add_layernorm_{way}_kernel"] = (1 + 3) * layers
    check(model, make_batch(), expected=expected)


@pytest.mark.parametrize("kind", [CLM], ids=str)
@pytest.mark.parametrize("keep", [1, 4])
def test_logits_of_the_last_positions(kind, keep):
    # A slice of the hidden states reaches the head: rows that are not contiguous.
    results = check(make(kind), make_batch(kind, labels=False) | {"logits_to_keep": keep, "use_cache": False})
    assert results["logits"].shape[1] == keep
