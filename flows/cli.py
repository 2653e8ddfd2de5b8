"""The console script `rlhf`: run, look, compare, talk.

Imports of the tools stand inside the commands, so that `rlhf --help` answers at once.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from flows import campaigns, constitutions, feedback, judge
from flows.listening import require_free, warn_if_public
from rlhf_core.errors import ResourceError, RLHFError
from tasks import preflight
from tasks.environment import record_folder
from tasks.pipeline import STAGES, apply_overrides, find_root, run_stage, serving_lock, workspace_lock

if TYPE_CHECKING:
    from flows.rlhf import Stage

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(feedback.app, name="feedback")
app.command("judge-check")(judge.judge_check)
app.add_typer(campaigns.app, name="online")
app.add_typer(constitutions.app, name="constitution")

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-S", metavar="SECTION.KEY=VALUE", help="Change a value of params.yaml first. Repeatable."),
]
Recipe = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Run recipes/NAME.yaml in its own workspace, .rlhf/NAME, such as: tiny"),
]
InRecipe = Annotated[
    str | None, typer.Option(metavar="NAME", help="In the recipe's workspace, .rlhf/NAME, such as: tiny")
]
RunName = Annotated[str | None, typer.Option(help="What the run is called in MLflow.")]
Fresh = Annotated[
    bool, typer.Option("--fresh", help="Start a stage that was stopped from its beginning, not from its checkpoint.")
]
Host = Annotated[str, typer.Option(help="Address to listen on. 127.0.0.1 is this machine only.")]
STAGE_NAMES = ", ".join(STAGES)


@app.callback()
def about() -> None:
    """Trains a language model from human preferences: **prepare → sft → reward → ppo → dpo → evaluate → people**.

    Every value stands in params.yaml. DVC decides which stages have to run, Prefect runs them, MLflow records them.

    A first hour:

    - `rlhf run --recipe tiny` takes a random two-layer model through all stages, in about a minute
    - `rlhf run` does it with the real model, and prints base, SFT and PPO side by side
    - `rlhf chat ppo` lets you talk to the result
    - `rlhf run -S ppo.kl_coef=0.1` changes one value and runs only what hangs on it
    - `rlhf compare HEAD` shows what that changed, and `rlhf ui` opens all runs in MLflow
    - `rlhf frontier` places PPO beside DPO and best-of-n, over all runs
    - `rlhf sweep` weighs two axes against each other, such as helpful and harmless, and draws what can be had of both
    - `rlhf people` asks people: is PPO better than SFT? Their word stands in the report beside the gold model's
    - `rlhf feedback` lets people judge all sorts: which responses are best, what a model should have said
    - `rlhf judge-check` says how far a model could judge in their place
    - `rlhf online` learns on from what they say, in rounds
    - `rlhf constitution` lets the policy revise its own answers by principles
    """


@app.command()
def run(
    overrides: Overrides = None,
    until: Annotated[str, typer.Option(metavar="STAGE", help=f"Stop after this stage: {STAGE_NAMES}.")] = STAGES[-1],
    force: Annotated[bool, typer.Option("--force", help="Run every stage even if nothing changed.")] = False,
    fresh: Fresh = False,
    name: RunName = None,
    retries: Annotated[int, typer.Option(min=0, max=10, help="How often a stage that crashed is started again.")] = 1,
    recipe: Recipe = None,
) -> None:
    """Bring all stages up to date, as one Prefect flow run.

    Stages in which nothing changed are not run again. A run that was stopped, however hard, goes on where it was when
    it is started again: finished stages are kept, and training continues from its last checkpoint.

    - `rlhf run -S ppo.kl_coef=0.1 -S ppo.updates=60 --name low-kl`
    - `rlhf run --until reward`
    """
    last = _stage(until)
    _begin(recipe)
    from flows.rlhf import rlhf

    rlhf(overrides=overrides or [], until=last, force=force, fresh=fresh, run_name=name, retries=retries)


@app.command()
def people(
    overrides: Overrides = None,
    hours: campaigns.Hours = 72.0,
    judgements: campaigns.Judgements = None,
    overlap: campaigns.Overlap = 1,
    address: campaigns.Address = None,
    guideline: Annotated[
        str | None, typer.Option(metavar="FILE", help="What people judge by, in Markdown; the one that ships if none.")
    ] = None,
    port: campaigns.PagesPort = 8000,
    name: RunName = None,
    recipe: Recipe = None,
) -> None:
    """Have people compare held-out answers of two policies, blind, and put their word beside the gold model's.

    Brings all stages up to date first, as `rlhf run` does. Then it prints where to judge, one pair a prompt, and the
    run is paused on Prefect's pages (`rlhf prefect-ui`). It goes on when all are judged, when `--judgements` are, or
    after `--hours`; Ctrl-C and later the same command goes on where it was. The report and MLflow then have people's
    win rate, and how far they and the gold model agree. Whose answers says params.yaml's `people.policies`.

    - `rlhf people --hours 24 --overlap 2` has two people judge each pair, for a day at most
    - `rlhf people -S people.policies=[ppo,base]`
    """
    guideline = guideline and str(Path(guideline).resolve())  # _begin changes the folder
    _begin(recipe)
    from flows.people import Waiting
    from flows.rlhf import rlhf

    waiting = Waiting(
        judgements=judgements, overlap=overlap, hours=hours, address=address, guideline=guideline, port=port
    )
    rlhf(overrides=overrides or [], run_name=name, people=waiting)


@app.command()
def stage(
    name: Annotated[str, typer.Argument(metavar="STAGE", help=f"One of {STAGE_NAMES}.")],
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Run it even if nothing changed.")] = False,
    fresh: Fresh = False,
) -> None:
    """Bring one stage up to date through DVC, without Prefect. The stages before it are left as they are.

    - `rlhf stage evaluate --force`
    """
    _stage(name)
    root = find_root()
    from tasks.stage import check_disk, forget_checkpoints

    with workspace_lock(root):
        check_disk(root)
        apply_overrides(overrides or [], root=root)
        if fresh:
            forget_checkpoints([name])
        outcome = run_stage(name, force=force, root=root)
    typer.echo(f"{name}: {outcome.value}")


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 5000,
    host: Host = "127.0.0.1",
) -> None:
    """Serve MLflow's pages: every run, its curves, its data versions. Ctrl-C ends it.

    To compare two runs, tick them in the table and press Compare.
    """
    find_root()
    from tasks.tracking import connect, tracking_uri

    warn_if_public(host)
    uri = tracking_uri()
    if uri.startswith(("http://", "https://")):
        typer.echo(f"Runs are recorded by the MLflow server at {uri}; open that.")
        return
    connect()  # makes the database ready
    artifacts = record_folder() / "mlartifacts"
    command = ["mlflow", "server", "--backend-store-uri", uri, "--artifacts-destination", artifacts.as_uri(),
               "--host", host, "--port", str(port), "--workers", "1"]  # fmt: skip
    require_free(host, port, "rlhf ui")
    typer.echo(f"MLflow: http://{host}:{port}   (Ctrl-C ends it)")
    _exec(command)


@app.command("prefect-ui")
def prefect_ui(
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 4200,
    host: Host = "127.0.0.1",
) -> None:
    """Serve Prefect's pages: flow runs, their logs, schedules. Ctrl-C ends it.

    While it runs, `rlhf run` uses this server in place of a temporary one, which saves some seconds.
    """
    root = find_root()
    from flows.server import prepare_prefect, record_address, running_server

    home = prepare_prefect(root)
    if address := running_server(home):
        typer.echo(f"Prefect already runs: {address.removesuffix('/api')}")
        return
    warn_if_public(host)
    require_free(host, port, "rlhf prefect-ui")
    record_address(home, host, port)
    typer.echo(f"Prefect: http://{host}:{port}   (Ctrl-C ends it)")
    _exec(["prefect", "server", "start", "--host", host, "--port", str(port), "--log-level", "WARNING"])


@app.command()
def serve(
    cron: Annotated[
        str | None, typer.Option(help='When to start a run by itself, such as "0 3 * * *": every night at three.')
    ] = None,
    overrides: Overrides = None,
    name: Annotated[str, typer.Option(help="Name of the deployment.")] = "served",
    port: Annotated[int, typer.Option(help="Port of the server that is started if none answers.")] = 4200,
) -> None:
    """Wait for scheduled runs, and for runs started on Prefect's pages, and run them here. Ctrl-C ends it.

    For a machine with no work pool. With one, use `prefect deploy --all` and `prefect worker start`; see prefect.yaml.

    - `rlhf serve --cron "0 3 * * *"`
    - `rlhf serve --cron "0 3 * * *" -S ppo.updates=60`
    """
    root = find_root()
    os.chdir(root)  # runs start in the folder that the server was told
    apply_overrides(overrides or [], root=root, keep=False)  # a wrong one would be told every night, to nobody
    from flows.server import check_schedule, use_lasting_server

    with serving_lock(root, f"rlhf/{name}"):
        address = use_lasting_server(root, "rlhf serve", port=port, meanwhile=lambda: check_schedule(cron))
        from flows.rlhf import rlhf

        typer.echo(f"Prefect: {address.removesuffix('/api')}   (Ctrl-C ends it)")
        rlhf.serve(name=name, cron=cron, limit=1, parameters={"overrides": overrides} if overrides else None)


@app.command()
def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A run's name or id, a git revision, or: workspace")],
    second: Annotated[str, typer.Argument(metavar="B", help="The same.")] = "workspace",
    recipe: InRecipe = None,
) -> None:
    """Two runs as a table: the parameters and data versions that differ, and every metric.

    - `rlhf compare low-kl high-kl` compares two runs by the names they were given
    - `rlhf compare HEAD` compares the last commit with what lies on disk
    - `rlhf compare low-kl high-kl --recipe tiny` compares two runs of a recipe
    """
    root = find_root()
    from flows.recipe import workspace_of

    os.chdir(workspace_of(recipe, root))
    from tasks.compare import compare as compare_runs

    typer.echo(compare_runs(first, second))


@app.command()
def frontier(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[RUN|REV]...", help="As `rlhf compare` takes them; all runs if none.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The page, with a CSV file beside it; .rlhf/frontier.html.")
    ] = None,
) -> None:
    """Draw what PPO, DPO and best-of-n of all runs reach over how far they went: reward over √KL on one page.

    Runs that were judged by other reward models, or on other prompts, stand apart. Nothing is recorded.

    - `rlhf frontier` takes every recorded run, and what lies on disk
    - `rlhf frontier HEAD low-kl high-kl`
    """
    page = out or record_folder(find_root()) / "frontier.html"
    from rlhf_core.frontier import on_frontier
    from tasks.frontier import frontier as write_frontier

    for group in write_frontier(names or [], page):
        best = on_frontier(group.points, "gold_reward")
        typer.echo(f"{len(group.points)} points, of which by gold reward and KL none beats these:")
        for point, on in sorted(zip(group.points, best, strict=True), key=lambda pair: pair[0].kl):
            if on:
                typer.echo(f"  {point.method:<10} {point.gold_reward:6.2f} at {point.kl:5.1f} nats  {point.run}")
    typer.echo(f"Page: {page}   numbers: {page.with_suffix('.csv')}")


@app.command()
def sweep(
    name: Annotated[str, typer.Argument(metavar="SWEEP", help="Its shared workspace is .rlhf/SWEEP.")] = "sweep",
    axes: Annotated[
        str, typer.Option(metavar="A,B", help="The two axes of the rankings' scores that the frontier is over.")
    ] = "",
    weights: Annotated[
        str, typer.Option(metavar="W,W,…", help="A point each: B weighs this, A the rest up to 1. From 0 to 1.")
    ] = "",
    limits: Annotated[
        str,
        typer.Option(metavar="D,D,…", help="A point each: A is climbed while the mean cost, minus B, is at most this."),
    ] = "",
    recipe: Annotated[str | None, typer.Option(metavar="NAME", help="Begin with recipes/NAME.yaml.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-S", metavar="SECTION.KEY=VALUE", help="Begin with another value of params.yaml."),
    ] = None,
    drop: Annotated[
        str, typer.Option(metavar="POINT,…", help="Go on without these points, such as: weight-0.25,limit--0.3")
    ] = "",
) -> None:
    """Run the pipeline at several weights or limits of two axes, and draw one Pareto frontier.

    Each point is a run in a workspace of its own and in MLflow. A sweep that was stopped, or that had points which
    failed, goes on when it is started again; points that are done are Cached, and new weights or limits come on top.

    - `rlhf sweep safety --axes helpfulness,harmlessness --weights 0,0.25,0.5,0.75,1 --limits=-0.3`
    - `rlhf sweep safety --limits=-0.6` adds a point, and `rlhf sweep safety --drop limit--0.6` takes it out again
    """
    project = find_root()
    if missing := preflight.problems(str(project), light=bool(recipe)):
        raise ResourceError("\n".join(missing))
    shares = _numbers("--weights", weights)
    if any(not 0 <= share <= 1 for share in shares):
        _usage(f"Found --weights {weights}, expected numbers from 0 to 1.")
    limited = _numbers("--limits", limits)
    from flows.server import use_server

    use_server(project)
    from flows.frontier import sweep as run_sweep

    run_sweep(
        name=name, axes=_words(axes), weights=shares, limits=limited, recipe=recipe, overrides=overrides or [],
        drop=_words(drop),
    )  # fmt: skip


@app.command()
def chat(
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="Whose policy answers: base, sft, ppo or dpo.")],
    temperature: Annotated[float | None, typer.Option(min=0.01, help="As in evaluate if not given.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; as in evaluate if not given.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed and turns give the same answers.")] = 0,
    recipe: InRecipe = None,
) -> None:
    """Talk to a stage's policy in the terminal.

    - `rlhf chat sft`
    """
    root = find_root()
    from flows.chat import FOLDERS
    from flows.chat import chat as talk
    from flows.recipe import workspace_of

    if stage not in FOLDERS:
        _usage(f"Found STAGE {stage!r}, expected one of {', '.join(FOLDERS)}.")
    os.chdir(workspace_of(recipe, root))
    talk(stage, temperature=temperature, tokens=tokens, seed=seed)


@app.command()
def sync() -> None:
    """Send MLflow what it missed while its server was away, from all recipes, campaigns and sweeps too."""
    find_root()
    from tasks.tracking import outboxes, sync_outbox

    sent, left = map(sum, zip(*(sync_outbox(outbox=folder) for folder in outboxes()), strict=True))
    typer.echo(f"{sent} sent, {left} left." if sent or left else "Nothing is waiting.")
    if left:
        raise typer.Exit(1)


def main() -> None:
    """Entry point: every error that a user can mend is one message and exit code 1."""
    # A shell starts background jobs with SIGINT ignored; `kill -INT` shall stop a run all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that servers are stopped too
    try:
        app()
    except RLHFError as error:
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
    except KeyboardInterrupt:
        typer.echo("Stopped.", err=True)
        sys.exit(130)


def _begin(recipe: str | None) -> None:
    """Before a run: tell what the machine lacks, go to the recipe's workspace, and have a server."""
    project = find_root()
    if missing := preflight.problems(str(project), light=bool(recipe)):
        raise ResourceError("\n".join(missing))
    from flows.server import use_server

    if recipe:
        _enter_recipe(recipe, project)
    use_server(project, meanwhile=_load_tools)


