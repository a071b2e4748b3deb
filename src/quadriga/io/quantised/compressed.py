"""compressed-tensors (llm-compressor, vLLM): integers of 4 or 8 bits, packed or plain, and FP8.

    pack-quantized    NAME.weight_packed int32 (rows, cols * bits / 32), lowest bits first; q = field - 2^(bits - 1)
                      NAME.weight_shape int64 (2,)      NAME.weight_zero_point int32, packed along the rows
    int-quantized     NAME.weight int8                  NAME.weight_zero_point int8
    float-quantized   NAME.weight float8_e4m3fn         naive-quantized is either of the two
    all               NAME.weight_scale (rows, groups)  NAME.weight_g_idx int32 (cols,): the group of every column
    w = (q - z) * scale, in the dtype of the scales

Scales are one a matrix (strategy "tensor"), a row ("channel"), a group of columns ("group") or a block ("block").
Activations are not rounded here. Source: neuralmagic/compressed-tensors 0.20.1, compressors/ and
quantization/lifecycle/forward.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import ConfigError
from quadriga.io.quantised.fp8 import FLOAT8
from quadriga.io.quantised.method import FLOATS, Parts, scaled, unpack_words
from quadriga.model.families.keys import Keys
from quadriga.model.weight_map import Shape
from quadriga.quant.dtypes import Array, as_float32

_PACKED = "pack-quantized"
_FORMATS = (_PACKED, "int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class Compressed:
    """Settings of a checkpoint; see ``method.Method``."""

    packed: bool
    bits: int
    is_float: bool
    symmetric: bool
    strategy: str
    height: int
    """Rows under one scale; 0: all."""
    width: int
    """Columns under one scale; 0: all."""

    label = "compressed-tensors"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """See ``method.Method``."""
        own = ("weight_packed", "weight_shape") if self.packed else ("weight",)
        return (*own, "weight_scale", "weight_zero_point", "weight_g_idx", "input_scale", "input_zero_point")

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        if self.packed:
            parts.expect("weight_shape", ("int64", "int32"), (2,))
            rows, cols = map(int, parts.read("weight_shape"))
            if not 0 < cols < 2**31:
                raise parts.fail(f"its part 'weight_shape' must say how many rows and columns, got {[rows, cols]}")
            parts.expect("weight_packed", ("int32",), (rows, -(-cols * self.bits // 32)))
        else:
            rows, cols = parts.matrix("weight", (FLOAT8 if self.is_float else "int8",))
        groups = self._groups(rows, cols)
        if self.strategy == "tensor":
            if parts.expect("weight_scale", FLOATS).shape not in ((), (1,), (1, 1)):
                raise parts.fail("its part 'weight_scale' must be one number (strategy tensor)")
        elif parts.expect("weight_scale", FLOATS).shape != groups[:1] or groups[1] != 1:
            parts.expect("weight_scale", FLOATS, groups)
        if not self.symmetric:
            packed_rows = -(-groups[0] * self.bits // 32)
            wanted = ("int32", (packed_rows, groups[1])) if self.packed else ("int8", groups)
            parts.expect("weight_zero_point", (wanted[0],), wanted[1])
        if "weight_g_idx" in parts:
            parts.expect("weight_g_idx", ("int32",), (cols,))
        return rows, cols

    def _groups(self, rows: int, cols: int) -> tuple[int, int]:
        return -(-rows // (self.height or rows or 1)), -(-cols // (self.width or cols or 1))

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: in the dtype of the scales."""
        rows, cols = parts.read("weight_shape") if self.packed else parts.info("weight").shape
        groups = self._groups(int(rows), int(cols))
        of_row = np.arange(first, last) // (self.height or int(rows) or 1)
        of_column = self._group_of_columns(parts, int(cols), groups[1])
        scales = parts.read("weight_scale").reshape(groups)[of_row]
        zeros = (
            np.zeros((last - first, groups[1]), dtype=np.int16)
            if self.symmetric
            else self._zeros(parts, groups)[of_row]
        )
        if self.packed:
            words = parts.read("weight_packed", ((first, last), (0, parts.info("weight_packed").shape[1])))
            fields = unpack_words(words, self.bits)[:, : int(cols)]
            return scaled(fields, zeros + np.int16(2 ** (self.bits - 1)), scales, of_column, self.bits)
        stored = as_float32(parts.read("weight", ((first, last), (0, int(cols)))))
        difference = stored if self.symmetric else stored - zeros[:, of_column]
        return (difference * as_float32(scales)[:, of_column]).astype(scales.dtype)

    def _zeros(self, parts: Parts, groups: tuple[int, int]) -> NDArray[np.int16]:
        stored = parts.read("weight_zero_point")
        if not self.packed:
            return stored.astype(np.int16)
        fields = unpack_words(stored.T, self.bits)[:, : groups[0]].T
        return fields.astype(np.int16) - np.int16(2 ** (self.bits - 1))

    def _group_of_columns(self, parts: Parts, cols: int, groups: int) -> NDArray[np.int32]:
        if "weight_g_idx" not in parts:
            return np.arange(cols, dtype=np.int32) // np.int32(self.width or cols or 1)
        group = parts.read("weight_g_idx")
        if not 0 <= group.min() <= group.max() < groups:
            raise parts.fail(f"its part 'weight_g_idx' must name groups from 0 to {groups - 1}")
        return group


