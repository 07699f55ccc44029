"""Fast classes of sentence-transformers' Transformer and Pooling: the pooling tells the encoder what it reads of a batch.

A `Transformer` that is followed by a `Pooling` passes a `PoolingPlan` down to its encoder as the keyword `reading`. If the
encoder packs, it leaves the packed rows in the plan, and the pooling reduces those: padding is neither computed nor unpacked.
The token embeddings among the features are then a `LazyTokens`, which runs the forward again if anything else reads it; from
then on that Transformer stays padded.

The module is imported only where sentence_transformers is already, and the classes have stock's names and modules:
`SentenceTransformer.save` writes both into modules.json.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import sentence_transformers
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastbert import forwards
from fastbert.dispatch import FastModule, falls_back, forward_replaced, hooked, kind_of, share_calls
from fastbert.integrations.lazy_tokens import LazyTokens, Source
from fastbert.integrations.pooling_plan import PoolingPlan, plan_pooling, pool, version_of
from fastbert.layers.encoder import model_packs_unseen
from fastbert.layers.packing import Rows
from fastbert.layers.stock import fast_forward_of
from fastbert.wrapped import MARKS


def _stock_class(name: str, *modules: str) -> type[nn.Module]:
    """sentence-transformers' class of this name, or an empty class if the release has none in these modules."""
    for module in modules:
        found = sentence_transformers
        for part in module.split("."):
            found = getattr(found, part, None)
        if isinstance(cls := getattr(found, name, None), type):
            return cls
    return type(name, (nn.Module,), {"__module__": "sentence_transformers", "forward": lambda self, features: features})


TRANSFORMER = _stock_class("Transformer", "base.modules", "models")
POOLING = _stock_class("Pooling", "sentence_transformer.modules", "models")
# Per stock class, the functions that its fast class replaces or depends on.
CODE = {
    "Transformer": forwards.Code((TRANSFORMER, "forward")),
    "Pooling": forwards.Code(*((POOLING, name) for name in ("forward", "_forward_padded", "_exclude_prompt_from_mask"))),
}


@torch.compiler.assume_constant_result
def _untested() -> str | None:
    return CODE["Transformer"].untested() or CODE["Pooling"].untested()


@dataclass
class Link:
    """On a fast Transformer: the pooling that follows it, and why it stays padded from now on, if it does."""

    pooling: nn.Module
    padded: str | None = None


_LINK = "_fastbert_pooling"
# Per pooling, what its Transformer did in its last call: the token embeddings that it returned, and the plan or a reason.
_handed: WeakKeyDictionary[nn.Module, tuple[ref[Tensor], PoolingPlan | str]] = WeakKeyDictionary()
# Per Transformer, the parameters of its model, which are looked up once: their versions tell whether they were written to.
_parameters: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()
_READ = "token embeddings were read"
_WITHOUT_PADDING = ("a batch without padding", "a batch without a mask")
_OUTPUTS = ("last_hidden_state", ("last_hidden_state",), ["last_hidden_state"])
_PRODUCED = {"token_embeddings", "sentence_embedding"}  # by an earlier call with the same features
_KEEP_PADDED = ("reading", "inputs_embeds", "output_hidden_states", "output_attentions")


def _fast(cls: type[nn.Module]) -> Callable[[type], type[nn.Module]]:
    """Decorator: the subclass of `cls`, under its name and module, with the members of the decorated class.

    `cls` is the first base, because an instance's class can only be set to one of the same layout, and sentence-transformers'
    classes derive from ABC. pickle would find the stock class under this name.
    """

    def reduce(self: nn.Module, protocol: int) -> Any:
        return _new, (cls.__name__,), self.__getstate__()

    def replicate(self: nn.Module) -> nn.Module:
        return share_calls(self, cls._replicate_for_data_parallel(self))

    def decorate(members: type) -> type[nn.Module]:
        found = {name: value for name, value in vars(members).items() if name not in ("__dict__", "__weakref__")}
        found |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__reduce_ex__": reduce}
        return type(cls)(cls.__name__, (cls, FastModule), found | {"_replicate_for_data_parallel": replicate})

    return decorate


def _new(name: str) -> nn.Module:
    cls = {"Transformer": Transformer, "Pooling": Pooling}[name]
    return cls.__new__(cls)


