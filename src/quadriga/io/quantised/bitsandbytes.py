"""bitsandbytes in 4 bits (NF4, FP4): indices of sixteen values under a scale for every 64 numbers of the flat matrix.

    NAME.weight (n / 2, 1) uint8        two indices a byte, the first one in the high half
    NAME.weight.quant_map (16,)         the values
    NAME.weight.absmax (blocks,)        float32; or uint8 with NAME.weight.nested_absmax, .nested_quant_map (256,):
                                        scale = nested_quant_map[absmax] * nested_absmax of its block + nested_offset
    NAME.weight.quant_state.bitsandbytes__nf4   uint8, JSON: shape, dtype, blocksize, nested_blocksize, nested_offset
    w = value * scale in float32, rounded to the dtype that the JSON names

Source: bitsandbytes-foundation/bitsandbytes bitsandbytes/functional.py (QuantState, dequantize_4bit).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.json_files import parse_json
from quadriga.io.quantised.llm_int8 import LlmInt8
from quadriga.io.quantised.method import Method, Parts
from quadriga.model.families.keys import Keys
from quadriga.model.weight_map import Shape
from quadriga.quant.dtypes import DTYPES, Array, as_float32

_MAX_STATE_BYTES = 1 << 16


@dataclass(frozen=True)
class _State:
    shape: tuple[int, int]
    dtype: np.dtype[Any]
    blocksize: int
    nested: tuple[int, float] | None
    """Block size and offset of the scales' own scales."""


@dataclass(frozen=True)
class Bitsandbytes:
    """Settings of a checkpoint; see ``method.Method``."""

    kind: str
    """"nf4" or "fp4"."""

    label = "bitsandbytes"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """See ``method.Method``."""
        own = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", f"quant_state.bitsandbytes__{self.kind}")
        return ("weight", *(f"weight.{part}" for part in own))

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        state = self._state(parts)
        count = prod(state.shape)
        parts.expect("weight", ("uint8",), (-(-count // 2), 1))
        parts.expect("weight.quant_map", ("float32",), (16,))
        blocks = -(-count // state.blocksize)
        parts.expect("weight.absmax", ("uint8" if state.nested else "float32",), (blocks,))
        if state.nested:
            parts.expect("weight.nested_absmax", ("float32",), (-(-blocks // state.nested[0]),))
            parts.expect("weight.nested_quant_map", ("float32",), (256,))
        return state.shape

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: in the dtype of the JSON."""
        state = self._state(parts)
        start, stop = first * state.shape[1], last * state.shape[1]
        packed = parts.read("weight", ((start // 2, -(-stop // 2)), (0, 1))).reshape(-1)
        indices = np.stack((packed >> 4, packed & 15), axis=1).reshape(-1)[start % 2 :][: stop - start]
        scales = self._scales(parts, state)[np.arange(start, stop) // state.blocksize]
        values = as_float32(parts.read("weight.quant_map"))[indices] * scales
        return values.astype(state.dtype).reshape(last - first, state.shape[1])

    def _scales(self, parts: Parts, state: _State) -> NDArray[np.float32]:
        absmax = parts.read("weight.absmax")
        if state.nested is None:
            return as_float32(absmax)
        size, offset = state.nested
        outer = as_float32(parts.read("weight.nested_absmax"))[np.arange(len(absmax)) // size]
        return as_float32(parts.read("weight.nested_quant_map"))[absmax] * outer + np.float32(offset)

    def _state(self, parts: Parts) -> _State:
        part = f"weight.quant_state.bitsandbytes__{self.kind}"
        if parts.expect(part, ("uint8",)).nbytes > _MAX_STATE_BYTES:
            raise parts.fail(f"its part {part!r} must be a short JSON text, it has {parts.info(part).nbytes} bytes")
        where = f"the quantisation state of {parts.weight}"
        try:
            return _read_state(Keys(parse_json(parts.read(part).tobytes(), where), where), self.kind)
        except ConfigError as error:
            raise CheckpointError(str(error)) from None


def _read_state(keys: Keys, kind: str) -> _State:
    keys.must_be("quant_type", kind)
    shape, dtype, blocksize = keys.integers("shape"), keys.text("dtype"), keys.integer("blocksize")
    nested = None
    if keys.given("nested_blocksize"):
        keys.must_be("nested_dtype", "float32")
        nested = keys.integer("nested_blocksize"), keys.number("nested_offset")
    keys.finish(frozenset())
    if len(shape) != 2 or not all(0 < n < 2**31 for n in shape) or min(blocksize, nested[0] if nested else 1) < 1:
        raise ConfigError(
            f"a bitsandbytes weight must be a matrix in blocks, got shape {list(shape)}, blocks of {blocksize}"
        )
    if dtype not in DTYPES:
        raise ConfigError(f"the dtype of a bitsandbytes weight must be one of {', '.join(DTYPES)}; got {dtype[:40]!r}")
    return _State((shape[0], shape[1]), DTYPES[dtype], blocksize, nested)


def read_config(keys: Keys) -> Method:
    """quantization_config of the method "bitsandbytes", of 4 or 8 bits.

    Raises:
        ConfigError: a key that is unknown or asks for what is not read: other storage than bytes.
    """
    eight = keys.given("load_in_8bit") and keys.flag("load_in_8bit")
    keys.must_be("load_in_4bit", not eight)
    keys.must_be("_load_in_4bit", not eight)
    keys.must_be("load_in_8bit", eight)
    keys.must_be("_load_in_8bit", eight)
    keys.must_be("bnb_4bit_quant_type", "nf4", "fp4")
    keys.must_be("bnb_4bit_quant_storage", "uint8", None)
    kind = "" if eight else keys.text("bnb_4bit_quant_type")
    # Double quantisation shows in the tensors; the others are about computing.
    keys.finish(
        frozenset(
            {
                "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "llm_int8_enable_fp32_cpu_offload",
                "llm_int8_has_fp16_weight", "llm_int8_skip_modules", "llm_int8_threshold",
            }
        )
    )  # fmt: skip
    return LlmInt8() if eight else Bitsandbytes(kind)
