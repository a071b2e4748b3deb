"""Router, experts and aggregate against naive loops, and what happens when routing goes wrong."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quadriga.kernels import ops
from quadriga.model.config import Aggregate, MoESpec
from quadriga.nn.moe import MoE

D, FF, E, K, N = 48, 80, 5, 3, 37


def build(dtype: torch.dtype = torch.float64, *, seed: int = 0, **spec: object) -> MoE:
    options: dict[str, object] = {"d_ff": FF, "n_experts": E, "top_k": K, "activation": "silu"} | spec
    moe = MoE(D, MoESpec(**options)).double()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return moe.to(dtype).eval()


def tokens(dtype: torch.dtype = torch.float64, n: int = N, seed: int = 9) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def one_expert(moe: MoE, e: int, x: Tensor) -> Tensor:
    return moe.w_down[e] @ (F.silu(moe.w_gate[e] @ x) * (moe.w_up[e] @ x))


def naive(moe: MoE, x: Tensor) -> Tensor:
    """Token by token, expert by expert, straight from the definition."""
    out = torch.zeros_like(x)
    for n in range(len(x)):
        p = (moe.router.weight @ x[n]).softmax(0)
        chosen = sorted(range(len(p)), key=lambda e: (-p[e].item(), e))[: moe.spec.top_k]
        weights = torch.stack([p[e] for e in chosen])
        if moe.spec.normalize_p is not None:
            weights = weights / (weights**moe.spec.normalize_p).sum() ** (1 / moe.spec.normalize_p)
        if moe.spec.aggregate == "vote":
            weights = torch.full_like(weights, 1 / moe.spec.top_k)
        if moe.spec.aggregate == "fuse":
            assert moe.fuse is not None
            lifted = weights * torch.stack([moe.fuse.weight[e].exp() for e in chosen])
            weights = lifted / lifted.sum() * weights.sum()
        for w, e in zip(weights, chosen, strict=True):
            out[n] += w * one_expert(moe, e, x[n])
    return out


@pytest.mark.parametrize(
    ("aggregate", "normalize_p"),
    [("weighted_sum", 1.0), ("weighted_sum", 2.0), ("weighted_sum", None), ("vote", 1.0), ("fuse", None)],
)
@torch.no_grad()
def test_forward_equals_the_naive_loop(aggregate: Aggregate, normalize_p: float | None) -> None:
    moe = build(aggregate=aggregate, normalize_p=normalize_p)
    out, stats = moe(tokens())
    torch.testing.assert_close(out, naive(moe, tokens()), rtol=1e-12, atol=1e-12)
    assert int(stats.load().sum()) == N * K


@torch.no_grad()
def test_the_grouped_product_equals_the_split_one() -> None:
    """float32 with aligned rows takes torch's grouped product, float64 the split by expert."""
    wide, narrow = build(), build(torch.float32)
    out, _ = narrow(tokens(torch.float32))
    expected, _ = wide(tokens())
    # Reductions of length D and F in float32: about 1e-6 of the largest output.
    assert (out - expected).abs().max() < 2e-6 * expected.abs().max()


def test_gradients_equal_the_naive_loop_and_idle_experts_get_none() -> None:
    moe = build()
    with torch.no_grad():
        moe.router.weight[4] = -moe.router.weight[:4].sum(0)
        moe.router.weight[4] -= 100.0  # expert 4 loses on every token with a positive sum
    x = tokens().abs()
    out, stats = moe(x)
    assert stats.load()[4] == 0
    names = ("w_gate", "w_up", "w_down")
    cotangent = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad((out * cotangent).sum(), [getattr(moe, n) for n in names] + [moe.router.weight])
    expected = torch.autograd.grad(
        (naive(moe, x) * cotangent).sum(), [getattr(moe, n) for n in names] + [moe.router.weight]
    )
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, want, rtol=1e-10, atol=1e-11)
    for grad in grads[:3]:
        assert torch.count_nonzero(grad[4]) == 0
        assert all(torch.count_nonzero(grad[e]) > 0 for e in range(4))


