"""Compiles a variant for an architecture as a launch would, and reads registers, spills and accesses from the result.

Runs in worker processes: kernels decorated under TRITON_INTERPRET=1 cannot be compiled, so the interpreter must be
off before triton is imported (bench.audit.run ensures this). No GPU is used; triton sees a driver for an absent device.
"""

import subprocess
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from bench.audit import sass
from bench.audit.unwritten import unwritten
from bench.core.floors import SCORE_PRODUCTS
from bench.core.hardware import ARCHITECTURES, LANES, issue_bytes_per_second, issue_per_second, resident_programs
from fastbert.kernels.core import cache, launch
from fastbert.testing.spec import Variant
from fastbert.testing.specs import SPECS

TILES = "pointers"  # the name of every pointer through which attention's kernels load or store a tile
_COLUMN_SUMS = "column_sums_kernel"
_ADAMW_TENSORS = ("PARAM", "GRAD", "EXP_AVG", "EXP_AVG_SQ", "MAX_EXP_AVG_SQ", "MASTER")
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Launch:
    """One recorded launch, with the arguments of launch.launch."""

    kernel: Any
    programs: int
    config: Any
    arguments: dict[str, Any]

    @property
    def form(self) -> tuple[Any, ...]:
        """Everything that determines the compiled kernel; equal for two launches that differ in their tensors only."""
        values = ((n, x.dtype if isinstance(x, Tensor) else x) for n, x in self.arguments.items())
        return self.kernel, self.programs, self.config, *values

    @property
    def direction(self) -> str:
        """forward, backward, or backward-<part> for an op whose backward has several kernels."""
        if self.kernel.__name__ == _COLUMN_SUMS:
            return "backward-sums"
        part = self.kernel.__name__.removesuffix("_kernel").rpartition("_bwd")[2]
        return "forward" if "_bwd" not in self.kernel.__name__ else "backward" + part.replace("_", "-")

    @property
    def loops_over_scores(self) -> bool:
        """Whether this is one of attention's kernels over queries x keys."""
        return "max_seqlen_k" in self.arguments

    def big(self, variant: Variant) -> dict[str, Tensor]:
        """The tensors of tokens x width elements, by name without _ptr. Their bytes make up the floor.

        Column sums read three tensors through one pointer; this returns the one of that width.
        """
        if self.kernel.__name__ == _COLUMN_SUMS:
            return {"here": self.arguments["b_ptr"]}
        elements = SPECS[variant.op].elements(SPECS[variant.op], variant)
        tensors = {k.removesuffix("_ptr"): v for k, v in self.arguments.items() if isinstance(v, Tensor)}
        return {name: tensor for name, tensor in tensors.items() if tensor.numel() == elements}


class _AbsentDevice:
    """Answers the three queries that triton's launch path makes to a driver, for an architecture without a GPU."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, LANES)

    def get_current_device(self) -> int:
        return self.target.arch  # the key of triton's per-device kernel cache

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def audit_batch(architecture: str, variants: list[Variant]) -> list[dict[str, Any]]:
    """One record per launch of each variant."""
    launches = [(variant, launched) for variant in variants for launched in record(architecture, variant)]
    kernels = [compile_here(architecture, launched) for _, launched in launches]
    codes = [sass.code(kernel.asm["cubin"]) for kernel in kernels]
    listings = sass.disassemble(codes, ARCHITECTURES[architecture].nvdisasm_name, str(_TOOLS / "nvdisasm"))
    return [
        describe(architecture, variant, launched, kernel, listing)
        for (variant, launched), kernel, listing in zip(launches, kernels, listings, strict=True)
    ]


def record(architecture: str, variant: Variant, rows: int | None = None) -> list[Launch]:
    """The launches of a variant in a training step. Each kernel counts once; a backward may reuse its forward's kernel.

    rows: replaces the number of rows in the op's spec.
    """
    launches: list[Launch] = []
    with launch.recording(architecture, lambda *launched: launches.append(Launch(*launched))):
        SPECS[variant.op].launch(variant, rows)
    kernels = variant.kernels or {launched.kernel.__name__ for launched in launches}
    forms = {launched.form: launched for launched in reversed(launches) if launched.kernel.__name__ in kernels}
    return list(reversed(forms.values()))


def compile_launch(architecture: str, launched: Launch) -> Any:
    """Compile through Triton's warm-up, which specialises the arguments as a launch does and stops after compiling."""
    assert isinstance(launched.kernel, triton.JITFunction), "TRITON_INTERPRET is set: nothing can be compiled"
    triton.runtime.driver.set_active(_AbsentDevice(ARCHITECTURES[architecture].capability))
    return launched.kernel.warmup(grid=(launched.programs,), **launched.arguments, **cache.options(launched.config))


