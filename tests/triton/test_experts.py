"""Grouped products and experts beside the reference, in every format of weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quadriga.kernels import ops, reference
from quadriga.kernels.triton.experts import ExpertNetworks, run_experts
from quadriga.kernels.triton.grouped import grouped_product
from quadriga.kernels.triton.router import Places
from quadriga.kernels.triton.weights import GroupedWeight, from_blocks, from_fp8, plain
from quadriga.quant.blocks import UNPACK
from quadriga.quant.formats import FORMATS

E, FF, D, K = 5, 80, 48, 3


def _normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def _ids(tokens: int, n_experts: int = E, k: int = K) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(n_experts, generator=generator)[:k] for _ in range(tokens)])


ROUTINGS = {
    "spread": _ids(23),
    "one expert idle": _ids(23, E - 1) + 1,
    "all tokens to the same experts": torch.tensor([[4, 0, 2]]).expand(23, -1),
    "k = 1, all to one expert": torch.full((23, 1), 2),
    "k = E": torch.arange(E).expand(23, -1),
    "one token": _ids(1),
    "some": _ids(61),
    "many": _ids(130),
}


def places_of(ids: Tensor, n_experts: int = E) -> Places:
    """Places by torch's stable sort."""
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    home = torch.empty_like(order).scatter_(0, order, torch.arange(len(flat)))
    starts = F.pad(torch.bincount(flat, minlength=n_experts).cumsum(0), (1, 0))
    return Places(home.view(ids.shape).to(torch.int32), order.to(torch.int32), starts.to(torch.int32))


