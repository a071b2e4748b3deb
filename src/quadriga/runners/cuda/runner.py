"""A runner on the kernels for GPUs: the engine's protocol over ``DeviceModel``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quadriga.errors import RequestError
from quadriga.io.open import Checkpoint
from quadriga.io.parameters import Progress
from quadriga.kernels.cpu.expert_store import ExpertStore
from quadriga.kernels.cpu.sampling import Logits, TokenSampler
from quadriga.kernels.pass_batch import PassBatch
from quadriga.model import cost
from quadriga.model.cache_layout import CacheLayout, cache_layout, one_group
from quadriga.model.config import ModelConfig
from quadriga.nn.devices import resolve_device, resolve_dtype
from quadriga.nn.load import load_parameters
from quadriga.nn.moe import RouterStats
from quadriga.nn.transformer import Transformer
from quadriga.quant.packed import BLOCK_TOKENS
from quadriga.runners.base import Adapters, CacheSize, LayerRouting, PassResult
from quadriga.runners.cuda.device_array import DeviceArray
from quadriga.runners.cuda.graphs import BUCKETS, Capture, CudaCapture, DecodeGraphs, no_capture
from quadriga.runners.cuda.inputs import StaticPass, is_single_tokens, upload
from quadriga.runners.cuda.missing import require_kernels
from quadriga.runners.cuda.mixers import plain
from quadriga.runners.cuda.model import Computed, DeviceCache, DeviceModel
from quadriga.runners.cuda.sampling import DeviceSampler


def load(
    opened: Checkpoint,
    sizes: Callable[[int], CacheSize],
    *,
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> CudaRunner:
    """A checkpoint on the kernels for GPUs, its parameters copied to the device part by part from the mapped files.

    Args:
        sizes: size of the cache, from the bytes of a block.
        dtype: float32, bfloat16 or float16, or auto. device: as ``nn.devices.resolve_device`` has it.

    Raises:
        HardwareError: no such device here.
        CheckpointError, ConfigError: the files are malformed or of an unsupported kind, or no kernel has what they ask.
    """
    require_kernels(opened.config)
    target = resolve_device(device)
    parameters = load_parameters(opened, dtype=resolve_dtype(dtype, target.type), device=target, progress=progress)
    cache = shared_places(opened.config)
    layers = opened.config.layers
    numbers = sum(layers[users[0]].mixer.state.numbers_per_token for users in cache.slot_layers)
    room = sizes(BLOCK_TOKENS * numbers * parameters["embed.weight"].element_size())
    return CudaRunner(
        Transformer.from_parameters(opened.config, parameters), room.n_blocks, cache, n_slots=room.n_slots
    )


def shared_places(config: ModelConfig) -> CacheLayout:
    """The layout of a model's cache; one group where layers that would share a place keep keys of different shapes."""
    cache = cache_layout(config)
    alike = all(len({config.layers[i].mixer.state for i in users}) == 1 for users in cache.slot_layers)
    return cache if alike else one_group(config.n_layers)


