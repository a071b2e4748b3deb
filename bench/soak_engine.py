"""Random requests at one engine for some minutes: they arrive, share prefixes, leave, are preempted; then the books.

At the end no block may be missing, no request may have waited for ever, and every answer that came to its end must be,
token by token and to the bit of its log-probabilities, what the same request gives alone in a fresh engine.

    python bench/soak_engine.py --minutes 10
    python bench/soak_engine.py --minutes 1 --model smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import random
import resource
import time
from dataclasses import replace

import quadriga
from quadriga.engine.engine import Engine
from quadriga.engine.request import Request, SamplingParams, TokenEvent
from quadriga.kernels.arrays import arrays
from quadriga.model.config import AttentionSpec, MoESpec, NormSpec, RopeSpec, uniform_model
from quadriga.nn.transformer import random_parameters
from quadriga.runners.compiled import CompiledModel, pack_parameters

TINY = uniform_model(
    family="dbrx",
    vocab_size=997,
    d_model=96,
    n_layers=3,
    max_seq_len=512,
    norm=NormSpec(kind="layer"),
    mixer=AttentionSpec(n_heads=6, n_kv_heads=2, head_dim=16, clip_qkv=8.0, position=RopeSpec(theta=5e5)),
    ffn=MoESpec(d_ff=160, n_experts=16, top_k=4, activation="silu", aux_loss_weight=0.05),
)
Key = tuple[int, float]


def make_request(rng: random.Random, vocabulary: int) -> Request:
    """Any mixture of prompt, sampling and drafts; one prompt in three begins with one of four shared prefixes."""
    shared = [rng.randrange(4) * 7 + 1] * 48 if rng.random() < 0.33 else []
    prompt = shared + [rng.randrange(vocabulary) for _ in range(rng.randint(1, 160))]
    params = SamplingParams(
        max_new_tokens=rng.randint(1, 120),
        temperature=rng.choice([0.0, 0.7, 1.2]),
        top_k=rng.choice([0, 20]),
        top_p=rng.choice([1.0, 0.9]),
        seed=rng.randrange(1 << 30),
        ignore_eos=rng.random() < 0.8,
        speculate=rng.choice([0, 0, 4]),
        repetition_penalty=rng.choice([1.0, 1.1]),
    )
    return Request(prompt=tuple(prompt), params=params, priority=rng.choice([0, 0, 0, 1]))


def keys(events: list[TokenEvent]) -> list[Key]:
    """What must be equal."""
    return [(event.token_id, event.logprob) for event in events]


def solo(engine: Engine, request: Request) -> list[Key]:
    """The same request alone."""
    engine.submit(replace(request, params=replace(request.params, speculate=0)))
    events = []
    while engine.has_work:
        events += [event for _, event in engine.step() if isinstance(event, TokenEvent)]
    return keys(events)


def main() -> None:
    """Run for the given time, then drain, count blocks and compare answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--model", help="a model instead of a small random MoE")
    parser.add_argument("--checks", type=int, default=400, help="answers to compare with their solo runs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    if args.model:
        llm = quadriga.load(args.model, kv_memory=64 << 20)
        assert isinstance(llm.runner, CompiledModel), "the soak is for the CPU's kernels"
        runner = llm.runner
    else:
        runner = CompiledModel(
            TINY, pack_parameters(arrays(random_parameters(TINY, std=0.2)), "q4"), threads=2, n_blocks=72
        )
    engine = Engine(runner, max_batch_tokens=96, max_sequences=12)
    live: dict[int, tuple[Request, list[TokenEvent], float]] = {}
    finished: list[tuple[Request, list[Key]]] = []
    n_submitted = n_cancelled = 0
    longest_wait = 0.0
    started = time.monotonic()
    rss_at: list[int] = []
    while (now := time.monotonic()) < started + 60 * args.minutes or live:
        arriving = now < started + 60 * args.minutes
        while arriving and len(live) < 24 and rng.random() < 0.5:
            request = make_request(rng, runner.config.vocab_size)
            live[engine.submit(request)] = (request, [], now)
            n_submitted += 1
        if live and rng.random() < 0.01:
            leaver = rng.choice(list(live))
            engine.cancel(leaver)
            del live[leaver]
            n_cancelled += 1
        for number, event in engine.step():
            assert isinstance(event, TokenEvent), event
            request, events, since = live[number]
            events.append(event)
            if event.finish_reason is not None:
                longest_wait = max(longest_wait, now - since)
                finished.append((request, keys(events)))
                del live[number]
        if len(rss_at) < int((now - started) / 30) + 1:
            rss_at.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    stats = engine.stats()
    print(
        f"{n_submitted} requests in {args.minutes:g} minutes: {len(finished)} finished, {n_cancelled} cancelled, "
        f"{stats.n_preemptions} preemptions, {stats.n_cached_tokens} tokens from the prefix cache, "
        f"{stats.n_guessed_right} guessed right; longest from arrival to end {longest_wait:.1f} s; "
        f"peak memory {rss_at[0]} MB after the first step, {rss_at[-1]} MB at the end"
    )
    assert len(finished) + n_cancelled == n_submitted, "a request was lost"
    assert stats.kv_blocks_used == 0, f"{stats.kv_blocks_used} blocks were not given back"
    assert stats.n_preemptions and stats.n_cached_tokens, "the run was too easy to show anything"
    sample = rng.sample(finished, min(args.checks, len(finished)))
    wrong = 0
    for request, answer in sample:
        alone = Engine(runner, prefix_cache=False)
        wrong += solo(alone, request) != answer
    print(f"{len(sample)} answers compared with their solo runs: {wrong} differ; blocks in use: {stats.kv_blocks_used}")
    assert wrong == 0, "an answer depended on what ran beside it"


if __name__ == "__main__":
    main()
