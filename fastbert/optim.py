"""AdamW whose step is one kernel launch over all parameters of all groups.

The step works on whole lists: which parameters have gradients, where their tensors are and what forms they have is compared
in a few C calls, because a Python loop over parameters takes longer than torch's optimizer. A step in which nothing changed
is one launch and no ATen call (tests/optim/test_host.py). Steps with a GradScaler never wait for the device.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import _device_dtype_check_for_fused

from fastbert.kernels.core.collectives import is_pending, waited

# The other kernels are imported inside the step: they import triton (see fastbert/patch.py).

logger = logging.getLogger("fastbert")
_HALVES = (torch.float16, torch.bfloat16)
_MASTER_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, with the whole step in one Triton launch.

    Arguments, checks, parameter groups, hooks, closures and schedulers are torch's, and so is the state: a state_dict
    of either loads into the other. There is one launch per device and combination of dtypes, amsgrad and 16-byte
    alignment among the parameters. A learning rate that changes every step recompiles and rebuilds nothing. If no kernel
    can run (a CPU, float8, float64, a GPU older than sm_80, a kernel that does not compile), the step falls back to
    torch's own AdamW on the same state.

    Numerics: elements are computed in float32 and rounded when they are stored, as torch's `fused=True` does; float32
    parameters and state stay within 1e-6 of torch's over 100 steps. In float16 and bfloat16 that is more accurate than
    torch's default, which rounds after every operation.

    GradScaler passes `grad_scale` and `found_inf` to the kernel without a synchronisation; a step with an infinite
    gradient changes nothing. The `step` tensor is on the parameter's device; in a state_dict it is where torch has it.

    Args:
        params: parameters, named parameters, or groups, for example from `fastbert.param_groups`.
        lr: a float, or a tensor of one element, which is read on its device.
        betas: likewise, two of them.
        eps: as in torch.optim.AdamW.
        weight_decay: as in torch.optim.AdamW.
        amsgrad: as in torch.optim.AdamW.
        maximize: as in torch.optim.AdamW.
        capturable: allow steps to be captured in CUDA graphs, in any number, after one step outside a graph that creates
            the state. A graph holds the hyperparameters of its capture and the addresses of its gradients, and the
            optimizer holds nothing for it. An lr that changes between replays must be a tensor on the device.
        foreach: ignored, because it chooses among torch's implementations.
        fused: ignored likewise.
        differentiable: must be False; the kernel has no derivative.
        master_weights: keep the moments of fp16 and bf16 parameters and a copy of the parameter ("master") in float32, in
            state and state_dict. The step updates the copy and rounds it into the parameter. 28 bytes per parameter.

    Raises:
        ValueError: as torch.optim.AdamW; `differentiable=True`.
        RuntimeError: in `step`: a sparse gradient or a complex parameter; a captured step without state.

    Loshchilov and Hutter, arXiv:1711.05101.
    """

    # With it, GradScaler passes grad_scale and found_inf to the step instead of reading found_inf on the host.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        master_weights: bool = False,
    ) -> None:
        if differentiable:
            raise ValueError("differentiable: expected False, got True: the kernel has no derivative; use torch.optim.AdamW")
        for name, value in (("foreach", foreach), ("fused", fused)):
            if value:
                _log_ignored(name)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable)
        if master_weights:
            self.defaults["master_weights"] = True
            self._set_masters()
        self._reset_tables()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "master_weights" in self.defaults:
            self._set_masters()
        for group in self.param_groups:
            for param in group["params"]:
                if "step" in self.state.get(param, ()):
                    own = self.state[param]
                    own["step"] = own["step"].to(device=param.device, dtype=torch.float32)
        self._reset_tables()

    def _set_masters(self) -> None:
        """A group without masters has no entry for them, as torch.distributed.checkpoint loads only what a checkpoint has."""
        for group in self.param_groups:
            group.setdefault("master_weights", True)

    def _reset_tables(self) -> None:
        self._tables: Any = None
        # Which groups keep masters as of the last step; None unless that step launched the kernel.
        self._masters: list[bool] | None = None
        self._loaded = False  # whether masters were loaded since the last step

    def state_dict(self) -> dict[str, Any]:
        """The state_dict of torch.optim.AdamW: `step` is on the CPU, except in groups that are capturable or fused."""
        found = super().state_dict()
        moved = [i for group in found["param_groups"] if not _step_on_device(group) for i in group["params"]]
        steps = {i: found["state"][i]["step"] for i in moved if "step" in found["state"].get(i, ())}
        if any(step.device.type != "cpu" for step in steps.values()):
            host = torch.stack([step.cpu() if step.device.type == "cpu" else step for step in steps.values()]).cpu()
            # A new dictionary, because the nested one is the optimizer's own.
            own = {i: found["state"][i] | {"step": step.clone()} for i, step in zip(steps, host, strict=True)}
            found["state"] = found["state"] | own
        return found

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state_dict of this class or of torch.optim.AdamW; float32 moments and masters stay float32.

        If no masters were saved, a group with master_weights initialises them from its parameters. The next step also takes
        from its parameter what a loaded master does not round to: the parameter was written since, or the masters are those
        of another checkpoint (torch.distributed.checkpoint fills in what a checkpoint lacks from the optimizer itself).
        """
        super().load_state_dict(state_dict)
        # torch has cast all state to the parameter's dtype; where masters are kept, restore the saved values.
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        owners = [(param, group) for group in self.param_groups for param in group["params"]]
        for saved_id, (param, group) in zip(saved_ids, owners, strict=True):
            saved = state_dict["state"].get(saved_id, {})
            if not _keeps_master(param, group):
                continue
            for name in _MASTER_STATE:
                if name in saved:
                    self._loaded = self._loaded or name == "master"
                    self.state[param][name] = saved[name].to(device=param.device, dtype=torch.float32, copy=True)

    @torch.no_grad()
    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one optimization step; returns the closure's loss, or None without a closure.

        Raises:
            RuntimeError: a sparse gradient, a complex parameter, or a captured step without state or capturable=True.
        """
        _check_capture(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._loaded:
            self._match_masters()

        from fastbert import ops

        failed = ops.failures is not None and "adamw_kernel" in ops.failures.reasons
        if failed or not self._repeat_step():
            self._full_step(failed)
        return loss

    def _match_masters(self) -> None:
        self._loaded = False
        for param, state in self.state.items():
            if "master" in state:
                param, master = (x.to_local() if _is_distributed(type(x)) else x for x in (param, state["master"]))
                master.copy_(torch.where(master.to(param.dtype) == param, master, param.float()))

    def _repeat_step(self) -> bool:
        """Take a step with the same parameters as the last one; return False, with nothing changed, if they differ.

        It compares whole lists, because a loop over parameters would take longer than torch's optimizer.
        """
        groups = self.param_groups
        if self._masters is None or self._masters != list(map(_has_masters, groups)):
            return False
        params = [param for group in groups for param in group["params"]]
        owners = [index for index, group in enumerate(groups) for _ in group["params"]]
        every = [param.grad for param in params]
        grads = [grad for grad in every if grad is not None]
        if len(grads) < len(every):
            params = [param for param, grad in zip(params, every, strict=True) if grad is not None]
            owners = [index for index, grad in zip(owners, every, strict=True) if grad is not None]
        states = self._states_of(params)
        if not grads or not all(states) or _is_capturing(params[0]):
            return False

        from fastbert.kernels.adamw import launch_all

        if not self._tables.follow(_columns(params, grads, states, owners, [group["amsgrad"] for group in groups])):
            return False
        self._tables.set_hyperparameters(self._hyperparameters())
        with self._falling_back_to_torch(lambda: list(zip(params, grads, states, owners, strict=True))):
            launch_all(self._tables, **self._scaling())
        return True

    def _states_of(self, params: list[Tensor]) -> list[dict[str, Tensor] | None]:
        states = list(self.state.values())  # in the order in which parameters first had gradients
        if len(states) == len(params) and all(map(is_, self.state, params)):
            return states
        return [self.state.get(param) for param in params]

    def _full_step(self, failed: bool) -> None:
        """Take any step: choose kernel or torch per parameter, and create the state of those with a first gradient."""
        from fastbert.dispatch import device_reason

        self._masters = None
        fast: list[tuple] = []
        # Nothing is stepped before all state exists: if memory runs out, the step can be repeated.
        stock_of_groups: list[tuple[list[tuple], dict[str, Any]]] = []
        for index, group in enumerate(self.param_groups):
            stock: list[tuple] = []
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                if is_pending(type(grad)):
                    grad = param.grad = waited((grad,))[0]
                state = self._state_of(param, grad, group)
                if not failed and device_reason(param.device, param.dtype) is None:
                    fast.append((param, grad, state, index))
                else:
                    stock.append((param, state))
            if stock:
                stock_of_groups.append((stock, group))
        for stock, group in stock_of_groups:
            self._step_stock(stock, group)
        if fast:
            with self._falling_back_to_torch(lambda: fast):
                self._step_fast(fast)
            if self._tables is not None and not any(_is_distributed(type(param)) for param, *_ in fast):
                self._masters = list(map(_has_masters, self.param_groups))

    def _state_of(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state, created at its first gradient, as in torch."""
        if grad.is_sparse:
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        state = self.state[param]
        master = _keeps_master(param, group)
        if not state or (master and "master" not in state):
            if param.is_complex():
                _device_dtype_check_for_fused(param)  # raises
            if _is_capturing(param):
                raise RuntimeError("step: an optimizer without state cannot be captured in a graph: take one step before")
            _create_state(state, param, group["amsgrad"], master)
        return state

    def _step_fast(self, found: list[tuple]) -> None:
        from fastbert.kernels.adamw import adamw
        from fastbert.kernels.adamw.tables import Parameter, Tables

        amsgrad = [group["amsgrad"] for group in self.param_groups]
        parameters = [
            Parameter(
                param,
                grad,
                state["exp_avg"],
                state["exp_avg_sq"],
                state["step"],
                state["max_exp_avg_sq"] if amsgrad[index] else None,
                state.get("master"),
                index,
            )
            for param, grad, state, index in found
        ]
        if any(map(_is_distributed, {type(parameter.param) for parameter in parameters})):
            parameters = [Parameter._make(_local(*parameter)) for parameter in parameters]
        if _is_capturing(found[0][0]):
            tables = Tables(captured=True)  # the graph itself keeps their contents
        else:
            tables = self._tables = self._tables or Tables()
        adamw(parameters, self._hyperparameters(), **self._scaling(), tables=tables)

    def _hyperparameters(self) -> list[Any]:
        from fastbert.kernels.adamw.tables import Hyperparameters

        return [
            Hyperparameters(group["lr"], beta1, beta2, group["eps"], group["weight_decay"], group["maximize"])
            for group in self.param_groups
            for beta1, beta2 in [group["betas"]]
        ]

    def _scaling(self) -> dict[str, Tensor | None]:
        return {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}

    @contextmanager
    def _falling_back_to_torch(self, found: Callable[[], list[tuple]]) -> Iterator[None]:
        """Wraps the kernel: if it fails, torch's own functions step the parameters in `found` that it did not update."""
        from fastbert import ops

        try:
            yield
        except ops.failures.KernelFailed as failure:
            if ops.failures.strict:
                raise
            ops.failures.record(failure)
            stepped = found()
            left = [stepped[i] for i in failure.left]
            for index, group in enumerate(self.param_groups):
                stock = [(param, state) for param, _, state, own in left if own == index]
                if stock:
                    self._step_stock(stock, group)

    def _step_stock(self, found: list[tuple], group: dict[str, Any]) -> None:
        """Step with torch's own functions, on the same state."""
        scaling = self._scaling()
        names = ("exp_avg", "exp_avg_sq", "step", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
        # As shards, because torch's functions take no list of DTensors and other tensors.
        rows = [
            _local(param, param.grad, state.get("master", param), *(state[name] for name in names)) for param, state in found
        ]
        _, grads, params, exp_avg, exp_avg_sq, step, *largest = map(list, zip(*rows, strict=True))
        adam(
            params,
            [grad.to(param.dtype) for param, grad in zip(params, grads, strict=True)],
            exp_avg,
            exp_avg_sq,
            largest[0] if largest else [],
            step,
            # Only torch's fused implementation takes the scaling tensors and reads `step` on a device without waiting.
            fused=True if any(t is not None for t in scaling.values()) or not params[0].is_cpu else group["fused"],
            foreach=group["foreach"],
            capturable=group["capturable"],
            grad_scale=scaling["grad_scale"],
            found_inf=scaling["found_inf"],
            decoupled_weight_decay=True,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        for param, state in found:
            if "master" in state:
                param.copy_(state["master"])


def _columns(params: list[Tensor], grads: list[Tensor], states: list[Any], owners: list[int], amsgrad: list[bool]) -> Any:
    """The tensors of a step, as columns; `owners` are indices into `amsgrad`."""
    from fastbert.kernels.adamw.tables import Columns

    exp_avg = [state["exp_avg"] for state in states]
    exp_avg_sq = [state["exp_avg_sq"] for state in states]
    step = [state["step"] for state in states]
    largest: list[Tensor | None] | None = None
    if any(amsgrad):
        largest = [state["max_exp_avg_sq"] if amsgrad[own] else None for state, own in zip(states, owners, strict=True)]
    masters = [state.get("master") for state in states]
    kept = any([master is not None for master in masters])  # a list comprehension takes half as long as a generator
    return Columns(params, grads, exp_avg, exp_avg_sq, step, largest, masters if kept else None, owners)


def _create_state(state: dict[str, Tensor], param: Tensor, amsgrad: bool, master: bool) -> None:
    """Fill `state`, or leave it as it is if memory runs out."""
    dtype = torch.float32 if master else param.dtype
    made: dict[str, Tensor] = {}
    if not state:
        made["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]:
            made[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if master:
        made["master"] = param.detach().to(dtype=dtype, copy=True)
    state.update(made)


def _has_masters(group: dict[str, Any]) -> bool:
    return group.get("master_weights", False)


def _keeps_master(param: Tensor, group: dict[str, Any]) -> bool:
    return _has_masters(group) and param.dtype in _HALVES


@cache
def _is_distributed(cls: type) -> bool:
    """Whether `cls` is a DTensor class, which is not imported here because a torch build may lack it."""
    return hasattr(cls, "to_local")


def _local(param: Any, grad: Any, *state: Any) -> tuple[Any, ...]:
    """A parameter, its gradient and its state; of a distributed one the local shards, the gradient's as the parameter's are."""
    if not _is_distributed(type(param)):
        return param, grad, *state
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return tuple(waited([x.to_local() if hasattr(x, "to_local") else x for x in (param, grad, *state)]))


def _step_on_device(group: dict[str, Any]) -> bool:
    return bool(group["capturable"] or group["fused"])


def _is_capturing(param: Tensor) -> bool:
    return param.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_capture(groups: list[dict[str, Any]]) -> None:
    capturing = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if capturing and not all(group["capturable"] for group in groups):
        raise RuntimeError("capturable: expected True for a step that a CUDA graph captures, got False")


@cache
def _log_ignored(name: str) -> None:
    logger.warning("fastbert.AdamW: %s is ignored, because it chooses among torch's implementations", name)
