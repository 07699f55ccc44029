"""The model families with BERT's encoder. Most are copies of BERT's code under other names; DistilBERT has its own.

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
    encoder: the attribute of its models that holds the encoder.
    own_names: the classes that it does not name after BERT's with its prefix, as pairs of a part and a name.
    """

    title: str
    prefix: str
    path: str
    body: str
    encoder: str = "encoder"
    own_names: tuple[tuple[str, str], ...] = ()

    def name(self, part: str) -> str:
        """The name of the class of this part."""
        return dict(self.own_names).get(part, self.prefix + part)

    def part(self, name: str) -> str:
        """The part that a class of this name is; empty for a class that is none."""
        own = {own: part for part, own in self.own_names}
        return own[name] if name in own else name.removeprefix(self.prefix) if name.startswith(self.prefix) else ""

    @cached_property
    def module(self) -> ModuleType | None:
        """transformers' module of this family, or None if the release lacks it."""
        try:
            return import_module(f"transformers.models.{self.path}")
        except ImportError:
            return None

    def find(self, part: str) -> type[nn.Module] | None:
        """The stock class of this part, or None."""
        return getattr(self.module, self.name(part), None)

    def __getitem__(self, part: str) -> type[nn.Module]:
        """The stock class of this part; an empty class, which no module has, if the release lacks it."""
        return self.find(part) or _missing(self, part)


@cache
def _missing(family: Family, part: str) -> type[nn.Module]:
    return type(family.name(part), (nn.Module,), {"__module__": f"transformers.models.{family.path}"})


BERT = Family("BERT", "Bert", "bert.modeling_bert", "bert")
ROBERTA = Family("RoBERTa", "Roberta", "roberta.modeling_roberta", "roberta")
XLM_ROBERTA = Family("XLM-RoBERTa", "XLMRoberta", "xlm_roberta.modeling_xlm_roberta", "roberta")
CAMEMBERT = Family("CamemBERT", "Camembert", "camembert.modeling_camembert", "roberta")
DATA2VEC = Family("Data2VecText", "Data2VecText", "data2vec.modeling_data2vec_text", "data2vec_text")
ELECTRA = Family("ELECTRA", "Electra", "electra.modeling_electra", "electra")
ERNIE = Family("ERNIE", "Ernie", "ernie.modeling_ernie", "ernie")
DISTILBERT = Family(
    "DistilBERT",
    "DistilBert",
    "distilbert.modeling_distilbert",
    "distilbert",
    encoder="transformer",
    own_names=(("Embeddings", "Embeddings"), ("Layer", "TransformerBlock"), ("Encoder", "Transformer"), ("FFN", "FFN")),
)

# Families with RoBERTa's embeddings and heads, and those whose layers are copies of BERT's.
LIKE_ROBERTA = (ROBERTA, XLM_ROBERTA, CAMEMBERT, DATA2VEC)
LIKE_BERT = (BERT, *LIKE_ROBERTA, ELECTRA, ERNIE)
FAMILIES = (*LIKE_BERT, DISTILBERT)
