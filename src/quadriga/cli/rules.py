"""Which options of a command go with which others: one table for each command, read whenever it reads its arguments.

What goes with which backend is the same for all commands that run a model, and stands in ``engine.load_options``; what
goes with which form of a written model in ``io.convert_options``. Here is the rest. An option counts as given if it was
typed, even with the value that it has anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from quadriga.option_rules import Rule

Options = Mapping[str, Any]


def _all(options: Iterable[str], when: Callable[[Options], bool], why: str) -> tuple[Rule, ...]:
    return tuple(Rule(option, when, why) for option in options)


def is_address(text: str) -> bool:
    """True for the address of a server, where a model's name could stand as well."""
    return text.startswith(("http://", "https://"))


def _remote(options: Options, argument: str = "model") -> bool:
    return is_address(str(options[argument]))


def _weighs_errors(options: Options) -> bool:
    from quadriga.io.convert_options import weighs_errors  # NumPy, which --help does without

    return weighs_errors(options)


def _recipe(options: Options) -> bool:
    inputs = options["inputs"]
    return len(inputs) == 1 and inputs[0].endswith((".toml", "manifest.json"))


def _draws(options: Options) -> bool:
    return bool(options["drop"] or options["noise"] or options["router_text"] is None)


_SAMPLED = _all(
    ("top_k", "top_p", "min_p", "seed"),
    lambda o: o["temperature"] is None or o["temperature"] > 0,
    "at {temperature} 0 the most probable token is taken each time. Give {temperature} above 0, or leave it out",
)

_HERE = ("format", "activations", "kv_format", "kv_memory", "expert_memory", "dtype", "device", "threads")
"""How a model runs in this process."""

_WRITES = (
    *("out", "to", "layout", "dtype", "format", "gguf_format", "embeddings", "budget"),
    *("calibrate", "calibrate_tokens", "restart"),
)

