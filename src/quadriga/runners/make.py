"""The runner of an opened checkpoint: the CPU's kernels, or plain torch. The engine's only door to torch.

make(...)       ──► CompiledModel                  NumPy and C++; torch is never imported
make_torch(...) ──► runners.torch, imported here   where it is not installed, one error says how to install it;
                    runners.cuda with QUADRIGA_OPS=triton
join(mesh)      ──► runners.distributed, imported here   the same
make_ranked(...) ─► RankedModel on rank 0, a RankModel to follow with elsewhere
"""

from __future__ import annotations

import json

from quadriga import __version__, runtime
from quadriga.errors import ConfigError, HardwareError
from quadriga.io.open import Checkpoint
from quadriga.io.packed import load_packed
from quadriga.io.parameters import Progress
from quadriga.io.rank_parameters import load_part
from quadriga.kernels import dispatch
from quadriga.kernels.cpu.library import isa
from quadriga.model import cost
from quadriga.model.cache_layout import cache_layout
from quadriga.model.config import ModelConfig
from quadriga.model.rank_mesh import RankMesh
from quadriga.model.rank_share import RankShare
from quadriga.quant.packed import BLOCK_TOKENS
from quadriga.runners.base import CacheSize, Runner
from quadriga.runners.compiled import MAX_TOKENS, CompiledModel, place_bytes
from quadriga.runners.ranks import Links, RankedModel, RankModel

_KERNELS_CONTEXTS, _TORCH_CONTEXTS = 4, 2
"""Full contexts that a cache of keys and values has room for where nobody says how large it is to be."""