def _enter_recipe(recipe: str, project: Path) -> None:
    """Work in the recipe's workspace."""
    from flows.recipe import make_workspace

    folder = project / ".rlhf" / recipe
    make_workspace(recipe, folder, project=project)
    os.chdir(folder)


def _load_tools() -> None:
    """Prefect and MLflow take seconds to import, a new MLflow database some more: the time a server needs anyway."""
    import flows.rlhf  # noqa: F401
    from tasks.tracking import connect

    try:
        connect()
    except RLHFError:
        raise
    except Exception:  # noqa: S110  (a tracking server that is away stops no run; the tracker says so itself)
        pass


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        _usage(f"Found {option} {text}, expected numbers with commas between them, such as 0,0.5,1.")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _stage(name: str) -> "Stage":
    if name not in STAGES:
        _usage(f"Found STAGE {name!r}, expected one of {STAGE_NAMES}.")
    return cast("Stage", name)


def _usage(message: str) -> NoReturn:
    raise typer.BadParameter(message)


def _exec(command: list[str]) -> None:
    """Run a tool of this environment in the foreground; it ends with Ctrl-C."""
    from flows.server import stop

    env: dict[str, Any] = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen([sys.executable, "-m", *command], env=env, start_new_session=True)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        code = 0
    finally:
        stop(process)
    if code:
        raise typer.Exit(code)


if __name__ == "__main__":
    main()