RULES: dict[str, tuple[Rule, ...]] = {
    "chat": (
        *_SAMPLED,
        *_all(
            ("model", "parallel", *_HERE),
            lambda o: o["url"] is None,
            "the model is behind {url} and computes there. Leave one of the two out",
        ),
        *_all(
            ("api_key", "api_model"),
            lambda o: o["url"] is not None,
            "the model runs in this process. Give {url}, or leave it out",
        ),
    ),
    "generate": (
        *_SAMPLED,
        Rule("logprobs", lambda o: o["json"], "alternatives are shown in JSON only. Give {json}, or leave it out"),
    ),
    "convert": (
        *_all(_WRITES, lambda o: not o["dry_run"], "{dry_run} only reads the model. Leave one of the two out"),
        Rule(
            "budget",
            lambda o: o["format"] is None,
            "{budget} chooses the formats itself. Leave one of {budget} and {format} out",
        ),
        Rule(
            "budget",
            lambda o: o["gguf_format"] is None,
            "{budget} chooses the formats itself. Leave one of {budget} and {gguf_format} out",
        ),
        Rule(
            "budget",
            lambda o: o["calibrate"] is not None,
            "the mix of formats is chosen by a text. Give {calibrate} FILE, a text like those to come",
        ),
        Rule(
            "budget",
            lambda o: o["to"] in ("quadriga", "gguf"),
            "only matrices packed for the kernels and a GGUF file's tensors have formats to choose. Leave {budget} out",
        ),
        Rule(
            "calibrate",
            lambda o: o["budget"] is not None or _weighs_errors(o),
            "it weighs the errors of quantised weights. Give {format} q8, q4 or q4m, {to} gguf and a {gguf_format} "
            "with sub-blocks (q4_k), or {budget}, or leave it out",
        ),
        Rule(
            "calibrate_tokens",
            lambda o: o["calibrate"] is not None,
            "it says how much of a text is read. Give {calibrate} FILE, or leave it out",
        ),
    ),
    "train": (
        Rule(
            "dtype",
            lambda o: o["export"] is not None,
            "it is about the checkpoint that is written. Give {export} FOLDER, or leave it out",
        ),
        Rule(
            "step",
            lambda o: o["export"] is not None or o["branch"] is not None,
            "it chooses a checkpoint to write or to begin at. Give {export} FOLDER or {branch} RUN, or leave it out",
        ),
        *_all(
            ("resume", "threads", "stop_after", "branch"),
            lambda o: o["export"] is None and not o["check"],
            "nothing is trained with {export} or {check}. Leave it out",
        ),
        Rule("export", lambda o: not o["check"], "{check} only says what would run. Leave one of the two out"),
    ),
    "upcycle": (
        *_all(
            ("router_label", "router_tokens"),
            lambda o: o["router_text"] is not None,
            "routers are drawn at random without a text. Give {router_text} FILE, or leave it out",
        ),
        Rule("router_std", lambda o: o["router_text"] is None, "routers are fitted to {router_text}. Leave it out"),
        Rule("seed", _draws, "nothing is drawn here: routers are fitted, and {drop} and {noise} are 0. Leave it out"),
    ),
    "merge-experts": (
        Rule(
            "calibrate_tokens",
            lambda o: o["calibrate"] is not None,
            "it says how much of a text is read. Give {calibrate} FILE, or leave it out",
        ),
    ),
    "eval": (
        *_all(
            (
                *("model", "limit", "shots", "samples", "k", "temperature", "seed", "chat", "data_dir", "unsafe_exec"),
                *(
                    "judge",
                    "judge_model",
                    "out",
                    "restart",
                    "picture",
                    "json",
                    "api",
                    "api_model",
                    "api_key",
                    "concurrency",
                ),
                *("format", "activations", "kv_format", "kv_memory", "expert_memory", "dtype", "device", "threads"),
            ),
            lambda o: o["tasks"] is not None,
            "without {tasks} the tasks are listed and none is run. Give {tasks} NAMES, or leave it out",
        ),
        *_all(
            _HERE,
            lambda o: not _remote(o),
            "the model is behind an address and computes elsewhere. Leave it out",
        ),
        *_all(
            ("api", "api_model", "api_key", "concurrency"),
            _remote,
            "the model runs in this process. Give an address as {model}, or leave it out",
        ),
    ),
    "bench invariance": (
        *_all(
            ("format", "dtype", "threads"),
            lambda o: not _remote(o, "target"),
            "the model is behind an address and computes there. Leave it out",
        ),
        *_all(
            ("api_model", "api_key", "timeout", "completions"),
            lambda o: _remote(o, "target"),
            "the model runs in this process. Give an address, or leave it out",
        ),
    ),
    "serve": (
        *_all(
            ("models_memory", "parallel", "admin_key", "stay_on_failure"),
            lambda o: o["replicas"] == 1 and o["ray"] is None,
            "it is for a server of one process. Leave it out, or {replicas} and {ray}",
        ),
        Rule(
            "keep_alive",
            lambda o: o["models_memory"] is not None,
            "models that are loaded at the start stay. Give {models_memory}, or leave it out",
        ),
        Rule(
            "parallel",
            lambda o: o["models_memory"] is None,
            "ranks follow one engine from the start to the end. Leave one of {parallel} and {models_memory} out",
        ),
        Rule(
            "adapter",
            lambda o: o["models_memory"] is None,
            "they are added to a model that is loaded at the start; over HTTP ({admin_key}) they keep a model from "
            "leaving. Leave one of the two out",
        ),
    ),
    "compare": (Rule("markdown", lambda o: not o["json"], "{json} prints JSON. Leave one of the two out"),),
    "plan": _all(
        ("tokens", "seq_len", "batch_tokens", "stack", "price", "availability", "top", "picture", "verify"),
        lambda o: o["gpus"] is not None,
        "it is about training: give the cluster with {gpus}, e.g. {gpus} 64xH100, or leave it out",
    ),
    "data prepare": _all(
        ("text_field", "domain", "domain_field"),
        lambda o: not _recipe(o),
        "it is for plain text inputs; a recipe names its own. Leave it out",
    ),
    "data inspect": (
        *_all(
            ("domain", "split"),
            lambda o: o["document"] is not None,
            "it says where a document is. Give its number with {document}, or leave it out",
        ),
        *_all(
            ("verify", "json"),
            lambda o: o["document"] is None,
            "{document} prints one document's text. Leave one of the two out",
        ),
    ),
    "data mix": _all(
        ("tokens", "power"),
        lambda o: not (len(o["paths"]) == 1 and o["paths"][0].suffix == ".toml"),
        "it is for corpora; a run's file says its own. Leave it out",
    ),
}
"""The words of a command -> its rules."""
