"""Tiny models of the families beside BERT: the kinds of `tiny` with the class of each family, and ELECTRA's discriminator."""

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    CamembertConfig,
    Data2VecTextConfig,
    ElectraConfig,
    ErnieConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
)
from transformers.models.camembert import modeling_camembert
from transformers.models.data2vec import modeling_data2vec_text
from transformers.models.electra import modeling_electra
from transformers.models.ernie import modeling_ernie
from transformers.models.roberta import modeling_roberta
from transformers.models.xlm_roberta import modeling_xlm_roberta

from tests.models.tiny import KINDS, ROWS, Kind

EMBEDDING_SIZE = 24  # of an ELECTRA that projects its embeddings

# The end of the class's name, per kind of `tiny`.
_ENDS = {
    "base": "Model",
    "pretraining": "ForPreTraining",
    "clm": "ForCausalLM",
    "mlm": "ForMaskedLM",
    "next-sentence": "ForNextSentencePrediction",
    "regression": "ForSequenceClassification",
    "single-label": "ForSequenceClassification",
    "multi-label": "ForSequenceClassification",
    "multiple-choice": "ForMultipleChoice",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
}
_BERTS_ONLY = ("pretraining", "next-sentence")


def _has_what_it_reads(kind: Kind) -> bool:
    """False for choices whose forward reads a pooler that they lack: XLM-RoBERTa's and CamemBERT's up to transformers 5.10."""
    return not kind.name.endswith("choice") or "add_pooling_layer=False" not in inspect.getsource(kind.cls.__init__)


@dataclass(frozen=True)
class Family:
    """A family: the start of its class names, transformers' module of it, its config class and settings for `tiny.config`."""

    prefix: str
    module: Any
    config_class: type[PreTrainedConfig]
    body: str  # the attribute that holds the model in a head
    config: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = _BERTS_ONLY

    def __str__(self) -> str:
        return self.prefix

    def kind(self, name: str) -> Kind:
        """The kind of this family with the name of one of `tiny`."""
        kind = next(kind for kind in KINDS if kind.name == name)
        cls = getattr(self.module, self.prefix + _ENDS[name])
        settings = self.config | kind.config
        return replace(kind, name=f"{self.prefix} {name}", cls=cls, config=settings, config_class=self.config_class)

    def kinds(self) -> list[Kind]:
        return [kind for name in _ENDS if name not in self.without and _has_what_it_reads(kind := self.kind(name))]

    def body_of(self, head: nn.Module) -> nn.Module:
        return getattr(head, self.body)


# Padding has the id 1, and positions count from 2. Segments are given to the kinds of `tiny`: two types, where RoBERTa has one.
_LIKE_ROBERTA = {"pad_token_id": 1, "type_vocab_size": 2}
ROBERTA = Family("Roberta", modeling_roberta, RobertaConfig, "roberta", _LIKE_ROBERTA)
XLM_ROBERTA = Family("XLMRoberta", modeling_xlm_roberta, XLMRobertaConfig, "roberta", _LIKE_ROBERTA)
CAMEMBERT = Family("Camembert", modeling_camembert, CamembertConfig, "roberta", _LIKE_ROBERTA)
DATA2VEC = Family("Data2VecText", modeling_data2vec_text, Data2VecTextConfig, "data2vec_text", _LIKE_ROBERTA)
_ELECTRAS = {"embedding_size": EMBEDDING_SIZE, "summary_last_dropout": 0.0}
ELECTRA = Family("Electra", modeling_electra, ElectraConfig, "electra", _ELECTRAS)
ERNIE = Family("Ernie", modeling_ernie, ErnieConfig, "ernie", {"use_task_id": True}, without=())
FAMILIES = (ROBERTA, XLM_ROBERTA, CAMEMBERT, DATA2VEC, ELECTRA, ERNIE)
LIKE_ROBERTA = FAMILIES[:4]
COPIES = FAMILIES[1:4]  # of RoBERTa's code, under other names

DISCRIMINATOR = Kind(
    "Electra discriminator",
    modeling_electra.ElectraForPreTraining,
    lambda length: {"labels": torch.randint(2, (ROWS, length))},
    ELECTRA.config,
    config_class=ElectraConfig,
)
FAMILY_KINDS = (*(kind for family in FAMILIES for kind in family.kinds()), DISCRIMINATOR)
