"""AdamW whose step is one kernel over all parameters of all groups."""

import logging
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import _device_dtype_check_for_fused

# fastbert.kernels is imported inside the step: it brings in triton (see fastbert/patch.py).

logger = logging.getLogger("fastbert")
_HALVES = (torch.float16, torch.bfloat16)
_MASTER_STATE = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "master")


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW, with the whole step in one Triton launch.

    Arguments, checks, parameter groups, hooks, closures and schedulers are torch's, and so is the state: a state_dict
    of either loads into the other. There is one launch for each device and combination of dtypes, amsgrad and 16-byte
    alignment among the parameters. A learning rate that changes every step recompiles and rebuilds nothing. Where no
    kernel can run (a CPU, float8, a GPU older than sm_80, a kernel that does not compile), torch's own AdamW steps on the
    same state.

    Numerics: elements are computed in float32 (float64 parameters in float64) and rounded where they are stored, which
    is what torch's `fused=True` does; float32 parameters and state stay within 1e-6 of torch's over 100 steps. In
    float16 and bfloat16 that is closer to exact than torch's default, which rounds after every operation.

    GradScaler passes `grad_scale` and `found_inf` to the kernel, without a synchronisation; a step with an infinite
    gradient changes nothing. `step` lives on the parameter's device, and in a state_dict where torch has it.

    Args:
        params: parameters, named parameters, or groups, for example of `fastbert.param_groups`.
        lr, betas: floats, or tensors of one element, which are read on their device.
        eps, weight_decay, amsgrad, maximize: as in torch.optim.AdamW.
        capturable: steps may be captured in CUDA graphs, as many as one likes, after one step outside that creates the
            state. A graph holds the numbers of its capture and the addresses of its gradients, and the optimizer holds
            nothing for it; an lr that has to change between replays is a tensor on the device.
        foreach, fused: ignored, because they choose among torch's implementations.
        differentiable: False; the kernel has no derivative.
        master_weights: keep fp16 and bf16 parameters' moments and a copy of the parameter ("master") in float32, in
            state and state_dict; the copy is updated, and the parameter is it rounded. 28 bytes a parameter.

    Raises:
        ValueError: what torch.optim.AdamW raises for; `differentiable=True`.
        RuntimeError (step): a sparse gradient or a complex parameter; a captured step without state.

    Loshchilov and Hutter, arXiv:1711.05101.
    """

    # GradScaler then hands over grad_scale and found_inf instead of reading the latter on the host.
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
                _say_ignored(name)
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, capturable=capturable)
        self.defaults["master_weights"] = master_weights
        for group in self.param_groups:
            group.setdefault("master_weights", master_weights)
        self._forget_tables()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("master_weights", self.defaults.get("master_weights", False))
            for param in group["params"]:
                if "step" in self.state.get(param, ()):
                    own = self.state[param]
                    own["step"] = own["step"].to(device=param.device, dtype=torch.float32)
        self._forget_tables()

    def _forget_tables(self) -> None:
        self._tables: Any = None

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.AdamW's: `step` is on the CPU, except in groups that are capturable or fused."""
        found = super().state_dict()
        moved = [i for group in found["param_groups"] if not _step_on_device(group) for i in group["params"]]
        steps = {i: found["state"][i]["step"] for i in moved if "step" in found["state"].get(i, ())}
        if any(step.device.type != "cpu" for step in steps.values()):
            host = torch.stack([step.cpu() if step.device.type == "cpu" else step for step in steps.values()]).cpu()
            # A new dictionary: the one inside is the optimizer's own.
            own = {i: found["state"][i] | {"step": step.clone()} for i, step in zip(steps, host, strict=True)}
            found["state"] = found["state"] | own
        return found

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what this class or torch.optim.AdamW saved; float32 moments and masters stay float32.

        Without saved masters, a group with master_weights starts them from its parameters.
        """
        super().load_state_dict(state_dict)
        # torch has cast all state to the parameter's dtype: where masters are kept, the saved values once more.
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        owners = [(param, group) for group in self.param_groups for param in group["params"]]
        for saved_id, (param, group) in zip(saved_ids, owners, strict=True):
            saved = state_dict["state"].get(saved_id, {})
            if not _keeps_master(param, group):
                continue
            for name in _MASTER_STATE:
                if name in saved:
                    self.state[param][name] = saved[name].to(device=param.device, dtype=torch.float32, copy=True)

    @torch.no_grad()
    @torch._disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns the closure's loss, or None without one."""
        _check_capture(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        from fastbert import ops
        from fastbert.dispatch import device_reason

        failed = ops.failures is not None and "adamw_kernel" in ops.failures.reasons
        fast: list[tuple] = []
        for index, group in enumerate(self.param_groups):
            stock = []
            for param in group["params"]:
                grad = param.grad
                if grad is None:
                    continue
                state = self._state_of(param, grad, group)
                if not failed and device_reason(param.device, param.dtype) is None:
                    fast.append((param, grad, state, index))
                else:
                    stock.append((param, state))
            if stock:
                self._step_stock(stock, group)
        if fast:
            try:
                self._step_fast(fast)
            except ops.failures.KernelFailed as failure:
                if ops.failures.strict:
                    raise
                ops.failures.note(failure)
                self._step_left([fast[i] for i in failure.left])
        return loss

    def _state_of(self, param: Tensor, grad: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state, created when its first gradient comes, as torch does."""
        if grad.is_sparse:
            raise RuntimeError("Adam does not support sparse gradients, please consider SparseAdam instead")
        state = self.state[param]
        master = _keeps_master(param, group)
        if not state or (master and "master" not in state):
            if param.is_complex():
                _device_dtype_check_for_fused(param)  # raises
            if _is_capturing(param):
                raise RuntimeError("step: a graph captures steps of an optimizer that has its state: step once before")
            _create_state(state, param, group["amsgrad"], master)
        return state

    def _step_fast(self, found: list[tuple]) -> None:
        from fastbert.kernels.adamw import adamw
        from fastbert.kernels.adamw_table import Hyperparameters, Parameter, Tables

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
            parameters = [_local(p) if _is_distributed(type(p.param)) else p for p in parameters]
        groups = [
            Hyperparameters(group["lr"], *group["betas"], group["eps"], group["weight_decay"], group["maximize"])
            for group in self.param_groups
        ]
        if _is_capturing(found[0][0]):
            tables = Tables(captured=True)  # a graph holds on to what is in them by itself
        else:
            tables = self._tables = self._tables or Tables()
        adamw(
            parameters,
            groups,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            tables=tables,
        )

    def _step_left(self, found: list[tuple]) -> None:
        """torch's own functions for parameters (with state and number of their group) that the kernel failed at."""
        for index, group in enumerate(self.param_groups):
            stock = [(param, state) for param, _, state, own in found if own == index]
            if stock:
                self._step_stock(stock, group)

    def _step_stock(self, found: list[tuple], group: dict[str, Any]) -> None:
        """torch's own functions, on the same state."""
        scaling = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        params = [state.get("master", param) for param, state in found]
        grads = [param.grad.to(own.dtype) for (param, _), own in zip(found, params, strict=True)]
        states = [state for _, state in found]
        adam(
            params,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            # Only torch's fused implementation takes these two, and steps that are not on the CPU without waiting.
            fused=True if any(t is not None for t in scaling.values()) or not params[0].is_cpu else group["fused"],
            foreach=group["foreach"],
            capturable=group["capturable"],
            **scaling,
            decoupled_weight_decay=True,
            amsgrad=group["amsgrad"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=group["maximize"],
        )
        for (param, state), own in zip(found, params, strict=True):
            if "master" in state:
                param.copy_(own)


def _create_state(state: dict[str, Tensor], param: Tensor, amsgrad: bool, master: bool) -> None:
    dtype = torch.float32 if master else param.dtype
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if amsgrad else 2]:
            state[name] = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
    if master:
        state["master"] = param.detach().to(dtype=dtype, copy=True)


def _keeps_master(param: Tensor, group: dict[str, Any]) -> bool:
    return group["master_weights"] and param.dtype in _HALVES


@cache
def _is_distributed(cls: type) -> bool:
    """Whether it is DTensor, which is not imported here for the sake of those without."""
    return hasattr(cls, "to_local")


def _local(parameter: Any) -> Any:
    """The part of a distributed parameter that is here, with its state; the gradient is distributed as the parameter is."""
    param, grad = parameter.param, parameter.grad
    if grad.placements != param.placements:
        parameter = parameter._replace(grad=grad.redistribute(param.device_mesh, param.placements))
    return type(parameter)(*(x.to_local() if hasattr(x, "to_local") else x for x in parameter))


def _step_on_device(group: dict[str, Any]) -> bool:
    return bool(group["capturable"] or group["fused"])


def _is_capturing(param: Tensor) -> bool:
    return param.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_capture(groups: list[dict[str, Any]]) -> None:
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    if capturing and not all(group["capturable"] for group in groups):
        raise RuntimeError("capturable: expected True for a step that a CUDA graph captures, got False")


@cache
def _say_ignored(name: str) -> None:
    logger.warning("fastbert.AdamW: %s is ignored, for it chooses among torch's implementations and there is one here", name)
