"""compressed-tensors' quantization_config: schemes of weights, and which of several a weight is packed by.

A file of one scheme has it for every packed weight. Where it has several ("mixed-precision"), the one that a weight's
parts fit, by names, dtypes and shapes, is its own; patterns of names ("targets") are not run, as a file could make one
that never ends.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quadriga.errors import CheckpointError, ConfigError
from quadriga.io.quantised.compressed import Compressed
from quadriga.io.quantised.fp4 import Fp4
from quadriga.io.quantised.method import Method, Parts
from quadriga.model.families.keys import Keys
from quadriga.model.weight_map import Shape
from quadriga.quant.dtypes import Array

_PACKED, _MX8 = "pack-quantized", "mxfp8-quantized"
_FORMATS = (_PACKED, "int-quantized", "float-quantized", "naive-quantized", _MX8)
_FP4 = {"nvfp4-pack-quantized": Fp4("nvfp4"), "mxfp4-pack-quantized": Fp4("mxfp4")}


@dataclass(frozen=True)
class Mixed:
    """Several schemes of one checkpoint; see the module docstring and ``method.Method``."""

    schemes: tuple[Compressed | Fp4, ...]

    label = "compressed-tensors"

    @property
    def suffixes(self) -> tuple[str, ...]:
        """See ``method.Method``."""
        return tuple(dict.fromkeys(suffix for scheme in self.schemes for suffix in scheme.suffixes))

    def _of(self, parts: Parts) -> Compressed | Fp4:
        """The scheme that the parts fit."""
        fitting: list[Compressed | Fp4] = []
        whys = []
        for scheme in self.schemes:
            try:
                if set(parts) <= set(scheme.suffixes):
                    scheme.shape(parts)
                    fitting.append(scheme)
            except CheckpointError as error:
                whys.append(str(error))
        if len(fitting) == 1:
            return fitting[0]
        which = "several of them" if fitting else "none: " + (whys[0] if whys else ", ".join(sorted(parts)))
        raise parts.fail(
            f"its parts must fit one of the {len(self.schemes)} schemes of config_groups, they fit {which}"
        )

    def shape(self, parts: Parts) -> Shape:
        """See ``method.Method``."""
        return self._of(parts).shape(parts)

    def read(self, parts: Parts, first: int, last: int) -> Array:
        """See ``method.Method``: as the weight's scheme has it."""
        return self._of(parts).read(parts, first, last)

    @property
    def kept(self) -> str:
        """See ``method.KeepsBlocks``."""
        return ", ".join(scheme.kept for scheme in self.schemes if isinstance(scheme, Fp4) and scheme.kept)

    def block_format(self, parts: Parts) -> str | None:
        """See ``method.KeepsBlocks``: as the weight's scheme has it."""
        scheme = self._of(parts)
        return scheme.block_format(parts) if isinstance(scheme, Fp4) else None

    def raw(self, parts: Parts, first: int, last: int) -> NDArray[np.uint8]:
        """See ``method.KeepsBlocks``."""
        scheme = self._of(parts)
        assert isinstance(scheme, Fp4), "a weight of blocks"
        return scheme.raw(parts, first, last)


def read_config(keys: Keys) -> Method:
    """quantization_config of the method "compressed-tensors".

    Raises:
        ConfigError: a key that is unknown or asks for what is not read.
    """
    form = keys.text("format")
    groups = keys.section("config_groups")
    keys.must_be("transform_config", {}, None)
    keys.must_be("moe_sparsity_config", None)
    keys.must_be("quantization_status", "compressed", "frozen", None)
    _check_dense(keys)
    keys.finish(_WHICH_AND_HOW)
    found = [_scheme(groups.section(name), form) for name in groups.names()]
    schemes = tuple(dict.fromkeys(scheme for scheme in found if scheme is not None))
    if not schemes:
        raise ConfigError(f"quantization_config: config_groups must pack weights, got {len(found)} groups that do not")
    return schemes[0] if len(schemes) == 1 else Mixed(schemes)


_WHICH_AND_HOW = frozenset(
    {"ignore", "global_compression_ratio", "version", "producer", "provider", "kv_cache_scheme", "quant_method"}
)
"""What was left as it was, which the tensors' names say; the cache's keys and values are not rounded."""


def _check_dense(keys: Keys) -> None:
    """Sparse weights are stored otherwise still."""
    if keys.value("sparsity_config"):
        sparsity = keys.section("sparsity_config")
        sparsity.must_be("format", "dense")
        sparsity.finish(
            frozenset({"global_sparsity", "sparsity_structure", "ignore", "targets", "registry_requires_subclass"})
        )


def _scheme(keys: Keys, form: str) -> Compressed | Fp4 | None:
    """How a group's weights are packed; None: only its activations would be rounded."""
    form = keys.text("format") if keys.given("format") else form
    if not keys.given("weights"):
        keys.finish(_ACTIVATIONS)
        return None
    if form not in (*_FORMATS, *_FP4):
        raise ConfigError(
            f"quantization_config: format must be one of {', '.join((*_FORMATS, *_FP4))}; got {form[:40]!r}"
        )
    how = keys.section("weights")
    keys.finish(_ACTIVATIONS)
    how.must_be("type", "int", "float")
    how.must_be("dynamic", False)
    how.must_be("actorder", None, False, True, "group", "weight", "static", "dynamic")
    is_float, bits, symmetric = how.text("type") == "float", how.integer("num_bits"), how.flag("symmetric")
    if form in _FP4:
        return _fp4(how, form)
    if not 1 <= bits <= 8 or (is_float and bits != 8):
        raise ConfigError(f"quantization_config: num_bits must be 1 to 8, and 8 of type float; got {bits}")
    if is_float and (form == _PACKED or not symmetric):
        raise ConfigError("quantization_config: weights of type float must be symmetric, and not pack-quantized")
    strategy = how.text("strategy")
    height, width = _block_of(how, strategy)
    if form == _MX8 and (not is_float or (height, width) != (1, 32)):
        raise ConfigError(f"quantization_config: {_MX8} must be of type float in groups of 32")
    how.finish(_FOUND)
    return Compressed(form == _PACKED, bits, is_float, symmetric, strategy, height, width, form == _MX8)


_ACTIVATIONS = frozenset({"targets", "input_activations", "output_activations"})
_FOUND = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype", "is_mse"})
"""How the numbers were found; the scales' dtype shows in the tensors."""


def _fp4(how: Keys, form: str) -> Fp4:
    """The settings of FP4, which are all fixed."""
    nvidia = _FP4[form].kind == "nvfp4"
    how.must_be("type", "float")
    how.must_be("num_bits", 4)
    how.must_be("symmetric", True)
    how.must_be("strategy", "tensor_group" if nvidia else "group")
    how.must_be("group_size", 16 if nvidia else 32)
    how.must_be("block_structure", None)
    how.finish(_FOUND)
    return _FP4[form]


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
