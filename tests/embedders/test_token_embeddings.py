"""Token embeddings that a packing encoder left packed: computed when something reads them, and right for every reader."""

import copy
import functools
import pickle

import numpy
import pytest
import torch
from torch import nn

import fastbert
from fastbert.graphs.training_state import hooks_on
from fastbert.integrations.lazy_tokens import LazyTokens
from fastbert.testing.models import assert_equal
from tests.embedders.tiny import TEXTS, WIDTH, assert_packs, check, close, close_in_half, embed, features_of, make, row_of

pytestmark = pytest.mark.one_in(2)

READ = "token embeddings were read"


def tokens_of(output):
    return output["token_embeddings"]


@pytest.mark.parametrize("unpad", ["auto", True])
@pytest.mark.parametrize("mode", ["mean", "cls", ("mean", "lasttoken")], ids=str)
def test_reading_them_gives_stocks_with_gradients(folder, mode, unpad):
    def read(output):
        return tokens_of(output) * output["attention_mask"].unsqueeze(-1) if unpad is True else tokens_of(output)

    model = make(folder, mode)
    patched = check(model, features_of(model), read=read, unpad=unpad)
    assert row_of(patched).kernel_calls == 1, "the sentence embeddings were pooled before"


@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_reading_them_beside_the_sentence_embedding(folder, mode):
    def read(output):
        return tokens_of(output).sum(1) + 3 * output["sentence_embedding"]

    model = make(folder, mode)
    check(model, features_of(model), read=read)


def test_the_tokens_have_the_dropout_of_the_sentence(folder):
    model = fastbert.patch(make(folder, dropout=0.5).train())
    torch.manual_seed(3)
    output = model(features_of(model))
    mask = output["attention_mask"].unsqueeze(-1)
    mean = (tokens_of(output) * mask).sum(1) / mask.sum(1)
    close(mean, output["sentence_embedding"])


def test_afterwards_the_model_stays_padded_until_it_is_patched_again(folder):
    model = fastbert.patch(make(folder))
    features = features_of(model)
    expected = embed(make(folder), features, False)["output"]
    output = model(dict(features))
    assert type(tokens_of(output)) is LazyTokens
    tokens_of(output)[0]
    output = model(dict(features))
    assert type(tokens_of(output)) is torch.Tensor
    torch.testing.assert_close(output["sentence_embedding"], expected)
    row = row_of(model)
    assert (row.kernel_calls, row.fallback_calls) == (1, {READ: 1}) and READ in row.reason
    fastbert.patch(model)
    assert type(tokens_of(model(dict(features)))) is LazyTokens


METADATA = {
    "shape": lambda x: x.shape,
    "size": lambda x: (x.size(), x.size(1), len(x), x.numel()),
    "ndim": lambda x: (x.ndim, x.dim()),
    "dtype": lambda x: (x.dtype, x.is_floating_point()),
    "device": lambda x: (x.device, x.is_cuda),
    "requires_grad": lambda x: x.requires_grad,
    "isinstance": lambda x: (isinstance(x, torch.Tensor), torch.is_tensor(x)),
}


@pytest.mark.parametrize("name", METADATA)
def test_metadata_computes_nothing(folder, name):
    stock, model = make(folder), fastbert.patch(make(folder))
    expected, output = stock(features_of(stock)), model(features_of(model))
    assert METADATA[name](tokens_of(output)) == METADATA[name](tokens_of(expected))
    assert type(tokens_of(model(features_of(model)))) is LazyTokens
    assert_packs(model, calls=2)


