"""The initial weights of a run's model.

New matrices are drawn from N(0, init_std^2); the projections back into the residual stream (wo, w_down) are divided by
sqrt(2 n_layers), so that its variance does not grow with depth (GPT-2; LLM Foundry does so for DBRX's family). Norms
are 1 (DBRX's first official file drew them from N(0, 0.02), a mistake).

Random numbers are counted, not drawn one after another: an element's value is a function of the seed, the parameter's
name and the element's index in the whole parameter. So any box can be made alone, and any number of ranks starts with
the same bits:

    x[i] = std sqrt(-2 log u) cos(2 pi v)     u, v: upper and lower 32 bits of SplitMix64's i-th number (Steele 2014)
"""

from __future__ import annotations

import hashlib
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from quadriga.hub import catalogue
from quadriga.io.open import open_checkpoint
from quadriga.kernels.arrays import tensor
from quadriga.model.config import ModelConfig
from quadriga.model.weight_map import Box, parameter_shapes
from quadriga.nn.load import load_parameters
from quadriga.text.tokenizer import Tokenizer
from quadriga.train.corpus.words import mix

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's step; its i-th number from key is mix(key + (i + 1) golden)."""
_AT_ONCE = 1 << 20
"""Elements computed at once, so that what is between stays in cache."""


class NewWeights:
    """The float32 weights of a new model, as the module docstring says; any box of any parameter can be read."""

    def __init__(self, config: ModelConfig, *, seed: int, std: float) -> None:
        self.config, self.seed, self.std = config, seed, std
        self._shapes = parameter_shapes(config)

    def read(self, name: str, box: Box) -> Tensor:
        """A box of a parameter."""
        shape = tuple(b - a for a, b in box)
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith(("fuse.weight", "router.correction", ".bias", ".sinks")) or ".b_" in name:
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{self.seed}/{name}".encode()).digest()
        back = name.endswith((".attn.wo.weight", ".w_down"))
        std = self.std / (2 * self.config.n_layers) ** 0.5 if back else self.std
        return torch.from_numpy(normal(int.from_bytes(digest[:8], "little"), self._shapes[name], box, std))

    def parameters(self) -> dict[str, Tensor]:
        """All of them: name -> tensor."""
        return {name: self.read(name, tuple((0, n) for n in shape)) for name, shape in self._shapes.items()}


def normal(key: int, shape: tuple[int, ...], box: Box, std: float) -> npt.NDArray[np.float32]:
    """A box of a tensor of normal numbers of mean 0, by the formula in the module docstring."""
    out = np.empty([b - a for a, b in box], dtype=np.float32)
    strides = [prod(shape[dim + 1 :]) for dim in range(len(shape))]
    slab = max(1, _AT_ONCE // max(1, prod(out.shape[1:])))
    for first in range(0, len(out), slab):
        part = out[first : first + slab]
        spans = [(box[0][0] + first, box[0][0] + first + len(part)), *box[1:]]
        index = np.zeros([1] * len(shape), dtype=np.uint64)
        for dim, ((a, b), stride) in enumerate(zip(spans, strides, strict=True)):
            along = np.arange(a, b, dtype=np.uint64) * np.uint64(stride)
            index = index + along.reshape([-1 if d == dim else 1 for d in range(len(shape))])
        bits = mix((index + np.uint64(1)) * _GOLDEN + np.uint64(key))
        upper, lower = (bits >> np.uint64(32)).astype(np.float64), (bits & np.uint64(0xFFFFFFFF)).astype(np.float64)
        part[...] = std * np.sqrt(-2 * np.log((upper + 0.5) * 2.0**-32)) * np.cos(lower * (2 * np.pi * 2.0**-32))
    return out


def new_parameters(config: ModelConfig, *, seed: int, std: float) -> dict[str, Tensor]:
    """All of :class:`NewWeights`: name -> tensor."""
    return NewWeights(config, seed=seed, std=std).parameters()


class StoredWeights:
    """The weights of a checkpoint of any format as float32; any box of any parameter can be read."""

    def __init__(self, source: str) -> None:
        path = Path(source)
        self._checkpoint = open_checkpoint(path if path.exists() else catalogue.resolve(source))
        self.config = self._checkpoint.config

    def read(self, name: str, box: Box) -> Tensor:
        """A box of a parameter."""
        return tensor(self._checkpoint.parameters.read(name, box)).float()

    def parameters(self) -> dict[str, Tensor]:
        """All of them: name -> tensor."""
        return load_parameters(self._checkpoint, dtype=torch.float32)

    def tokenizer(self) -> Tokenizer | None:
        """The checkpoint's tokenizer, if it has one."""
        return self._checkpoint.load_tokenizer(catalogue.cl100k_ranks)

    def close(self) -> None:
        """Close the checkpoint's files."""
        self._checkpoint.close()
