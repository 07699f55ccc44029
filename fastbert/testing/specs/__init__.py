"""Every op by name: the SPEC of each file in this folder."""

from importlib import import_module
from pkgutil import iter_modules

from ..row_op import RowOp
from ..spec import OpSpec

SPECS: dict[str, OpSpec] = {
    name: import_module(f"{__name__}.{name}").SPEC for name in sorted(module.name for module in iter_modules(__path__))
}
ROW_OPS: tuple[RowOp, ...] = tuple(spec for spec in SPECS.values() if isinstance(spec, RowOp))
