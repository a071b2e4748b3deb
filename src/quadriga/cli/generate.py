"""``quadriga generate``: continue a text, no chat template."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from quadriga.cli import options


def generate_command(
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; without it, standard input is read.")] = None,
    model: options.Model = "smollm2-135m-instruct",
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    presence_penalty: options.PresencePenalty = 0.0,
    frequency_penalty: options.FrequencyPenalty = 0.0,
    logit_bias: options.LogitBias = None,
    stop: options.Stop = None,
    seed: options.Seed = None,
    logprobs: Annotated[int, typer.Option(min=0, max=20, help="With --json: this many alternatives per token.")] = 0,
    echo: Annotated[bool, typer.Option("--echo", help="Print the prompt before its continuation.")] = False,
    json: options.Json = False,
    speculate: options.Speculate = 0,
    format: options.Format = None,
    activations: options.Activations = None,
    kv_format: options.KVFormat = None,
    kv_memory: options.KVMemory = None,
    expert_memory: options.ExpertMemory = None,
    dtype: options.Dtype = None,
    device: options.Device = "cpu",
    threads: options.Threads = None,
    parallel: options.Parallel = None,
) -> None:
    """Continue a text exactly as given, without a chat template."""
    from quadriga.errors import RequestError

    how = options.load_options(
        format=format,
        activations=activations,
        kv_format=kv_format,
        kv_memory=kv_memory,
        expert_memory=expert_memory,
        dtype=dtype,
        device=device,
        threads=threads,
        parallel=parallel,
    )
    options.follow_if_rank(model, how)
    if prompt is None:
        if sys.stdin.isatty():
            raise RequestError("give a text to continue, as an argument or on standard input")
        prompt = sys.stdin.read()
    params = options.sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias,
        stop=stop,
        seed=seed,
        speculate=speculate,
        logprobs=logprobs,
    )
    llm = options.load_model(model, how)
    if json:
        events = list(llm.stream(prompt, params))
        rows = [
            {"id": e.token_id, "text": e.text, "logprob": e.logprob, "top_logprobs": list(e.top_logprobs)}
            for e in events
        ]
        text = (prompt if echo else "") + "".join(e.text for e in events)
        print(options.as_json({"text": text, "finish_reason": events[-1].finish_reason, "tokens": rows}))
        return
    from quadriga.cli.chat import print_stream

    if echo:
        print(prompt, end="", flush=True)
    print_stream(llm.stream(prompt, params), llm)
