"""What a conversion may be asked for: which options go with which result.

to          with format       what it has a use for
quadriga    none              dtype max_shard_bytes
quadriga    one               format embeddings importance
hf                            layout dtype max_shard_bytes
gguf                          gguf_format importance
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quadriga.errors import ConfigError
from quadriga.io.gguf_mixtures import MIXTURES
from quadriga.io.packed import FORMATS_TO_LOAD
from quadriga.option_rules import (
    Allowed,
    OneOf,
    Rule,
    Spelling,
    Whole,
    as_argument,
    is_given,
    refuse_unused,
    require_values,
)
from quadriga.quant import pack_blocks
from quadriga.quant.packed import QUANTISED

TARGETS = ("quadriga", "hf", "gguf")
GGUF_FORMATS = ("float32", "float16", "bfloat16", "q8_0", "q4_0", "q4_1", *pack_blocks.PACK, *MIXTURES)
WEIGHED = ("q4_0", "q4_1", *pack_blocks.PACK, *MIXTURES)
"""Formats of GGUF files whose scales are searched for, with an importance of columns."""
DTYPES = ("keep", "float32", "bfloat16", "float16")


def _packs(options: Mapping[str, Any]) -> bool:
    return is_given(options["format"])


def weighs_errors(options: Mapping[str, Any]) -> bool:
    """True if numbers are rounded by a search, whose errors columns can weigh."""
    if options["to"] == "gguf":
        stored = options["gguf_format"]
        return is_given(stored) and (not isinstance(stored, str) or stored in WEIGHED)
    form = options["format"]
    # mx4's scale is the largest number's: nothing is searched.
    return is_given(form) and (not isinstance(form, str) or (form in QUANTISED and form != "mx4"))


RULES = (
    Rule(
        "layout",
        lambda o: o["to"] == "hf",
        "it is one of a family's Hugging Face layouts. Give {to} hf, or leave {layout} out",
    ),
    Rule(
        "gguf_format",
        lambda o: o["to"] == "gguf",
        "it is how a GGUF file stores numbers. Give {to} gguf, or leave {gguf_format} out",
    ),
    Rule(
        "format",
        lambda o: o["to"] == "quadriga",
        "it packs weights for Quadriga's own kernels, in its own directory. Leave {format} out, or {to} at quadriga",
    ),
    Rule(
        "dtype",
        lambda o: o["to"] != "gguf",
        "how a GGUF file stores numbers is {gguf_format}. Leave {dtype} out",
    ),
    Rule("dtype", lambda o: not _packs(o), "{format} says what the weights are packed as. Leave one of the two out"),
    Rule(
        "embeddings",
        lambda o: isinstance(o["format"], str),
        "it is another format for some of the packed matrices. Give {format} too, or leave {embeddings} out",
    ),
    Rule(
        "importance",
        weighs_errors,
        "it weighs the errors of quantised weights. Give {format} q8, q4 or q4m, or {to} gguf and a {gguf_format} with "
        "sub-blocks (q4_k), or leave {importance} out",
    ),
    Rule(
        "max_shard_bytes",
        lambda o: o["to"] != "gguf" and not _packs(o),
        "only safetensors are split so. Leave {max_shard_bytes} out",
    ),
)
"""Which options have an effect where."""

VALUES: dict[str, Allowed] = {
    "to": OneOf(TARGETS),
    "dtype": OneOf(DTYPES),
    "embeddings": OneOf(FORMATS_TO_LOAD),
    "max_shard_bytes": Whole(1, 1 << 60),
}
"""What each option may be, but ``format`` and ``gguf_format``, which may be recipes."""

OPTIONS: dict[str, Any] = dict.fromkeys(
    ("layout", "dtype", "gguf_format", "format", "embeddings", "importance", "max_shard_bytes")
) | {"to": "quadriga"}
"""Every option, not given."""


def check(given: Mapping[str, Any], spell: Spelling = as_argument) -> None:
    """Refuse what cannot be and what would be ignored, before a file is opened.

    Args:
        given: some of OPTIONS.
        spell: how options are named in the error.

    Raises:
        ConfigError: naming the option.
    """
    options = OPTIONS | dict(given)
    assert len(options) == len(OPTIONS), "given are options of a conversion"
    require_values(VALUES, options, spell)
    form = options["format"]
    if isinstance(form, str) and form not in FORMATS_TO_LOAD:
        raise ConfigError(f"{spell('format')} must be one of {', '.join(FORMATS_TO_LOAD)}; got {form!r}")
    stored = options["gguf_format"]
    if isinstance(stored, str) and stored not in GGUF_FORMATS:
        raise ConfigError(f"{spell('gguf_format')} must be one of {', '.join(GGUF_FORMATS)}; got {stored!r}")
    if options["layout"] == "":
        raise ConfigError(f"{spell('layout')} must be the name of a layout, got an empty one")
    refuse_unused(RULES, options, spell)