class CudaRunner:
    """A ``runners.base.Runner`` on a GPU, or interpreted on a host.

    Args:
        model: its parameters' device and dtype are computed in.
        n_blocks: KV blocks of 16 tokens.
        cache: how layers share them; None: a block has room for all layers.
        n_slots: places for the states of recurrent layers; None: as many as blocks.
        most_tokens: single tokens of a pass that go through a graph at most.
        capture: how passes are captured; None: as CUDA graphs on a GPU, not at all on a host.

    Raises:
        ConfigError: something that no kernel computes.
    """

    def __init__(
        self,
        model: Transformer,
        n_blocks: int,
        cache: CacheLayout | None = None,
        *,
        n_slots: int | None = None,
        most_tokens: int = BUCKETS[-1],
        capture: Capture | None = None,
    ) -> None:
        self.config, self.n_blocks = model.config, n_blocks
        self.cache = cache or one_group(self.config.n_layers)
        self.n_slots = (n_slots or n_blocks) if self.config.is_recurrent else 0
        self._model, self._device = model.eval(), plain(model.embed).device
        self._stored = DeviceCache(model, self.cache, n_blocks, self.n_slots)
        self.kv_bytes = sum(t.nbytes for t in self._stored.blocks)
        self.state_bytes = self.n_slots * cost.state_bytes(self.config)
        self.store: ExpertStore | None = None
        self.can_steer = False
        self.row_sampler: TokenSampler | None = DeviceSampler()
        self._layers = DeviceModel(model, self._stored, most_tokens)
        if capture is None:
            capture = CudaCapture() if self._device.type == "cuda" else no_capture
        self._graphs = DecodeGraphs(self._layers.compute, self._static, capture, most_tokens)
        self._load: list[Tensor] = []

    @property
    def adapter_names(self) -> list[str]:
        """There are none."""
        return []

    def adapters(self) -> Adapters:
        """See :class:`Runner`.

        Raises:
            RequestError: always; these kernels know no adapters.
        """
        raise RequestError(
            "adapters chosen per request run on plain torch: unset QUADRIGA_OPS, or fold the adapter in with "
            "quadriga adapter merge"
        )

    def forward(
        self, batch: PassBatch, *, adapters: Sequence[int] | None = None, hidden: bool = False, routing: bool = False
    ) -> PassResult:
        """See :class:`Runner`; the logits stay on the device until somebody reads them."""
        assert adapters is None, "there are none: adapters() refuses"
        n = len(batch.tokens)
        if is_single_tokens(batch) and self._graphs.bucket(n) is not None:
            made = self._graphs.run(batch)
            # The graph's own memory changes with the next step.
            rows = torch.arange(n) if len(batch.rows) == n else torch.from_numpy(batch.rows.astype(np.int64))
            logits = made.logits[rows.to(self._device)]
        else:
            made = self._layers.compute(
                upload(
                    batch,
                    tile_tokens=self._layers.tile_tokens,
                    is_recurrent=self.config.is_recurrent,
                    device=self._device,
                )
            )
            logits = made.logits
        self._count(made, n)
        return PassResult(
            DeviceArray(logits),
            made.hidden[:n].float().cpu().numpy() if hidden else None,
            [_as_arrays(stats, n) for stats in made.routing] if routing else None,
        )

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        """See :class:`Runner`."""
        source, target = zip(*pairs, strict=True)
        for stored in self._stored.blocks:
            blocks = stored.view(self.n_blocks, BLOCK_TOKENS, *stored.shape[1:])
            blocks[list(target)] = blocks[list(source)]

    def row_stats(self, logits: Logits) -> tuple[list[int], list[float]]:
        """See :class:`Runner`."""
        rows = logits.tensor if isinstance(logits, DeviceArray) else torch.from_numpy(np.asarray(logits))
        return rows.argmax(-1).tolist(), rows.logsumexp(-1).tolist()

    def weights(self) -> tuple[str, int]:
        """See :class:`Runner`."""
        n_bytes: Counter[str] = Counter()
        for parameter in self._model.parameters():
            n_bytes[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
        return n_bytes.most_common(1)[0][0], n_bytes.total()

    def expert_load(self) -> list[NDArray[np.int64]]:
        """See :class:`Runner`."""
        return [load.cpu().numpy() for load in self._load]

    def _count(self, made: Computed, n_tokens: int) -> None:
        """Count the choices of a pass's own tokens; nothing waits."""
        for layer, stats in enumerate(made.routing):
            if layer == len(self._load):
                self._load.append(torch.zeros(stats.probs.shape[-1], dtype=torch.int64, device=self._device))
            ids = stats.expert_ids[:n_tokens].reshape(-1)
            self._load[layer].scatter_add_(0, ids, torch.ones_like(ids))

    def _static(self, n: int) -> StaticPass:
        most_blocks = -(-self.config.max_seq_len // BLOCK_TOKENS)
        return StaticPass(
            n, self.cache.n_groups, most_blocks, is_recurrent=self.config.is_recurrent, device=self._device
        )


def _as_arrays(stats: RouterStats, n_tokens: int) -> LayerRouting:
    fields = (stats.expert_ids, stats.expert_weights, stats.probs, stats.logits)
    return LayerRouting(*(t[:n_tokens].cpu().numpy() for t in fields))
