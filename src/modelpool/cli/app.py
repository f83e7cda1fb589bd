"""The commands. Each parses its options, does one thing, and prints it for people or, with --json, for programs."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer
import yaml
from rich.console import Console
from rich.markup import escape

from modelpool import __version__
from modelpool.cli.chat import Chat, converse, say
from modelpool.cli.client import PoolClient, Trouble, fail, report
from modelpool.cli.command import program
from modelpool.cli.models_file import BadFile, read_as, read_models
from modelpool.cli.plan import Step, lines, patch, plan
from modelpool.cli.record import recorded, scenario_of_pool, seconds_of, writing
from modelpool.cli.simulate import (
    SCENARIO_SUFFIX,
    arrivals_of,
    figures_table,
    picture,
    refusals,
    scenario_of,
    simulated,
)
from modelpool.cli.tables import (
    considered_table,
    instances_table,
    keys_table,
    learned_table,
    models_table,
    now_line,
    phases_table,
    status_line,
    workers_table,
)
from modelpool.cli.waiting import is_ready, wait
from modelpool.home import AlreadyRunning, Home
from modelpool.messages.admin import ModelView
from modelpool.messages.dump import Dump
from modelpool.messages.models import CHANGEABLE
from modelpool.pool_address import local_address
from modelpool.process import StartupError
from modelpool.settings import Settings, SettingsError, load, to_environ
from modelpool.simulator.policies import Named
from modelpool.simulator.scenario import ScenarioError, write_scenario
from modelpool.simulator.trace import TraceError, generate, write_rows, write_trace

app = typer.Typer(
    name="modelpool",
    help="One OpenAI-compatible address in front of many models that share few accelerators.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

T = TypeVar("T")

keys_app = typer.Typer(name="keys", help="API keys for clients.", no_args_is_help=True)
app.add_typer(keys_app)

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
UrlOption = Annotated[str | None, typer.Option("--url", envvar="MODELPOOL_URL", help="The pool's address.")]
FileOption = Annotated[Path, typer.Option("--file", "-f", help="Models in YAML, - for stdin: see config/models.yaml.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", envvar="MODELPOOL_CONFIG", help="A YAML file.")]
_INTERRUPTED = 130


@app.callback(invoke_without_command=True)
def version(show: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False) -> None:
    if show:
        print(__version__)
        raise typer.Exit


@app.command("up")
def up_command(
    host: Annotated[str | None, typer.Option(help="The gateway's address.")] = None,
    port: Annotated[int | None, typer.Option(help="The gateway's port; 0 for any free one.")] = None,
    worker_host: Annotated[str | None, typer.Option(help="The worker's address.")] = None,
    gateway_processes: Annotated[int | None, typer.Option(help="Gateway processes that share the port.")] = None,
    worker_port: Annotated[int | None, typer.Option(help="The worker's port; 0 for any free one.")] = None,
    manager_host: Annotated[
        str | None, typer.Option(help="Let the manager listen on TCP too, at this address.")
    ] = None,
    manager_port: Annotated[int | None, typer.Option(help="The manager's TCP port.")] = None,
    api_key: Annotated[str | None, typer.Option(help="What clients must send. Needed beyond loopback.")] = None,
    require_key: Annotated[bool, typer.Option("--require-key", help="Serve nobody without a key.")] = False,
    insecure_no_auth: Annotated[bool, typer.Option("--insecure-no-auth", help="Serve beyond loopback openly.")] = False,
    no_demo: Annotated[bool, typer.Option("--no-demo", help="Leave the demo model out.")] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Start gateway, manager and one worker on this machine; end them all on Ctrl-C."""
    from modelpool.cli.up import JsonLines, Terminal, up

    settings = _settings(
        config,
        {
            "gateway.host": host,
            "gateway.port": port,
            "gateway.processes": gateway_processes,
            "gateway.api_key": api_key,
            "gateway.require_key": require_key or None,
            "gateway.insecure_no_auth": insecure_no_auth or None,
            "manager.host": manager_host,
            "manager.port": manager_port,
            "worker.host": worker_host,
            "worker.port": worker_port,
        },
    )
    screen = JsonLines(lambda line: print(line, flush=True)) if json else Terminal(Console())
    try:
        asyncio.run(up(settings, screen, with_demo=not no_demo))
    except (StartupError, AlreadyRunning, OSError, ExceptionGroup) as raised:
        screen.close()
        error = _leaf(raised)
        if isinstance(error, StartupError):
            fail(str(error), error.hint)
        if isinstance(error, AlreadyRunning):
            end = f"; `kill {error.pid}` ends it" if error.pid else ""
            fail(
                f"{error} in the home {settings.home_path}",
                f"`{program()} status` shows the pool{end}; MODELPOOL_HOME names another home.",
            )
        if isinstance(error, OSError):
            fail(str(error), "docs/operations.md lists what a pool needs.")
        raise
    finally:
        screen.close()


