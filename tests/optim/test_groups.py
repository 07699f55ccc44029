"""fastbert.param_groups on the tiny BERTs: decay and rate of each parameter, which must be in exactly one group."""

import pytest
import torch
import transformers
from torch import nn

import fastbert
from tests.models.tiny import BASE, CLASSIFICATION, CLM, KINDS, MLM, make

pytestmark = pytest.mark.filterwarnings("error")


def by_name(model, groups):
    """{name: (lr, weight decay)}, each parameter once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found, f"{name} comes twice"
            found[name] = (group["lr"], group["weight_decay"])
    return found


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_parameter_once(kind):
    model = make(kind)
    found = by_name(model, fastbert.param_groups(model, 2e-5))
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, (lr, decay) in found.items():
        free = name.endswith("bias") or name.endswith("LayerNorm.weight")
        assert (lr, decay) == (2e-5, 0.0 if free else 0.01), name


def test_two_groups_are_enough():
    groups = fastbert.param_groups(make(CLASSIFICATION), 2e-5)
    assert [group["name"] for group in groups] == ["body", "body, no decay"]


def test_head_rate():
    model = make(CLASSIFICATION)
    found = by_name(model, fastbert.param_groups(model, 2e-5, head_lr=1e-3))
    assert {name for name, (lr, _) in found.items() if lr == 1e-3} == {"classifier.weight", "classifier.bias"}
    assert found["classifier.bias"][1] == 0.0
    assert {lr for lr, _ in found.values()} == {2e-5, 1e-3}


def test_layer_decay():
    model = make(CLASSIFICATION)
    found = by_name(model, fastbert.param_groups(model, 1.0, head_lr=5.0, layer_decay=0.5))
    for name, (lr, _) in found.items():
        if "classifier" in name:
            assert lr == 5.0, name
        elif "pooler" in name or "layer.1." in name:
            assert lr == 1.0, name
        elif "layer.0." in name:
            assert lr == 0.5, name
        else:
            assert "embeddings" in name and lr == 0.25, name


def test_layer_decay_leaves_the_head_at_lr():
    model = make(CLASSIFICATION)
    found = by_name(model, fastbert.param_groups(model, 1.0, layer_decay=0.5))
    assert found["classifier.weight"][0] == 1.0


@pytest.mark.parametrize("kind", [MLM, CLM], ids=str)
def test_tied_weights_once_and_with_the_embeddings(kind):
    model = make(kind)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    groups = fastbert.param_groups(model, 1.0, layer_decay=0.5)
    found = by_name(model, groups)
    assert found["bert.embeddings.word_embeddings.weight"] == (0.25, 0.01)
    assert found["cls.predictions.transform.dense.weight"][0] == 1.0
    fastbert.AdamW(groups)  # which raises for a parameter in two groups


def test_frozen_are_left_out():
    model = make(CLASSIFICATION)
    model.bert.embeddings.requires_grad_(False)
    found = by_name(model, fastbert.param_groups(model, 1.0))
    assert found and not any("embeddings" in name for name in found)


def test_other_names_without_decay():
    model = make(CLASSIFICATION)
    found = by_name(model, fastbert.param_groups(model, 1.0, weight_decay=0.3, no_decay=["classifier.weight"]))
    assert {name for name, (_, decay) in found.items() if decay == 0.0} == {"classifier.weight"}
    assert {decay for _, decay in found.values()} == {0.0, 0.3}


def test_whole_parts_of_names():
    """ "bias" does not match "antibias"."""
    model = nn.Module()
    model.antibias = nn.Parameter(torch.zeros(2))
    model.bias = nn.Parameter(torch.zeros(2))
    found = by_name(model, fastbert.param_groups(model, 1.0, no_decay=["bias"]))
    assert found == {"antibias": (1.0, 0.01), "bias": (1.0, 0.0)}


def test_everything_decays_where_nothing_is_left_out():
    model = make(CLASSIFICATION)
    assert {decay for _, decay in by_name(model, fastbert.param_groups(model, 1.0, no_decay=())).values()} == {0.01}


class Norm(nn.Module):
    """A model's own RMSNorm, recognised only by its name."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))


