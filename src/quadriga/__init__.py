"""Quadriga: an open DBRX. Run, train, tune, evaluate and look inside fine-grained mixture-of-experts models.

The public names are imported on first use (PEP 562), so ``import quadriga`` costs nothing and ``quadriga --help``
never imports torch. Every exception raised on purpose is a name here too; ``quadriga.errors`` draws their tree.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quadriga.engine.llm import LLM as LLM
    from quadriga.engine.load import load as load
    from quadriga.engine.request import SamplingParams as SamplingParams
    from quadriga.errors import AnswerError as AnswerError
    from quadriga.errors import BusyError as BusyError
    from quadriga.errors import CatalogueError as CatalogueError
    from quadriga.errors import CheckpointError as CheckpointError
    from quadriga.errors import ConfigError as ConfigError
    from quadriga.errors import CorpusError as CorpusError
    from quadriga.errors import EndpointError as EndpointError
    from quadriga.errors import EngineError as EngineError
    from quadriga.errors import EvaluationError as EvaluationError
    from quadriga.errors import GrammarError as GrammarError
    from quadriga.errors import HardwareError as HardwareError
    from quadriga.errors import InputError as InputError
    from quadriga.errors import QuadrigaError as QuadrigaError
    from quadriga.errors import RequestError as RequestError
    from quadriga.errors import TemplateError as TemplateError
    from quadriga.errors import TokenizerError as TokenizerError
    from quadriga.errors import TrainingError as TrainingError
    from quadriga.model.config import ModelConfig as ModelConfig

__version__ = "0.1.0"

_HOME = {
    "LLM": "quadriga.engine.llm",
    "ModelConfig": "quadriga.model.config",
    "SamplingParams": "quadriga.engine.request",
    "load": "quadriga.engine.load",
}

__all__ = [
    "LLM",
    "AnswerError",
    "BusyError",
    "CatalogueError",
    "CheckpointError",
    "ConfigError",
    "CorpusError",
    "EndpointError",
    "EngineError",
    "EvaluationError",
    "GrammarError",
    "HardwareError",
    "InputError",
    "ModelConfig",
    "QuadrigaError",
    "RequestError",
    "SamplingParams",
    "TemplateError",
    "TokenizerError",
    "TrainingError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module(_HOME.get(name, "quadriga.errors")), name)
    raise AttributeError(f"module 'quadriga' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
