"""How a model is loaded, as one value: what each option may be, and which backend has a use for it. No torch.

    backend      chosen by                                       what has an effect
    kernels      a CPU and none of the following                 format activations kv_format expert_memory parallel
    torch        dtype, another device, QUADRIGA_OPS             dtype
    triton       QUADRIGA_OPS=triton                             dtype, format of quantised weights

Checked before anything is fetched or read. What depends on the model (quantised weights for ``activations``, a mixture
of experts for ``expert_memory``) is checked when its files are open.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from quadriga import runtime
from quadriga.errors import ConfigError
from quadriga.io.packed import FORMATS_TO_LOAD
from quadriga.kernels import dispatch
from quadriga.model.rank_mesh import RankMesh
from quadriga.option_rules import Allowed, OneOf, Rule, Spelling, Whole, as_argument, refuse_unused, require_values
from quadriga.quant.packed import KV_FORMATS
from quadriga.runners.compiled import ACTIVATIONS
from quadriga.runners.make import device_type

MOST_SEQUENCES = 1 << 16
MOST_BATCH_TOKENS = 1 << 16
"""Of one pass: its intermediate results are a few gigabytes then, and more is no faster."""

_MOST_BYTES = 1 << 60


def _on_kernels(options: Mapping[str, Any]) -> bool:
    return bool(options["backend"] == "kernels")


RULES = (
    Rule("format", lambda options: options["backend"] != "torch", "it packs weights for kernels, and {reason}"),
    Rule(
        "format",
        lambda options: options["backend"] != "triton" or options["format"] not in ("float32", "bfloat16"),
        "numbers are of {dtype} on the kernels for GPUs. Leave {format} out, and give that",
    ),
    Rule("threads", lambda options: options["backend"] != "triton", "a GPU's kernels have none, and {reason}"),
    Rule("activations", _on_kernels, "it is what the CPU's kernels multiply quantised weights with, and {reason}"),
    Rule("kv_format", _on_kernels, "torch's cache is of the weights' own type, and {reason}"),
    Rule("expert_memory", _on_kernels, "only the CPU's kernels leave experts on disk, and {reason}"),
    Rule("parallel", _on_kernels, "ranks compute on the CPU's kernels, and {reason}"),
    Rule(
        "expert_memory",
        lambda options: options["parallel"] is None,
        "ranks keep their parts in memory. Leave one of {expert_memory} and {parallel} out",
    ),
    Rule(
        "activations",
        lambda options: options["format"] not in ("float32", "bfloat16"),
        "it is what quantised weights are multiplied with. Leave it out, or give {format} q8, q4, q4m or mx4",
    ),
    Rule(
        "expert_memory",
        lambda options: options["format"] in (None, "keep"),
        "experts stay on disk as a packed directory holds them. Leave {format} out, and convert the model to it first",
    ),
)
"""Which options have an effect where."""

VALUES: dict[str, Allowed] = {
    "format": OneOf(FORMATS_TO_LOAD),
    "dtype": OneOf(("auto", *runtime.DTYPE_NAMES)),
    "threads": Whole(1, runtime.MOST_THREADS),
    "activations": OneOf(ACTIVATIONS),
    "kv_format": OneOf(KV_FORMATS),
    "kv_memory": Whole(1, _MOST_BYTES),
    "expert_memory": Whole(1, _MOST_BYTES),
    "max_sequences": Whole(1, MOST_SEQUENCES),
    "max_batch_tokens": Whole(1, MOST_BATCH_TOKENS),
}
"""What each option may be."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What ``engine.load.load`` takes beside the model's name; its docstring says what each is for."""

    format: str | None = None
    """None: keep."""
    dtype: str | None = None
    device: str = "cpu"
    threads: int | None = None
    activations: str | None = None
    """None: auto."""
    kv_format: str | None = None
    """None: bfloat16."""
    kv_memory: int | None = None
    expert_memory: int | None = None
    max_sequences: int = 64
    max_batch_tokens: int = 2048
    parallel: str | None = None
    """None: this process has the whole model."""

    def why_torch(self, spell: Spelling = as_argument) -> str | None:
        """What makes the model run on torch or a GPU's kernels, and how to change that; None: on the CPU's kernels.

        Raises:
            ConfigError, HardwareError: no such device, or an unknown QUADRIGA_OPS.
        """
        if dispatch.forced() == "triton":
            return "QUADRIGA_OPS=triton computes on the kernels for GPUs. Leave it out, or unset QUADRIGA_OPS"
        if self.dtype is not None:
            return f"{spell('dtype')} {self.dtype} computes in plain torch. Leave one of the two out"
        if self.device != "cpu" and device_type(self.device) != "cpu":
            return f"{spell('device')} {self.device} computes in plain torch. Leave one of the two out"
        if not dispatch.compiled():
            return f"QUADRIGA_OPS={dispatch.forced()} computes in torch. Leave it out, or unset QUADRIGA_OPS"
        return None

    def check(self, spell: Spelling = as_argument) -> None:
        """Refuse what cannot be and what would be ignored.

        Args:
            spell: how options are named in the error.

        Raises:
            ConfigError: an unknown name, a number out of range, an option that has no effect here.
            HardwareError: a device or an amount of memory that this machine has not.
        """
        options = asdict(self)
        require_values(VALUES, options, spell)
        if self.max_sequences > self.max_batch_tokens:
            raise ConfigError(
                f"{spell('max_sequences')} must be at most {spell('max_batch_tokens')} ({self.max_batch_tokens}), got "
                f"{self.max_sequences}: every running sequence gets a token in every pass"
            )
        if self.parallel is not None:
            RankMesh.parse(self.parallel)
        runtime.check_device(self.device, spell("device"))
        reason = self.why_torch(spell)
        options["backend"] = "kernels" if reason is None else "triton" if dispatch.forced() == "triton" else "torch"
        refuse_unused(RULES, options, spell, reason=reason or "")
        if reason is None or self.device == "cpu":  # elsewhere the accelerator's own memory counts
            self._check_memory(spell)

    def _check_memory(self, spell: Spelling) -> None:
        total = runtime.memory_bytes()[0]
        for option in ("kv_memory", "expert_memory"):
            nbytes = getattr(self, option)
            if nbytes is not None and nbytes > total:
                raise ConfigError(
                    f"{spell(option)} must be at most this machine's memory, {total / 1e9:.1f} GB; got "
                    f"{nbytes / 1e9:.1f} GB"
                )