READERS = {
    "index": lambda x: x[1, 2],
    "iterate": lambda x: torch.stack([row[0] for row in x]),
    "arithmetic": lambda x: 2 * x - 1,
    "function": lambda x: torch.cat([x, x], 1),
    "layer": lambda x: nn.functional.layer_norm(x, (WIDTH,)),
    "numpy": lambda x: torch.from_numpy(x.detach().cpu().numpy()),
    "array": lambda x: torch.from_numpy(numpy.asarray(x.detach().cpu())),
    "list": lambda x: torch.tensor(x.tolist()),
    "move": lambda x: x.to("cpu", torch.float64),
    "clone": lambda x: x.clone(),
    "write": lambda x: x.detach().mul_(2),
    "deepcopy": lambda x: copy.deepcopy(x.detach()),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "float": lambda x: x.float() + 0,
    "half": lambda x: x.half(),
    "operator": lambda x: torch.ops.aten.mul.Tensor(x, 2),
    "collate": lambda x: torch.utils.data.default_collate([x, x]),
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", READERS)
def test_readers(folder, name):
    stock, model = make(folder, "cls"), fastbert.patch(make(folder, "cls"))
    with torch.inference_mode():
        expected, output = stock(features_of(stock)), model(features_of(model))
    assert type(tokens_of(output)) is LazyTokens
    result = READERS[name](tokens_of(output))
    (close_in_half if name == "half" else close)(result, READERS[name](tokens_of(expected)))


def test_what_is_written_to_them_is_read_back(folder):
    model = fastbert.patch(make(folder))
    with torch.no_grad():
        tokens = tokens_of(model(features_of(model)))
        tokens[:, 0] = 7.0
    assert (tokens[:, 0] == 7.0).all() and not (tokens[:, 1] == 7.0).any()


def test_a_copy_keeps_what_it_was_made_of(folder):
    model = fastbert.patch(make(folder))
    with torch.no_grad():
        tokens = tokens_of(model(features_of(model)))
        copied = tokens.clone()
        assert type(copied) is LazyTokens
        tokens[:, 0] = 7.0
    assert (tokens[:, 0] == 7.0).all() and not (copied[:, 0] == 7.0).any()
    torch.testing.assert_close(copied + 0, tokens_of(make(folder)(features_of(model))).detach())


def test_converted_outputs_are_still_lazy(folder):
    """accelerate makes every output of a model in lower precision float32."""
    from accelerate.utils import convert_outputs_to_fp32

    model = fastbert.patch(make(folder).half())
    stock = make(folder).half()
    output = convert_outputs_to_fp32(model.forward)(features_of(model))
    assert type(tokens_of(output)) is LazyTokens and tokens_of(output).dtype == torch.float32
    assert_packs(model)
    expected = convert_outputs_to_fp32(stock.forward)(features_of(stock))
    close_in_half(tokens_of(output).detach() + 0, tokens_of(expected).detach())


@pytest.mark.parametrize("output_value", ["token_embeddings", None])
def test_encode_returns_them(folder, output_value):
    stock, model = make(folder), fastbert.patch(make(folder))
    for result, expected in zip(*(m.encode(TEXTS, output_value=output_value) for m in (model, stock)), strict=True):
        if output_value is None:
            assert result.keys() == expected.keys()
            for name in ("token_embeddings", "sentence_embedding"):
                torch.testing.assert_close(result[name], expected[name])
        else:
            torch.testing.assert_close(result, expected)


def test_the_module_alone_gives_stocks(folder):
    stock, model = make(folder), fastbert.patch(make(folder))
    torch.testing.assert_close(tokens_of(model[0](features_of(model))) + 0, tokens_of(stock[0](features_of(stock))) + 0)


class Read(nn.Module):
    """A module of the user's own that reads the token embeddings."""

    def forward(self, features):
        features["sentence_embedding"] = features["token_embeddings"].amax(1)
        return features


@pytest.mark.parametrize("place", [1, 2])
def test_a_module_of_the_users_own(folder, place):
    """Put in before the pooling after patching, or behind it."""
    models = make(folder), fastbert.patch(make(folder))
    for model in models:
        modules = list(model._modules.values())
        modules.insert(place, Read())
        model._modules = {str(i): module for i, module in enumerate(modules)}
    stock, model = models
    for _ in range(2):
        expected, result = (embed(m, features_of(m), False)["output"] for m in (stock, model))
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("name", ["0", "1", ""])
def test_hooks_on_the_modules_see_them(folder, name):
    stock, model, seen = make(folder), fastbert.patch(make(folder)), []
    for m in (stock, model):
        m.get_submodule(name).register_forward_hook(lambda _, inputs, output: seen.append(tokens_of(output) + 0))
        m(features_of(m))
    torch.testing.assert_close(*seen)


class Doubled(torch.autograd.Function):
    """A function whose backward PyTorch calls with what it was applied to, past every override."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


def test_a_gradient_never_gets_lost(folder):
    model = fastbert.patch(make(folder))
    features = features_of(model)
    with pytest.raises(RuntimeError, match="unpad=False"):
        Doubled.apply(tokens_of(model(dict(features)))).sum().backward()
    # The model stays padded from then on, so the same code works.
    results = embed(model, features, read=lambda output: Doubled.apply(tokens_of(output)))
    expected, exact = (
        embed(m, features, read=lambda o: Doubled.apply(tokens_of(o))) for m in (make(folder), make(folder).double())
    )
    assert_equal(results, expected, exact)


CHANGES = {
    "parameters": lambda model, features: (
        model[0].model.encoder.layer[0].output.dense.bias.data_ptr()
        and torch.no_grad()(model[0].model.encoder.layer[0].output.dense.bias.add_)(1)
    ),
    "ids": lambda model, features: features["input_ids"].fill_(7),
    "mask": lambda model, features: features["attention_mask"].fill_(1),
    "dtype": lambda model, features: model.half(),
    "mode": lambda model, features: model.train(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_computed_any_more_is_refused(folder, change):
    model = fastbert.patch(make(folder, "cls"))
    features = features_of(model)
    output = model(dict(features))
    CHANGES[change](model, features)
    with pytest.raises(RuntimeError, match="unpad=False"):
        tokens_of(output)[0]


OPTIMIZERS = {
    "fastbert": fastbert.AdamW,
    "fused": functools.partial(torch.optim.AdamW, fused=True),
    "foreach": functools.partial(torch.optim.AdamW, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_an_optimizer_is_noticed(folder, name):
    model, other = (fastbert.patch(make(folder, "cls")) for _ in range(2))
    optimizer = OPTIMIZERS[name](model.parameters(), lr=1e-2)
    outputs = model(features_of(model)), other(features_of(other))
    outputs[0]["sentence_embedding"].sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="unpad=False"):
        tokens_of(outputs[0])[0]
    expected = tokens_of(make(folder)(features_of(model)))
    torch.testing.assert_close(tokens_of(outputs[1])[0], expected[0])


def test_the_hook_that_notices_it_is_none_of_the_users(folder):
    """A graphed step falls back for a user's hooks on its optimizer."""
    optimizer = fastbert.AdamW(make(folder).parameters(), lr=1e-2)
    assert not hooks_on(optimizer)
    optimizer.register_step_post_hook(lambda *_: None)
    assert hooks_on(optimizer)


def test_autocast_and_gradient_mode_are_those_of_the_forward(folder):
    stock, model = make(folder), fastbert.patch(make(folder))
    results = []
    for m in (stock, model):
        with torch.no_grad(), torch.autocast(m.device.type, torch.float16):
            output = m(features_of(m))
        results.append(tokens_of(output) + 0)
    assert results[1].dtype == results[0].dtype and not results[1].requires_grad
    close_in_half(results[1], results[0])
    with torch.enable_grad():
        output = model(features_of(model))
    with torch.no_grad():
        tokens = 2 * tokens_of(output)
    assert tokens_of(output).requires_grad and not tokens.requires_grad