def read_config(keys: Keys) -> Compressed:
    """quantization_config of the method "compressed-tensors".

    Raises:
        ConfigError: a key that is unknown or asks for what is not read.
    """
    form = keys.text("format")
    groups = keys.section("config_groups")
    keys.must_be("kv_cache_scheme", None)
    keys.must_be("transform_config", {}, None)
    keys.must_be("quantization_status", "compressed", "frozen", None)
    _check_dense(keys)
    keys.finish(frozenset({"ignore", "global_compression_ratio", "version", "producer"}))
    schemes = [_scheme(groups.section(name), form) for name in groups.names()]
    if not schemes or any(scheme != schemes[0] for scheme in schemes):
        raise ConfigError(
            f"quantization_config: config_groups must pack all weights alike, got {len(schemes)} groups that differ"
        )
    return schemes[0]


def _check_dense(keys: Keys) -> None:
    """Sparse weights are stored otherwise still."""
    if keys.value("sparsity_config"):
        sparsity = keys.section("sparsity_config")
        sparsity.must_be("format", "dense")
        sparsity.finish(
            frozenset({"global_sparsity", "sparsity_structure", "ignore", "targets", "registry_requires_subclass"})
        )


def _scheme(keys: Keys, form: str) -> Compressed:
    form = keys.text("format") if keys.given("format") else form
    if form not in _FORMATS:
        raise ConfigError(f"quantization_config: format must be one of {', '.join(_FORMATS)}; got {form[:40]!r}")
    how = keys.section("weights")
    keys.finish(frozenset({"targets", "input_activations", "output_activations"}))
    how.must_be("type", "int", "float")
    how.must_be("num_bits", 4, 8)
    how.must_be("dynamic", False)
    how.must_be("actorder", None, False, True, "group", "weight", "static", "dynamic")
    is_float, bits, symmetric = how.text("type") == "float", how.integer("num_bits"), how.flag("symmetric")
    if (is_float or form != _PACKED) and bits != 8:
        raise ConfigError(f"quantization_config: num_bits must be 8 for {form} of type {how.text('type')}, got {bits}")
    if is_float and (form == _PACKED or not symmetric):
        raise ConfigError("quantization_config: weights of type float must be symmetric, and not pack-quantized")
    strategy = how.text("strategy")
    height, width = _block_of(how, strategy)
    how.finish(frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype", "is_mse"}))
    return Compressed(form == _PACKED, bits, is_float, symmetric, strategy, height, width)


def _block_of(how: Keys, strategy: str) -> tuple[int, int]:
    """Rows and columns under one scale, 0 for all."""
    size = how.integer("group_size") if how.given("group_size") else None
    block = how.integers("block_structure") if how.given("block_structure") else ()
    if strategy == "tensor":
        return 0, 0
    if strategy == "channel":
        return 1, 0
    if strategy == "group" and size is not None and size > 0:
        return 1, size
    if strategy == "block" and len(block) == 2 and min(block) > 0:
        return block[0], block[1]
    raise ConfigError(
        "quantization_config: strategy must be tensor, channel, group with group_size or block with block_structure; "
        f"got {strategy[:40]!r}, group_size {size}, block_structure {list(block)}"
    )
