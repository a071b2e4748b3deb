"""How ranks share a model that answers: which layers, heads, experts and rows each of them has. Imports no torch.

    ranks = pp x ep x tp             rank = (stage x ep + expert part) x tp + tensor part

    pp   stages of neighbouring layers, one after the other: for memory, and for slow networks
    ep   parts of every mixture: whole experts, each on one rank of a stage (with tp: on tp of them)
    tp   parts of every expert's width

What is no expert (attention by heads, dense and shared networks by width, the head by rows) is cut into as many parts
as a stage has ranks, ep x tp. Routers, norms and latents are everywhere. Parts need not be equal: 8 heads on 3 ranks
are 2, 3 and 3. What is whose never depends on the batch, so neither does the order in which anything is added up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

from quadriga.errors import ConfigError
from quadriga.model.config import (
    AttentionSpec,
    DeltaNetSpec,
    DenseSpec,
    LatentAttentionSpec,
    LayerSpec,
    Mamba2Spec,
    ModelConfig,
    MoESpec,
    NoFeedForward,
    NoMixer,
    ShortConvSpec,
)

MOST_RANKS = 1024

Run = tuple[int, int]
"""A half-open range of rows, columns or experts."""


@dataclass(frozen=True, kw_only=True)
class RankMesh:
    """See the module docstring."""

    tp: int = 1
    ep: int = 1
    pp: int = 1

    @classmethod
    def parse(cls, text: str) -> RankMesh:
        """``tp=2,ep=4,pp=3``, in any order, each at most once.

        Raises:
            ConfigError: not such a text.
        """
        given: dict[str, int] = {}
        for part in text.split(","):
            found = re.fullmatch(r"\s*(tp|ep|pp)\s*=\s*([1-9][0-9]{0,3})\s*", part)
            if found is None or found[1] in given:
                raise ConfigError(
                    f"parallel must be like tp=2, ep=4 or tp=2,ep=2,pp=3, each at most once; got {text[:80]!r}"
                )
            given[found[1]] = int(found[2])
        mesh = cls(**given)
        if not 2 <= mesh.size <= MOST_RANKS:
            raise ConfigError(f"parallel must make from 2 to {MOST_RANKS} ranks; {text} makes {mesh.size}")
        return mesh

    def __str__(self) -> str:
        return ",".join(f"{name}={n}" for name in ("tp", "ep", "pp") if (n := getattr(self, name)) > 1) or "tp=1"

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.group * self.pp

    @property
    def group(self) -> int:
        """Ranks of a stage."""
        return self.tp * self.ep

    def place(self, rank: int) -> RankPlace:
        """What a rank has, by its number."""
        stage, index = divmod(rank, self.group)
        expert_part, tensor_part = divmod(index, self.tp)
        return RankPlace(
            mesh=self, rank=rank, stage=stage, index=index, expert_part=expert_part, tensor_part=tensor_part
        )

    def problem(self, config: ModelConfig) -> str | None:
        """Why a model cannot be shared so, and what to do; None: it can."""
        if self.pp > config.n_layers:
            return f"pp must be at most the model's {config.n_layers} layers, got {self.pp}"
        if self.ep > 1 and not config.is_moe:
            return f"ep={self.ep} shares experts out, and this model has none. Give tp={self.ep}"
        if self.group == 1:
            return None
        if config.vocab_size < self.group:
            return f"the head's {config.vocab_size} rows do not make {self.group} parts"
        for layer in config.kinds():
            found = self._layer_problem(layer)
            if found is not None:
                return found
        return None

    def _layer_problem(self, layer: LayerSpec) -> str | None:
        if isinstance(layer.mixer, Mamba2Spec) or (layer.moe is not None and layer.moe.apart):
            what = "a Mamba-2 layer" if isinstance(layer.mixer, Mamba2Spec) else "a mixture with norms inside"
            return f"{what} is not shared out: tp and ep must be 1. Let pp share layers out"
        qk_norm = layer.mixer.qk_norm if isinstance(layer.mixer, AttentionSpec) else None
        if qk_norm is not None and qk_norm.over != "head":
            return (
                "a norm of all heads together cannot be shared out by heads: tp and ep must be 1. Let pp share layers"
            )
        if layer.mixes:
            what, n = _parts_of(layer)
            if n < self.group:
                return (
                    f"tp x ep must be at most {n}, the number of {what}; got {self.tp} x {self.ep}. Let pp share "
                    "layers out"
                )
        match layer.ffn:
            case MoESpec() as moe if moe.n_experts < self.ep:
                return f"ep must be at most the model's {moe.n_experts} experts, got {self.ep}"
            case MoESpec(d_ff=width, shared=shared):
                too_many = width < self.tp or (shared is not None and shared.d_ff < self.group)
            case DenseSpec(d_ff=width):
                too_many = width < self.group
            case NoFeedForward():
                return None
        return f"a network's width must have a part for each rank, got {width}" if too_many else None


def _parts_of(layer: LayerSpec) -> tuple[str, int]:
    """What a layer's mixer is cut by, and how many of it there are."""
    match layer.mixer:
        case LatentAttentionSpec(n_heads=n):
            return "heads", n
        case AttentionSpec(n_kv_heads=n):
            return "key/value heads", n
        case DeltaNetSpec(n_k_heads=n):
            return "key heads", n
        case ShortConvSpec(width=n):
            return "channels", n
        case Mamba2Spec(n_groups=n):
            return "groups of heads", n
        case NoMixer():
            raise AssertionError("asked of layers that mix")


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """A rank in its mesh."""

    mesh: RankMesh
    rank: int
    stage: int
    index: int
    """In its stage."""
    expert_part: int
    tensor_part: int

    @property
    def first(self) -> bool:
        """True in the stage that looks tokens up."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """True in the stage that makes logits."""
        return self.stage == self.mesh.pp - 1

    def layers(self, config: ModelConfig) -> range:
        """The layers of this rank's stage."""
        return range(*even_part(config.n_layers, self.mesh.pp, self.stage))

    def of_group(self, n: int, width: int = 1) -> Run:
        """This rank's of ``n`` heads or channels of ``width`` numbers that all ranks of a stage share."""
        return aligned_part(n, self.mesh.group, self.index, width)

    def of_width(self, n: int) -> Run:
        """This rank's numbers of an expert's width."""
        return aligned_part(n, self.mesh.tp, self.tensor_part)

    def experts(self, n: int) -> Run:
        """This rank's of ``n`` experts."""
        return even_part(n, self.mesh.ep, self.expert_part)

    def head_rows(self, vocab_size: int, index: int | None = None) -> Run:
        """The rows of the head that this rank has, or another one of its stage; none but in the last stage."""
        if not self.last:
            return (0, 0)
        return aligned_part(vocab_size, self.mesh.group, self.index if index is None else index, most=16)


def even_part(n: int, parts: int, part: int) -> Run:
    """A part of ``n`` things; parts differ by one at most."""
    return part * n // parts, (part + 1) * n // parts


MOST_UNEVEN = 1.25
"""How much larger than an even part the largest may be for the sake of whole blocks."""


def aligned_part(n: int, parts: int, part: int, width: int = 1, *, most: int = 256) -> Run:
    """A part of ``n`` things of ``width`` numbers, cut where stored blocks of numbers end unless that is too uneven.

    Args:
        most: numbers of the largest blocks: GGUF's have 256, others 64 or 32, and a tile has 16 rows.
    """
    block = most
    while block > 1:
        unit = block // gcd(block, width)  # things that are whole blocks
        cuts = [i * (n // unit) // parts * unit for i in range(parts)] + [n]
        sizes = [end - begin for begin, end in pairwise(cuts)]
        if min(sizes) > 0 and max(sizes) <= MOST_UNEVEN * -(-n // parts):
            return cuts[part], cuts[part + 1]
        block //= 2
    return even_part(n, parts, part)
