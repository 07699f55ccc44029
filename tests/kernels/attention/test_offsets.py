"""Many heads and large strides: more programs than a grid axis has room for, and offsets past 2**31 elements.

Dense tensors of that size: tests/kernels/test_gpu_sizes.py.
"""

import subprocess
import sys

import pytest
import torch

from fastbert.kernels.attention import attention
from fastbert.kernels.core.configs import ARCHITECTURES
from fastbert.kernels.core.launch import recording
from fastbert.testing.attention import FORWARD, backward_of, check, make_inputs
from fastbert.testing.rows import run

from ..test_large_offsets import ROOT

PLACES = [(name, dim) for name in ("q", "k", "v", "dy", "mask") for dim in range(4)]
PLACES += [("packed", dim) for dim in range(2)]


@pytest.mark.long
@pytest.mark.no_launch  # launched and counted in a process of its own
@pytest.mark.parametrize("name, dim", PLACES)
def test_elements_far_apart(name, dim):
    """Each of the four strides of each tensor: sequences, positions, heads or elements 2**30 apart."""
    command = [sys.executable, "-m", "tests.kernels.attention.large_offsets", name, str(dim)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "right\n"), f"exit {done.returncode}\n{done.stderr[-2000:]}"


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def recorded(architecture, inputs, **options):
    """{kernel: (programs, configuration, arguments)} of a forward and a backward."""
    seen = {}
    with recording(architecture, lambda kernel, *rest: seen.update({kernel.__name__: rest})):
        run(attention, inputs, torch.empty_like(inputs["q"]), **options)
        assert list(seen) == [FORWARD, *backward_of(inputs, options)]
    return seen


@pytest.mark.no_launch
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch, heads, lengths", [(4096, 16, (128, 128)), (65537, 1, (1, 300)), (1, 70000, (65, 5))])
def test_each_block_of_each_head_has_a_program(architecture, batch, heads, lengths):
    """More than the 65,535 of axes 1 and 2, so on axis 0 only, and no more than necessary."""
    inputs = {name: meta(batch, n, heads, 64) for name, n in zip("qkv", (lengths[0], lengths[1], lengths[1]), strict=True)}
    for kernel, (programs, config, _) in recorded(architecture, inputs).items():
        length, block = (lengths[1], config.BLOCK_N) if kernel == "attention_bwd_kv_kernel" else (lengths[0], config.BLOCK_M)
        assert programs == batch * heads * -(-length // block) >= 65536, kernel


@pytest.mark.no_launch
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_programs_go_by_sequences_and_not_by_rows(architecture):
    """Each sequence has the programs of the longest; on a shorter one the surplus ends at once."""
    inputs = {name: meta(30000, 12, 64) for name in ("q", "k", "v")}
    options = {"cu_seqlens": meta(6001, dtype=torch.int32), "max_seqlen": 512}
    for kernel, (programs, config, arguments) in recorded(architecture, inputs, **options).items():
        block = config.BLOCK_N if kernel == "attention_bwd_kv_kernel" else config.BLOCK_M
        assert programs == 6000 * 12 * (512 // block) and arguments["n_rows"] == 30000


@pytest.mark.no_launch
def test_arguments_past_32_bits_stay_whole():
    """Strides are passed unchanged: Triton makes an int64 of those that need one."""
    storage = meta(1).expand(3, 3, 3, 8).as_strided((3, 3, 3, 8), (2**40, 2**33, 2**35, 1))
    for kernel, (_, _, arguments) in recorded("sm_90", dict.fromkeys("qkv", storage)).items():
        assert arguments["k_strides"] == (2**40, 2**33, 2**35, 1), kernel


@pytest.mark.gpu
@pytest.mark.parametrize("batch, heads", [(4096, 16), (1, 65537)])
def test_more_heads_than_an_axis_holds(batch, heads):
    check(make_inputs(batch, 16, heads, 16, torch.float16), p=0.1)
