"""The backend "triton" has every operation of ``kernels.ops``."""

from __future__ import annotations

import inspect

import torch

from quadriga.kernels import ops, reference
from quadriga.kernels.dispatch import backend_for
from quadriga.kernels.triton import backend


def test_the_backend_has_the_reference_s_signatures() -> None:
    with ops.use("triton"):
        assert backend_for(torch.ones(1)) is backend
    names = [name for name in ops.__all__ if inspect.isfunction(getattr(reference, name, None))]
    assert sorted(backend.__all__) == sorted(names) and len(names) > 10
    for name in names:
        ours, truth = (inspect.signature(getattr(module, name)).parameters for module in (backend, reference))
        assert list(ours) == list(truth), name
