"""Loading a model that ranks share: what is done once on each machine, and where ranks but the first go on."""

from __future__ import annotations

import atexit
from collections.abc import Callable
from typing import Any, TypeVar

from quadriga import runtime
from quadriga.errors import InputError
from quadriga.hub import catalogue
from quadriga.io.open import Checkpoint
from quadriga.io.parameters import Progress
from quadriga.model.rank_mesh import RankMesh
from quadriga.runners import make
from quadriga.runners.base import Runner
from quadriga.runners.ranks import Links, RankModel, follow

T = TypeVar("T")


def on_ranks(parallel: str, name: str, progress: Progress | None, load: Callable[[Links, Progress | None], T]) -> T:
    """Join the other ranks, and load.

    Of the ranks on one machine the first downloads, if there is something to; then the others find it there.

    Args:
        load: called with the links, and whom to tell of progress: rank 0 alone tells.

    Raises:
        ConfigError, HardwareError, EngineError: as ``runners.make.join``.
    """
    links = make.join(RankMesh.parse(parallel))
    try:
        if runtime.launched_rank() == 0:
            catalogue.resolve(name, progress=progress)
        links.compare("")
        return load(links, progress if links.place.rank == 0 else None)
    except Exception as error:
        links.abandon(2 if isinstance(error, InputError) else 1)
        raise


def shared_runner(opened: Checkpoint, links: Links, how: dict[str, Any]) -> Runner:
    """The shared model on rank 0. On other ranks this takes part in what rank 0 computes, until that ends.

    Args:
        how: options of ``runners.make.make_ranked``.

    Raises:
        SystemExit: the work is done, on ranks but the first.
        EngineError: a rank is gone.
    """
    made = make.make_ranked(opened, links, **how)
    if isinstance(made, RankModel):
        follow(made)
        raise SystemExit(0)
    atexit.register(made.close)
    return made