@torch.no_grad()
def test_routing_is_float32_whatever_the_dtype() -> None:
    """Two experts whose logits differ by less than bf16 can hold must still be told apart."""
    weight = torch.zeros(E, D, dtype=torch.bfloat16)
    weight[2, 0], weight[3, 0], weight[3, 1] = 1.0, 1.0, 2.0**-9  # logits 64 and 64.125: one bf16 number
    x = torch.zeros(1, D, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 64.0, 64.0
    assert torch.equal((x @ weight.T)[0, 2], (x @ weight.T)[0, 3])
    routing = ops.route(x, weight, ops.Choice(top_k=1))
    assert routing.expert_ids.item() == 3
    assert routing.probs.dtype == torch.float32
    assert routing.probs[0, 3] - routing.probs[0, 2] == pytest.approx(0.0624, abs=1e-3)


@torch.no_grad()
def test_jitter_disturbs_the_routers_input_in_training_and_nothing_else() -> None:
    """In use a jittered model is the model without; in training the experts still see what came in."""
    plain, jittered = build(jitter_eps=None), build(jitter_eps=0.4)
    x = tokens()
    out, stats = plain(x)
    for _ in range(2):
        again, same = jittered(x)
        assert torch.equal(again, out) and torch.equal(same.logits, stats.logits)
    jittered.train()
    torch.manual_seed(0)
    seen: list[Tensor] = []
    dispatch = jittered.dispatch
    jittered.dispatch = lambda *arguments: seen.append(arguments[0]) or dispatch(*arguments)  # type: ignore[func-returns-value]
    _, moved = jittered(x)
    assert torch.equal(seen[0], x), "what the experts compute on is not disturbed"
    torch.manual_seed(0)
    factors = torch.empty_like(x).uniform_(0.6, 1.4)
    torch.testing.assert_close(moved.logits, (x * factors) @ jittered.router.weight.T)
    plain.train()
    assert torch.equal(plain(x)[1].logits, stats.logits)


@torch.no_grad()
def test_a_bias_moves_the_choice_and_not_the_weights() -> None:
    moe = build()
    free = moe(tokens())[1]
    moe.router.balancing = torch.tensor([0.0, 0.0, 0.0, 0.0, 9.0])
    _, stats = moe(tokens())
    assert bool((stats.expert_ids == 4).any(1).all()), "it is chosen for every token"
    assert torch.equal(stats.probs, free.probs) and torch.equal(stats.logits, free.logits)
    chosen = free.probs.gather(1, stats.expert_ids)
    torch.testing.assert_close(stats.expert_weights, chosen / chosen.sum(-1, keepdim=True))


@torch.no_grad()
def test_ties_take_the_lower_expert_first() -> None:
    moe = build()
    moe.router.weight.zero_()
    _, stats = moe(tokens())
    assert stats.expert_ids.tolist() == [[0, 1, 2]] * N
    torch.testing.assert_close(stats.expert_weights, torch.full((N, K), 1 / 3, dtype=torch.float64))


@torch.no_grad()
def test_all_tokens_to_one_expert() -> None:
    moe = build(top_k=1)
    moe.router.weight.zero_()
    moe.router.weight[3] = 1.0
    out, stats = moe(tokens().abs())
    assert stats.load().tolist() == [0, 0, 0, N, 0]
    torch.testing.assert_close(out, torch.stack([one_expert(moe, 3, x) for x in tokens().abs()]))


@pytest.mark.parametrize("top_k", [1, E])
@pytest.mark.parametrize("n", [1, 2])
@torch.no_grad()
def test_extreme_top_k_and_batch_of_one(top_k: int, n: int) -> None:
    moe = build(top_k=top_k)
    x = tokens(n=n)
    torch.testing.assert_close(moe(x)[0], naive(moe, x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_nan_tokens_stay_their_own_problem() -> None:
    """A NaN in one token's router input reaches that token's output only, and crashes nothing."""
    moe, x = build(), tokens()
    clean, _ = moe(x)
    x[5, 0] = float("nan")
    out, _ = moe(x)
    assert out[5].isnan().all()
    others = torch.arange(N) != 5
    torch.testing.assert_close(out[others], clean[others], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_jitter_disturbs_the_router_only_and_zero_is_the_identity() -> None:
    calm, shaken = build(jitter_eps=0.0).train(), build(jitter_eps=0.9, top_k=E).train()
    assert torch.equal(calm(tokens())[0], build()(tokens())[0])
    torch.manual_seed(0)
    out, stats = shaken(tokens())
    still = shaken.router.eval()(tokens())
    assert not torch.equal(stats.probs, still.probs)
    # With all experts chosen, the output is the shaken weights over the *undisturbed* tokens' expert outputs.
    rebuilt = torch.zeros_like(out)
    for n, j in itertools.product(range(N), range(E)):
        e = int(stats.expert_ids[n, j])
        rebuilt[n] += stats.expert_weights[n, j] * one_expert(shaken, e, tokens()[n])
    torch.testing.assert_close(out, rebuilt, rtol=1e-12, atol=1e-12)
