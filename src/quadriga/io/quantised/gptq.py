"""GPTQ as AutoGPTQ and GPTQModel store it: whole numbers of 2, 3, 4 or 8 bits in int32 words, packed along the inputs.

    NAME.qweight (cols * bits / 32, rows) int32    q of (row r, column c): bits c % n of word [c // n, r], n = 32 / bits
    NAME.qzeros  (groups, rows * bits / 32) int32  z of (group g, row r): bits r % n of word [g, r // n]
    NAME.scales  (groups, rows) float16            NAME.g_idx (cols,) int32: the group of every column
    w = scales[g, r] * (q - z), in the dtype of the scales

With 3 bits, 32 fields lie one after the other in 3 words, two of them across words. The format "gptq" stores z - 1 (and
0 as all ones), "gptq_v2" z itself. Without g_idx, group_size columns after each other are a group. Sources:
AutoGPTQ/AutoGPTQ auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py, ModelCloud/GPTQModel gptqmodel/utils/model.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import ConfigError
from quadriga.io.quantised import auto_round
from quadriga.io.quantised.method import FLOATS, Parts, group_size, run_of_fields, scaled, unpack_words
from quadriga.model.families.keys import Keys
from quadriga.model.weight_map import Shape
from quadriga.quant.dtypes import Array

_HARMLESS = frozenset(
    {
        # How the numbers were found; desc_act shows in g_idx.
        "desc_act", "true_sequential", "static_groups", "damp_percent", "damp_auto_increment", "mse",
        "act_group_aware", "dataset", "tokenizer", "model_seqlen", "batch_size", "pad_token_id", "max_input_length",
        "cache_block_outputs", "gptaq", "hessian", "fallback", "mock_quantization", "pack_impl",
        # What to convert and with what to compute; the tensors' names say what was converted.
        "lm_head", "block_name_to_quantize", "module_name_preceding_first_block", "modules_in_block_to_quantize",
        "modules_to_not_convert", "use_exllama", "exllama_config", "use_cuda_fp16", "disable_exllama", "backend",
        "model_name_or_path", "model_file_base_name", "meta", "quantizer", "offload_to_disk",
    }
)  # fmt: skip


_SPOILT_ZEROS = np.array([0, 0xB6DB6DB7, 0x49249249], dtype=np.uint32)
"""Words of 3 bits that releases of GPTQModel and AutoGPTQ of 2024 and 2025 wrote in the format "gptq" for z = 4, from
which they took away another constant than 1 of each field (and added it again when they read them)."""


@dataclass(frozen=True)
class Gptq:
    """Settings of a checkpoint; see ``method.Method``."""

    bits: int
    group_size: int
    """Columns of a group; -1: all."""
    zeros_less_one: bool
    symmetric: bool = False
    """The configuration says that every z is the middle of the range."""
    varied: bool = False
    """Matrices have bits and groups of their own (GPTQModel's "dynamic"), which their parts tell."""
    named: tuple[tuple[str, int, int], ...] = ()
    """Matrices that have others: (name without ".weight", bits, columns of a group) (AutoRound's "extra_config")."""

    label = "gptq"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")

    def _of(self, parts: Parts) -> Gptq:
        """What holds for one weight."""
        name = parts.weight.removesuffix(".weight")
        for other, bits, size in self.named:
            if other == name:
                return Gptq(bits, size, self.zeros_less_one, self.symmetric)
        return self._told_by(parts) if self.varied else self

    def _told_by(self, parts: Parts) -> Gptq:
        """Bits from the length of g_idx, the group's size from the number of scales."""
        words, _ = parts.matrix("qweight", ("int32",))
        cols, groups = prod(parts.expect("g_idx", ("int32",)).shape), parts.matrix("scales", FLOATS)[0]
        if not cols or not groups or words * 32 % cols or words * 32 // cols not in (2, 3, 4, 8) or cols % groups:
            raise parts.fail(
                f"its bits must be 2, 3, 4 or 8, and its groups whole: got {words} words of {cols} columns in {groups} "
                "groups"
            )
        return Gptq(words * 32 // cols, cols // groups, self.zeros_less_one, self.symmetric)

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        return self._of(parts)._shape(parts)

    def _shape(self, parts: Parts) -> Shape:
        words, rows = parts.matrix("qweight", ("int32",))
        cols, (fields, of_words) = words * 32 // self.bits, run_of_fields(self.bits)
        if words % of_words or rows % fields:
            raise parts.fail(
                f"fields of {self.bits} bits must fill whole runs of {of_words} words: 'qweight' has {words} words of "
                f"{rows} rows, which must be a multiple of {fields}"
            )
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

    @property
    def kept(self) -> str:
        """See ``method.KeepsBlocks``."""
        return "4 bits in order around 8 (as q4)" if self.symmetric and self.bits == 4 else ""

    def block_format(self, parts: Parts) -> str | None:
        """See ``method.KeepsBlocks``: 4 bits around 8 in groups of whole 32s are q4_0, but for act order."""
        return self._of(parts)._block_format(parts)

    def _block_format(self, parts: Parts) -> str | None:
        _, cols = self._shape(parts)
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
        of = self._of(parts)
        size = q.shape[1] * 32 if of.group_size == -1 else of.group_size
        scales = np.ascontiguousarray(parts.read("scales", ((0, groups), (first, last))).T)
        blocks = np.empty((last - first, q.shape[1], 18), dtype=np.uint8)
        blocks[:, :, :2] = scales.repeat(size // 32, axis=1)[:, : q.shape[1], None].view(np.uint8)
        blocks[:, :, 2:] = q[:, :, 0] | q[:, :, 1] << np.uint8(4)
        return blocks.reshape(last - first, -1)

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: in the dtype of the scales."""
        return self._of(parts)._read(parts, first, last)

    def _read(self, parts: Parts, first: int, last: int) -> Array:
        words, _ = parts.info("qweight").shape
        q = unpack_words(parts.read("qweight", ((0, words), (first, last))).T, self.bits)
        groups = parts.info("scales").shape[0]
        scales = parts.read("scales", ((0, groups), (first, last))).T
        z = self._zeros(parts, groups, first, last)
        return scaled(q, z, scales, self._group_of_columns(parts, q.shape[1], groups), self.bits)

    def _zeros(self, parts: Parts, groups: int, first: int, last: int) -> NDArray[np.uint8]:
        """z of rows [first, last), (rows, groups)."""
        n, of_words = run_of_fields(self.bits)
        span = (first // n * of_words, -(-last // n) * of_words)
        words = np.ascontiguousarray(parts.read("qzeros", ((0, groups), span)))
        z = unpack_words(words, self.bits)
        if self.zeros_less_one and self.bits == 3 and self._are_spoilt(words):
            z[...] = 4
        elif self.zeros_less_one:
            z = z + np.uint8(1) & np.uint8(2**self.bits - 1)
        return z[:, first % n :][:, : last - first].T

    @staticmethod
    def _are_spoilt(words: NDArray[np.int32]) -> bool:
        return bool((words.view(np.uint32).reshape(len(words), -1, 3) == _SPOILT_ZEROS).all())

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
    keys.must_be("bits", 2, 3, 4, 8)
    keys.must_be("checkpoint_format", "gptq", "gptq_v2", None)
    keys.must_be("format", "gptq", "gptq_v2", None)
    keys.must_be("method", "gptq", None)
    keys.must_be("is_marlin_format", False, None)
    keys.must_be("pack_dtype", "int32", None)
    keys.must_be("rotation", None)
    varied = _has_other_settings(keys)
    keys.must_be("adapter", {}, None)
    said = {str(keys.value(key)) for key in ("checkpoint_format", "format") if keys.given(key)} or {"gptq"}
    if len(said) > 1:
        raise ConfigError("quantization_config: checkpoint_format and format must agree, got gptq and gptq_v2")
    bits, size = keys.integer("bits"), group_size(keys, "group_size")
    symmetric = keys.given("sym") and keys.flag("sym")
    auto_round.finish(keys, _HARMLESS)
    return Gptq(bits, size, said == {"gptq"}, symmetric, varied)


_SETTINGS = frozenset({"bits", "group_size", "sym", "desc_act", "mse", "damp_percent", "static_groups"})


def _has_other_settings(keys: Keys) -> bool:
    """Whether single matrices have settings of their own ("+:REGEX", or REGEX alone).

    "-:REGEX" leaves some unpacked, as their tensors' names say. No pattern is run: a weight's parts tell its settings.
    """
    dynamic = keys.value("dynamic")
    if not isinstance(dynamic, dict):
        keys.must_be("dynamic", {}, None)
        return False
    others = {pattern: how for pattern, how in dynamic.items() if not str(pattern).startswith("-:")}
    for pattern, how in others.items():
        if not isinstance(how, dict) or not how.keys() <= _SETTINGS:
            raise ConfigError(
                f"quantization_config: dynamic may set {', '.join(sorted(_SETTINGS))} of {pattern[:60]!r}, got "
                f"{str(how)[:80]}"
            )
    return bool(others)


def read_auto_round_config(keys: Keys) -> Gptq:
    """quantization_config of the method "auto-round" where it packs as GPTQ does.

    Raises:
        ConfigError: a key that is unknown or asks for what is not read.
    """
    keys.must_be("bits", 2, 3, 4, 8)
    bits, size = keys.integer("bits"), group_size(keys, "group_size")
    symmetric = keys.given("sym") and keys.flag("sym")
    less_one = keys.text("packing_format") not in auto_round.WHOLE_ZEROS
    named = auto_round.other_settings(keys, bits, size)
    auto_round.finish(keys, _HARMLESS)
    return Gptq(bits, size, less_one, symmetric, named=named)
