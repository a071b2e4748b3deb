"""Quadriga: an open DBRX. Run, train, tune, evaluate and look inside fine-grained mixture-of-experts models.

The public names are imported on first use (PEP 562), so ``import quadriga`` costs nothing and ``quadriga --help``
never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quadriga.engine.llm import LLM as LLM
    from quadriga.engine.llm import load as load
    from quadriga.engine.request import SamplingParams as SamplingParams
    from quadriga.model.config import ModelConfig as ModelConfig

__version__ = "0.1.0"

_HOME = {
    "LLM": "quadriga.engine.llm",
    "ModelConfig": "quadriga.model.config",
    "SamplingParams": "quadriga.engine.request",
    "load": "quadriga.engine.llm",
}

__all__ = ["LLM", "ModelConfig", "SamplingParams", "__version__", "load"]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'quadriga' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
