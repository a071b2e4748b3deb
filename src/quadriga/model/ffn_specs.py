"""Feed-forward networks: one, or a router over many (``model/config.py`` draws the tree)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quadriga.model.spec_checks import require, require_number, require_positive

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_glu"]
"""The non-linearity of a feed-forward network. ``gelu`` is the exact erf form, ``gelu_tanh`` jax's and GPT-2's,
``relu2`` max(x, 0) squared (So et al. 2021, arXiv 2109.08668).
``clamped_glu`` is a gated unit as a whole, gpt-oss's: (u + 1) g sigmoid(1.702 g), g = min(gate, 7), u = up in +-7."""

Aggregate = Literal["weighted_sum", "vote", "fuse"]
"""How the chosen experts' outputs become one vector; see ``nn.moe``."""


@dataclass(frozen=True, kw_only=True)
class DenseSpec:
    """One feed-forward network: gated, w_down(act(w_gate x) * w_up x), or plain, w_down(act(w_up x))."""

    d_ff: int
    activation: Activation
    gated: bool = True

    def __post_init__(self) -> None:
        require_positive("ffn", d_ff=self.d_ff)
        require_activation(self.activation)
        require(self.gated or self.activation != "clamped_glu", "the activation clamped_glu needs a gated network")


@dataclass(frozen=True, kw_only=True)
class NoFeedForward:
    """No network, and no norm before one: a layer that is its mixer alone (Nemotron-H)."""

    @property
    def d_ff(self) -> int:
        """Units: none."""
        return 0


Score = Literal["softmax", "sigmoid", "sparse_mixer"]
"""How logits become scores: each against all others, each by itself (DeepSeek-V3), or each of the two best against
those that are near it (``sparse_mixer``: Phi-3.5-MoE, Liu et al. 2023)."""


