"""Loss-free balancing: a bias on each expert's probability, for the choice alone, moved against its load.

    bias_e += rate * sign(mean load - load_e)        after every step, over the whole batch of all ranks

(Wang et al. 2024; DeepSeek-V3 2.1.2.) The bias changes which experts are chosen, never what their outputs weigh, and it
has no gradient. No checkpoint format of a DBRX has a place for it, so it fades to 0 towards the end of the run: the
router takes over what the bias did, and the model that is exported is the model that was trained.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quadriga.errors import ConfigError
from quadriga.nn.transformer import Transformer
from quadriga.train.config import RouterSection
from quadriga.train.parallel import mixtures
from quadriga.train.schedule import bias_share
from quadriga.train.world import World


class BiasBalancer:
    """Owns the bias of every layer's router: ``bias`` (L, E) float32."""

    def __init__(self, model: Transformer, section: RouterSection, world: World) -> None:
        self.section = section
        self._routers = [moe.router for moe in mixtures(model)]
        if not self._routers:
            raise ConfigError("router.bias_rate needs a model with experts; this one is dense")
        self.bias = torch.zeros(len(self._routers), self._routers[0].spec.n_experts, device=world.device)

    def apply(self, step: int, n_steps: int) -> None:
        """Give the routers the bias in force at a step."""
        share = bias_share(step, n_steps, self.section.bias_fade)
        for router, bias in zip(self._routers, self.bias, strict=True):
            router.balancing = bias * share if share else None

    @torch.no_grad()
    def update(self, counts: Tensor) -> None:
        """Learn from a step's loads (L, E), the whole batch's; centred, since only differences matter."""
        load = counts.to(self.bias.device)
        self.bias += self.section.bias_rate * (load.mean(1, keepdim=True) - load).sign().float()
        self.bias -= self.bias.mean(1, keepdim=True)
