"""What a multiprocessor holds, by architecture, and the two measured ceilings that floors are divided by.

Limits: CUDA C++ programming guide, "Technical specifications per compute capability".
"""

from dataclasses import dataclass

# Measured on one H200 (KERNELS: bytes read + written by a device copy; a bf16 matrix product).
COPY_BYTES_PER_SECOND = 4.3e12
BF16_OPERATIONS_PER_SECOND = 790e12

# Not measured: an H200's multiprocessors and boost clock, for the bound by instruction issue.
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
    """Programs that one multiprocessor holds at once.

    Registers go to a warp in units of 256 and a warp stays with one of four schedulers; each program takes 1 KiB of
    shared memory more than it asks for.
    """
    per_warp = -(-registers * LANES // 256) * 256
    by_registers = architecture.registers_per_scheduler // per_warp * SCHEDULERS // warps
    by_shared = architecture.shared_per_multiprocessor // (shared + 1024)
    by_warps = architecture.warps_per_multiprocessor // warps
    return min(by_registers, by_shared, by_warps, architecture.programs_per_multiprocessor)


def issue_per_second(instructions: float) -> float:
    """How often a second an H200's schedulers can issue this many instructions of a lane, one of a warp a cycle each."""
    return H200_MULTIPROCESSORS * H200_BOOST_HERTZ * SCHEDULERS * LANES / instructions


def issue_bytes_per_second(instructions_per_element: float, bytes_per_element: float) -> float:
    """Bytes a second of a kernel that an H200's schedulers could keep up with."""
    return issue_per_second(instructions_per_element) * bytes_per_element
