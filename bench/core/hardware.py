"""Limits of an SM by architecture, and the two measured ceilings that floors are computed from.

Limits: CUDA C++ programming guide, "Technical specifications per compute capability".
"""

from dataclasses import dataclass

# Measured on one H200: bytes read plus bytes written by a device copy, and a bf16 matrix product.
COPY_BYTES_PER_SECOND = 4.3e12
BF16_OPERATIONS_PER_SECOND = 790e12

# Specifications, not measured: an H200's SM count and boost clock, for the bound by instruction issue.
H200_MULTIPROCESSORS = 132
H200_BOOST_HERTZ = 1.98e9
SCHEDULERS = 4
LANES = 32


@dataclass(frozen=True)
class Architecture:
    capability: int
    nvdisasm_name: str
    shared_per_program: int
    shared_per_multiprocessor: int
    warps_per_multiprocessor: int = 64
    programs_per_multiprocessor: int = 32
    registers_per_scheduler: int = 16384


ARCHITECTURES = {
    "sm_80": Architecture(80, "SM80", 166_912, 167_936),
    "sm_90": Architecture(90, "SM90a", 232_448, 233_472),
    "sm_100": Architecture(100, "SM100a", 232_448, 233_472),
}


def resident_programs(architecture: Architecture, warps: int, registers: int, shared: int) -> int:
    """Programs that are resident on one SM at the same time.

    A warp gets registers in units of 256 and belongs to one of four schedulers. Each program takes 1 KiB of shared
    memory in addition to what it requests.
    """
    per_warp = -(-registers * LANES // 256) * 256
    by_registers = architecture.registers_per_scheduler // per_warp * SCHEDULERS // warps
    by_shared = architecture.shared_per_multiprocessor // (shared + 1024)
    by_warps = architecture.warps_per_multiprocessor // warps
    return min(by_registers, by_shared, by_warps, architecture.programs_per_multiprocessor)


def issue_per_second(instructions: float) -> float:
    """How many lanes of this many instructions an H200 issues per second: one warp instruction per scheduler and cycle."""
    return H200_MULTIPROCESSORS * H200_BOOST_HERTZ * SCHEDULERS * LANES / instructions


def issue_bytes_per_second(instructions_per_element: float, bytes_per_element: float) -> float:
    """The memory throughput in bytes per second that an H200's schedulers can keep up with."""
    return issue_per_second(instructions_per_element) * bytes_per_element
