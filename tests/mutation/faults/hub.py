"""The attention by a name with "flash" in it, FlashAttention's functions, and the folder for Hugging Face's kernels package."""

from functools import partial

from tests.mutation.fault import Fault

NAME = "tests/hub/test_flash_name.py"
FUNCTIONS = "tests/hub/test_flash_attention.py"
BUILD = "tests/hub/test_build.py"

_flash = partial(Fault, file="fastbert/integrations/flash.py")
_packed = partial(Fault, file="fastbert/hub/packed.py")
_layers = partial(Fault, file="fastbert/hub/layers.py")

FAULTS = (
    _flash(
        "a window is a key wider on each side",
        before="(sliding_window - 1, sliding_window - 1)",
        after="(sliding_window, sliding_window)",
        tests=(f"{NAME}::test_a_flattened_batch_is_the_texts_one_by_one[ModernBert]",),
    ),
    _flash(
        "dropout is left out of packed sequences",
        before="causal=causal, scale=scale, p=p, **more)",
        after="causal=causal, scale=scale, **more)",
        tests=(f"{NAME}::test_dropout_follows_the_seed",),
    ),
    _flash(
        "a text starts only at position 0, which RoBERTa's do not",
        before="(positions == positions.min())",
        after="(positions == 0)",
        tests=(f"{NAME}::test_position_ids_that_start_again_are_bounds[Roberta]",),
    ),
    _flash(
        "a mask that no keyword stands for is dropped",
        before="if not known or not base:",
        after="if not base:",
        tests=(f"{NAME}::test_any_other_mask_is_general",),
    ),
    _flash(
        "packing in several rows is dropped, where position ids are not read",
        before="name == _PACKED for name, _ in parts) and batch_size != 1:",
        after="name == _PACKED for name, _ in parts) and batch_size == 0:",
        tests=(f"{NAME}::test_packing_in_several_rows_is_general",),
    ),
    _flash(
        "a general mask replaces the bounds of packed sequences",
        before="        attention_mask = _within_sequences(attention_mask, *bounds[:2])",
        after="        pass",
        tests=(f"{NAME}::test_masks_and_windows_of_packed_sequences[bool-all keys]",),
    ),
    _flash(
        "a patched model does not know the attention function for ours",
        before="OURS[NAME] = flash_attention_forward",
        after="OURS.clear",
        tests=(f"{NAME}::test_a_patched_model_reads_the_bounds",),
    ),
    _packed(
        "a window that excludes one key counts as none",
        before="before >= longest - 1",
        after="before >= longest - 2",
        tests=(FUNCTIONS, "-k", "test_sequences_of_one_length and (window5 or window6)"),
    ),
    _packed(
        "the key behind a sequence is seen",
        before="keys < of_keys",
        after="keys <= of_keys",
        tests=(FUNCTIONS, "-k", "test_packed_sequences"),
    ),
    _layers(
        "the exact GELU is the one by tanh",
        before='bias_gelu(input, activation="gelu") if',
        after='bias_gelu(input, activation="gelu_tanh") if',
        tests=(f"{BUILD}::test_kernelize_replaces_activations[gelu]",),
    ),
    _layers(
        "a dtype without a kernel goes to the kernel",
        before="or x.dtype not in (torch.float32, torch.float16, torch.bfloat16)",
        after="or x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16)",
        tests=(BUILD, "-k", "test_what_the_kernel_does_not_take_is_stocks and dtype0"),
    ),
    Fault(
        "builds of different sources have one name",
        file="fastbert/hub/build.py",
        before='"id": f"{PACKAGE}_{digest}"',
        after='"id": f"{PACKAGE}_kernels"',
        tests=(f"{BUILD}::test_other_sources_have_another_name",),
    ),
    Fault(
        "two copies of the kernels define the same custom ops",
        file="kernels/core/op.py",
        before='NAMESPACE = re.sub(r"\\W", "_", __name__.partition(".kernels.")[0])',
        after='NAMESPACE = "fastbert"',
        tests=(f"{BUILD}::test_custom_ops_of_both_copies",),
    ),
)
