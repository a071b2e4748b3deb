"""A runner on the kernels for GPUs: the engine's protocol over ``DeviceModel``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
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
from quadriga.nn.devices import free_bytes, resolve_device, resolve_dtype
from quadriga.nn.moe import RouterStats
from quadriga.quant.packed import BLOCK_TOKENS
from quadriga.runners.base import Adapters, CacheSize, LayerRouting, PassResult
from quadriga.runners.cuda.device_array import DeviceArray
from quadriga.runners.cuda.graphs import BUCKETS, Capture, CudaCapture, DecodeGraphs, no_capture
from quadriga.runners.cuda.inputs import StaticPass, is_single_tokens, to_device, upload
from quadriga.runners.cuda.load import load_weights
from quadriga.runners.cuda.missing import require_kernels
from quadriga.runners.cuda.model import DeviceCache, DeviceModel
from quadriga.runners.cuda.sampling import DeviceSampler
from quadriga.runners.cuda.weights import DeviceWeights
from quadriga.runners.on_tensors import TensorRunner


def load(
    opened: Checkpoint,
    sizes: Callable[[int, int | None], CacheSize],
    *,
    format: str = "keep",
    dtype: str = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> CudaRunner:
    """A checkpoint on the kernels for GPUs, its parameters copied to the device one by one from the mapped files.

    Args:
        sizes: size of the cache, from the bytes of a block and those that are free on the device beside the weights
            (None: it is the host).
        format: of the matrices, as ``io.packed.load_packed`` has it: keep, or a quantised one.
        dtype: what is computed in: float32, bfloat16 or float16, or auto.
        device: as ``nn.devices.resolve_device`` has it.

    Raises:
        HardwareError: no such device here.
        CheckpointError, ConfigError: the files are malformed or of an unsupported kind, or no kernel has what they ask.
    """
    require_kernels(opened.config)
    target = resolve_device(device)
    weights = load_weights(opened, format, dtype=resolve_dtype(dtype, target.type), device=target, progress=progress)
    cache = shared_places(opened.config)
    layers = opened.config.layers
    numbers = sum(layers[users[0]].mixer.state.numbers_per_token for users in cache.slot_layers)
    room = sizes(BLOCK_TOKENS * numbers * weights.dtype.itemsize, free_bytes(target))
    return CudaRunner(opened.config, weights, room.n_blocks, cache, n_slots=room.n_slots)


def shared_places(config: ModelConfig) -> CacheLayout:
    """The layout of a model's cache; one group where layers that would share a place keep keys of different shapes."""
    cache = cache_layout(config)
    alike = all(len({config.layers[i].mixer.state for i in users}) == 1 for users in cache.slot_layers)
    return cache if alike else one_group(config.n_layers)


class CudaRunner(TensorRunner):
    """A ``runners.base.Runner`` on a GPU, or interpreted on a host.

    Args:
        weights: of the whole model; what it computes in, and where, they say.
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
        config: ModelConfig,
        weights: DeviceWeights,
        n_blocks: int,
        cache: CacheLayout | None = None,
        *,
        n_slots: int | None = None,
        most_tokens: int = BUCKETS[-1],
        capture: Capture | None = None,
    ) -> None:
        self.cache = cache or one_group(config.n_layers)
        self.n_slots = (n_slots or n_blocks) if config.is_recurrent else 0
        kept = DeviceCache(config, self.cache, n_blocks, self.n_slots, dtype=weights.dtype, device=weights.device)
        super().__init__(config, n_blocks, kept.blocks, weights.device)
        self._weights = weights
        self.state_bytes = self.n_slots * cost.state_bytes(config)
        self.store: ExpertStore | None = None
        self.can_steer = False
        self.row_sampler: TokenSampler | None = DeviceSampler()
        self._layers = DeviceModel(config, weights, kept, most_tokens)
        if capture is None:
            capture = CudaCapture() if self._device.type == "cuda" else no_capture
        self._graphs = DecodeGraphs(self._layers.compute, self._static, capture, most_tokens)

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
            # A copy: the graph's own memory changes with the next step.
            logits = made.logits[:n].clone() if _is_all(batch.rows, n) else made.logits[self._places(batch.rows)]
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
        self._count(made.routing, n)
        return PassResult(
            DeviceArray(logits),
            made.hidden[:n].float().cpu().numpy() if hidden else None,
            [_as_arrays(stats, n) for stats in made.routing] if routing else None,
        )

    def _places(self, rows: NDArray[np.int32]) -> Tensor:
        return to_device(rows.astype(np.int64), self._device)

    def _rows_of(self, logits: Logits) -> Tensor:
        return logits.tensor if isinstance(logits, DeviceArray) else super()._rows_of(logits)

    def _sizes(self) -> Counter[str]:
        return self._weights.sizes()

    def _static(self, n: int) -> StaticPass:
        most_blocks = -(-self.config.max_seq_len // BLOCK_TOKENS)
        return StaticPass(
            n, self.cache.n_groups, most_blocks, is_recurrent=self.config.is_recurrent, device=self._device
        )


def _is_all(rows: NDArray[np.int32], n: int) -> bool:
    """True if these are all rows of a pass, in their order."""
    return len(rows) == n and bool((rows == np.arange(n)).all())


def _as_arrays(stats: RouterStats, n_tokens: int) -> LayerRouting:
    fields = (stats.expert_ids, stats.expert_weights, stats.probs, stats.logits)
    return LayerRouting(*(t[:n_tokens].cpu().numpy() for t in fields))
