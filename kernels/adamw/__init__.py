"""AdamW (decoupled weight decay) over all parameters of all groups in one launch.

For each element, with g the gradient (negated where the group maximizes) and t the number of steps, including this one:

    p  = p (1 - lr weight_decay)
    m  = beta1 m + (1 - beta1) g
    v  = beta2 v + (1 - beta2) g^2
    p -= lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

amsgrad takes the square root of the largest v so far. In float32 a step moves 28 bytes per parameter: it reads p, g, m, v and
writes p, m, v. A program finds its tensors in the tables of tables.py. Steps with a GradScaler never wait for the device.

Elements are computed in float32 (float64 for float64) and rounded when they are stored, as in torch's fused AdamW; factors that
a whole tensor shares are computed in float64. Loshchilov and Hutter, arXiv:1711.05101; amsgrad: Reddi, Kale and Kumar,
arXiv:1904.09237.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..core.failures import KernelFailed
from ..core.launch import accumulator, launch
from .tables import COLUMNS, Hyperparameters, LaunchTable, Parameter, Tables

__all__ = ["adamw"]

_TYPES = {torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_COLUMNS: tl.constexpr = tl.constexpr(COLUMNS)


@triton.jit
def _pointer(row_ptr, column: tl.constexpr, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of the tensor in this column of the row. Without the hint it is read 4 bytes at a time."""
    pointer = tl.load(row_ptr + column).to(tl.pointer_type(TYPE)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _update(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    max_exp_avg_sq_ptr,
    master_ptr,
    offsets,
    mask,
    scale,
    sign,
    decay,
    beta1,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    step_size,
    correction,
    eps,
    UNSCALE: tl.constexpr,
    ACC: tl.constexpr,
):
    grad = tl.load(grad_ptr + offsets, mask, other=0.0).to(ACC)
    exp_avg = tl.load(exp_avg_ptr + offsets, mask, other=0.0).to(ACC)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask, other=0.0).to(ACC)
    if master_ptr is not None:
        param = tl.load(master_ptr + offsets, mask, other=0.0).to(ACC)
    else:
        param = tl.load(param_ptr + offsets, mask, other=0.0).to(ACC)

    if UNSCALE:
        grad = tl.div_rn(grad, scale) if grad.dtype == tl.float32 else grad / scale
        tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask)
    grad *= sign
    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * (grad * grad)
    largest = exp_avg_sq
    if max_exp_avg_sq_ptr is not None:
        largest = tl.load(max_exp_avg_sq_ptr + offsets, mask, other=0.0).to(ACC)
        largest = tl.maximum(largest, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
        tl.store(max_exp_avg_sq_ptr + offsets, largest.to(max_exp_avg_sq_ptr.dtype.element_ty), mask)
    if grad.dtype == tl.float32:
        # The approximate square root flushes denormals to 0, and with eps = 0 their updates would be infinite.
        update = tl.div_rn(exp_avg, tl.sqrt_rn(largest) * correction + eps)
    else:
        update = exp_avg / (tl.sqrt(largest) * correction + eps)
    param = param * decay - step_size * update

    tl.store(exp_avg_ptr + offsets, exp_avg.to(exp_avg_ptr.dtype.element_ty), mask)
    tl.store(exp_avg_sq_ptr + offsets, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), mask)
    if master_ptr is not None:
        tl.store(master_ptr + offsets, param.to(master_ptr.dtype.element_ty), mask)
    tl.store(param_ptr + offsets, param.to(param_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["n_rows"])
def adamw_kernel(
    rows_ptr,
    chunks_ptr,
    hyperparameters_ptr,
    done_ptr,
    grad_scale_ptr,
    found_inf_ptr,
    n_rows,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    EXP_AVG: tl.constexpr,
    EXP_AVG_SQ: tl.constexpr,
    MAX_EXP_AVG_SQ: tl.constexpr,
    MASTER: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row_ptr = rows_ptr + tl.load(chunks_ptr + 2 * program) * _COLUMNS
    start = tl.load(chunks_ptr + 2 * program + 1)
    n = tl.minimum(tl.load(row_ptr + 7) - start, BLOCK_M * BLOCK_N).to(tl.int32)
    group_ptr = hyperparameters_ptr + tl.load(row_ptr + 8) * 6
    step = tl.load(tl.load(row_ptr + 6).to(tl.pointer_type(tl.float32)))
    finite = True
    if found_inf_ptr is not None:
        finite = tl.load(found_inf_ptr) == 0.0

    if finite:
        lr = tl.load(group_ptr)
        beta1 = tl.load(group_ptr + 1)
        beta2 = tl.load(group_ptr + 2)
        eps = tl.load(group_ptr + 3).to(ACC)
        decay = (1.0 - lr * tl.load(group_ptr + 4)).to(ACC)
        sign = (1.0 - 2.0 * tl.load(group_ptr + 5)).to(ACC)
        t = step.to(tl.float64) + 1.0
        step_size = (lr / (1.0 - tl.exp2(t * tl.log2(beta1)))).to(ACC)
        correction = (1.0 / tl.sqrt(1.0 - tl.exp2(t * tl.log2(beta2)))).to(ACC)
        one_minus_beta1 = (1.0 - beta1).to(ACC)
        one_minus_beta2 = (1.0 - beta2).to(ACC)
        beta1 = beta1.to(ACC)
        beta2 = beta2.to(ACC)
        scale = 1.0
        if grad_scale_ptr is not None:
            scale = tl.load(grad_scale_ptr).to(ACC)
        param_ptr = _pointer(row_ptr, 0, start, PARAM, ALIGNED)
        grad_ptr = _pointer(row_ptr, 1, start, GRAD, ALIGNED)
        exp_avg_ptr = _pointer(row_ptr, 2, start, EXP_AVG, ALIGNED)
        exp_avg_sq_ptr = _pointer(row_ptr, 3, start, EXP_AVG_SQ, ALIGNED)
        max_exp_avg_sq_ptr = None
        if MAX_EXP_AVG_SQ is not None:
            max_exp_avg_sq_ptr = _pointer(row_ptr, 4, start, MAX_EXP_AVG_SQ, ALIGNED)
        master_ptr = None
        if MASTER is not None:
            master_ptr = _pointer(row_ptr, 5, start, MASTER, ALIGNED)

        # A mask that is uniform per vector allows vector loads, so the loop ends at a multiple of 16 elements; the rest
        # follows.
        whole = n
        if ALIGNED:
            whole = tl.multiple_of(n // 16 * 16, 16)
        for first in range(0, whole, BLOCK_N):
            offsets = first + tl.arange(0, BLOCK_N)
            _update(
                param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, master_ptr,
                offsets, offsets < whole, scale, sign, decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
                step_size, correction, eps, grad_scale_ptr is not None, ACC,
            )  # fmt: skip
        if ALIGNED:
            if whole < n:
                offsets = whole + tl.arange(0, 16)
                _update(
                    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, master_ptr,
                    offsets, offsets < n, scale, sign, decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
                    step_size, correction, eps, grad_scale_ptr is not None, ACC,
                )  # fmt: skip

    # The last program to finish increments the steps: by then all others have read them.
    tl.debug_barrier()
    if tl.atomic_add(done_ptr, 1) == tl.num_programs(0) - 1:
        tl.store(done_ptr, 0)
        if finite:
            for first in range(0, n_rows, 128):
                rows = first + tl.arange(0, 128)
                mask = rows < n_rows
                address = tl.load(rows_ptr + rows * _COLUMNS + 6, mask, other=0)
                step_ptr = address.to(tl.pointer_type(tl.float32))
                tl.store(step_ptr, tl.load(step_ptr, mask, other=0.0) + 1.0, mask)


def _launch(table: LaunchTable, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    kind, config = table.kind, table.config
    grad_scale, found_inf = (None if t is None else t.to(kind.device, non_blocking=True) for t in (grad_scale, found_inf))
    table.copy_in()
    launch(
        adamw_kernel,
        table.chunks.shape[0],
        config,
        table.like,
        rows_ptr=table.rows.tensor,
        chunks_ptr=table.chunks,
        hyperparameters_ptr=table.hyperparameters.tensor,
        done_ptr=table.done,
        grad_scale_ptr=grad_scale,
        found_inf_ptr=found_inf,
        n_rows=table.n_rows,
        PARAM=_TYPES[kind.param],
        GRAD=_TYPES[kind.grad],
        EXP_AVG=_TYPES[kind.exp_avg],
        EXP_AVG_SQ=_TYPES[kind.exp_avg_sq],
        MAX_EXP_AVG_SQ=_TYPES.get(kind.max_exp_avg_sq),
        MASTER=_TYPES.get(kind.master),
        ALIGNED=kind.aligned,
        ACC=accumulator(kind.master or kind.param),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
    )
    table.copy_out(unscaled=grad_scale is not None)


def adamw(
    parameters: Sequence[Parameter],
    groups: Sequence[Hyperparameters],
    *,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    tables: Tables | None = None,
) -> None:
    """One step of AdamW, in place: parameters, moments, master weights and steps.

    One launch per device and per combination of dtypes, amsgrad and 16-byte alignment among the parameters.

    Args:
        parameters: each with its gradient and state; all but `step` (float32 []) have the parameter's shape. fp32, fp16 or bf16
            (in the interpreter fp64 too), any strides. `master`, the parameter in a higher precision, is updated and
            rounded into the parameter.
        groups: hyperparameters; `Parameter.group` is an index into them.
        grad_scale: fp32 []: gradients are divided by it first and stored so, as in torch's fused AdamW.
        found_inf: fp32 []: if it is not 0, nothing changes.
        tables: the tables of an earlier call, which are brought up to date. A call that a CUDA graph captures needs
            Tables(captured=True) of its own.

    Raises:
        ValueError: a dtype without a kernel; a tensor of another size or on another device than its parameter.
        KernelFailed: a launch failed; its attribute `left` has the indices of the parameters that were not updated.
    """
    tables = Tables() if tables is None else tables
    tables.refresh(parameters, groups)
    launch_all(tables, grad_scale, found_inf)


def launch_all(tables: Tables, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    """Run the step that `tables` describe, which must be up to date. Raises KernelFailed, as adamw does."""
    for done, table in enumerate(tables.launches):
        try:
            _launch(table, grad_scale, found_inf)
        except KernelFailed as failure:
            failure.left = [index for other in tables.launches[done:] for index in other.indices]
            raise
