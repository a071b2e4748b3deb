"""What AutoRound says in a quantization_config, of its own method "auto-round" and of those it writes for others.

Its own files are packed as GPTQ or AWQ are, and packing_format says which:

    auto_round:auto_gptq, auto_round:gptq        GPTQ, zeros less one        (``gptq``)
    auto_round, auto_round:gptqmodel             GPTQ, zeros as they are
    auto_round:auto_awq, auto_round:awq          AWQ, version gemm           (``awq``)

Source: intel/auto-round auto_round/export/export_to_autoround/export.py.
"""

from __future__ import annotations

import re

from quadriga.errors import ConfigError
from quadriga.model.families.keys import Keys

LESS_ONE = ("auto_round:auto_gptq", "auto_round:gptq")
WHOLE_ZEROS = ("auto_round", "auto_round:gptqmodel")
AWQ = ("auto_round:auto_awq", "auto_round:awq")

_TUNING = frozenset(
    {
        "amp", "autoround_version", "auto_round_version", "batch_size", "data_type", "dataset",
        "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "gradient_accumulate_steps",
        "iters", "lr", "low_gpu_mem_usage", "minmax_lr", "nsamples", "provider", "scale_dtype", "seqlen",
        "static_attention_granularity", "static_kv_granularity", "to_quant_block_names", "block_name_to_quantize",
        "modules_in_block_to_quantize", "lm_head", "packing_format", "backend",
    }
)  # fmt: skip
"""How the numbers were found, and what of the model was packed, which the tensors' names say."""


def finish(keys: Keys, harmless: frozenset[str]) -> None:
    """``Keys.finish`` with what AutoRound writes besides; what it may write and nobody reads here is refused."""
    keys.must_be("data_type", "int", None)
    keys.must_be("act_bits", 16, 32, None)
    for key in ("rotation_config", "static_attention_dtype", "static_kv_dtype", "super_bits", "super_group_size"):
        keys.must_be(key, None)
    keys.finish(harmless | _TUNING)


def other_settings(keys: Keys, bits: int, size: int) -> tuple[tuple[str, int, int], ...]:
    """Matrices with bits or groups of their own: (name, bits, columns of a group); those of 16 bits are not packed.

    Raises:
        ConfigError: a pattern in place of a name, or a setting that is not read.
    """
    if not keys.given("extra_config"):
        return ()
    table, found = keys.section("extra_config"), []
    for name in table.names():
        how = table.section(name)
        own_bits = how.integer("bits") if how.given("bits") else bits
        own_size = how.integer("group_size") if how.given("group_size") else size
        how.must_be("data_type", "int", "float", "fp", None)
        how.must_be("act_bits", 16, 32, None)
        how.finish(frozenset({"sym", "act_group_size", "act_sym", "act_data_type", "act_dynamic", "super_bits",
                              "super_group_size", "scale_dtype", "in_blocks"}))  # fmt: skip
        if own_bits >= 16 or (own_bits, own_size) == (bits, size):
            continue
        if own_bits not in (2, 3, 4, 8) or not (own_size == -1 or own_size > 0):
            raise ConfigError(
                f"quantization_config: extra_config of {name[:60]!r}: bits must be 2, 3, 4, 8 or 16 and group_size -1 "
                f"or from 1, got {own_bits} and {own_size}"
            )
        if not re.fullmatch(r"[\w.]+", name):
            raise ConfigError(
                f"quantization_config: extra_config must name single matrices where bits differ, got the pattern "
                f"{name[:60]!r}"
            )
        found.append((name, own_bits, own_size))
    return tuple(found)