class OwnLayerNorm(nn.LayerNorm):
    def __init__(self, width):
        super().__init__(width)
        self.gain = nn.Linear(1, 1, bias=False)


class Tagger(nn.Module):
    """A model of BERT, a BiLSTM and a CRF."""

    def __init__(self):
        super().__init__()
        self.bert = make(BASE)
        self.lstm = nn.LSTM(40, 8, num_layers=2, bidirectional=True, proj_size=4)
        self.normal = nn.Linear(8, 5)
        self.transitions = nn.Parameter(torch.zeros(5, 5))
        self.start_bias = nn.Parameter(torch.zeros(5))


class Norms(nn.Module):
    """A model with every kind of norm under every kind of name."""

    def __init__(self):
        super().__init__()
        for kind in (nn.LayerNorm, OwnLayerNorm, Norm, nn.RMSNorm, nn.BatchNorm1d):
            names = ("ln", "norm", "norm1", "final_norm", "Norm", "input_layernorm", "LayerNormal", "q_norm", "renorm")
            self.add_module(kind.__name__.lower()[-6:], nn.ModuleDict({name: kind(4) for name in names}))
        self.norm = nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 4), nn.GRUCell(4, 4))
        self.embedding = nn.EmbeddingBag(7, 4)
        self.scale, self.norm_scale, self.Bias = (nn.Parameter(torch.ones(4)) for _ in range(3))


class Shared(nn.Module):
    """A model with a shared norm and shared weights: the first name counts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.ModuleList([nn.LayerNorm(4)])
        self.first.bias = self.second[0].weight
        self.third = self.second[0]
        self.last_norm = nn.Linear(4, 4)
        self.last_norm.weight = self.first.weight


@pytest.mark.parametrize(
    "build",
    [
        *(lambda kind=kind: make(kind) for kind in KINDS),
        lambda: fastbert.patch(make(MLM)),
        Tagger,
        Norms,
        Shared,
        lambda: nn.Sequential(Tagger(), Norms()),
        lambda: nn.GRU(3, 4),
    ],
    ids=[*map(str, KINDS), "patched", "tagger", "norms", "shared", "wrapped", "recurrent"],
)
def test_decays_what_trainer_decays(build):
    """Compared with the Trainer of the installed release."""
    model = build()
    decayed = set(transformers.Trainer.get_decay_parameter_names(None, model))
    expected = {name: (1.0, 0.3 if name in decayed else 0.0) for name, _ in model.named_parameters()}
    assert by_name(model, fastbert.param_groups(model, 1.0, weight_decay=0.3)) == expected


def test_a_wrapped_model():
    wrapped = nn.Sequential(make(BASE), nn.Linear(40, 2))
    found = by_name(wrapped, fastbert.param_groups(wrapped, 1.0, head_lr=5.0, layer_decay=0.5))
    assert {name for name, (lr, _) in found.items() if lr == 5.0} == {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model: expected a torch.nn.Module, got int"),
        ({"model": nn.ReLU()}, ValueError, "model: expected a parameter that requires a gradient, ReLU has none"),
        ({"lr": -1.0}, ValueError, "lr: expected 0 or more, got -1.0"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay: expected 0 or more, got -1.0"),
        ({"head_lr": -1.0}, ValueError, "head_lr: expected 0 or more, got -1.0"),
        ({"head_lr": 1.0}, ValueError, "head_lr: expected parameters beside the pretrained ones, BertModel has none"),
        ({"layer_decay": 0.0}, ValueError, r"layer_decay: expected a factor in \(0, 1\], got 0.0"),
        ({"layer_decay": 1.5}, ValueError, r"layer_decay: expected a factor in \(0, 1\], got 1.5"),
        ({"model": nn.Linear(2, 2), "layer_decay": 0.9}, ValueError, "layer_decay: expected encoder layers"),
        ({"no_decay": "bias"}, TypeError, "no_decay: expected a sequence of names, got the string 'bias'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        fastbert.param_groups(**({"model": make(BASE), "lr": 1.0} | arguments))
