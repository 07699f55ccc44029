"""Simulates a future transformers release: the installed BERT with some lines rewritten before it is imported.

python -m tests.models.future NAME,NAME...: a stock and a patched model of that release agree, and `report` gives reasons.
"""

import importlib.util
import linecache
import re
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

MODELING = "transformers.models.bert.modeling_bert"


def added_keyword(source: str) -> str:
    """Every self-attention gets a temperature, by a keyword that no release has."""
    source = re.sub(
        r"(class BertSelfAttention\(.*?attention_mask: [^\n]*\n)", r"\1        temperature: float = 1.0,\n", source, flags=re.S
    )
    source = source.replace("scaling=self.scaling,", "scaling=self.scaling / temperature,", 1)
    return source.replace("            hidden_states,\n            encoder_hidden_states=", _TEMPERATURE, 1)


_TEMPERATURE = """            hidden_states,
            **({} if self.is_cross_attention else {"temperature": 2.0}),
            encoder_hidden_states="""


def renamed_keyword(source: str) -> str:
    """The embeddings' argument for the number of cached tokens is renamed."""
    return re.sub(r"\b(cache_length|past_key_values_length)\b", "tokens_before", source)


def renamed_argument(source: str) -> str:
    """The residual is passed by a new keyword."""
    source = source.replace("input_tensor", "residual")
    call = "self.output(intermediate_output, attention_output)"
    return source.replace(call, call.replace(", ", ", residual="))


def removed_class(source: str) -> str:
    """The release has no cross-attention and no next-sentence head."""
    source = re.sub(r"\nclass BertCrossAttention\(.*?(?=\nclass )", "\n", source, flags=re.S)
    source = source.replace("BertCrossAttention", "BertSelfAttention")
    head = r"\n@auto_docstring\(\n[^@]*?\n\)\nclass BertForNextSentencePrediction\(.*?(?=\n@auto_docstring)"
    source = re.sub(head, "\n", source, flags=re.S)
    return source.replace('    "BertForNextSentencePrediction",\n', "")


def other_arithmetic(source: str) -> str:
    """The signatures are the same, but the intermediate layer is scaled."""
    return source.replace("self.intermediate_act_fn(hidden_states)", "self.intermediate_act_fn(0.5 * hidden_states)")


def masks_elsewhere(source: str) -> str:
    """The model makes its masks in a renamed method, with positional arguments."""
    source = source.replace("_create_attention_masks", "_masks")

    def by_position(call: re.Match[str]) -> str:
        return re.sub(r"\w+=(\w+),", r"\1,", call[0])

    return re.sub(r"self\._masks\(.*?\n        \)", by_position, source, count=1, flags=re.S)


def documented(source: str) -> str:
    """Only documentation and annotations change, so the kernels run."""
    head = "def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:"
    return source.replace(head, 'def forward(self, hidden_states) -> "Anything":\n        """New words."""')


RELEASES: dict[str, Callable[[str], str]] = {
    f.__name__: f
    for f in (added_keyword, renamed_keyword, renamed_argument, removed_class, other_arithmetic, masks_elsewhere, documented)
}


class Rewritten(MetaPathFinder, Loader):
    """Imports MODELING from a file with the rewritten source, so that inspect finds it."""

    def __init__(self, changes: list[Callable[[str], str]]) -> None:
        self.changes = changes

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> object:
        if name != MODELING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        with open(spec.origin, encoding="utf-8") as file:
            self.source = file.read()
        for change in self.changes:
            before, self.source = self.source, change(self.source)
            assert self.source != before, f"{change.__name__} rewrote nothing"
        self.origin = spec.origin
        return importlib.util.spec_from_loader(name, self, origin=spec.origin)

    def exec_module(self, module: ModuleType) -> None:
        module.__file__ = self.origin
        linecache.cache[self.origin] = (len(self.source), None, self.source.splitlines(keepends=True), self.origin)
        exec(compile(self.source, self.origin, "exec"), module.__dict__)


def main(names: str) -> None:
    sys.meta_path.insert(0, Rewritten([RELEASES[name] for name in names.split(",")]))
    import copy

    import torch
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertLMHeadModel

    import fastbert
    from fastbert.kernels.core.launch import counts

    torch.manual_seed(0)
    ids = torch.randint(1, 60, (2, 8))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    labels = {
        BertForMaskedLM: ids.masked_fill(mask == 0, -100),
        BertLMHeadModel: ids.masked_fill(mask == 0, -100),
        BertForSequenceClassification: torch.tensor([0, 1]),
    }
    for cls, label in labels.items():
        model = cls(BertConfig(**SIZE, is_decoder=cls is BertLMHeadModel)).eval()
        batch = {"input_ids": ids, "attention_mask": mask, "labels": label}
        stock = losses_and_gradients(copy.deepcopy(model), batch)
        torch.testing.assert_close(losses_and_gradients(fastbert.patch(copy.deepcopy(model)), batch), stock)
        if cls is BertLMHeadModel:
            with torch.no_grad():
                fastbert.patch(copy.deepcopy(model)).generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    patched = fastbert.patch(copy.deepcopy(model))
    patched(**batch)
    for row in fastbert.report(patched).rows:
        print(f"{row.hf_class}: {row.state}: {row.reason}")
    print("launched:", *sorted(counts))
    try:
        fastbert.patch(copy.deepcopy(model), strict=True)
        print("strict: patched")
    except fastbert.UnsupportedModelError as error:
        print("strict:", error)
    print("verify:", fastbert.verify(model, batch).ok)
    print("verify untested:", fastbert.verify(model, batch, untested=True).ok)


SIZE = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}


def losses_and_gradients(model: Any, batch: dict[str, Any]) -> list[Any]:
    """The loss, the logits and every gradient."""
    output = model(**batch)
    output.loss.backward()
    return [output.loss.detach(), output.logits.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


if __name__ == "__main__":
    main(sys.argv[1])
