"""Loss-free balancing: a bias per expert, used only to choose experts, is moved against the expert's load.

    bias_e += rate * sign(mean load - load_e)        after every step, over the global batch

(Wang et al. 2024; DeepSeek-V3 2.1.2.) The bias changes which experts are chosen, not the weights of their outputs, and
has no gradient. Most checkpoint formats, DBRX's among them, cannot store it, so it fades to 0 towards the end of the
run: the router learns to do without it, and the exported model is the model that was trained. Families whose routers
have a correction of this kind get it added to theirs by the export, and need no fade.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.nn.transformer import Transformer
from quadriga.train.config import RouterSection
from quadriga.train.parallel import moe_layers
from quadriga.train.schedule import bias_share
from quadriga.train.stage import Stage
from quadriga.train.world import World


class BiasBalancer:
    """Owns the bias of every layer's router: ``bias`` (L, E) float32; a stage of a pipeline applies those it has."""

    def __init__(self, model: Transformer, section: RouterSection, world: World, stage: Stage | None = None) -> None:
        self.section = section
        self._routers, mixtures = [moe.router for moe in moe_layers(model)], model.config.moe_layers
        if not mixtures:
            raise ConfigError("router.bias_rate needs a model with experts; this one is dense")
        if any(spec.score == "sparse_mixer" for _, spec in mixtures):
            raise ConfigError(
                "router.bias_rate must be 0 for a sparse mixer, which chooses experts by its logits alone"
            )
        self.bias = torch.zeros(len(mixtures), mixtures[0][1].n_experts, device=world.device)
        own = None if stage is None else stage.mixtures
        self._own = slice(None) if own is None else slice(own.start, own.stop)

    def apply(self, step: int, n_steps: int) -> None:
        """Set the routers' biases for a step, faded according to the schedule."""
        share = bias_share(step, n_steps, self.section.bias_fade)
        for router, bias in zip(self._routers, self.bias[self._own], strict=True):
            router.balancing = bias * share if share else None

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Move the biases by a step's token counts (L, E), summed over the global batch; the mean bias stays 0."""
        load = counts.to(self.bias.device)
        self.bias += self.section.bias_rate * (load.mean(1, keepdim=True) - load).sign().float()
        self.bias -= self.bias.mean(1, keepdim=True)
