"""AdamW: the kernel, its tables, the optimizer around it, and parameter groups."""

from functools import partial

from tests.mutation.fault import Fault

KERNEL = "tests/kernels/adamw/test_adamw.py"
OPTIMIZER = "tests/optim/test_adamw.py"
STATE = "tests/optim/test_state_dict.py"
HOST = "tests/optim/test_host.py"
FORMS = "tests/kernels/core/test_tensor_forms.py"
GROUPS = "tests/optim/test_groups.py"
CAPTURE = "tests/optim/test_capture.py"
FAILING = "tests/faults/test_kernel_fails.py"

_kernel = partial(Fault, file="kernels/adamw/__init__.py", op="adamw")
_table = partial(Fault, file="kernels/adamw/tables.py", op="adamw")
_forms = partial(Fault, file="kernels/core/tensor_forms.py", op="adamw")
_optimizer = partial(Fault, file="fastbert/optim.py")
_failures = partial(Fault, file="kernels/core/failures.py")
_groups = partial(Fault, file="fastbert/groups.py")

FAULTS = (
    _kernel(
        "the bias correction is that of the previous step",
        before="t = step.to(tl.float64) + 1.0",
        after="t = tl.maximum(step.to(tl.float64), 1.0)",
        tests=(f"{OPTIMIZER}::test_groups_with_numbers_of_their_own",),
        short=True,
    ),
    _kernel(
        "weight decay goes into the gradient",
        before="    grad *= sign\n",
        after="    grad = grad * sign + (1.0 - decay) * param\n",
        tests=(f"{KERNEL}::test_one_step",),
        short=True,
    ),
    _kernel(
        "amsgrad keeps the largest square of a gradient",
        before="largest = tl.maximum(largest, exp_avg_sq, ",
        after="largest = tl.maximum(largest, grad * grad, ",
        tests=(f"{OPTIMIZER}::test_groups_that_differ_in_amsgrad",),
    ),
    _kernel(
        "eps is inside the root",
        before="tl.sqrt_rn(largest) * correction + eps)",
        after="tl.sqrt_rn(largest + eps) * correction)",
        tests=(f"{KERNEL}::test_one_step",),
    ),
    _kernel(
        "steps are not counted",
        before="mask, other=0.0) + 1.0, mask)",
        after="mask, other=0.0) + 0.0, mask)",
        tests=(f"{KERNEL}::test_one_step",),
    ),
    _kernel(
        "steps are counted for the first 128 tensors only",
        before="for first in range(0, n_rows, 128):",
        after="for first in range(0, 128, 128):",
        tests=(f"{KERNEL}::test_steps_of_many_tensors_are_counted",),
    ),
    _kernel(
        "maximize is ignored",
        before="sign = (1.0 - 2.0 * tl.load(group_ptr + 5)).to(ACC)",
        after="sign = (1.0 - 0.0 * tl.load(group_ptr + 5)).to(ACC)",
        tests=(f"{OPTIMIZER}::test_groups_with_numbers_of_their_own",),
    ),
    _kernel(
        "found_inf is ignored",
        before="finite = tl.load(found_inf_ptr) == 0.0",
        after="finite = tl.load(found_inf_ptr) >= 0.0",
        tests=(f"{KERNEL}::test_found_inf_changes_nothing",),
    ),
    _kernel(
        "a chunk's last element is not updated if it is one past a vector",
        before="if whole < n:",
        after="if whole + 1 < n:",
        tests=(f"{KERNEL}::test_one_step", f"{KERNEL}::test_more_programs_than_one_a_tensor"),
    ),
    _kernel(
        "every parameter steps by the first group's numbers",
        before="group_ptr = hyperparameters_ptr + tl.load(row_ptr + 8) * 6",
        after="group_ptr = hyperparameters_ptr + tl.load(row_ptr + 8) * 0",
        tests=(f"{OPTIMIZER}::test_groups_with_numbers_of_their_own",),
    ),
    _kernel(
        "the unscaled gradient is not stored",
        before="tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask)",
        after="tl.store(grad_ptr + offsets, grad.to(grad_ptr.dtype.element_ty), mask & False)",
        tests=(f"{KERNEL}::test_grad_scale_divides_and_stores_the_gradient",),
    ),
    _kernel(
        "the rounded parameter is updated, not its master",
        before="param = tl.load(master_ptr + offsets, mask, other=0.0).to(ACC)",
        after="param = tl.load(param_ptr + offsets, mask, other=0.0).to(ACC)",
        tests=(f"{STATE}::test_master_weights",),
    ),
    _table(
        "a gradient that moved off its 16-byte boundary is still loaded as a vector",
        before="return not any([(old - new) % VECTOR_BYTES for old, new in zip(before[moved], pointers[moved], strict=True)])",
        after="return True",
        tests=(f"{KERNEL}::test_a_gradient_that_moves_off_its_boundary_and_back",),
    ),
    _table(
        "a tensor of another dtype at the same address is read as the one before",
        before=" or not self._forms.same(tensors):",
        after=":",
        tests=(f"{KERNEL}::test_a_tensor_that_changes_its_dtype_at_the_same_address",),
    ),
    _table(
        "a master of another dtype at the same address is read as the one before",
        before="found += [tensor for tensor in column if tensor is not None]",
        after="found += []",
        tests=(f"{KERNEL}::test_a_tensor_that_changes_its_dtype_at_the_same_address",),
    ),
    _table(
        "a moment that moved is treated as a gradient that moved",
        before=" or before[moved.stop :] != pointers[moved.stop :]:",
        after=":",
        tests=(f"{HOST}::test_what_is_changed_by_hand_is_noticed",),
    ),
    _table(
        "a parameter that changed its group steps by the numbers of the old one",
        before="self._places != (columns.group, present)",
        after="self._places[1] != present",
        tests=(f"{HOST}::test_what_is_changed_by_hand_is_noticed",),
    ),
    _table(
        "gradients that moved are read at their former address",
        before="            self._send(pointers)\n        return True",
        after="            self._pointers = pointers\n        return True",
        tests=(f"{KERNEL}::test_tables_are_kept_while_nothing_moves", f"{OPTIMIZER}::test_torchs_own_configurations"),
    ),
    _table(
        "launches planned again have no hyperparameters",
        before="self._forms, self._numbers = None, None",
        after="self._forms = None",
        tests=(f"{KERNEL}::test_a_gradient_that_moves_off_its_boundary_and_back",),
    ),
    _forms(
        "a tensor that is cut down at the same address is read past its end",
        before='for name in ("dtype", "device", "layout", "shape")]',
        after='for name in ("dtype", "device", "layout")]',
        tests=(f"{KERNEL}::test_a_tensor_that_is_cut_down_at_the_same_address", FORMS),
    ),
    _forms(
        "tensors that change their strides at the same address are read as before",
        before="found.append([tensor.stride() if tensor.layout is torch.strided else None for tensor in tensors])",
        after="found.append([])",
        tests=(f"{KERNEL}::test_a_tensor_that_changes_its_strides_at_the_same_address",),
    ),
    _forms(
        "torch's guards are used without checking that they work",
        before="return TensorGuards if _notices(TensorGuards) else None",
        after="return TensorGuards",
        tests=(f"{FORMS}::test_a_release_whose_guards_miss_something",),
    ),
    _forms(
        "fewer tensors than there were are compared with the first of them",
        before="if guards is not None and len(tensors) == self._length and guards.check(*tensors):",
        after="if guards is not None and guards.check(*tensors):",
        tests=(f"{FORMS}::test_fewer_more_or_none",),
    ),
    _table(
        "a graph copies its tables from memory of the host",
        before="if self.captured:\n            self.tensor = torch.zeros",
        after="if self.captured and host.dtype == torch.float64:\n            self.tensor = torch.zeros",
        tests=(f"{CAPTURE}::test_captures_in_a_row",),
    ),
    _table(
        "a graph reads the chunks of the host",
        before="        if captured:\n            return _chunks(upload.send(numbers), chunk, programs)\n",
        after="        if captured:\n            return _chunks(numbers, chunk, programs)\n",
        tests=(f"{CAPTURE}::test_captures_in_a_row",),
    ),
    _table(
        "changed hyperparameters are not uploaded",
        before="if numbers != self._numbers:",
        after="if self._numbers is None:",
        tests=(f"{KERNEL}::test_new_numbers_reach_the_kernel",),
    ),
    _table(
        "a copy is not written back to its original",
        before="if column != GRAD or unscaled:",
        after="if column == GRAD and unscaled:",
        tests=(f"{KERNEL}::test_one_tensor_laid_out_unlike_the_others",),
    ),
    _table(
        "a parameter that is listed twice is updated twice at once",
        before="seen[id(parameter.param)] += 1",
        after="seen[id(parameter.param)] += 0",
        tests=(f"{KERNEL}::test_a_parameter_listed_twice_is_updated_twice",),
    ),
    _table(
        "an empty tensor's step is never counted",
        before="counts = ((sizes + (chunk - 1)) // chunk).clamp(min=1)",
        after="counts = (sizes + (chunk - 1)) // chunk",
        tests=(f"{KERNEL}::test_one_step", f"{KERNEL}::test_memory_of_any_form"),
    ),
    _optimizer(
        "a captured step reads the tables that later steps change",
        before="tables = Tables(captured=True)",
        after="tables = self._tables = self._tables or Tables()",
        tests=(f"{CAPTURE}::test_captures_in_a_row",),
    ),
    _optimizer(
        "a captured step is taken for one like the last",
        before="or not all(states) or _is_capturing(params[0]):",
        after="or not all(states):",
        tests=(f"{CAPTURE}::test_captures_in_a_row",),
    ),
    _optimizer(
        "states in another order than the parameters make every step a full step",
        before="        return [self.state.get(param) for param in params]\n",
        after="        return states\n",
        tests=(f"{HOST}::test_no_python_function_runs_for_each_parameter",),
    ),
    _optimizer(
        "masters requested midway are not created",
        before="self._masters != list(map(_has_masters, groups)):",
        after="len(self._masters) != len(groups):",
        tests=(f"{HOST}::test_masters_requested_midway",),
    ),
    _optimizer(
        "masters are loaded in 16 bits",
        before="self.state[param][name] = saved[name].to(device=param.device, dtype=torch.float32, copy=True)",
        after="self.state[param][name] = saved[name].to(device=param.device, dtype=param.dtype).float()",
        tests=(f"{STATE}::test_master_weights_in_a_checkpoint",),
    ),
    _optimizer(
        "amsgrad is the first group's",
        before="if amsgrad[index] else None",
        after="if amsgrad[0] else None",
        tests=(f"{OPTIMIZER}::test_groups_that_differ_in_amsgrad",),
    ),
    _optimizer(
        "a master starts at 0",
        before='made["master"] = param.detach().to(dtype=dtype, copy=True)',
        after='made["master"] = torch.zeros_like(param, dtype=dtype)',
        tests=(f"{STATE}::test_master_weights",),
    ),
    _optimizer(
        "torch's own AdamW, where no kernel runs, does not maximize",
        before='maximize=group["maximize"],\n        )\n        for param, state',
        after="maximize=False,\n        )\n        for param, state",
        tests=("tests/optim/test_stock.py::test_is_torchs",),
    ),
    _optimizer(
        "masters that were loaded overwrite parameters that were written since",
        before="        if self._loaded:\n",
        after="        if False:\n",
        tests=(f"{STATE}::test_a_master_follows_a_parameter_that_was_written_since",),
    ),
    _optimizer(
        "a group without masters has an entry for them, which a checkpoint of torch's AdamW lacks",
        before="        if master_weights:\n",
        after="        if True:\n",
        tests=(f"{STATE}::test_same_layout_as_torchs", "tests/distributed/test_checkpoint.py::test_flat_state_from_stock"),
    ),
    _failures(
        "float64 goes to a kernel on a GPU",
        before="x.dtype == torch.float64 and x.is_cuda",
        after="x.dtype == torch.float64 and x.is_cpu",
        tests=("tests/kernels/test_float64_on_a_gpu.py::test_which_tensors_have_no_kernel",),
    ),
    _failures(
        "float64 on a GPU counts as a kernel that failed",
        before="            if not wide:\n                _count(",
        after="            if wide:\n                _count(",
        tests=("tests/kernels/test_float64_on_a_gpu.py::test_an_op_runs_its_twin",),
    ),
    _failures(
        "an operation that a capture forbids counts as a failed kernel",
        before="others = (*_OF_THE_DEVICE, *_OF_THE_CONTEXT, *_OF_CHECKPOINTING, _OF_A_CAPTURE)",
        after="others = (*_OF_THE_DEVICE, *_OF_THE_CONTEXT, *_OF_CHECKPOINTING)",
        tests=(f"{FAILING}::test_what_a_capture_forbids_is_raised_and_disables_nothing",),
    ),
    _failures(
        "a lost CUDA context counts as a failed kernel",
        before="others = (*_OF_THE_DEVICE, *_OF_THE_CONTEXT, *_OF_CHECKPOINTING, _OF_A_CAPTURE)",
        after="others = (*_OF_THE_DEVICE, *_OF_CHECKPOINTING, _OF_A_CAPTURE)",
        tests=(f"{FAILING}::test_what_a_capture_forbids_is_raised_and_disables_nothing",),
    ),
    _failures(
        "a kernel that fails in a capture is switched off if the error does not speak of captures",
        before="return not (_mentions(error, *others) or _is_capturing(device))",
        after="return not _mentions(error, *others)",
        tests=(f"{FAILING}::test_no_error_inside_a_capture_disables_a_kernel",),
    ),
    _groups(
        "a norm decays unless its name says that it is one",
        before="return inside | {name",
        after="return {name",
        tests=(f"{GROUPS}::test_decays_what_trainer_decays",),
    ),
    _groups(
        "the biases of recurrent layers decay",
        before='r"bias|layernorm|',
        after='r"bias$|layernorm|',
        tests=(f"{GROUPS}::test_decays_what_trainer_decays",),
    ),
    _groups(
        "names without decay are matched anywhere in a name",
        before='any(name == end or name.endswith("." + end) for end in no_decay)',
        after="any(name.endswith(end) for end in no_decay)",
        tests=(f"{GROUPS}::test_whole_parts_of_names",),
    ),
    _groups(
        "rates decay from below the last layer",
        before="lr * layer_decay ** (last - int(found[1]))",
        after="lr * layer_decay ** (last + 1 - int(found[1]))",
        tests=(f"{GROUPS}::test_layer_decay",),
    ),
    _groups(
        "frozen parameters are in a group",
        before="for name, parameter in model.named_parameters() if parameter.requires_grad]",
        after="for name, parameter in model.named_parameters()]",
        tests=(f"{GROUPS}::test_frozen_are_left_out",),
    ),
)
