"""What is counted as whose launch: names as torch's profiler and a stub driver give them."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from bench.host import counts
from bench.host.counts import ATEN, COPIES, LIBRARIES, TRITON, kind_of

FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, false, cutlass::bfloat16_t>>"


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>(int)", ATEN),
        ("void (anonymous namespace)::softmax_warp_forward<float, 9>(float*)", ATEN),
        (FLASH, ATEN),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::AttentionKernel)", ATEN),
        ("attention_fwd_kernel", TRITON),
        ("triton_poi_fused_add_gelu_0", TRITON),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_NNT", LIBRARIES),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", LIBRARIES),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_64x64_32x6_tn_align8>(Params)", LIBRARIES),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>(float*)", LIBRARIES),
        ("std::enable_if<!(false), void>::type internal::gemvx::kernel<int, int, __nv_bfloat16>", LIBRARIES),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", LIBRARIES),
        ("Memcpy DtoH (Device -> Pinned)", COPIES),
        ("Memset (Device)", COPIES),
    ],
)
def test_kinds(name, kind):
    assert kind_of(name) == kind


def test_a_stub_is_asked_for_its_counts():
    found = SimpleNamespace(
        runtime=Counter({"_Zadd": 2, "_Zmul": 1}),
        driver=Counter(attention_fwd_kernel=4),
        library=Counter(cublasGemmEx=3),
        copies=Counter(HtoD=1),
        fills=5,
    )
    calls = []
    stub = SimpleNamespace(
        reset=lambda: calls.append("reset"), counts=lambda: found, readable=lambda name: f"void at::native::{name[2:]}"
    )
    launches = counts._of_stub(lambda: calls.append("step"), stub)
    assert calls == ["reset", "step"]
    assert launches[ATEN] == {"add": 2, "mul": 1} and launches[COPIES] == {"Memset": 5, "Memcpy HtoD": 1}
    assert counts.kernels(launches) == 2 + 1 + 4 + 3, "copies and fills are no kernels"


def test_the_profilers_events_are_counted_by_name(monkeypatch):
    on_gpu, on_cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU

    def event(name, where=on_gpu, annotation=False):
        return SimpleNamespace(name=name, device_type=where, is_user_annotation=annotation)

    events = [event("bias_gelu_fwd_kernel")] * 2 + [event("Memset (Device)"), event("cudaLaunchKernel", on_cpu)]
    events.append(event("Optimizer.step#AdamW.step", annotation=True))

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return SimpleNamespace(events=lambda: events)

        def __exit__(self, *raised):
            pass

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    launches = counts._profiled(lambda: None)
    assert launches == {ATEN: {}, TRITON: {"bias_gelu_fwd_kernel": 2}, LIBRARIES: {}, COPIES: {"Memset (Device)": 1}}


def test_long_names_are_cut():
    name = counts._short("void at::native::reduce_kernel<" + "at::native::x, " * 100)
    assert name.startswith("reduce_kernel<x, x") and len(name) == counts.LONGEST
