"""GPTQ as AutoGPTQ and GPTQModel store it: whole numbers of 2, 4 or 8 bits in int32 words, packed along the inputs.

    NAME.qweight (cols * bits / 32, rows) int32    q of (row r, column c): bits c % n of word [c // n, r], n = 32 / bits
    NAME.qzeros  (groups, rows * bits / 32) int32  z of (group g, row r): bits r % n of word [g, r // n]
    NAME.scales  (groups, rows) float16            NAME.g_idx (cols,) int32: the group of every column
    w = scales[g, r] * (q - z), in the dtype of the scales

The format "gptq" stores z - 1 (and 0 as all ones), "gptq_v2" z itself. Without g_idx, group_size columns after each
other are a group. Source: AutoGPTQ/AutoGPTQ auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.io.quantised.method import FLOATS, Parts, group_size, scaled, unpack_words
from quadriga.model.families.keys import Keys
from quadriga.model.weight_map import Shape
from quadriga.quant.dtypes import Array

_HARMLESS = frozenset(
    {
        # How the numbers were found; desc_act shows in g_idx.
        "desc_act", "true_sequential", "static_groups", "damp_percent", "damp_auto_increment", "mse",
        "act_group_aware", "dataset", "tokenizer", "model_seqlen", "batch_size", "pad_token_id", "max_input_length",
        "cache_block_outputs",
        # What to convert and with what to compute; the tensors' names say what was converted.
        "lm_head", "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize",
        "modules_to_not_convert", "use_exllama", "exllama_config", "use_cuda_fp16", "disable_exllama", "backend",
        "model_name_or_path", "model_file_base_name", "meta", "quantizer", "rotation", "offload_to_disk",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Gptq:
    """Settings of a checkpoint; see ``method.Method``."""

    bits: int
    group_size: int
    """Columns of a group; -1: all."""
    zeros_less_one: bool
    symmetric: bool = False
    """The configuration says that every z is the middle of the range."""

    label = "gptq"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        words, rows = parts.matrix("qweight", ("int32",))
        cols = words * 32 // self.bits
        groups, _ = parts.matrix("scales", FLOATS)
        size = cols if self.group_size == -1 else self.group_size
        if groups != -(-cols // size):
            raise parts.fail(
                f"{cols} columns in groups of {size} need {-(-cols // size)} rows of 'scales', got {groups}"
            )
        parts.expect("scales", FLOATS, (groups, rows))
        parts.expect("qzeros", ("int32",), (groups, rows * self.bits // 32))
        if "g_idx" in parts:
            parts.expect("g_idx", ("int32",), (cols,))
        return rows, cols

    def block_format(self, parts: Parts) -> str | None:
        """See ``method.KeepsBlocks``: 4 bits around 8 in groups of whole 32s are q4_0, but for act order."""
        _, cols = self.shape(parts)
        size = cols if self.group_size == -1 else self.group_size
        if not self.symmetric or self.bits != 4 or size % 32 or cols % 32 or parts.info("scales").dtype != "float16":
            return None
        middle = 0x77 if self.zeros_less_one else 0x88
        if not (np.ascontiguousarray(parts.read("qzeros")).view(np.uint8) == middle).all():
            return None
        in_order = "g_idx" not in parts or np.array_equal(parts.read("g_idx"), np.arange(cols) // size)
        return "q4_0" if in_order else None

    def raw(self, parts: Parts, first: int, last: int) -> NDArray[np.uint8]:
        """See ``method.KeepsBlocks``."""
        words, _ = parts.info("qweight").shape
        groups = parts.info("scales").shape[0]
        q = unpack_words(parts.read("qweight", ((0, words), (first, last))).T, 4).reshape(last - first, -1, 2, 16)
        size = q.shape[1] * 32 if self.group_size == -1 else self.group_size
        scales = np.ascontiguousarray(parts.read("scales", ((0, groups), (first, last))).T)
        blocks = np.empty((last - first, q.shape[1], 18), dtype=np.uint8)
        blocks[:, :, :2] = scales.repeat(size // 32, axis=1)[:, : q.shape[1], None].view(np.uint8)
        blocks[:, :, 2:] = q[:, :, 0] | q[:, :, 1] << np.uint8(4)
        return blocks.reshape(last - first, -1)

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: in the dtype of the scales."""
        words, _ = parts.info("qweight").shape
        groups, n = parts.info("scales").shape[0], 32 // self.bits
        q = unpack_words(parts.read("qweight", ((0, words), (first, last))).T, self.bits)
        word = (first // n, -(-last // n))
        z = unpack_words(parts.read("qzeros", ((0, groups), word)), self.bits)
        z = z[:, first - word[0] * n :][:, : last - first].T
        if self.zeros_less_one:
            z = z + np.uint8(1) & np.uint8(2**self.bits - 1)
        scales = parts.read("scales", ((0, groups), (first, last))).T
        return scaled(q, z, scales, self._group_of_columns(parts, q.shape[1], groups), self.bits)

    def _group_of_columns(self, parts: Parts, cols: int, groups: int) -> NDArray[np.int32]:
        if "g_idx" not in parts:
            size = cols if self.group_size == -1 else self.group_size
            return np.arange(cols, dtype=np.int32) // np.int32(size)
        group = parts.read("g_idx")
        if cols and not 0 <= group.min() <= group.max() < groups:
            raise parts.fail(
                f"its part 'g_idx' must name groups from 0 to {groups - 1}, got {group.min()} to {group.max()}"
            )
        return group


def read_config(keys: Keys) -> Gptq:
    """quantization_config of the method "gptq".

    Raises:
        ConfigError: a key that is unknown or asks for what is not read.
    """
    keys.must_be("bits", 2, 4, 8)
    keys.must_be("checkpoint_format", "gptq", "gptq_v2", None)
    keys.must_be("format", "gptq", "gptq_v2", None)
    keys.must_be("is_marlin_format", False, None)
    keys.must_be("pack_dtype", "int32", None)
    keys.must_be("dynamic", {}, None)
    keys.must_be("adapter", {}, None)
    form = keys.value("checkpoint_format") or keys.value("format") or "gptq"
    bits, size = keys.integer("bits"), group_size(keys, "group_size")
    symmetric = keys.given("sym") and keys.flag("sym")
    keys.finish(_HARMLESS)
    return Gptq(bits, size, form == "gptq", symmetric)