GroupWorth = Literal["two_best", "best"]
"""What of its scores says how good a group of experts is."""


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """A router over ``n_experts`` networks of which each token visits ``top_k``; dropless.

    score   = softmax(logits) or sigmoid(logits)               logits = W x, plus a bias with ``router_bias``
    choice  = the top_k of score (+ correction), within the best ``top_k_groups`` of ``n_groups`` groups
    weight  = score of the chosen, divided by their norm, times ``routed_scale``
    out     = sum of weight * expert(x)  (+ shared(x), with ``shared_gate`` times sigmoid(w x))

    With ``sparse_mixer`` the two greatest logits are chosen. The first one's weight is its softmax over the experts
    with (best - logit) <= 2 ``mixer_eps`` max(|logit|, best), the second one's the same over all but the first.

    A softmax over the chosen logits alone (Mixtral, gpt-oss) is ``softmax`` with ``normalize_p`` 1: the sum over all
    experts cancels.
    """

    d_ff: int
    n_experts: int
    top_k: int
    activation: Activation
    gated: bool = True
    """The experts are gated networks; False: plain ones (Nemotron-H). See :class:`DenseSpec`."""
    normalize_p: float | None = 1.0
    """Divide the chosen weights by their p-norm; 1 makes them sum to one, None leaves the softmax values (Grok-1)."""
    aggregate: Aggregate = "weighted_sum"
    aux_loss_weight: float = 0.0
    """Strength of the load-balancing loss in the checkpoint's own convention; used by training only."""
    jitter_eps: float | None = None
    """Training only: the router's input (and nothing else) is multiplied by U(1-eps, 1+eps)."""
    score: Score = "softmax"
    normalize_eps: float = 0.0
    """Added to the norm before dividing by it (DeepSeek: 1e-20, LFM2: 1e-6)."""
    normalize_min: float = 0.0
    """The least that is divided by (ERNIE: 1e-12)."""
    routed_scale: float = 1.0
    """What the chosen weights are multiplied by at last."""
    mixer_eps: float | None = None
    """How near logits must be to count beside a chosen one, as a share of them; for ``sparse_mixer`` alone."""
    correction: bool = False
    """True: a bias on the scores for the choice alone, stored with the model and trained by no gradient."""
    n_groups: int = 1
    """The experts in this many groups of neighbours, of which only the best ``top_k_groups`` are chosen from."""
    top_k_groups: int = 1
    group_worth: GroupWorth = "two_best"
    """What a group is as good as: the sum of its two best scores (DeepSeek-V3), or its best one (DeepSeek-V2)."""
    router_bias: bool = False
    """True: a bias on the router's logits."""
    expert_bias: bool = False
    """True: biases on gate, up and down of every routed expert."""
    shared: DenseSpec | None = None
    """A network beside the routed ones; several shared experts are one of their widths together."""
    shared_gate: bool = False
    """True: the shared network's output is multiplied by the sigmoid of a linear form of x (Qwen2-MoE)."""
    apart: bool = False
    """True: router and experts read the residual stream h, not the normed x that the shared network reads (Gemma 4):

        logits = W (h / rms(h) * scale / sqrt(D));    weight = score of the chosen * expert_scale
        out    = norm(shared(x)) + norm(sum of weight * expert(norm(h)))

    with a norm of its own in each place, ``scale`` (D,) and ``expert_scale`` (E,) learned."""

    def __post_init__(self) -> None:
        sizes = {"d_ff": self.d_ff, "n_experts": self.n_experts, "top_k": self.top_k}
        require_positive("ffn", **sizes, n_groups=self.n_groups, top_k_groups=self.top_k_groups)
        require(
            self.top_k <= self.n_experts,
            f"top_k must not exceed n_experts: got top_k={self.top_k}, n_experts={self.n_experts}",
        )
        # Weight maps list every expert: a hostile config must not make it endless. Published models have up to 512.
        require(self.n_experts <= 1024, f"n_experts must be at most 1024, got {self.n_experts}")
        require_activation(self.activation)
        require(self.gated or self.activation != "clamped_glu", "the activation clamped_glu needs gated experts")
        require(self.gated or not self.expert_bias, "experts with biases must be gated")
        if self.normalize_p is not None:
            require_number("ffn", normalize_p=self.normalize_p)
        require(
            self.aggregate in ("weighted_sum", "vote", "fuse"),
            f"ffn.aggregate must be 'weighted_sum', 'vote' or 'fuse', got {self.aggregate!r}",
        )
        require_number("ffn", above=-1e-30, aux_loss_weight=self.aux_loss_weight)
        if self.jitter_eps is not None:
            require_number("ffn", above=-1e-30, jitter_eps=self.jitter_eps)
        self._check_choice()

    def _check_choice(self) -> None:
        known = ("softmax", "sigmoid", "sparse_mixer")
        require(self.score in known, f"ffn.score must be one of {', '.join(known)}; got {self.score!r}")
        if self.score == "sparse_mixer":
            require(
                self.top_k == 2 and self.normalize_p is None and not self.correction and self.n_groups == 1,
                "a sparse mixer chooses two experts of all, by their logits, and does not divide their weights: it "
                "needs top_k 2, normalize_p None, no correction and one group",
            )
            require(self.mixer_eps is not None, "a sparse mixer needs mixer_eps")
            require_number("ffn", mixer_eps=self.mixer_eps or 0.0)
        else:
            require(self.mixer_eps is None, "mixer_eps is a sparse mixer's alone")
        require_number("ffn", above=-1e-30, normalize_eps=self.normalize_eps, normalize_min=self.normalize_min)
        require_number("ffn", routed_scale=self.routed_scale)
        size = self.n_experts // self.n_groups
        worths = ("two_best", "best")
        require(self.group_worth in worths, f"group_worth must be 'two_best' or 'best', got {self.group_worth!r}")
        require(
            self.n_groups == 1 or (self.n_experts % self.n_groups == 0 and size >= 2),
            f"n_groups must part the experts into equal groups of two or more: got n_experts={self.n_experts}, "
            f"n_groups={self.n_groups}",
        )
        require(
            self.top_k_groups <= self.n_groups and self.top_k <= self.top_k_groups * size,
            f"the chosen groups must exist and hold top_k experts: got n_groups={self.n_groups} of {size} experts, "
            f"top_k_groups={self.top_k_groups}, top_k={self.top_k}",
        )
        require(self.shared is not None or not self.shared_gate, "shared_gate needs a shared network")
        plain = self.shared is not None and not self.shared_gate and self.aggregate == "weighted_sum"
        require(plain or not self.apart, "experts apart need a shared network without a gate, and a weighted sum")


def require_activation(activation: str) -> None:
    known = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_glu")
    require(activation in known, f"activation must be one of {', '.join(known)}; got {activation!r}")


FeedForwardSpec = DenseSpec | MoESpec | NoFeedForward
"""What a layer's second half may be."""
