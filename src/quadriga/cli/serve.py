"""``quadriga serve``: a model over HTTP, with a chat page."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quadriga.cli import options
from quadriga.cli.door import Door, open_door

if TYPE_CHECKING:
    from quadriga.engine.load_options import LoadOptions
    from quadriga.server.files import FileStore
    from quadriga.server.fleet import Fleet
    from quadriga.server.guard import Limits
    from quadriga.server.hosting import Hosting
    from quadriga.server.on_demand import OnDemand
    from quadriga.server.run import Certificate
    from quadriga.server.service import Service


def serve_command(
    model: options.ModelArguments = None,
    host: Annotated[str, typer.Option(help="Address to listen on; loopback is this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    unix_socket: Annotated[
        Path | None, typer.Option(help="Listen at this socket file, for users of its group; not at an address.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM) to speak TLS with; needs --tls-key.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, without a password.")] = None,
    open_probes: Annotated[
        bool,
        typer.Option("--open-probes", help="/health, /ready and /metrics answer under any Host name."),
    ] = False,
    name: Annotated[
        list[str] | None,
        typer.Option("--served-name", "--served-model-name", help="What clients call the model; may be repeated."),
    ] = None,
    api_key: options.APIKeys = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A host name clients may use; * is any.")] = None,
    allow_origin: Annotated[list[str] | None, typer.Option(help="A site whose pages may ask; * is any.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FOLDER of an adapter, served as MODEL:NAME; may be repeated. Needs --dtype."),
    ] = None,
    admin_key: Annotated[
        str | None, typer.Option(help="A key for adding and removing adapters over HTTP; without it nobody can.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse fields that have no meaning here, instead of naming them.")
    ] = False,
    tool_form: Annotated[
        str, typer.Option(help="How the model writes calls of tools: auto (by its template), hermes, llama3, ...")
    ] = "auto",
    reasoning: Annotated[
        bool,
        typer.Option("--reasoning/--no-reasoning", help="Tell thoughts from answers, where the template marks them."),
    ] = True,
    log_level: Annotated[
        str | None,
        typer.Option(help="debug, info (a line for every request), warning or error; default: warning."),
    ] = None,
    otlp_traces_endpoint: Annotated[
        str | None, typer.Option(help="Send a span of every request to this OTLP/HTTP address; needs the extra otel.")
    ] = None,
    log_json: Annotated[bool, typer.Option("--log-json", help="Lines of the access log are JSON.")] = False,
    replicas: Annotated[
        int,
        typer.Option(min=1, max=64, help="Processes that answer behind one address, each with the whole model."),
    ] = 1,
    ray: options.Ray = None,
    models_memory: Annotated[
        str | None,
        typer.Option(help="Load models when asked for, so much of them, e.g. 16GB; without MODEL any that is here."),
    ] = None,
    keep_alive: Annotated[
        str,
        typer.Option(help="How long such a model stays when idle: 5m, 1h30m, seconds; -1: for ever, 0: not at all."),
    ] = "5m",
    max_waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = 256,
    max_sequences: Annotated[int, typer.Option(min=1, help="Requests that are computed at once.")] = 64,
    max_batch_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of one pass: fewer keep answers fluent beside long prompts.")
    ] = 512,
    requests_per_minute: Annotated[
        int, typer.Option(help="Answers and embedded texts for each key or address; 0 is no limit.")
    ] = 0,
    tokens_per_minute: Annotated[
        int, typer.Option(help="Tokens read and made for each key or address; 0 is no limit.")
    ] = 0,
    tokens_per_day: Annotated[int, typer.Option(help="The same in a day, refilled all the time; 0 is no limit.")] = 0,
    concurrent: Annotated[
        int, typer.Option(help="Answers and embedded texts at once for each key or address; 0 is no limit.")
    ] = 0,
    max_body: Annotated[str, typer.Option(help="Largest request body, e.g. 8MB.")] = "8MB",
    files: Annotated[
        Path | None, typer.Option(help="Folder for uploaded files and batches; without it there are none.")
    ] = None,
    files_size: Annotated[str, typer.Option(help="Bytes that all files may have together, e.g. 1GB.")] = "1GB",
    prefix_cache: Annotated[
        Path | None, typer.Option(help="Folder for known prefixes of prompts: found again after a restart.")
    ] = None,
    prefix_cache_size: Annotated[str, typer.Option(help="Bytes that it may have, e.g. 10GB.")] = "10GB",
    drain: Annotated[
        int, typer.Option(help="Seconds that answers get after SIGTERM; a second signal ends at once.")
    ] = 30,
    step_timeout: Annotated[
        float, typer.Option(help="Seconds that one pass may take; longer counts as hung, and the server ends. 0: any.")
    ] = 300,
    stay_on_failure: Annotated[
        bool, typer.Option("--stay-on-failure", help="When the engine fails, go on answering 503; do not exit.")
    ] = False,
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
    """Serve a model, or several (NAME=MODEL gives a name): OpenAI's and Anthropic's interfaces, and a chat page at /.

    QUADRIGA_API_KEYS has keys too, with commas between.
    """
    from quadriga import runtime
    from quadriga.server.files import FileStore
    from quadriga.server.fleet import Fleet
    from quadriga.server.guard import Limits
    from quadriga.server.hosting import Hosting
    from quadriga.server.tracing import Spans

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
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
    )
    models = [] if models_memory is not None and not model else _models(model or [DEFAULT], name or ())
    budget = None if models_memory is None else options.size(models_memory, "--models-memory")
    if len(models) != 1:
        _require_one_model(
            parallel=parallel,
            replicas=replicas > 1 or ray is not None,
            adapter=adapter,
            prefix_cache=prefix_cache if not models else None,
        )
    if budget is None:
        options.follow_if_rank(models[0][0], how)
    keys = tuple(api_key or ()) + tuple(k for k in (runtime.setting("API_KEYS") or "").split(",") if k)
    _check_keys(keys, admin_key)
    _check_ranges(
        (max_waiting, requests_per_minute, tokens_per_minute, tokens_per_day, concurrent, drain),
        step_timeout=step_timeout,
        tool_form=tool_form,
    )
    if log_level is not None:
        runtime.set_log_level(log_level, "--log-level")
    limits = Limits(
        keys=keys,
        hosts=(*(allow_host or ()), *(() if host in ("0.0.0.0", "::") else (host,))),
        origins=tuple(allow_origin or ()),
        max_body_bytes=options.size(max_body, "--max-body"),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        tokens_per_day=tokens_per_day,
        concurrent=concurrent,
        strict=strict,
        log_json=log_json,
        admin_key=admin_key or "",
        open_probes=open_probes,
    )
    hosting = Hosting(
        max_waiting=max_waiting,
        step_timeout_s=step_timeout,
        tool_form=tool_form,
        reasoning=reasoning,
        adapters=_adapters(adapter or (), how),
        prefix_cache=None if prefix_cache is None else str(prefix_cache),
        prefix_cache_bytes=options.size(prefix_cache_size, "--prefix-cache-size") // max(1, len(models)) // replicas,
    )
    around: dict[str, Any] = {
        "store": None if files is None else FileStore(files, options.size(files_size, "--files-size")),
        "certificate": _certificate(tls_cert, tls_key),
        "spans": None if otlp_traces_endpoint is None else Spans(otlp_traces_endpoint),
        "drain_s": drain,
    }
    with open_door(host, port, unix_socket, tls=around["certificate"] is not None, with_key=bool(keys)) as door:
        places = f"{max_sequences} requests at once, {max_waiting} may wait"
        if replicas > 1 or ray is not None:
            _serve_replicas(models[0], replicas, ray, how, hosting, limits, door, places, **around)
            return
        if budget is None:
            fleet = Fleet([hosting.service(options.load_model(path, how), names) for path, names in models])
        else:
            fleet = Fleet(on_demand=_on_demand(models, how, budget, keep_alive, hosting))
        _serve_fleet(fleet, limits, door, places, keep_alive, stay_on_failure=stay_on_failure, **around)


def _require_one_model(
    *, parallel: str | None, replicas: bool, adapter: Sequence[str] | None, prefix_cache: Path | None
) -> None:
    """Refuse what is for a server of one model, where there are several or any."""
    from quadriga.errors import ConfigError

    if parallel is not None:
        raise ConfigError("--parallel is for a server of one model: its ranks follow one engine")
    if replicas:
        raise ConfigError(
            "--replicas is for a server of one model: each has it whole, and requests are shared out by what each "
            "has read. Start a server for each model, or leave --replicas out"
        )
    if adapter:
        raise ConfigError("--adapter is for a server of one model; add them over HTTP, with --admin-key")
    if prefix_cache is not None:
        raise ConfigError("--prefix-cache is shared out among models that are named: give MODEL beside --models-memory")


def _check_ranges(limits: Sequence[int], *, step_timeout: float, tool_form: str) -> None:
    from quadriga.errors import ConfigError
    from quadriga.text.tool_calls.forms import FORMS

    if min(limits) < 0:
        raise ConfigError("limits cannot be negative")
    if not 0 <= step_timeout < float("inf"):
        raise ConfigError(f"--step-timeout must be seconds, 0 for no limit; got {step_timeout:g}")
    if tool_form not in ("auto", *FORMS):
        raise ConfigError(f"--tool-form must be auto or one of {', '.join(FORMS)}; got {tool_form!r}")


def _certificate(cert: Path | None, key: Path | None) -> Certificate | None:
    from quadriga.errors import ConfigError
    from quadriga.server.run import Certificate

    if (cert is None) != (key is None):
        raise ConfigError("--tls-cert and --tls-key are given together")
    return None if cert is None or key is None else Certificate(cert, key)


def _check_keys(keys: Sequence[str], admin_key: str | None) -> None:
    from quadriga.errors import ConfigError

    if any(len(key) < 8 for key in (*keys, *([] if admin_key is None else [admin_key]))):
        raise ConfigError("an API key needs at least 8 characters")


def _on_demand(
    models: Sequence[tuple[str, list[str]]],
    how: LoadOptions,
    budget: int,
    keep_alive: str,
    hosting: Hosting,
) -> OnDemand:
    """Models that are loaded when asked for: those that are named, fetched first, or all of the local store."""
    from dataclasses import asdict

    from quadriga.cli.progress import progress_bar
    from quadriga.engine.load import load
    from quadriga.errors import ConfigError
    from quadriga.hub import catalogue
    from quadriga.server import offers
    from quadriga.server.on_demand import Offer, OnDemand, keep_alive_s

    for path, _ in models:
        with progress_bar(f"looking for {Path(path).name}") as show:
            catalogue.resolve(path, progress=show)
    found = [offers.offer(path, names, how, budget) for path, names in models] or offers.stored(set(), how, budget)
    for one in found if models else ():
        if one.nbytes > budget:
            raise ConfigError(
                f"--models-memory must be enough for each model: {one.card.name} needs {one.nbytes / 1e9:.2f} GB with "
                f"its cache (--kv-memory), and all may have {budget / 1e9:.2f} GB"
            )
    default = next((i for i, one in enumerate(found) if not models and one.source == DEFAULT), 0)
    found.insert(0, found.pop(default))

    def opened(one: Offer) -> Service:
        return hosting.service(load(one.source, **asdict(one.how)), one.names)

    return OnDemand(
        found,
        opened,
        budget=budget,
        keep_alive_s=keep_alive_s(keep_alive),
        max_waiting=hosting.max_waiting,
        look=None if models else lambda known: offers.stored(known, how, budget),
    )


def _serve_fleet(fleet: Fleet, limits: Limits, door: Door, places: str, keep_alive: str, **around: Any) -> None:
    """Models of this process."""
    from quadriga import runtime
    from quadriga.server.run import serve

    def started() -> None:
        door.greet([one.card.name for one in fleet.listed()], _about(fleet, places, keep_alive))

    runtime.prefer_short_pauses()
    serve(fleet, limits, door.listener, started=started, **around)


def _serve_replicas(
    model: tuple[str, list[str]],
    n: int,
    ray: str | None,
    how: LoadOptions,
    hosting: Hosting,
    limits: Limits,
    door: Door,
    places: str,
    *,
    store: FileStore | None,
    **around: Any,
) -> None:
    """A front and its replicas: here, their sockets in a folder that goes with it, or on a cluster."""
    import tempfile

    from quadriga.server.front.app import Front, build_front
    from quadriga.server.front.replica import Order
    from quadriga.server.front.replicas import launcher
    from quadriga.server.run import run

    source, names = model
    with ExitStack() as stack:
        if ray is None:
            how = _shared_out(source, how, n)
        order = Order(
            source=source,
            names=names,
            how=how,
            hosting=hosting,
            strict=limits.strict,
            max_body_bytes=limits.max_body_bytes,
        )
        if ray is None:
            launch = launcher(order, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quadriga-"))))
        else:
            from quadriga.server.front.ray_serve import ray_launcher

            launch = ray_launcher(order, ray)
        front = Front(names, n, launch)

        def started() -> None:
            door.greet(names[:1], [f"{n} replicas; each: {places}"])

        run(build_front(front, limits, store), front, door.listener, started=started, **around)


def _shared_out(source: str, how: LoadOptions, n: int) -> LoadOptions:
    """The options of each of n replicas on this machine, with the model fetched before they start."""
    from dataclasses import replace

    from quadriga import runtime
    from quadriga.cli.progress import progress_bar
    from quadriga.hub import catalogue

    with progress_bar(f"looking for {Path(source).name}") as show:
        catalogue.resolve(source, progress=show)
    return how if how.threads is not None else replace(how, threads=max(1, runtime.n_threads(None) // n))


def _about(fleet: Fleet, places: str, keep_alive: str) -> list[str]:
    """A line for each model that is loaded, and one about those that are not."""
    lines = []
    for service in fleet.services:
        whose = f"{service.name}: " if len(fleet.services) > 1 else ""
        lines.append(f"{whose}cache for {16 * service.llm.engine.stats().kv_blocks:,} tokens, {places}")
    if fleet.on_demand is not None:
        gb = fleet.on_demand.budget / 1e9
        lines.append(f"loaded when asked for, {gb:.1f} GB at once, idle ones stay {keep_alive}; each: {places}")
    return lines


DEFAULT = "smollm2-135m-instruct"


def _models(given: Sequence[str], served: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(model, its names) of every model to serve.

    Raises:
        ConfigError: names that are given twice, or nowhere.
    """
    from quadriga.errors import ConfigError

    models = []
    for one in given:
        name, equals, path = one.partition("=")
        named = bool(equals and name and path) and "/" not in name and not Path(one).exists()
        models.append((path, [name]) if named else (one, [Path(one).name]))
    if served and len(models) > 1:
        raise ConfigError("--served-name is for one model; with several write NAME=MODEL for each")
    names = [list(served)] if served else [names for _, names in models]
    flat = [name for some in names for name in some]
    if len(set(flat)) < len(flat) or any(":" in name for name in flat if len(models) > 1):
        raise ConfigError(f"models need names of their own, without colons: got {', '.join(flat)}. Write NAME=MODEL")
    return [(path, some) for (path, _), some in zip(models, names, strict=True)]


def _adapters(given: Sequence[str], how: LoadOptions) -> dict[str, str]:
    """Name -> folder of the adapters to serve."""
    from quadriga.errors import ConfigError

    if given and how.why_torch() is None:
        raise ConfigError(
            f"--adapter {given[0]} would have no effect: adapters chosen per request run on torch. Give --dtype "
            "float32, or fold it into the model: quadriga adapter merge MODEL FOLDER OUT"
        )
    table: dict[str, str] = {}
    for one in given:
        name, _, folder = one.partition("=")
        if not name or not folder or ":" in name:
            raise ConfigError(f"--adapter takes NAME=FOLDER with no colon in the name, got {one!r}")
        if name in table:
            raise ConfigError(f"--adapter takes each name once, got {name!r} for {table[name]} and for {folder}")
        table[name] = folder
    return table