def make(
    opened: Checkpoint,
    *,
    format: str = "keep",
    threads: int | None = None,
    activations: str = "auto",
    kv_format: str = "bfloat16",
    kv_memory: int | None = None,
    expert_memory: int | None = None,
    max_batch_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> Runner:
    """A checkpoint on the CPU's kernels; what each argument is for, ``engine.load.load`` says.

    Raises:
        CheckpointError, ConfigError: the files are malformed or of an unsupported kind; no room for a block.
        HardwareError: not enough memory.
    """
    packed = load_packed(opened, format, expert_memory=expert_memory, progress=progress)
    cache = cache_layout(opened.config)
    per_block = sum(place_bytes(opened.config, cache, kv_format))
    size = cache_size(opened.config, per_block, kv_memory, _KERNELS_CONTEXTS)
    return CompiledModel(
        opened.config,
        packed.parameters,
        threads=runtime.n_threads(threads),
        n_blocks=size.n_blocks,
        n_slots=size.n_slots,
        cache=cache,
        kv_format=kv_format,
        activations=activations,
        max_tokens=max(MAX_TOKENS, max_batch_tokens),
        store=packed.store,
    )


def make_torch(
    opened: Checkpoint,
    *,
    format: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    kv_memory: int | None = None,
    progress: Progress | None = None,
) -> Runner:
    """A checkpoint in plain torch, on any device; with QUADRIGA_OPS=triton on the kernels for GPUs.

    Args:
        format: what matrices are packed as for the kernels for GPUs; None: as they are stored.

    Raises:
        HardwareError: torch, or triton where it is asked for, is not installed, or the device does not exist here.
        CheckpointError, ConfigError: as :func:`make`.
    """
    if dispatch.forced() == "triton":
        how = {"format": format or "keep", "dtype": dtype, "device": device}
        return _make_cuda(opened, kv_memory, progress, how)
    assert format is None, "the options' rules refuse it"
    try:
        from quadriga.runners.torch import load
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise runtime.without_torch("computing with a dtype, on a GPU or with QUADRIGA_OPS=reference") from None
    return load(
        opened,
        lambda per_block, free: cache_size(opened.config, per_block, kv_memory, _TORCH_CONTEXTS, free),
        dtype=dtype,
        device=device,
        threads=threads,
        progress=progress,
    )


def _make_cuda(opened: Checkpoint, kv_memory: int | None, progress: Progress | None, how: dict[str, str]) -> Runner:
    try:
        from quadriga.runners.cuda.runner import load
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise runtime.without_torch("QUADRIGA_OPS=triton", "gpu") from None
        if error.name != "triton":
            raise
        raise HardwareError(
            f"QUADRIGA_OPS=triton needs triton, which is not installed: {runtime.install_hint('gpu')}"
        ) from None
    return load(
        opened,
        lambda per_block, free: cache_size(opened.config, per_block, kv_memory, _TORCH_CONTEXTS, free),
        progress=progress,
        **how,
    )


def join(mesh: RankMesh) -> Links:
    """This process as one of the ranks that torchrun has started.

    Raises:
        ConfigError: there are not as many as the mesh has.
        HardwareError: torch is not installed.
        EngineError: the others cannot be reached.
    """
    started = runtime.launched_ranks()
    if started != mesh.size:
        what = "this process is by itself" if started is None else f"torchrun has started {started}"
        raise ConfigError(
            f"parallel {mesh} is for {mesh.size} ranks, and {what}. Start them with: torchrun --nproc-per-node "
            f"{mesh.size} -m quadriga ..., or, on several machines, with --nnodes"
        )
    try:
        from quadriga.runners.distributed import TorchLinks
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise runtime.without_torch("sharing a model among ranks") from None
    return TorchLinks(mesh)


def make_ranked(
    opened: Checkpoint,
    links: Links,
    *,
    format: str = "keep",
    threads: int | None = None,
    activations: str = "auto",
    kv_format: str = "bfloat16",
    kv_memory: int | None = None,
    max_batch_tokens: int = MAX_TOKENS,
    progress: Progress | None = None,
) -> RankedModel | RankModel:
    """This rank's part of a checkpoint on the CPU's kernels; what each argument is for, ``engine.load.load`` says.

    Args:
        threads, kv_memory: of each rank.

    Returns:
        on rank 0 the whole model, on others what :func:`quadriga.runners.ranks.follow` takes.

    Raises:
        ConfigError: the model cannot be shared so, or the ranks are not alike.
        CheckpointError, HardwareError: as :func:`make`.
    """
    problem = links.place.mesh.problem(opened.config)
    if problem is not None:
        raise ConfigError(f"parallel {links.place.mesh}: {problem}")
    share = RankShare(opened.config, links.place)
    parameters = load_part(opened, share, format, progress=progress)
    per_block = max(1, sum(place_bytes(share.config, share.cache, kv_format)))
    size = cache_size(opened.config, per_block, kv_memory, _KERNELS_CONTEXTS)
    blocks, slots = _alike(links, opened, size, (format, activations, kv_format, max_batch_tokens))
    model = RankModel(
        share,
        parameters,
        links,
        threads=runtime.threads_of_rank() if threads is None else runtime.n_threads(threads),
        n_blocks=blocks,
        n_slots=slots,
        kv_format=kv_format,
        activations=activations,
        max_tokens=max(MAX_TOKENS, max_batch_tokens),
    )
    sizes = [tuple(map(int, told.split())) for told in links.compare(_bytes(model.local))]
    if links.place.rank:
        return model
    weights, kv, states = (sum(column) for column in zip(*sizes, strict=True))
    return RankedModel(model, (weights, kv, states))


def _bytes(model: CompiledModel) -> str:
    return f"{model.weights()[1]} {model.kv_bytes} {model.state_bytes}"


def _alike(links: Links, opened: Checkpoint, size: CacheSize, options: tuple[object, ...]) -> tuple[int, int]:
    """Blocks and slots that every rank has room for.

    Raises:
        ConfigError: the ranks have different models, options, versions or instruction sets: their numbers would differ.
    """
    what = repr((__version__, isa(), opened.config, options))
    told = [json.loads(text) for text in links.compare(json.dumps([what, size.n_blocks, size.n_slots]))]
    other = next((rank for rank, (theirs, _, _) in enumerate(told) if theirs != what), None)
    if other is not None:
        raise ConfigError(
            f"all ranks must have the same model, options, version and instruction set; ranks {links.place.rank} and "
            f"{other} differ. Where processors do, set QUADRIGA_CPU_ISA to what all of them have"
        )
    return min(blocks for _, blocks, _ in told), min(slots for _, _, slots in told)


def device_type(name: str) -> str:
    """cpu or cuda: what a device's name stands for on this machine. torch is asked unless the name is "cpu".

    "auto" is the CPU where there is no torch.

    Raises:
        HardwareError: the device does not exist here, or torch, which it needs, is not installed.
        ConfigError: the name is not a device.
    """
    runtime.check_device(name)
    if name == "cpu":
        return name
    try:
        from quadriga.nn import devices
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        if name == "auto":
            return "cpu"
        raise runtime.without_torch(f"the device {name}") from None
    return devices.resolve_device(name).type


_SLOTS = 256
"""Most slots for recurrent states where memory is no limit: two a running sequence, and prefixes that are kept."""


def cache_size(
    config: ModelConfig, per_block: int, memory: int | None, contexts: int, free: int | None = None
) -> CacheSize:
    """Blocks of keys and values, and slots for the states of recurrent layers, in ``memory`` bytes.

    Slots get at most half of it; without a limit at most half of what a cache may take. Two are the least: a sequence's
    state, and the one it becomes.

    Args:
        memory: None: what so many full contexts take, at most a quarter of the host's free memory, or three quarters of
            a device's.
        free: bytes that are free on the device; None: it is the host.

    Raises:
        ConfigError: no room for a block, or for two slots.
    """
    most = _quarter() if free is None else free // 4 * 3
    slot = cost.state_bytes(config)
    if not slot:
        return CacheSize(n_blocks(config, per_block, memory, contexts, most), 0)
    if memory is None:
        return CacheSize(
            n_blocks(config, per_block, None, contexts, most if free is None else most // 2),
            max(2, min(_SLOTS, most // 2 // slot)),
        )
    if memory < 2 * slot + per_block:
        raise ConfigError(
            f"kv_memory must hold at least two recurrent states of {slot} bytes and a block of 16 tokens, {per_block} "
            f"bytes; got {memory}"
        )
    n_slots = max(2, min(_SLOTS, memory // 2 // slot))
    return CacheSize(n_blocks(config, per_block, memory - n_slots * slot, contexts, most), n_slots)


def n_blocks(config: ModelConfig, per_block: int, memory: int | None, contexts: int, most: int | None = None) -> int:
    """Blocks of a cache of ``memory`` bytes; None: of so many full contexts, in ``most`` bytes at most (None: a quarter
    of the host's free memory)."""
    cache = cache_layout(config)
    if memory is not None:
        if memory < cache.n_groups * per_block:
            least = f"{cache.n_groups} x {per_block}" if cache.n_groups > 1 else f"{per_block}"
            raise ConfigError(f"kv_memory must hold at least one block of 16 tokens, {least} bytes; got {memory}")
        return min(memory // per_block, 2**20)
    return max(cache.n_groups, min(_wanted(config, contexts), (_quarter() if most is None else most) // per_block))


def _wanted(config: ModelConfig, contexts: int) -> int:
    """Blocks of so many full contexts."""
    cache = cache_layout(config)
    passing = -(-min(MAX_TOKENS, config.max_seq_len) // BLOCK_TOKENS)  # of a prompt, until its pass is over
    return contexts * cache.n_blocks(config.max_seq_len) + passing * sum(w is not None for w in cache.windows)


def kernels_cache_bytes(config: ModelConfig, kv_format: str) -> int:
    """Bytes of the cache that :func:`make` gives a model where memory is no limit."""
    per_block = sum(place_bytes(config, cache_layout(config), kv_format))
    return _wanted(config, _KERNELS_CONTEXTS) * per_block + _SLOTS * cost.state_bytes(config)


def _quarter() -> int:
    return runtime.memory_bytes()[1] // 4
