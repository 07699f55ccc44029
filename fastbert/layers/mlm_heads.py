"""Fast classes of the heads with a language model's loss: the loss on the linear_cross_entropy kernel.

The loss is computed from the labelled rows only, and all logits are never held at once for it.

- mlm_logits="full" also returns stock's logits, from a separate product. No gradient goes back through that product unless
  the caller uses the logits.
- mlm_logits="none" omits them while training with labels. Then the whole head, and the last layer if the encoder packs, run
  for the labelled rows only.

The classes have stock's names, by which `save_pretrained`, pipelines and Trainer look classes up. The two kinds differ by
the namespace that holds them, `Full` or `WithoutLogits`.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.nn.functional import pad as pad_labels
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, MaskedLMOutput
from transformers.utils.generic import ModelOutput, can_return_tuple

from fastbert import ops
from fastbert.dispatch import FastModule, autocast_dtype, falls_back, is_plain, is_plain_tensor, run, tensor_reason
from fastbert.layers.counts import CallerCounts, Capacity, count
from fastbert.layers.encoder import packs_unseen
from fastbert.layers.family import BERT, ELECTRA, FAMILIES, Family
from fastbert.layers.lm_parts import IGNORED, lm_parts_of
from fastbert.layers.packing import Rows, pack
from fastbert.layers.packing_plan import stop_unless
from fastbert.layers.reading import Reading
from fastbert.layers.stock import family_of, subclass, untested

_Arguments = dict[str, Any]


def unsupported(module: nn.Module) -> str | None:
    """Why `module` can never use the kernel as it stands, or None."""
    if ops.MISSING is not None:
        return ops.MISSING
    parts = lm_parts_of(family_of(module))
    if (reason := parts.reason(module)) is not None:
        return reason
    decoder = parts.decoder(module)
    # FSDP2 gathers its DTensor for the call, which checks the type again.
    if not is_plain(decoder, nn.Linear) or not (is_plain_tensor(decoder.weight) or hasattr(decoder.weight, "to_local")):
        return f"its decoder is a {type(decoder).__name__}, or has hooks"
    if tuple(decoder.weight.shape) != (module.config.vocab_size, decoder.in_features):
        return f"its decoder's weight is {tuple(decoder.weight.shape)}, which is not the vocabulary's size"
    return None


def _reason(module: nn.Module, name: str, labels: Tensor, arguments: _Arguments) -> str | None:
    if (reason := untested(name) or unsupported(module)) is not None:
        return reason
    decoder = lm_parts_of(module.PART.family).decoder(module)
    inputs = arguments.get("input_ids")
    inputs = arguments.get("inputs_embeds") if inputs is None else inputs
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.device != decoder.weight.device:
        return "labels that are not an int64 tensor on the weights' device"
    if inputs is None or labels.shape != inputs.shape[:2]:
        return "labels that do not have the shape of the batch"
    return tensor_reason(decoder.weight, *(() if decoder.bias is None else (decoder.bias,)))


def _fast_forward(stock: type[nn.Module], finish: Callable[..., Any], applies: Callable[..., bool]) -> Any:
    """The fast forward for `stock`'s, for calls with labels where `applies(module, arguments)`; `finish` makes the output."""
    signature, name = inspect.signature(stock.forward), stock.__name__
    known = signature.parameters.keys()
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())

    @wraps(stock.forward)  # with its signature: Trainer chooses columns by it
    @can_return_tuple
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, FastModule):  # a wrapper kept this forward beyond unpatch
            return type(self).forward(self, *args, **kwargs)
        if not args and (takes_any or kwargs.keys() <= known):
            arguments = dict(kwargs)
        else:
            try:
                arguments = dict(signature.bind(self, *args, **kwargs).arguments)
            except TypeError:  # let stock raise it
                return stock.forward(self, *args, **kwargs)
            arguments |= arguments.pop("kwargs", {})
            del arguments["self"]
        labels = arguments.get("labels")
        if labels is None or not applies(self, arguments) or falls_back(self, _reason(self, name, labels, arguments)):
            return stock.forward(self, *args, **kwargs)
        return finish(self, arguments)

    return forward