@_fast(TRANSFORMER)
class Transformer:
    """A Transformer that tells its encoder what the next module, a Pooling, reads."""

    @fast_forward_of(TRANSFORMER)
    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        link = vars(self).get(_LINK)
        if link is None or torch.compiler.is_compiling():
            return TRANSFORMER.forward(self, features, **kwargs)
        plan = self._plan(link, features, kwargs)
        if isinstance(plan, str):
            features = TRANSFORMER.forward(self, features, **kwargs)
            _hand(link, features, plan)
            return features
        given = {name: value for name, value in features.items() if name not in _PRODUCED}
        state = _State(self, given["input_ids"].device.type)
        tokens = TRANSFORMER.forward(self, dict(given), reading=plan)["token_embeddings"]
        if plan.hidden is not None:
            tokens = LazyTokens.make(tokens, plan.hidden.requires_grad, _Unread(self, link, given, plan, state))
        features["token_embeddings"] = tokens
        if plan.hidden is None:
            _hand(link, features, plan if plan.padded in _WITHOUT_PADDING else plan.padded or "code that drops keywords")
        return features

    def _plan(self, link: Link, features: dict[str, Any], kwargs: dict[str, Any]) -> PoolingPlan | str:
        """What the pooling reads of this call, or why its encoder must not be told."""
        if (reason := link.padded or _untested()) is not None:
            return reason
        if kwargs:
            return "keywords, which the model would get"
        if not MARKS.isdisjoint(vars(self)):
            return "FSDP around the embedder, which puts hooks on all outputs"
        mask, ids = features.get("attention_mask"), features.get("input_ids")
        if not (_is_matrix(mask) and _is_matrix(ids) and ids.shape == mask.shape and ids.device == mask.device):
            return "features without input_ids and an attention_mask of one shape [B, S]"
        if mask.is_floating_point() or not mask.numel():
            return "an attention mask of weights, or an empty batch"
        if found := [name for name in _KEEP_PADDED if name in features]:
            return f"{found[0]} among the features"
        if (reason := self._model_reason(features)) is not None:
            return reason
        pooling = link.pooling
        if type(pooling) is not Pooling or forward_replaced(pooling) or not _STEPS.isdisjoint(vars(pooling)):
            return "a Pooling that was changed"
        return plan_pooling(pooling, features, mask)

    def _model_reason(self, features: dict[str, Any]) -> str | None:
        modality = features.get("modality", "text")
        settings = self.modality_config.get(modality) if modality == "text" else None
        if settings is None or settings["method"] != "forward" or settings["method_output_name"] not in _OUTPUTS:
            return "a modality other than text, or another output than last_hidden_state"
        if self.module_output_name != "token_embeddings" or self.model_forward_params is not None:
            return "another output than token_embeddings, or a model without **kwargs"
        if getattr(self.model.config, "output_hidden_states", False):
            return "hidden states were requested"
        body = _body(self.model)
        if body is not None and kind_of(body) is not type(body):
            return "CUDA graphs"
        if body is None or not model_packs_unseen(body) or _model_code(body).untested() is not None:
            return "the model's output is visible to other code than the pooling, or its encoder does not pack"
        return None


_STEPS = {"_forward_padded", "_exclude_prompt_from_mask"}


def _is_matrix(x: object) -> bool:
    return type(x) is Tensor and x.dim() == 2


def _hand(link: Link, features: dict[str, Any], outcome: PoolingPlan | str) -> None:
    tokens = features.get("token_embeddings")
    if isinstance(tokens, Tensor):
        _handed[link.pooling] = ref(tokens), outcome


def _body(model: nn.Module) -> nn.Module | None:
    """The transformers model inside PEFT's wrappers, which pass on its output; None if other code may see that output."""
    while type(model).__module__.startswith("peft."):
        configs = getattr(model, "peft_config", None)
        if hooked(model) or not configs or any(getattr(c, "is_prompt_learning", True) for c in configs.values()):
            return None
        model = model.base_model if "base_model" in model._modules else model.model
    return model


@cache
def _code_of(model: type, pooler: type | None) -> forwards.Code:
    stock = next(cls for cls in model.__mro__ if cls.__module__.startswith("transformers."))
    return forwards.Code((stock, "forward"), *([] if pooler is None else [(pooler, "forward")]))


def _model_code(model: nn.Module) -> forwards.Code:
    """The functions between the encoder of `model` and its caller."""
    pooler = getattr(model, "pooler", None)
    return _code_of(type(model), None if pooler is None else type(pooler))


@_fast(POOLING)
class Pooling:
    """A Pooling that reduces the packed rows of the encoder before it."""

    @fast_forward_of(POOLING)
    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if torch.compiler.is_compiling():
            return POOLING.forward(self, features, **kwargs)
        tokens = features.get("token_embeddings")
        outcome = _outcome(self, tokens)
        if isinstance(outcome, PoolingPlan) and not outcome.is_current(self, features):
            outcome = "features or a Pooling that changed after the encoder ran"
        if falls_back(self, outcome if isinstance(outcome, str) else None):
            return POOLING.forward(self, features, **kwargs)
        if outcome.hidden is None:
            batch, seqlen = outcome.mask.shape
            bounds = torch.arange(0, batch * seqlen + 1, seqlen, dtype=torch.int32, device=tokens.device)
            outcome.hidden, outcome.tokens = tokens.flatten(0, 1), Rows(None, None, bounds, seqlen)
        features["sentence_embedding"] = pool(self, outcome)
        return features


