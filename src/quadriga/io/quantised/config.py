"""config.json of a checkpoint that a quantiser packed: the model it is of, and how its weights are to be read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from quadriga.errors import ConfigError
from quadriga.io.quantised import awq, bitsandbytes, compressed, fp8, gptq
from quadriga.io.quantised.method import Method
from quadriga.model.families.keys import Keys

_METHODS: dict[str, Callable[[Keys], Method]] = {
    "fp8": fp8.read_config,
    "gptq": gptq.read_config,
    "awq": awq.read_config,
    "compressed-tensors": compressed.read_config,
    "bitsandbytes": bitsandbytes.read_config,
}

_OF_A_FAMILY = ("mxfp4",)
"""Read by the family that is published so (gpt-oss)."""


def split(raw: Mapping[str, object]) -> tuple[Mapping[str, object], Method | None]:
    """A parsed config.json without what the quantiser added, and the quantiser's method; None where there is none.

    Raises:
        ConfigError: a method, or a setting of one, that is not read; the message names it.
    """
    key = next((k for k in ("quantization_config", "compression_config") if raw.get(k) is not None), None)
    if key is None:
        return raw, None
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