def _run_with_loss(
    module: nn.Module, targets: Tensor, arguments: _Arguments, with_first: bool, **options: Any
) -> tuple[Any, Tensor | None, Tensor]:
    """The outputs of the model inside, the logits (None if they are to be omitted), and the loss for `targets` [B, S]."""
    family: Family = module.PART.family
    parts = lm_parts_of(family)
    decoder = parts.decoder(module)
    ignored = options.get("ignore_index", IGNORED)
    without = module.WITHOUT_LOGITS and module.training
    labelled = targets != ignored
    if without and with_first:
        labelled[:, :1] = True  # the pooler reads it; without a label it adds nothing to the loss
    reading = Reading(labelled, alone=without)
    extra = {"reading": reading} if packs_unseen(module) else {}
    outputs = getattr(module, family.body)(**arguments, return_dict=True, **extra)
    hidden = outputs.last_hidden_state
    # Under autocast the weight is cast once for logits and loss, as with autocast's cache.
    low = None if decoder.weight.dtype == torch.float64 else autocast_dtype(hidden.device.type)
    dtype = low or decoder.weight.dtype
    weight, bias = (None if x is None else x.to(dtype) for x in (decoder.weight, decoder.bias))
    if low is not None:
        options.setdefault("out_dtype", torch.float32)  # autocast runs cross_entropy in float32
    logits = None
    if not without:
        hidden = parts.transform(module, hidden).to(dtype)
        logits = linear(hidden, weight, bias)
    hidden, targets = _labelled(module, hidden, targets, labelled, reading.rows, ignored)
    if without:
        hidden = parts.transform(module, hidden).to(dtype)
    return outputs, logits, run(module, ops.linear_cross_entropy, hidden, weight, bias, targets, **options)


def _labelled(
    module: nn.Module, hidden: Tensor, targets: Tensor, labelled: Tensor, rows: Rows | None, ignored: int
) -> tuple[Tensor, Tensor]:
    """The labelled rows [N, H] and their labels [N]. One synchronisation, unless the encoder or the caller has counted them.

    torch.compile needs sizes that do not depend on the labels, so it gets all rows, most of them with an ignored label.
    """
    hidden, targets = hidden.flatten(0, 1), targets.flatten()
    if rows is None:
        if torch.compiler.is_compiling() or not labelled.numel():
            return hidden, targets
        counts = ops.row_counts(None, labelled)
        batch, seqlen = labelled.shape
        caller: CallerCounts | None = vars(module).get("caller_counts")  # set by fastbert.graphed_step
        capacity = None if caller is None else caller.capacity("read", batch, seqlen)
        claimed = capacity is not None
        if not claimed:
            _, capacity, _ = count(None, labelled, counts)
        _, rows, fits = pack(counts, None, labelled, seqlen, Capacity(batch * seqlen, seqlen), capacity, claimed)
        stop_unless(fits, (False, claimed, False))
    if rows.exact:
        return rows.take(hidden), targets.index_select(0, rows.index)
    index = rows.index
    return rows.take(hidden), targets.index_select(0, index.clamp(min=0)).masked_fill_(index < 0, ignored)


def _finish_masked(module: nn.Module, arguments: _Arguments) -> MaskedLMOutput:
    outputs, logits, loss = _run_with_loss(module, arguments.pop("labels"), arguments, with_first=False)
    return MaskedLMOutput(loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions)


