"""Compiles a variant for an architecture the way a launch would, and reads what came out.

Runs in worker processes: kernels decorated under TRITON_INTERPRET=1 cannot be compiled, so the interpreter must be
off before triton is imported (bench.audit sees to it). No GPU is touched: triton is told of a device that is not there.
"""

import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bench import sass
from bench.cases import CASES, TOKENS, Variant
from bench.hardware import ARCHITECTURES, LANES, issue_bytes_per_second, resident_programs
from fastbert.kernels import launch

_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the arguments of launch.launch."""

    kernel: Any
    programs: int
    config: Any
    arguments: dict[str, Any]

    @property
    def direction(self) -> str:
        return "backward" if "_bwd_" in self.kernel.__name__ else "forward"

    def big(self, width: int) -> dict[str, Tensor]:
        """The tensors of tokens x width elements, by name without _ptr: those whose bytes are the floor."""
        tensors = {k.removesuffix("_ptr"): v for k, v in self.arguments.items() if isinstance(v, Tensor)}
        return {name: tensor for name, tensor in tensors.items() if tensor.numel() == TOKENS * width}


class _AbsentDevice:
    """The three questions that triton's launch path asks of a driver, answered for an architecture without a GPU."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, LANES)

    def get_current_device(self) -> int:
        return self.target.arch  # keys triton's per-device cache of kernels

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def audit_batch(architecture: str, variants: list[Variant]) -> list[dict[str, Any]]:
    """One record a launch of each variant."""
    launches = [(variant, launched) for variant in variants for launched in record(architecture, variant)]
    kernels = [compile_launch(architecture, launched) for _, launched in launches]
    codes = [sass.code(kernel.asm["cubin"]) for kernel in kernels]
    listings = sass.disassemble(codes, ARCHITECTURES[architecture].nvdisasm_name, str(_TOOLS / "nvdisasm"))
    return [
        describe(architecture, variant, launched, kernel, listing)
        for (variant, launched), kernel, listing in zip(launches, kernels, listings, strict=True)
    ]


def record(architecture: str, variant: Variant) -> list[Launch]:
    launches: list[Launch] = []
    with launch.recording(architecture, lambda *launched: launches.append(Launch(*launched))):
        CASES[variant.op].launch(variant)
    return launches


def compile_launch(architecture: str, launched: Launch) -> Any:
    """Triton's own warm-up: it specialises the arguments as a launch does, compiles, and stops there."""
    assert isinstance(launched.kernel, triton.JITFunction), "TRITON_INTERPRET is set: nothing can be compiled"
    triton.runtime.driver.set_active(_AbsentDevice(ARCHITECTURES[architecture].capability))
    options = {"num_warps": launched.config.num_warps}
    return launched.kernel.warmup(grid=(launched.programs,), **launched.arguments, **options)


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", file.name]
        return sass.resources(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def describe(
    architecture: str, variant: Variant, launched: Launch, kernel: Any, listing: list[sass.Instruction]
) -> dict[str, Any]:
    """Everything the audit says about one kernel, ready for JSON."""
    limits, config = ARCHITECTURES[architecture], launched.config
    used = resources(kernel.asm["cubin"])
    shared = kernel.metadata.shared + used["SHARED"]
    hot, loops = sass.hot_loop(listing)
    resident = resident_programs(limits, config.num_warps, used["REG"], shared)
    if config.programs_per_multiprocessor:
        resident = min(resident, config.programs_per_multiprocessor)
    arguments = launched.arguments
    columns = arguments.get("CHUNKS", 1) * arguments["BLOCK_N"]
    elements = arguments["BLOCK_M"] * min(columns, variant.width)
    lanes_per_element = config.num_warps * LANES / elements
    big = launched.big(variant.width)
    widths = sass.access_widths(kernel.asm["ptx"])
    loaded = sum(t.element_size() for name, t in big.items() if ("ld", name) in widths)
    bytes_per_element = sum(t.element_size() for t in big.values())
    per_element = len(hot) * lanes_per_element
    return {
        "key": f"{architecture} {launched.direction} {variant.name}",
        "op": variant.op,
        "architecture": architecture,
        "kernel": launched.kernel.__name__,
        "config": {name: value for name, value in vars(config).items() if value is not None},
        "registers": used["REG"],
        "spills": sass.spills(listing),
        "local_bytes": used["LOCAL"] + used["STACK"],
        "shared_bytes": shared,
        "shared_limit": limits.shared_per_program,
        "programs_per_multiprocessor": resident,
        "occupancy": resident * config.num_warps / limits.warps_per_multiprocessor,
        "kib_in_flight": resident * elements * loaded / 1024,
        "loops": loops,
        "hot_instructions": len(hot),
        "instructions_per_element": round(per_element, 2),
        "philox_multiplies_per_element": round(sum(i.opcode.startswith("IMAD.HI") for i in hot) * lanes_per_element, 2),
        "barriers": sum(i.name == "BAR" for i in hot),
        "shuffles": sum(i.name == "SHFL" for i in hot),
        "matrix": dict(sass.matrix_instructions(hot)),
        "access_bytes": {name: min(widths.get(("ld", name), []) + widths.get(("st", name), [])) for name in big},
        "wide_share": wide_share(big, widths),
        "bytes_per_element": bytes_per_element,
        "issue_tb_per_second": round(issue_bytes_per_second(per_element, bytes_per_element) / 1e12, 2),
    }


def wide_share(big: dict[str, Tensor], widths: dict[tuple[str, str], list[int]]) -> float:
    """The share of the big tensors' bytes that move 16 or more at a time."""
    sizes = [size for (_, name), accesses in widths.items() if name in big for size in accesses]
    return sum(size for size in sizes if size >= 16) / sum(sizes) if sizes else 0.0
