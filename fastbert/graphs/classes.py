"""The classes of models whose forward may be replayed: a subclass of each class that a patched model can have.

Like the other fast classes they override `forward` only and keep stock's name. The namespaces tell apart the classes of one
name: those over stock's, and over each fast class.
"""

import inspect
from collections.abc import Iterable
from functools import wraps
from types import MethodType
from typing import Any

from torch import nn
from transformers import modeling_utils

from fastbert.dispatch import class_forward_on_instance, kind_of, set_kind
from fastbert.errors import UnsupportedModelError
from fastbert.graphs.inference import Graphs
from fastbert.graphs.options import Options
from fastbert.registry import BY_FAST, ENTRIES, MLM_HEADS, POOLED_HEADS, families_text, model_classes
from fastbert.wrapped import base_of

ATTRIBUTE = "_fastbert_graphs"  # the model's Graphs; on the model, so that it does not keep the model alive


def _graphed(base: type[nn.Module], namespace: str) -> type[nn.Module]:
    names = tuple(name for name in inspect.signature(base.forward).parameters if name not in ("self", "kwargs"))

    @wraps(base.forward)  # with its signature: Trainer and pipelines choose arguments by it
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        graphs = vars(self).get(ATTRIBUTE)
        if graphs is None:  # a wrapper kept this forward, or somebody removed the attribute
            return base.forward(self, *args, **kwargs)
        return graphs.call(self, base.forward, names, args, kwargs)

    members = {
        "__module__": __name__,
        "__qualname__": f"{namespace}.{base.__name__}",
        "forward": forward,
        "WITHOUT_GRAPHS": base,
    }
    cls = type(base.__name__, (base,), members)
    # transformers looks up by class which outputs a model can record, and registers a class when a model of it is made.
    getattr(modeling_utils, "_CAN_RECORD_REGISTRY", {}).setdefault(str(cls), getattr(cls, "_can_record_outputs", None))
    return cls


def _namespace(name: str, bases: Iterable[type[nn.Module]]) -> type:
    """A class whose attributes are the graphed classes, so that pickle finds them."""
    return type(name, (), {"__module__": __name__, **{base.__name__: _graphed(base, name) for base in bases}})


_BASES = {
    "Stock": model_classes(),
    "Fast": [entry.fast for entry in (*ENTRIES, *POOLED_HEADS) if entry.stock in model_classes()],
    "Full": [entry.fast for entry in MLM_HEADS["full"]],
    "WithoutLogits": [entry.fast for entry in MLM_HEADS["none"]],
}
Stock, Fast, Full, WithoutLogits = (_namespace(name, bases) for name, bases in _BASES.items())
GRAPHED = {
    base: getattr(namespace, base.__name__)
    for namespace, bases in zip((Stock, Fast, Full, WithoutLogits), _BASES.values(), strict=True)
    for base in bases
}


def roots(model: nn.Module) -> list[nn.Module]:
    """The outermost BERT models in `model`: their whole forward is one graph."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():  # a module comes before those inside it
        if module not in inside and kind_of(module) in GRAPHED:
            found.append(module)
            inside.update(module.modules())
    return found


def set_graphs(root: nn.Module, options: Options | None) -> None:
    """Let the forward of a root be replayed with these options, and of no model inside; or no longer with None."""
    for inside in graphed_modules(root):
        former = vars(inside).pop(ATTRIBUTE, None)
        if former is not None:
            former.forget()
        _set_class(inside, kind_of(inside))
    if options is not None:
        _set_class(root, GRAPHED[kind_of(root)])
        vars(root)[ATTRIBUTE] = Graphs(options)


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    own, former = vars(module), type(module)
    if class_forward_on_instance(module):  # it would keep the former class's forward
        del own["forward"]
    set_kind(module, cls)
    if getattr(own.get("_old_forward"), "__func__", None) is former.forward:  # accelerate's hooks call this forward
        own["_old_forward"] = MethodType(cls.forward, module)


def checked_roots(model: nn.Module) -> list[nn.Module]:
    """The roots in `model`.

    Raises:
        UnsupportedModelError: there is none.
    """
    found = roots(model)
    if not found:
        raise UnsupportedModelError(
            f"model: expected a model of {families_text()}, or a module that contains one, "
            f"got a {type(model).__name__} in which none has a forward for graphs"
        )
    return found


def is_patched(model: nn.Module) -> bool:
    """Whether any module in `model` has a fast class."""
    return any(kind_of(module) in BY_FAST for module in model.modules())


def graphs_of(module: nn.Module) -> Graphs | None:
    """The graphs of a module whose forward may be replayed, else None."""
    return vars(module).get(ATTRIBUTE) if _is_graphed(module) else None


def graphed_modules(model: nn.Module) -> list[nn.Module]:
    """Every module in `model` with a class for graphs: more than the roots, if a graphed model became a part of another."""
    return [module for module in model.modules() if _is_graphed(module)]


def _is_graphed(module: nn.Module) -> bool:
    return base_of(type(module)) is not kind_of(module)


def all_options(model: nn.Module) -> dict[nn.Module, Options]:
    """The options of every module in `model` that has graphs."""
    return {module: graphs.options for module in graphed_modules(model) if (graphs := graphs_of(module)) is not None}
