"""A recorded launch as a GPU's machine code, without a GPU: registers, shared memory, spills, instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from quadriga.errors import HardwareError
from quadriga.kernels.triton.launch import INTERPRETED, Launch

SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Compute capability -> the most shared memory of a block (CUDA C++ Programming Guide, technical specifications)."""

MATRIX = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The instruction that multiplies 16-bit tiles: of a warp, of four warps (wgmma), of the tensor memory (tcgen05)."""

_TYPES = {
    "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64", "float8_e4m3fn": "fp8e4nv",
    "int8": "i8", "uint8": "u8", "int16": "i16", "int32": "i32", "int64": "i64", "bool": "i1",
}  # fmt: skip
"""torch's names -> triton's."""


@dataclass(frozen=True)
class Binary:
    """What a kernel became."""

    capability: int
    registers: int
    """A thread's."""
    shared_bytes: int
    spills: int
    """Instructions that move registers to or from local memory."""
    instructions: Counter[str]
    """Opcode, without its modifiers, -> how often it stands in the code."""

    @property
    def matrix(self) -> int:
        """Instructions that multiply 16-bit tiles, of this capability's best kind."""
        return self.instructions[MATRIX[self.capability]]


def compile_launch(launch: Launch, capability: int) -> Binary:
    """Compile a launch just as triton would on a GPU, given these arguments.

    Args:
        capability: 80 for compute capability 8.0, and so on.

    Raises:
        HardwareError: the kernels were imported to be interpreted.
    """
    if INTERPRETED:
        raise HardwareError("kernels that were imported to be interpreted cannot be compiled: unset TRITON_INTERPRET")
    signature, constants, attributes = _specialised(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return _read(built.asm["cubin"], built.metadata.shared, capability)


def _specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """(type, constants, hints) of each argument: None and 1 are constants, whatever 16 divides is said to be so."""
    names: list[str] = launch.kernel.arg_names
    signature, constants = dict.fromkeys(names, "constexpr"), dict(launch.constants)
    attributes = {}
    for index, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if value is None or (type(value) is int and value == 1):
            constants[name] = value
            continue
        signature[name] = _type(value)
        if isinstance(value, Tensor) or (type(value) is int and value % 16 == 0):
            attributes[index,] = [["tt.divisibility", 16]]
    missing = [name for name in names if signature[name] == "constexpr" and name not in constants]
    assert not missing, f"{launch.name} is launched without {', '.join(missing)}"
    return signature, constants, attributes


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[str(value.dtype).removeprefix("torch.")]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    assert isinstance(value, int), f"tensors, numbers and None are arguments; got {type(value).__name__}"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _read(cubin: bytes, shared_bytes: int, capability: int) -> Binary:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tools / "cuobjdump", flag, file.name], check=True, capture_output=True, text=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, "cuobjdump says how many registers a kernel takes"
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)", code, flags=re.MULTILINE)
    counted = Counter(opcodes)
    return Binary(capability, int(registers[1]), shared_bytes, counted["STL"] + counted["LDL"], counted)