@app.command("deploy")
def deploy_command(
    host: Annotated[str | None, typer.Option(help="The gateways' address, on every node.")] = None,
    port: Annotated[int | None, typer.Option(help="The gateways' port.")] = None,
    gateway_processes: Annotated[int | None, typer.Option(help="Gateway processes on every node.")] = None,
    api_key: Annotated[str | None, typer.Option(help="What clients must send. Needed beyond loopback.")] = None,
    require_key: Annotated[bool, typer.Option("--require-key", help="Serve nobody without a key.")] = False,
    insecure_no_auth: Annotated[bool, typer.Option("--insecure-no-auth", help="Serve beyond loopback openly.")] = False,
    ray_address: Annotated[str | None, typer.Option(help="The cluster; one is started here if not given.")] = None,
    ray_args: Annotated[str | None, typer.Option(help="More arguments for `ray start --head`.")] = None,
    working_dir: Annotated[
        str | None, typer.Option(help="A folder with this code that Ray takes to the nodes.")
    ] = None,
    pin_manager: Annotated[
        bool, typer.Option("--pin-manager", help="Keep the manager on this node, where its store is.")
    ] = False,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Bring the pool up on a Ray cluster, or bring it to these settings: a manager, and a gateway on every node."""
    settings = _settings(
        config,
        {
            "gateway.host": host,
            "gateway.port": port,
            "gateway.processes": gateway_processes,
            "gateway.api_key": api_key,
            "gateway.require_key": require_key or None,
            "gateway.insecure_no_auth": insecure_no_auth or None,
            "cluster.ray_address": ray_address,
            "cluster.ray_args": ray_args,
            "cluster.working_dir": working_dir,
            "cluster.pin_manager": pin_manager or None,
        },
    )
    with _on_ray():
        from modelpool.cluster.deploy import deploy

        url = deploy(settings)
    _print({"url": url, "run_id": settings.run_id}, json, lambda: f"Model Pool serves at [bold]{url}/v1[/] on Ray")


@app.command("undeploy")
def undeploy_command(
    ray_address: Annotated[str | None, typer.Option(help="The cluster; the one of this machine if not given.")] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Take the pool off its Ray cluster, and end Ray where `deploy` started it. Workers and registrations stay."""
    settings = _settings(config, {"cluster.ray_address": ray_address})
    with _on_ray():
        from modelpool.cluster.deploy import undeploy

        undeploy(settings)
    _print({"undeployed": True}, json, lambda: "Nothing of the pool is left on Ray; workers go on by themselves.")


@contextmanager
def _on_ray() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        fail("Ray is not installed in this Python", "`pip install 'modelpool[ray]'`")
    except StartupError as error:
        fail(error.reason, error.hint)


@app.command("worker")
def worker_command(
    worker_id: Annotated[str | None, typer.Option(help="Its name; the host's name if not given.")] = None,
    manager_url: Annotated[
        str | None, typer.Option(help="A gateway or manager; or unix: and a control socket.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="The port; 0 for any free one.")] = None,
    public_url: Annotated[str | None, typer.Option(help="Where others reach it, if not at its own address.")] = None,
    config: ConfigOption = None,
) -> None:
    """Run a worker on this machine, in the foreground, for a pool that runs here or elsewhere."""
    from modelpool.worker.__main__ import run

    settings = _settings(
        config,
        {
            "worker.worker_id": worker_id,
            "worker.manager_url": manager_url,
            "worker.host": host,
            "worker.port": port,
            "worker.public_url": public_url,
        },
    )
    if settings.worker.manager_url == Settings().worker.manager_url and (local := local_address(settings)):
        # Where https is served, its certificate is for a name that others use, and may be known to nobody here.
        url = f"unix:{Home(settings.home_path).control_socket}" if local.cert_file else local.url
        settings = msgspec.structs.replace(settings, worker=msgspec.structs.replace(settings.worker, manager_url=url))
    os.environ.update(to_environ(settings), SPT_NOENV="1")
    try:
        run(settings)
    except StartupError as error:
        fail(error.reason, error.hint)
    except OSError as error:
        fail(str(error), "docs/operations.md lists what a worker needs.")


@app.command("register")
def register_command(
    alias: Annotated[str | None, typer.Argument(help="The name clients send as `model`.")] = None,
    model_name: Annotated[str | None, typer.Argument(help="Hub name or local path.")] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="A JSON body to register, - for stdin.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any field: name=value, value as JSON or text.")
    ] = None,
    engine_arg: Annotated[list[str] | None, typer.Option(help="A vLLM argument: name=value.")] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Tokens.")] = None,
    gpu_memory_gb: Annotated[float | None, typer.Option(help="GB of each device for it.")] = None,
    min_replicas: Annotated[int | None, typer.Option(help="Replicas to keep.")] = None,
    fake: Annotated[bool, typer.Option("--fake", help="Use the fake engine.")] = False,
    wait_: Annotated[
        bool, typer.Option("--wait", help="Wait until all its replicas are ready, or it has failed.")
    ] = False,
    timeout: Annotated[float | None, typer.Option(min=0, help="Wait so many seconds at most.")] = None,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Register a model; it is started, and stays registered until it is removed."""
    if timeout is not None and not wait_:
        fail("--timeout says how long to --wait; give both.", code=2)
    if model_name is not None and model_name.startswith((".", "~")):
        model_name = str(Path(model_name).expanduser().absolute())  # relative to whoever types it, not to the worker
    body = _body_from(file)
    given: dict[str, Any] = {
        "alias": alias,
        "model_name": model_name,
        "max_model_len": max_model_len,
        "min_replicas": min_replicas,
    }
    given |= {"gpu_memory_gb": gpu_memory_gb, "fake": fake or None}
    body |= {name: value for name, value in given.items() if value is not None}
    body |= dict(_assignment(text) for text in set_ or [])
    if engine_arg:
        body["engine_args"] = {**body.get("engine_args", {}), **dict(_assignment(text) for text in engine_arg)}
    with _client(url) as client:
        view = client.register(body)
        if wait_:
            view = _waited(client, view.alias, timeout, quiet=json)
    failed = wait_ and not is_ready(view)
    if json or not failed:
        _print(view, json, lambda: models_table([view]))
    if failed and json:
        raise typer.Exit(1)
    if failed:
        fail(
            f"{view.alias} is not ready: {view.reason}",
            f"It stays registered; `{program()} rm {view.alias}` removes it."
            + (f" `{program()} logs {view.alias}` may say more." if view.instances else ""),
        )


@app.command("set")
def set_command(
    alias: str,
    settings: Annotated[
        list[str], typer.Argument(metavar="NAME=VALUE...", help="min_replicas=1, pinned=true; null for the default.")
    ],
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Change settings of a model while it runs: replicas, pinned, preload, capacity, thresholds, idle times."""
    change = dict(_assignment(text) for text in settings)
    with _client(url) as client:
        view = client.change(alias, change)
    _print(view, json, lambda: models_table([view]))


@app.command("rm")
def remove_command(alias: str, url: UrlOption = None, json: JsonOption = False) -> None:
    """Remove a model: it takes no new requests, finishes those it has, and ends."""
    with _client(url) as client:
        client.remove(alias)
    _print({"removed": alias}, json, lambda: f"removed {alias}")


@app.command("apply")
def apply_command(
    file: FileOption,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    prune: Annotated[bool, typer.Option("--prune", help="Remove models that the file does not name.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove and register again what cannot change while it runs.")
    ] = False,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Make the pool's models those of a file. What is to be done is shown first; twice does nothing."""
    wanted = _read(lambda: read_models(_text_of(file), str(file)))
    with _client(url) as client:
        steps = plan(client.specs(), wanted, prune=prune)
        _print_plan(steps, json)
        if fixed := [step for step in steps if step.kind == "replace" and not replace]:
            names = ", ".join(each.field for each in fixed[0].differences if each.field not in CHANGEABLE)
            fail(
                f"{fixed[0].alias} cannot change in {names} while it runs; nothing was done",
                "With --replace it is removed and registered again, and answers nothing until it has started.",
            )
        if steps and not yes and not _confirmed():
            fail("nothing was done.", "Say --yes where nobody can be asked.")
        for step in steps:
            _take(client, step)
            if not json:
                Console(stderr=True).print(f"[dim]{step.kind} {escape(step.alias)}: done[/]", highlight=False)


@app.command("diff")
def diff_command(
    file: FileOption,
    prune: Annotated[bool, typer.Option("--prune", help="Also models that the file does not name.")] = False,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Show what `apply` would do. Ends with status 1 if that is anything, and with 2 if it cannot be said."""
    wanted = _read(lambda: read_models(_text_of(file), str(file)))
    with _client(url, code=2) as client:
        steps = plan(client.specs(), wanted, prune=prune)
    _print_plan(steps, json)
    if steps:
        raise typer.Exit(1)


@app.command("dump")
def dump_command(
    models: Annotated[bool, typer.Option("--models", help="Models only, as `apply` takes them.")] = False,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Print all models and keys, for `load`. Of keys the digests only: their secrets are nowhere."""
    with _client(url) as client:
        dump = client.dump()
    value = msgspec.to_builtins({"models": [each.spec for each in dump.models]} if models else dump)
    if json:
        _print_json(value)
    else:
        print(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), end="")


@app.command("load")
def load_command(
    file: Annotated[Path, typer.Argument(help="What `dump` printed; - for stdin.")],
    restore: Annotated[
        bool, typer.Option("--restore", help="An empty pool becomes the dumped one, and takes its workers.")
    ] = False,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Add what was dumped: all of it, or nothing where something of it is there and differs."""
    dump = _read(lambda: read_as(_text_of(file), str(file), Dump))
    with _client(url) as client:
        loaded = client.load(dump, restore=restore)
    _print(loaded, json, lambda: f"loaded {len(loaded.models)} models and {len(loaded.keys)} keys")


@app.command("ls")
def list_command(url: UrlOption = None, json: JsonOption = False) -> None:
    """List the registered models, whatever runs."""
    with _client(url) as client:
        models = client.status().models
    _print(
        models, json, lambda: models_table(models) if models else "No model is registered: see `modelpool register`."
    )


@app.command("status")
def status_command(url: UrlOption = None, json: JsonOption = False) -> None:
    """Show models, instances and workers."""
    with _client(url) as client:
        status, local = client.status(), client.local
    if json:
        _print_json(status)
        return
    console = Console()
    console.print(status_line(status), highlight=False, soft_wrap=True)
    for table in (models_table(status.models), instances_table(status.models), workers_table(status.workers)):
        if table.row_count:
            console.print()
            console.print(table, soft_wrap=True)
    if local is not None and local.pid:
        console.print(f"\n[dim]`kill {local.pid}` ends this pool, as Ctrl-C does where `up` runs.[/]", highlight=False)


@app.command("chat")
def chat_command(
    model: str,
    prompt: Annotated[
        str | None, typer.Argument(help="Ask this and end. Without it: what is piped in, or a conversation.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="The longest answer, in tokens.")] = None,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Talk to a model; the answer streams as it comes."""
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            fail("nothing was asked: standard input is empty.", "Give a prompt, or pipe one in.")
    if json and prompt is None:
        fail("--json needs a prompt.")
    with _client(url) as client:
        chat = Chat(client, model, max_tokens=max_tokens)
        if prompt is None:
            converse(chat, Console())
        elif json:
            _print_json({"model": model, "prompt": prompt, "answer": "".join(chat.ask(prompt))})
        else:
            say(chat, prompt, Console())


@app.command("explain")
def explain_command(
    what: Annotated[str, typer.Argument(help="The X-Request-Id of a recent request, or the alias of a model.")],
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Say what was decided for a recent request, or is to become of a model, and why."""
    with _client(url) as client:
        model = next((each for each in client.status().models if each.alias == what), None)
        if model is not None:
            _explain_model(model, json)
            return
        try:
            explanation = client.explain(what)
        except Trouble as trouble:
            if trouble.code == "request_not_known":
                fail(f"No model has the alias `{what}`. {trouble.message}", trouble.hint)
            raise
    if json:
        _print_json(explanation)
        return
    console = Console()
    for sentence in explanation.words:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    if explanation.considered:
        console.print()
        console.print(considered_table(explanation.considered), soft_wrap=True)


def _explain_model(model: ModelView, json: bool) -> None:
    if json:
        fields = ("alias", "state", "reason", "wanted", "decision", "due_s", "outlook", "learned")
        _print_json({name: getattr(model, name) for name in fields})
        return
    console = Console()
    console.print(now_line(model), markup=False, highlight=False, soft_wrap=True)
    for sentence in model.outlook:
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    if model.learned:
        console.print()
        console.print(learned_table(model.learned), soft_wrap=True)


@app.command("explain-start")
def explain_start_command(alias: str, url: UrlOption = None, json: JsonOption = False) -> None:
    """Show where the time of a model's last start went, by phase, for each of its instances."""
    with _client(url) as client:
        model = client.model(alias)
    started = [each for each in model.instances if each.phases]
    if json:
        _print_json(
            [{"instance": each.instance, "worker_id": each.worker_id, "phases": each.phases} for each in started]
        )
        return
    if not started:
        fail(f"no instance of {alias} has started: it is {model.state}" + (f", {model.reason}" if model.reason else ""))
    console = Console()
    for number, each in enumerate(started):
        if number:
            console.print()
        console.print(f"{each.instance} on {each.worker_id}", markup=False, highlight=False, soft_wrap=True)
        console.print(phases_table(each), soft_wrap=True)


@app.command("record")
def record_command(
    trace: Annotated[Path, typer.Argument(help="The CSV file to write; what models cost goes beside it.")],
    for_: Annotated[str, typer.Option("--for", help="How long: 90s, 10m, 2h.")] = "10m",
    url: UrlOption = None,
) -> None:
    """Write what requests a pool finishes, and when, to a trace for `simulate`; nothing of what they say."""
    try:
        for_s = seconds_of(for_)
    except ValueError:
        fail(f"--for={for_!r} is no time such as 90s, 10m or 2h.", code=2)
    count, missed = 0, False
    with _client(url) as client, writing(trace) as file:
        write_trace(file, ())
        try:
            for arrivals, some_missed in recorded(client, for_s):
                write_rows(file, arrivals)
                count, missed = count + len(arrivals), missed or some_missed
        except KeyboardInterrupt:
            pass
        status = client.status()
        write_scenario(trace.with_suffix(SCENARIO_SUFFIX), scenario_of_pool(status.models, status.workers))
    print(f"{count:,} requests in {trace}, what their models cost in {trace.with_suffix(SCENARIO_SUFFIX)}")
    if missed:
        report("more requests came than the gateway remembers: some are not in it")


@app.command("simulate")
def simulate_command(
    trace: Annotated[Path | None, typer.Argument(help="Arrivals: our CSV, Azure's, or Mooncake's JSON lines.")] = None,
    policy: Annotated[
        list[Named] | None, typer.Option("--policy", help="Several may be compared; the first is ladder, by default.")
    ] = None,
    scenario: Annotated[
        Path | None, typer.Option(help="Workers, models and costs (YAML); else NAME.pool.yaml beside NAME.csv.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="A setting: models.idle_sleep_1_s=60.")] = None,
    models: Annotated[int, typer.Option(min=1, help="Where the trace names none: spread it over so many.")] = 10,
    skew: Annotated[float, typer.Option(min=0, help="How uneven, by Zipf's law.")] = 1.0,
    rate: Annotated[float, typer.Option(min=0.001, help="Without a trace: requests a second.")] = 1.0,
    minutes: Annotated[float, typer.Option(min=0.1, help="Without a trace: how long.")] = 60.0,
    daily: Annotated[float, typer.Option(min=0, max=1, help="Without a trace: how far a day swings.")] = 0.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same figures.")] = 0,
    svg: Annotated[Path | None, typer.Option(help="Write a picture there.")] = None,
    config: ConfigOption = None,
    json: JsonOption = False,
) -> None:
    """Play arrivals to the controller in virtual time, and print what it would make of them."""
    settings = _settings(config, dict(_assignment(text) for text in set_ or []))
    try:
        world = scenario_of(trace, scenario)
        if trace is None:
            arrivals = generate(
                models=models, seconds=minutes * 60, rate=rate, skew=skew, daily=daily, day_s=minutes * 60, seed=seed
            )
        else:
            arrivals = arrivals_of(trace, models=models, skew=skew, seed=seed)
    except (TraceError, ScenarioError) as error:
        fail(str(error), "docs/simulator.md describes the files.", code=2)
    if not arrivals:
        fail("no request comes in that time; give more --minutes, or a higher --rate.", code=2)
    found = simulated(arrivals, world, settings, policy or [Named.LADDER], seed=seed)
    if svg is not None:
        svg.write_text(picture(found))
    _print(found, json, lambda: figures_table(found))
    if not json:
        for line in refusals(found):
            print(line)


@app.command("logs")
def logs_command(
    alias: Annotated[str, typer.Argument(help="A model, or one of its instances (`alias-r2`).")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as it grows.")] = False,
    tail: Annotated[int, typer.Option("--tail", "-n", help="So many last lines.")] = 200,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Show the log of a model's instance, also when it is dead."""
    if json and follow:
        fail("--json shows what there is; leave out --follow.")
    with _client(url) as client, client.logs(alias, tail=tail, follow=follow) as pieces:
        if json:
            _print_json({"alias": alias, "lines": "".join(pieces).splitlines()})
            return
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()


@keys_app.command("create")
def create_key_command(
    name: Annotated[str, typer.Argument(help="Whose it is.")],
    model: Annotated[
        list[str] | None, typer.Option("--model", help="It may use this alias; all, if none is given.")
    ] = None,
    rpm: Annotated[int | None, typer.Option("--rpm", help="Requests per minute.")] = None,
    tpm: Annotated[int | None, typer.Option("--tpm", help="Tokens per minute.")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", help="Requests at once.")] = None,
    priority: Annotated[int, typer.Option("--priority", help="The higher, the sooner its requests leave a queue.")] = 0,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Make a key. Its secret is shown now and never again; from the first key on, nobody is served without one."""
    body = {
        "name": name,
        "models": model or [],
        "requests_per_minute": rpm,
        "tokens_per_minute": tpm,
        "max_concurrency": concurrency,
        "priority": priority,
    }
    with _client(url) as client:
        made = client.make_key(body)
    if json:
        _print_json(made)
        return
    print(made.secret)
    Console(stderr=True).print(
        f"[dim]The key {made.key.id} of {escape(name)}. Keep its secret: it is shown only now.[/]", highlight=False
    )


@keys_app.command("ls")
def list_keys_command(
    all_: Annotated[bool, typer.Option("--all", help="Those that were revoked, too.")] = False,
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """List the keys and what each may do."""
    with _client(url) as client:
        made = client.keys()
    keys = [key for key in made if all_ or key.revoked is None]
    _print(keys, json, lambda: keys_table(keys) if keys else f"No key is there: see `{program()} keys create`.")


@keys_app.command("revoke")
def revoke_key_command(
    key: Annotated[str, typer.Argument(help="Its id, or the name of a live one.")],
    url: UrlOption = None,
    json: JsonOption = False,
) -> None:
    """Revoke a key: no new request of it is served; what runs is let finish."""
    with _client(url) as client:
        revoked = client.revoke_key(key)
    _print(revoked, json, lambda: f"revoked {revoked.id} ({escape(revoked.name)})")


def _settings(config: Path | None, flags: dict[str, Any]) -> Settings:
    environ = dict(os.environ)
    environ.setdefault("MODELPOOL_RUN_ID", secrets.token_hex(8))
    try:
        return load(environ, file=config, flags=flags)
    except SettingsError as error:
        fail(str(error), "docs/operations.md lists the settings.", code=2)


@contextmanager
def _client(url: str | None, *, code: int = 1) -> Iterator[PoolClient]:
    """A client of the pool; what goes wrong with it ends the command with a sentence, and this status."""
    try:
        client = PoolClient(_settings(None, {}), url)
        try:
            yield client
        finally:
            client.close()
    except Trouble as trouble:
        fail(trouble.message, trouble.hint, code=code)


def _waited(client: PoolClient, alias: str, timeout_s: float | None, *, quiet: bool) -> ModelView:
    """The model after waiting for it, telling on the way what it is at."""
    console = Console(quiet=quiet)
    try:
        return wait(
            client,
            alias,
            lambda line: console.print(f"[dim]{escape(f'{alias}: {line}')}[/]", highlight=False, soft_wrap=True),
            timeout_s=timeout_s,
        )
    except KeyboardInterrupt:
        console.print(f"No longer waited for; {alias} stays registered.", highlight=False)
        raise typer.Exit(_INTERRUPTED) from None


def _body_from(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        text = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return msgspec.json.decode(text, type=dict[str, Any])
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}.")
    except msgspec.DecodeError as error:
        fail(f"{file} is not a JSON object: {error}.")


def _text_of(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text()
    except OSError as error:
        fail(f"{file} cannot be read: {error.strerror}.", code=2)
    except UnicodeDecodeError as error:
        fail(f"{file} is no text: {error}.", code=2)


def _read(read: Callable[[], T]) -> T:
    """What a file says; what is wrong in it ends the command before anything was done."""
    try:
        return read()
    except BadFile as error:
        fail(str(error), code=2)


def _print_plan(steps: list[Step], json: bool) -> None:
    shown = "\n".join(lines(steps)) or "Nothing is to be done."
    _print(steps, json, lambda: escape(shown))


def _confirmed() -> bool:
    return sys.stdin.isatty() and typer.confirm("Do this?")


def _take(client: PoolClient, step: Step) -> None:
    if step.kind in ("remove", "replace"):
        client.remove(step.alias)
    if step.kind == "change":
        client.change(step.alias, patch(step))
    elif step.spec is not None:
        client.register(msgspec.to_builtins(step.spec))


def _assignment(text: str) -> tuple[str, Any]:
    """`name=value`, the value as JSON where it is JSON, else as text."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        fail(f"{text!r} is not of the form name=value.", code=2)
    try:
        return name, msgspec.json.decode(value)
    except msgspec.DecodeError:
        return name, value


def _print(value: object, as_json: bool, shown: Callable[[], Any]) -> None:
    if as_json:
        _print_json(value)
    else:
        Console().print(shown(), highlight=False, soft_wrap=True)


def _print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _leaf(error: BaseException) -> BaseException:
    """The first error inside a group, or group of groups; the error itself where it is none."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
