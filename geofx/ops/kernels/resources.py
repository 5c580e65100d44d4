"""What a kernel takes of a GPU, from the compiler's own report; no GPU is needed to compile for one."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from geofx.ops.kernels.autotuned import Autotuned
from geofx.ops.kernels.block_diagonal import BLOCK_DIAGONAL
from geofx.ops.kernels.project_expand import GAUGE_FIXED, LOW_RANK
from geofx.ops.kernels.table_lookups import three_cores_kernel, token_mps_kernel, two_cores_kernel
from geofx.ops.tiles import Tile

SHARED_LIMITS = {75: 64 * 1024, 80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block may have, by compute capability: CUDA C++ Programming Guide, table of
technical specifications per compute capability."""
THREADS_LIMITS = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048}
"""Threads that a multiprocessor holds, from the same table."""
REGISTERS = 65536
"""32-bit registers of a multiprocessor, of all of these."""
SHARED_RESERVED = 1024
"""Bytes that the system takes of each block's shared memory, from sm_80 on."""

TILED: Mapping[str, Autotuned] = {
    "low_rank_linear": LOW_RANK,
    "gauge_fixed_linear": GAUGE_FIXED,
    "block_diagonal_linear": BLOCK_DIAGONAL,
}
"""Kernels whose constants are a `Tile`."""
LOOKUPS: Mapping[str, tuple[Any, Mapping[str, Any]]] = {
    "tensor_train_lookup, two cores": (two_cores_kernel, {"N1": 32, "R1": 64, "N2": 32}),
    "tensor_train_lookup, three cores": (
        three_cores_kernel,
        {"N1": 16, "R1": 32, "N2": 8, "R2": 32, "N3": 16},
    ),
    "token_mps_lookup": (
        token_mps_kernel,
        {
            "BONDS": (1, 4, 4, 4, 4, 4, 1),
            "PADDED": (1, 4, 4, 4, 4, 4, 1),
            "MODES": (8, 2, 2, 2, 2, 8),
            "OFFSETS": (0, 32, 64, 96, 128, 160, 192),
            "CORES": 6,
            "WIDTH": 1024,
        },
    ),
}
"""Kernels of tables at sizes of a real one."""


@dataclass(frozen=True)
class Resources:
    """Of one program.

    Attributes:
        registers: per thread.
        stack_bytes: of local memory, where registers are spilled to.
        shared_bytes: of shared memory.
        warps: of 32 threads.
        capability: 80 for sm_80.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    warps: int
    capability: int

    @property
    def occupancy(self) -> float:
        """Warps that a multiprocessor holds over those that it could, by registers and shared memory."""
        threads = 32 * self.warps
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = REGISTERS // (per_warp * self.warps)
        shared = SHARED_LIMITS[self.capability] + SHARED_RESERVED
        by_shared = shared // (self.shared_bytes + SHARED_RESERVED)
        most = THREADS_LIMITS[self.capability]
        return min(by_registers, by_shared, most // threads, 32) * threads / most


def tiled_resources(name: str, tile: Tile, dtype: str, capability: int, precision: str = "tf32") -> Resources:
    """Of one of `TILED`, for inputs of ``dtype`` ("fp32", "fp16", "bf16") in rows."""
    flags = {flag: False for flag in TILED[name].kernel.arg_names if flag.startswith("HAS_")}
    constants = {**tile.numbers(), **flags, "HAS_BIAS": True, "PRECISION": precision}
    return compiled(TILED[name].kernel, constants, dtype, capability, tile.warps, tile.stages)


def compiled(
    kernel: Any, constants: Mapping[str, Any], dtype: str, capability: int, warps: int = 4, stages: int = 1
) -> Resources:
    """Compile ``kernel`` for sm_``capability`` and read what the binary takes.

    Strides of the last dimension are 1, sizes and other strides multiples of 16, as of large models.

    Raises:
        RuntimeError: the binary cannot be read.
    """
    integers = {"ids": "*i64", "places": "*i32"}
    signature, known, attributes = {}, dict(constants), {}
    for place, name in enumerate(kernel.arg_names):
        if name in ("sxn", "srn", "slr"):
            known[name] = 1
        if name in known:
            signature[name] = "constexpr"
        elif name in integers or name in _POINTERS:
            signature[name] = integers.get(name, f"*{dtype}")
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name in _MULTIPLES:
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, known, attributes)
    target = GPUTarget("cuda", capability, 32)
    binary = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    registers, stack = _used(binary.asm["cubin"])
    return Resources(registers, stack, binary.metadata.shared, warps, capability)


_REPORT = re.compile(r"REG:(\d+) STACK:(\d+)")
_POINTERS = ("x", "right", "left", "bias", "y", "first", "second", "third", "table")
_MULTIPLES = ("N", "R", "M", "sxt", "srr", "slm", "srg", "slb", "columns")


def _used(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack, where registers are spilled to) that ``cuobjdump`` finds in a binary."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    found = _REPORT.search(done.stdout)
    if done.returncode or found is None:
        raise RuntimeError(f"cuobjdump does not report: {(done.stdout + done.stderr)[-500:]}")
    return int(found[1]), int(found[2])