def compile_here(architecture: str, launched: Launch) -> Any:
    """compile_launch, and compile again what is cached from before its source file moved: its lines are of no file here."""
    compiled = compile_launch(architecture, launched)
    if not sass.has_moved(compiled.asm["ptx"]):
        return compiled
    launched.kernel.device_caches.clear()
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.always_compile = True
        return compile_launch(architecture, launched)


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / "cuobjdump"), "-res-usage", file.name]
        return sass.resources(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def describe(
    architecture: str, variant: Variant, launched: Launch, kernel: Any, listing: list[sass.Instruction]
) -> dict[str, Any]:
    """The audit's record of one kernel, ready for JSON."""
    limits, config = ARCHITECTURES[architecture], launched.config
    used = resources(kernel.asm["cubin"])
    shared = kernel.metadata.shared + used["SHARED"]
    hot, loops = sass.hot_loop(listing)
    resident = resident_programs(limits, config.num_warps, used["REG"], shared)
    if config.programs_per_multiprocessor:
        resident = min(resident, config.programs_per_multiprocessor)
    about_work = _of_scores if launched.loops_over_scores else _of_rows
    if variant.op == "adamw":
        about_work = _of_parameters
    elif "BLOCK_K" in launched.arguments:
        about_work = partial(_of_products, sum(i.name != "NOP" for i in listing))
    return (
        {
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
            "loops": loops,
            "hot_instructions": len(hot),
            "barriers": sum(i.name == "BAR" for i in hot),
            "shuffles": sum(i.name == "SHFL" for i in hot),
            "matrix": dict(sass.matrix_instructions(hot)),
        }
        | about_work(variant, launched, resident, shared, hot, sass.access_widths(kernel.asm["ptx"]))
        | _faults(listing)
    )


def _faults(listing: list[sass.Instruction]) -> dict[str, Any]:
    """Only where there are any, which no accepted state has."""
    found = unwritten(listing)
    return {"unwritten": found} if found else {}


def _of_rows(
    variant: Variant, launched: Launch, resident: int, shared: int, hot: list[sass.Instruction], widths: sass.Widths
) -> dict[str, Any]:
    """Counts per element of a [tokens, width] tensor, for a kernel that passes over memory once."""
    arguments = launched.arguments
    columns = arguments.get("CHUNKS", 1) * arguments.get("BLOCK_N", arguments.get("BLOCK_D", 1))
    elements = arguments.get("BLOCK_M", 1) * arguments.get("AT_ONCE", 1) * min(columns, variant.width)
    lanes_per_element = launched.config.num_warps * LANES / elements
    big = launched.big(variant)
    names = {TILES} if variant.op == "attention" else set(big)
    loaded = sum(t.element_size() for name, t in big.items() if ("ld", name) in widths or TILES in names)
    moved = sum(t.element_size() for t in big.values())
    per_element = len(hot) * lanes_per_element
    multiplies = sum(i.opcode.startswith("IMAD.HI") for i in hot) * lanes_per_element
    return {
        "kib_in_flight": resident * elements * loaded / 1024,
        "instructions_per_element": round(per_element, 2),
        "philox_multiplies_per_element": round(multiplies, 2),
        "access_bytes": {name: min(widths.get(("ld", name), []) + widths.get(("st", name), [])) for name in names},
        "wide_share": wide_share(names, widths),
        "bytes_per_element": moved,
        "issue_tb_per_second": round(issue_bytes_per_second(per_element, moved) / 1e12, 2),
    }


def _of_scores(
    variant: Variant, launched: Launch, resident: int, shared: int, hot: list[sass.Instruction], widths: sass.Widths
) -> dict[str, Any]:
    """Counts per score, for a kernel that multiplies tiles held in shared memory."""
    arguments = launched.arguments
    lanes_per_score = launched.config.num_warps * LANES / (arguments["BLOCK_M"] * arguments["BLOCK_N"])
    per_score = len(hot) * lanes_per_score
    operations = SCORE_PRODUCTS[launched.kernel.__name__] * 2 * variant.width
    return {
        "kib_in_flight": resident * shared / 1024,
        "instructions_per_element": round(per_score, 2),
        "philox_multiplies_per_element": round(sum(i.opcode.startswith("IMAD.HI") for i in hot) * lanes_per_score, 2),
        "access_bytes": {TILES: min(widths["ld", TILES] + widths["st", TILES])},
        "wide_share": wide_share({TILES}, widths),
        "operations_per_score": operations,
        "issue_tflop_per_second": round(issue_per_second(per_score) * operations / 1e12),
    }


def _of_products(
    instructions: int,
    variant: Variant,
    launched: Launch,
    resident: int,
    shared: int,
    hot: list[sass.Instruction],
    widths: sass.Widths,
) -> dict[str, Any]:
    """Counts per element of the product: the hot loop as often as it runs, the rest once."""
    arguments, names = launched.arguments, set(launched.big(variant))
    lanes_per_element = launched.config.num_warps * LANES / (arguments["BLOCK_M"] * arguments["BLOCK_N"])
    rest = (instructions - len(hot)) * lanes_per_element
    per_element = rest + len(hot) * lanes_per_element * arguments["inner_stride"] / arguments["BLOCK_K"]
    operations = 2 * arguments["inner_stride"]
    return {
        "kib_in_flight": resident * shared / 1024,
        "instructions_per_element": round(per_element, 2),
        "epilogue_instructions_per_element": round(rest, 2),
        "philox_multiplies_per_element": 0.0,
        "access_bytes": {name: min(widths.get(("ld", name), []) + widths.get(("st", name), [])) for name in names},
        "wide_share": wide_share(names, widths),
        "operations_per_element": operations,
        "issue_tflop_per_second": round(issue_per_second(per_element) * operations / 1e12),
    }


def _of_parameters(
    variant: Variant, launched: Launch, resident: int, shared: int, hot: list[sass.Instruction], widths: sass.Widths
) -> dict[str, Any]:
    """Counts per parameter. The tensors are behind a table of pointers, so accesses are those of the loop."""
    arguments = launched.arguments
    size = {name: arguments[name].primitive_bitwidth // 8 for name in _ADAMW_TENSORS if arguments[name] is not None}
    read = sum(size.values()) - (size["PARAM"] if "MASTER" in size else 0)
    moved = read + sum(size.values()) - (size["GRAD"] if arguments["grad_scale_ptr"] is None else 0)
    lanes_per_element = launched.config.num_warps * LANES / arguments["BLOCK_N"]
    accesses = [sass.access_bytes(i) for i in hot if i.name in ("LDG", "STG")]
    return {
        "kib_in_flight": resident * arguments["BLOCK_N"] * read / 1024,
        "instructions_per_element": round(len(hot) * lanes_per_element, 2),
        "philox_multiplies_per_element": 0.0,
        "access_bytes": {"parameters and state": min(accesses)},
        "wide_share": sum(n for n in accesses if n >= 16) / sum(accesses),
        "bytes_per_element": moved,
        "issue_tb_per_second": round(issue_bytes_per_second(len(hot) * lanes_per_element, moved) / 1e12, 2),
    }


def wide_share(names: set[str], widths: sass.Widths) -> float:
    """The share of these tensors' bytes that move in accesses of 16 bytes or more."""
    sizes = [size for (_, name), accesses in widths.items() if name in names for size in accesses]
    return sum(size for size in sizes if size >= 16) / sum(sizes) if sizes else 0.0
