"""The model families that share BERT's encoder: transformers generates their code from BERT's, under other names.

A family is a line of FAMILIES. A part is the name of a class without its family's prefix, such as "SelfAttention", and names
the same computation in every family that has it; what differs (position ids, heads) is a part of its own or an attribute
that the fast class reads. A family or a class that the installed transformers lacks is left out, so that importing fastbert
never fails because of it.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from types import ModuleType

from torch import nn


@dataclass(frozen=True)
class Family:
    """One family of models.

    title: the name that its authors use.
    prefix: of its class names.
    path: its module under transformers.models.
    body: the attribute of its heads that holds the model.
    """

    title: str
    prefix: str
    path: str
    body: str

    @cached_property
    def module(self) -> ModuleType | None:
        """transformers' module of this family, or None if the release lacks it."""
        try:
            return import_module(f"transformers.models.{self.path}")
        except ImportError:
            return None

    def find(self, part: str) -> type[nn.Module] | None:
        """The stock class of this part, or None."""
        return getattr(self.module, self.prefix + part, None)

    def __getitem__(self, part: str) -> type[nn.Module]:
        """The stock class of this part; an empty class, which no module has, if the release lacks it."""
        return self.find(part) or _missing(self, part)


@cache
def _missing(family: Family, part: str) -> type[nn.Module]:
    return type(family.prefix + part, (nn.Module,), {"__module__": f"transformers.models.{family.path}"})


BERT = Family("BERT", "Bert", "bert.modeling_bert", "bert")
ROBERTA = Family("RoBERTa", "Roberta", "roberta.modeling_roberta", "roberta")
XLM_ROBERTA = Family("XLM-RoBERTa", "XLMRoberta", "xlm_roberta.modeling_xlm_roberta", "roberta")
CAMEMBERT = Family("CamemBERT", "Camembert", "camembert.modeling_camembert", "roberta")
DATA2VEC = Family("Data2VecText", "Data2VecText", "data2vec.modeling_data2vec_text", "data2vec_text")
ELECTRA = Family("ELECTRA", "Electra", "electra.modeling_electra", "electra")
ERNIE = Family("ERNIE", "Ernie", "ernie.modeling_ernie", "ernie")

# Families with RoBERTa's embeddings and heads.
LIKE_ROBERTA = (ROBERTA, XLM_ROBERTA, CAMEMBERT, DATA2VEC)
FAMILIES = (BERT, *LIKE_ROBERTA, ELECTRA, ERNIE)
