"""config.json of a checkpoint that a quantiser packed: the model it is of, and how its weights are to be read.

Settings are in "quantization_config", of the model or of its text; in files of 2023 and of ModelOpt's older releases
they are only in a file beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from quadriga.errors import ConfigError
from quadriga.io.json_files import read_json
from quadriga.io.quantised import BESIDE, auto_round, awq, bitsandbytes, compressed_config, fp8, gptq, modelopt
from quadriga.io.quantised.method import Method
from quadriga.model.families.keys import Keys


def _auto_round(keys: Keys) -> Method:
    form = keys.text("packing_format")
    keys.must_be("packing_format", *auto_round.LESS_ONE, *auto_round.WHOLE_ZEROS, *auto_round.AWQ)
    if form in auto_round.AWQ:
        return awq.read_auto_round_config(keys)
    return gptq.read_auto_round_config(keys)


_METHODS: dict[str, Callable[[Keys], Method]] = {
    "fp8": fp8.read_config,
    "fbgemm_fp8": fp8.read_fbgemm_config,
    "modelopt": modelopt.read_config,
    "gptq": gptq.read_config,
    "awq": awq.read_config,
    "auto-round": _auto_round,
    "intel/auto-round": _auto_round,
    "compressed-tensors": compressed_config.read_config,
    "bitsandbytes": bitsandbytes.read_config,
}

_OF_A_FAMILY = ("mxfp4",)
"""Read by the family that is published so (gpt-oss)."""


def split(raw: Mapping[str, object], folder: Path | None = None) -> tuple[Mapping[str, object], Method | None]:
    """A parsed config.json without what the quantiser added, and the quantiser's method; None where there is none.

    Args:
        folder: where config.json lies, to look for a quantiser's own file beside it.

    Raises:
        ConfigError: a method, or a setting of one, that is not read; the message names it.
    """
    key = next((k for k in ("quantization_config", "compression_config") if raw.get(k) is not None), None)
    if key is None:
        return _split_text(raw, folder)
    keys = Keys(raw, "config.json").section(key)
    method = keys.text("quant_method")
    if method in _OF_A_FAMILY:
        return raw, None
    if method not in _METHODS:
        raise ConfigError(
            f"config.json: {key}: quant_method must be one of {', '.join((*_METHODS, *_OF_A_FAMILY))}; got "
            f"{method[:40]!r}. Give the checkpoint it was made from, or a GGUF file of it."
        )
    return {k: value for k, value in raw.items() if k != key}, _METHODS[method](keys)


def _split_text(raw: Mapping[str, object], folder: Path | None) -> tuple[Mapping[str, object], Method | None]:
    """The same of the text of a model that sees pictures, then of the files beside."""
    text = raw.get("text_config")
    if isinstance(text, Mapping) and text.get("quantization_config") is not None:
        inner, method = split(text)
        return {**raw, "text_config": inner}, method
    for name, of in BESIDE.items():
        if folder is not None and (folder / name).is_file():
            keys = Keys(read_json(folder / name), name)
            keys.must_be("quant_method", of, None)
            return raw, _METHODS[of](keys)
    return raw, None
