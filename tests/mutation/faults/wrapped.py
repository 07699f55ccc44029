"""Faults in how fastbert looks through what engines put over a model, killed in one process."""

from tests.mutation.fault import Fault

TESTS = "tests/distributed/test_wrapped.py"
SHARDED = f"{TESTS}::test_a_sharded_model_is_patched_and_unpatched"

FAULTS = [
    Fault(
        "a sharded module loses FSDP2's class when it is patched",
        file="fastbert/dispatch.py",
        before="module.__class__ = with_base(type(module), cls)",
        after="module.__class__ = cls",
        tests=(SHARDED,),
    ),
    Fault(
        "a part is not recognised under FSDP2's class",
        file="fastbert/layers/stock.py",
        before="return _parts.get(cls) or _parts.get(base_of(cls), _NONE)",
        after="return _parts.get(cls, _NONE)",
        tests=(SHARDED,),
    ),
    Fault(
        "FSDP2's hooks keep an encoder from packing",
        file="fastbert/layers/encoder.py",
        before="if any([hooked(module, _IDLE) for module in around])",
        after="if any([hooked(module) for module in around])",
        tests=(f"{SHARDED}[single-label]",),
    ),
    Fault(
        "an MLM head that was sharded before it was patched stays stock",
        file="fastbert/layers/mlm_heads.py",
        before='(is_plain_tensor(decoder.weight) or hasattr(decoder.weight, "to_local"))',
        after="is_plain_tensor(decoder.weight)",
        tests=(f"{SHARDED}[mlm]",),
    ),
    Fault(
        "a wrapped layer that is no op is packed",
        file="fastbert/layers/encoder.py",
        before="reason = _layer_reason(called)",
        after="reason = _layer_reason(layer)",
        tests=(f"{TESTS}::test_wrapped_layers_that_are_no_op_are_not_packed",),
    ),
    Fault(
        "a user's checkpointing function gets a KernelMask",
        file="fastbert/wrapped.py",
        before="return name if function is checkpoint else None",
        after="return name",
        tests=(f"{TESTS}::test_a_checkpoint_function_of_ones_own_sees_the_mask_of_stock",),
    ),
    Fault(
        "a hook on a wrapper sees the kernel's mask",
        file="fastbert/layers/masks.py",
        before="any(map(_observed, (*wrappers_of(called), layer)))",
        after="_observed(layer)",
        tests=(f"{TESTS}::test_a_hook_on_a_wrapper_sees_the_mask_of_stock",),
    ),
    Fault(
        "weights that are attributes are not found",
        file="fastbert/layers/layer_state.py",
        before='own["_parameters"].get(name, own.get(name))',
        after='own["_parameters"].get(name)',
        tests=(f"{TESTS}::test_replicas_of_data_parallel_run_layers_as_one_op",),
    ),
    Fault(
        "FSDP2 casts the carrier of DistilBERT's mask, which is lost",
        file="fastbert/layers/masks.py",
        before="torch.empty(0, 0, 0, 0, dtype=torch.bool)",
        after="torch.empty(0, 0, 0, 0)",
        tests=(f"{TESTS}::test_distilbert_in_half_precision",),
    ),
    Fault(
        "a step with layers in checkpoint wrappers is captured",
        file="fastbert/graphs/training.py",
        before='isinstance(module, parallel) or type(module).__module__.startswith("torch.distributed.")',
        after="isinstance(module, parallel)",
        tests=(f"{TESTS}::test_graphed_steps_are_ordinary",),
    ),
]