def _outcome(pooling: nn.Module, tokens: Any) -> PoolingPlan | str:
    """The plan by which these token embeddings may be pooled, or why stock pools them."""
    handed = _handed.pop(pooling, None)
    if isinstance(tokens, LazyTokens):
        source = tokens.source
        return source.plan if isinstance(source, _Unread) and not source.is_known() else _READ
    if handed is None or handed[0]() is not tokens:
        return "token embeddings that do not come straight from a patched Transformer"
    if not isinstance(handed[1], PoolingPlan):
        return handed[1]
    return handed[1].padded if handed[1].alone or tokens.shape[:2] != handed[1].mask.shape else handed[1]


# Stock class, fast class, and the op that it launches itself.
CLASSES = (TRANSFORMER, Transformer, None), (POOLING, Pooling, "pool_rows")


class _State:
    """What the result of a forward depends on besides its features."""

    def __init__(self, transformer: nn.Module, device_type: str) -> None:
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.training = transformer.model.training
        enabled = torch.is_autocast_enabled(device_type)
        self.autocast = device_type, torch.get_autocast_dtype(device_type), enabled
        if transformer not in _parameters:
            _parameters[transformer] = list(transformer.model.parameters())
        self.parameters = _parameters[transformer]
        self.versions = _versions(self.parameters)
        self.stepped = False  # an optimizer has written to the parameters; fused ones raise no version
        _live.add(self)

    def is_current(self, transformer: nn.Module) -> bool:
        unchanged = not self.stepped and self.versions == _versions(self.parameters)
        return unchanged and self.training == transformer.model.training


# The states of forwards whose token embeddings may still be read.
_live: WeakSet[_State] = WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if _live:
        written = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for state in list(_live):
            state.stepped = state.stepped or not written.isdisjoint(map(id, state.parameters))


register_optimizer_step_post_hook(_after_step)


_VERSION = attrgetter("_version")


def _versions(parameters: Iterable[Tensor]) -> list[int | None]:
    try:
        return list(map(_VERSION, parameters))
    except RuntimeError:  # inference tensors have none
        return list(map(version_of, parameters))


_STALE = (
    "token_embeddings: they are computed when they are read, and the model or the batch has changed since its forward: read "
    "them before, or patch the model with unpad=False"
)


class _Unread(Source):
    """The source of token embeddings that the encoder left packed: it runs stock's padded forward when they are read."""

    def __init__(self, transformer: nn.Module, link: Link, features: dict[str, Any], plan: PoolingPlan, state: _State) -> None:
        super().__init__()
        self.plan = plan
        self._transformer, self._link, self._features, self._state = transformer, link, features, state
        self._ids_version = version_of(features["input_ids"])

    def compute(self) -> Tensor:
        with torch.inference_mode(self._state.inference), torch.set_grad_enabled(self._state.grad):
            return self._padded()

    def detached_value(self) -> Tensor:
        with torch.no_grad():
            return (self._padded() if self._value is None else self._value).detach()

    def _padded(self) -> Tensor:
        """The padded forward; what was packed already is kept, so that dropout is the same in both."""
        self._link.padded = _READ
        ids, plan = self._features["input_ids"], self.plan
        unchanged = version_of(ids) == self._ids_version and version_of(plan.mask) == plan.version
        if not (unchanged and self._state.is_current(self._transformer)):
            raise RuntimeError(_STALE)
        kind, dtype, enabled = self._state.autocast
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            tokens = TRANSFORMER.forward(self._transformer, dict(self._features))["token_embeddings"]
        if tokens.dtype != plan.hidden.dtype or tokens.device != plan.hidden.device:
            raise RuntimeError(_STALE)
        if plan.alone:
            return tokens
        real = plan.tokens.put(plan.hidden).view(tokens.shape)
        return torch.where((plan.mask != 0).unsqueeze(-1), real, tokens)


def pairs(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Each Transformer in `model` whose next module in an nn.Sequential is a Pooling, with that Pooling.

    One that several poolings follow is left out.
    """
    found: dict[nn.Module, set[nn.Module]] = {}
    for parent in model.modules():
        if isinstance(parent, nn.Sequential):
            children = list(parent.children())
            for first, second in zip(children, children[1:], strict=False):
                if kind_of(first) in (TRANSFORMER, Transformer) and kind_of(second) in (POOLING, Pooling):
                    found.setdefault(first, set()).add(second)
    return {first: seconds.pop() for first, seconds in found.items() if len(seconds) == 1}


def link(model: nn.Module) -> None:
    """Give each fast Transformer in `model` its pooling, and take it from those that are stock."""
    poolings = pairs(model)
    for module in model.modules():
        if isinstance(module, TRANSFORMER):
            vars(module).pop(_LINK, None)
            _parameters.pop(module, None)
            pooling = poolings.get(module)
            if type(module) is Transformer and type(pooling) is Pooling:
                vars(module)[_LINK] = Link(pooling)