def numbers(name: str, n_experts: int, rows: int, columns: int, seed: int) -> tuple[GroupedWeight, Tensor]:
    """A weight of a format, and its numbers (E, N, K) float32 by the codec's own reading."""
    w = _normal(n_experts, rows, columns, seed=seed, scale=0.2)
    if name == "plain":
        return plain(w), w
    if name == "fp8":
        codes = w.to(torch.float8_e4m3fn)
        scales = _normal(n_experts, rows, -(-columns // 128), seed=seed + 1).abs() + 0.5
        return from_fp8(codes, scales), codes.float() * scales.repeat_interleave(128, 2)[:, :, :columns]
    blocks = any_blocks(name, n_experts * rows * columns, seed)
    return from_blocks(name, blocks, n_experts, rows, columns), torch.from_numpy(UNPACK[name](blocks)).view_as(w)


def any_blocks(name: str, count: int, seed: int) -> np.ndarray:
    """Blocks of any bits, with scales that leave numbers of about 0.3."""
    generator, form = np.random.default_rng(seed), FORMATS[name]
    blocks = generator.integers(0, 256, (count // form.block, form.nbytes), dtype=np.uint8)
    if name == "mxfp4":
        blocks[:, 0] = generator.integers(122, 126, len(blocks))
        return blocks
    size = {"q8_0": 0.005, "q4_0": 0.06, "q4_1": 0.04, "q4_k": 0.002}[name]
    for at in (0,) if name in ("q8_0", "q4_0") else (0, 2):
        halves = (generator.uniform(0.5, 1, len(blocks)) * size).astype(np.float16)
        blocks[:, at : at + 2] = halves[:, None].view(np.uint8)
    return blocks


FORMATS_TRIED = ("plain", "fp8", "q8_0", "q4_0", "q4_1", "mxfp4", "q4_k")


def _depths(name: str) -> tuple[int, int]:
    """Two depths that differ, one of them odd where the format allows it: rows of blocks are whole."""
    return {"plain": (77, 52), "fp8": (77, 260), "q4_k": (256, 512)}.get(name, (96, 160))


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        *((name, "silu") for name in ROUTINGS),
        *(("spread", a) for a in ("gelu", "gelu_tanh", "relu", "relu2", "clamped_glu")),
    ],
)
def test_experts_are_the_reference_s(name: str, activation: str) -> None:
    ids = ROUTINGS[name]
    x, combine = _normal(len(ids), D, seed=1), _normal(*ids.shape, seed=2).abs()
    scale = 3.0 if activation == "clamped_glu" else 0.3  # beyond its limits of 7
    w = [_normal(E, FF, D, seed=3, scale=scale), _normal(E, FF, D, seed=4, scale=scale), _normal(E, D, FF, seed=5)]
    ours = run_experts(x, places_of(ids), combine, ExpertNetworks(*map(plain, w), activation))
    truth = reference.experts(x.double(), ids, combine.double(), *(one.double() for one in w), activation)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


def test_experts_without_gates_are_the_reference_s() -> None:
    ids = ROUTINGS["spread"]
    x, combine = _normal(len(ids), D, seed=1), _normal(*ids.shape, seed=2).abs()
    up, down = _normal(E, FF, D, seed=4, scale=0.3), _normal(E, D, FF, seed=5)
    ours = run_experts(x, places_of(ids), combine, ExpertNetworks(None, plain(up), plain(down), "relu2"))
    truth = reference.experts(x.double(), ids, combine.double(), None, up.double(), down.double(), "relu2")
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize(
    ("form", "tokens"),
    [("plain", 23), ("q4_k", 7), *((f, n) for f in FORMATS_TRIED[1:-1] for n in (1, 61)), ("q8_0", 130)],
)
def test_weights_are_unpacked_in_the_tile(form: str, tokens: int) -> None:
    """gate, up and down in a packed format with biases: the same as the numbers that the format stands for."""
    d_model, d_ff = _depths(form)
    (gate, g), (up, u) = (numbers(form, E, d_ff, d_model, seed=seed) for seed in (11, 13))
    down, d = numbers(form, E, d_model, d_ff, seed=15)
    b_gate, b_up, b_down = _normal(E, d_ff, seed=17), _normal(E, d_ff, seed=18), _normal(E, d_model, seed=19)
    ids, x = _ids(tokens), _normal(tokens, d_model, seed=1)
    combine, base = _normal(tokens, K, seed=2).abs(), _normal(tokens, d_model, seed=20)
    networks = ExpertNetworks(gate, up, down, "silu", b_gate, b_up, b_down)
    ours = run_experts(x, places_of(ids), combine, networks, base)
    truth = base.double()
    for n in range(tokens):
        for j in range(K):
            e, row = int(ids[n, j]), x[n].double()
            hidden = F.silu(g[e].double() @ row + b_gate[e]) * (u[e].double() @ row + b_up[e])
            truth[n] += combine[n, j] * (d[e].double() @ hidden + b_down[e])
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5 * float(truth.abs().max()))


@pytest.mark.parametrize("form", FORMATS_TRIED)
def test_one_matrix_for_all_rows_with_something_added(form: str) -> None:
    depth, _ = _depths(form)
    weight, w = numbers(form, 1, 33, depth, seed=21)
    x, bias, base = _normal(7, depth, seed=22), _normal(1, 33, seed=23), _normal(7, 33, seed=24)
    truth = x @ w[0].T + bias + base
    torch.testing.assert_close(grouped_product(x, weight, bias=bias, base=base), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["plain", "fp8", "q8_0", "q4_0"])
def test_a_token_alone_is_what_it_is_in_a_crowd(form: str) -> None:
    """To the bit: among 23 tokens, and among 61 and 130, which are multiplied in tiles of other sizes."""
    d_model, d_ff = _depths(form)
    (gate, _), (up, _) = (numbers(form, E, d_ff, d_model, seed=seed) for seed in (11, 13))
    networks = ExpertNetworks(gate, up, numbers(form, E, d_model, d_ff, seed=15)[0], "gelu")
    ids, x, combine = _ids(130), _normal(130, d_model, seed=1), _normal(130, K, seed=2).abs()
    crowds = [run_experts(x[:n], places_of(ids[:n]), combine[:n], networks) for n in (23, 61, 130)]
    for n in (0, 9, 22):
        one = slice(n, n + 1)
        alone = run_experts(x[one], places_of(ids[one]), combine[one], networks)[0]
        assert all(torch.equal(alone, crowd[n]) for crowd in crowds)


@pytest.mark.parametrize("form", ["plain", "q4_0"])
def test_bfloat16_is_rounded_at_weights_hidden_and_rows_only(form: str) -> None:
    """Each number is within what its roundings explain: 2^-8 each, for the interpreter cuts where a GPU rounds."""
    d_model, d_ff = _depths(form)
    (gate, g), (up, u) = (numbers(form, E, d_ff, d_model, seed=seed) for seed in (11, 13))
    down, d = numbers(form, E, d_model, d_ff, seed=15)
    if form == "plain":
        gate, up, down = (plain(w.bfloat16()) for w in (g, u, d))
        g, u, d = (w.bfloat16().float() for w in (g, u, d))
    ids = _ids(23)
    x, combine = _normal(23, d_model, seed=1).bfloat16(), _normal(23, K, seed=2).abs()
    ours = run_experts(x, places_of(ids), combine, ExpertNetworks(gate, up, down, "silu")).float()
    truth = reference.experts(x.float(), ids, combine, g, u, d, "silu")
    size = reference.experts(x.float().abs(), ids, combine, g.abs(), u.abs(), d.abs(), "relu")
    assert ours.dtype == torch.float32
    assert float(((ours - truth).abs() / size).max()) < 4 * 2**-8
    assert float((ours - truth).abs().max()) > 0


def test_the_backend_s_experts_are_these_kernels() -> None:
    ids = _ids(9)
    x, combine = _normal(9, D, seed=1), _normal(9, K, seed=2).abs()
    w = [_normal(E, FF, D, seed=3), _normal(E, FF, D, seed=4), _normal(E, D, FF, seed=5)]
    with ops.use("triton"):
        ours = ops.experts(x, ids, combine, *w, "silu")
    assert torch.equal(ours, run_experts(x, places_of(ids), combine, ExpertNetworks(*map(plain, w), "silu")))