def _finish_pretraining(module: nn.Module, arguments: _Arguments) -> ModelOutput:
    labels, next_sentence = arguments.pop("labels"), arguments.pop("next_sentence_label")
    outputs, logits, loss = _run_with_loss(module, labels, arguments, with_first=True)
    relationship = module.cls.seq_relationship(outputs.pooler_output)
    family: Family = module.PART.family
    output_class = getattr(family.module, f"{family.prefix}ForPreTrainingOutput")
    return output_class(
        loss=loss + cross_entropy(relationship.view(-1, 2), next_sentence.view(-1)),
        prediction_logits=logits,
        seq_relationship_logits=relationship,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def _finish_causal(module: nn.Module, arguments: _Arguments) -> CausalLMOutputWithCrossAttentions:
    """The output with transformers' ForCausalLMLoss: labels shifted by one, in float32, divided by the caller's item count."""
    labels = arguments.pop("labels")
    arguments.pop("logits_to_keep", None)
    ignored, items = arguments.get("ignore_index", IGNORED), arguments.get("num_items_in_batch")
    targets = arguments.get("shift_labels")
    if targets is None:
        targets = pad_labels(labels, (0, 1), value=ignored)[..., 1:]
    options = {"ignore_index": ignored, "reduction": "mean" if items is None else "sum", "out_dtype": torch.float32}
    outputs, logits, loss = _run_with_loss(module, targets, arguments | {"use_cache": False}, with_first=False, **options)
    if items is not None:
        loss = loss / (items.to(loss.device) if isinstance(items, Tensor) else items)
    return CausalLMOutputWithCrossAttentions(
        loss=loss,
        logits=logits,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        cross_attentions=outputs.cross_attentions,
    )


def _has_both_labels(module: nn.Module, arguments: _Arguments) -> bool:
    return arguments.get("next_sentence_label") is not None  # without it stock returns no loss


def _causal_loss_applies(module: nn.Module, arguments: _Arguments) -> bool:
    shifted, keep = arguments.get("shift_labels"), arguments.get("logits_to_keep", 0)
    return (
        _has_causal_loss(module)
        and isinstance(keep, int)
        and keep == 0
        and (shifted is None or shifted.shape == arguments["labels"].shape)
        and module.dtype != torch.float64  # stock rounds float64 logits to float32 first
    )


def _has_causal_loss(module: nn.Module) -> bool:
    """Whether the property `loss_function` would return ForCausalLMLoss. Its warning would break a torch.compile graph."""
    if "_loss_function" in vars(module):
        return module._loss_function is ForCausalLMLoss
    return LOSS_MAPPING.get(getattr(module, "loss_type", None), ForCausalLMLoss) is ForCausalLMLoss


# Per part: the function that makes its output, and whether it computes the loss of a call.
_FINISHES = {
    "ForMaskedLM": (_finish_masked, lambda *_: True),
    "ForPreTraining": (_finish_pretraining, _has_both_labels),
    "LMHeadModel": (_finish_causal, _causal_loss_applies),
    "ForCausalLM": (_finish_causal, _causal_loss_applies),
}
_HEADS = [
    (family, part)
    for family in FAMILIES
    for part in _FINISHES
    if (family is BERT and part != "ForCausalLM") or (family.find(part) and (family, part) != (ELECTRA, "ForPreTraining"))
]
_FORWARDS = {(family, part): _fast_forward(family[part], *_FINISHES[part]) for family, part in _HEADS}


def _heads(namespace: str, without_logits: bool) -> type:
    """A namespace class whose attributes are the fast classes, so that pickle finds them."""
    made = [
        subclass(family, part, __name__, namespace, (FastModule,), forward=forward, WITHOUT_LOGITS=without_logits)
        for (family, part), forward in _FORWARDS.items()
    ]
    return type(namespace, (), {"__module__": __name__, **{cls.__name__: cls for cls in made}})


Full = _heads("Full", without_logits=False)  # mlm_logits="full"
WithoutLogits = _heads("WithoutLogits", without_logits=True)  # mlm_logits="none"
NAMES = tuple(family.prefix + part for family, part in _HEADS)
