"""AWQ in the version "gemm": 4 bits, eight neighbouring rows in an int32 word, even ones first; and AWQ's settings.

    NAME.qweight (cols, rows / 8) int32    nibble i of word [c, j] is q of column c and row 8 j + (0 2 4 6 1 3 5 7)[i]
    NAME.qzeros  (groups, rows / 8) int32  z of a group of columns, in the same order
    NAME.scales  (groups, rows) float16    w = (q - z) * scales, in the dtype of the scales

The versions for single vectors are in ``awq_vectors``. Source: casper-hansen/AutoAWQ awq/utils/packing_utils.py,
awq/modules/linear/gemm.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import ConfigError
from quadriga.io.quantised import auto_round
from quadriga.io.quantised.awq_vectors import AwqVectors, AwqVectorsFast
from quadriga.io.quantised.method import FLOATS, Method, Parts, group_size, scaled
from quadriga.model.families.keys import Keys
from quadriga.model.weight_map import Shape
from quadriga.quant.dtypes import Array

_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of every row of eight, the nibble that holds it."""


@dataclass(frozen=True)
class Awq:
    """Settings of a checkpoint; see ``method.Method``."""

    group_size: int
    """Columns of a group; -1: all."""

    label = "awq"
    suffixes = ("qweight", "qzeros", "scales")

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        cols, words = parts.matrix("qweight", ("int32",))
        size = cols if self.group_size == -1 else self.group_size
        if cols % size:
            raise parts.fail(f"its {cols} columns must be whole groups of {size}")
        parts.expect("qzeros", ("int32",), (cols // size, words))
        parts.expect("scales", FLOATS, (cols // size, 8 * words))
        return 8 * words, cols

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: in the dtype of the scales."""
        cols = parts.info("qweight").shape[0]
        groups = parts.info("scales").shape[0]
        word = (first // 8, -(-last // 8))

        def rows(part: str, height: int) -> NDArray[np.uint8]:
            words = np.ascontiguousarray(parts.read(part, ((0, height), word)).T).view(np.uint32)
            out = np.empty((8 * len(words), height), dtype=np.uint8)
            for row, nibble in enumerate(_NIBBLES):
                out[row::8] = words >> np.uint32(4 * nibble) & np.uint32(15)
            return out[first - 8 * word[0] :][: last - first]

        scales = parts.read("scales", ((0, groups), (first, last))).T
        return scaled(rows("qweight", cols), rows("qzeros", groups), scales, np.arange(cols) // (cols // groups), 4)


_VERSIONS: dict[str, Callable[[int], Method]] = {
    "gemm": Awq, "gemv": AwqVectors, "gemv_fast": AwqVectorsFast, "llm-awq": AwqVectorsFast,
}  # fmt: skip


def read_config(keys: Keys) -> Method:
    """quantization_config of the method "awq".

    Raises:
        ConfigError: a key that is unknown or asks for what is not read.
    """
    keys.must_be("bits", 4, None)
    keys.must_be("w_bit", 4, None)
    # Every file has zeros, and numbers are read by them: transformers 5 writes "sym" for all, AutoRound what is true.
    keys.must_be("zero_point", True, False)
    keys.must_be("sym", False, True, None)
    keys.must_be("desc_act", False, None)
    keys.must_be("method", "awq", None)
    for key in ("version", "format", "checkpoint_format"):
        keys.must_be(key, *_VERSIONS, *map(str.upper, _VERSIONS), None)
    keys.must_be("backend", "autoawq", "llm-awq", "auto", None)
    keys.must_be("pack_dtype", "int32", "int16", None)
    keys.must_be("dynamic", {}, None)
    keys.must_be("adapter", {}, None)
    keys.must_be("rotation", None)
    said = {str(keys.value(key)).lower() for key in ("version", "format", "checkpoint_format") if keys.given(key)} or {
        "gemm"
    }
    if keys.value("backend") == "llm-awq":
        said = {"llm-awq"}  # which calls its version "gemv"
    if len(said) > 1:
        raise ConfigError(f"quantization_config: version and format must agree, got {' and '.join(sorted(said))}")
    size = group_size(keys, "q_group_size" if keys.given("q_group_size") else "group_size")
    auto_round.finish(keys, _HARMLESS)
    return _VERSIONS[said.pop()](size)


def read_auto_round_config(keys: Keys) -> Awq:
    """quantization_config of the method "auto-round" where it packs as AWQ does.

    Raises:
        ConfigError: a key that is unknown or asks for what is not read.
    """
    keys.must_be("bits", 4)
    size = group_size(keys, "group_size")
    if auto_round.other_settings(keys, 4, size):
        raise ConfigError("quantization_config: extra_config must leave bits and groups as they are with AWQ's packing")
    keys.must_be("version", "gemm", None)
    auto_round.finish(keys, _HARMLESS | {"sym", "zero_point"})
    return Awq(size)


_HARMLESS = frozenset(
    {
        "group_size", "modules_to_not_convert", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config",
        "meta", "ignore",
        # What transformers 5 writes of its settings for GPTQ.
        "act_group_aware", "cache_block_outputs", "damp_percent", "max_input_length", "model_seqlen",
        "module_name_preceding_first_block", "pad_token_id", "tokenizer", "true_sequential",
    }
)  # fmt: skip
"""What was left as it was, which the tensors' names say; how it was made; with what to compute."""
