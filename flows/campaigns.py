"""The commands of `rlhf online`: run rounds, look at them, wait for a schedule."""

import os
from pathlib import Path
from typing import Annotated

import typer

from rlhf_core.errors import MissingArtifact, ResourceError
from tasks import preflight
from tasks.pipeline import find_root, serving_lock

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(rich_markup_mode="markdown", pretty_exceptions_enable=False, context_settings=HELP)
Name = Annotated[str, typer.Argument(metavar="CAMPAIGN", help="Its workspace is .rlhf/CAMPAIGN.")]
AnnotatorName = Annotated[
    str | None,
    typer.Option(
        metavar="WHO",
        help="Who judges: people, judge or ai (section judge of params.yaml), or a rule such as rule:short; "
        "preferences.annotator if not given.",
    ),
]
Recipe = Annotated[str | None, typer.Option(metavar="NAME", help="Begin with recipes/NAME.yaml, such as: tiny")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-S", metavar="SECTION.KEY=VALUE", help="Begin with another value of params.yaml."),
]
InRounds = Annotated[
    list[str] | None,
    typer.Option(
        "--in-rounds",
        "-R",
        metavar="SECTION.KEY=VALUE",
        help="Begin with another value for the rounds alone: round 0 stays what the project has computed already.",
    ),
]
Hours = Annotated[float, typer.Option(min=0.001, help="Go on after so many hours with what people have judged.")]
Judgements = Annotated[int | None, typer.Option(min=1, help="Go on after so many judgements; all items if not given.")]
Overlap = Annotated[int, typer.Option(min=1, max=20, help="How many people judge each item.")]
Address = Annotated[
    str | None,
    typer.Option(metavar="URL", help="Where people reach pages that you serve yourself with rlhf feedback."),
]
PagesPort = Annotated[int, typer.Option(help="Port of the pages for people, if you do not serve them.")]
Guideline = Annotated[
    str | None,
    typer.Option(
        metavar="FILE", help="What people judge by, in Markdown; what was given last, or the one that ships, if none."
    ),
]
Axes = Annotated[
    str,
    typer.Option(
        metavar="A,B", help="What people score each answer on too, from 1 to 5; reward.axes, or what was given last."
    ),
]


@app.callback(invoke_without_command=True)
def about(context: typer.Context) -> None:
    """Learn on from what people say of the policy's answers, in rounds.

    A round: the current policy answers prompts, somebody ranks the answers, the reward model and the policy go on
    learning, and a gate compares the new policy with the current one. It takes over only if it is better and within the
    limits of params.yaml's section gate.

    - `rlhf online run` runs a round with people, who judge on the pages it names; Ctrl-C and later again goes on
    - `rlhf online run --annotator rule:short --rounds 3` runs three with a rule, without anybody
    - `rlhf online status` tells what came of each round
    - `rlhf online serve --cron "0 18 * * 5"` begins a round every Friday evening
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    name: Name = "online",
    rounds: Annotated[int, typer.Option(min=0, help="How many rounds; one that was cut off counts.")] = 1,
    until: Annotated[
        int | None, typer.Option(min=0, help="Stop when this round is over, however many that are.")
    ] = None,
    annotator: AnnotatorName = None,
    recipe: Recipe = None,
    overrides: Overrides = None,
    in_rounds: InRounds = None,
    hours: Hours = 72.0,
    judgements: Judgements = None,
    overlap: Overlap = 1,
    address: Address = None,
    guideline: Guideline = None,
    axes: Axes = "",
    port: PagesPort = 8000,
) -> None:
    """Run rounds of a campaign; the first time also round 0, the pipeline itself.

    Whatever the project has computed already is taken over. A run that was stopped, however hard, goes on where it was
    when it is started again. While people judge, the run is paused on Prefect's pages (`rlhf prefect-ui`), with the
    count and the link; Resume there goes on with what there is.

    - `rlhf online run --recipe tiny --annotator rule:short` tries it all in some two minutes
    - `rlhf online run --hours 24 --judgements 200` waits a day, or for 200 judgements
    - `rlhf online run careful -S gate.max_kl=8 -S ppo.kl_coef=0.1` begins a campaign with other values
    - `rlhf online run more -R "reward.weights={human: 3}"` begins one with other values in its rounds alone
    """
    project = find_root()
    if missing := preflight.problems(str(project), light=bool(recipe)):
        raise ResourceError("\n".join(missing))
    from flows.server import use_server

    use_server(project)
    from flows.online import online
    from flows.people import Waiting

    waiting = Waiting(
        judgements=judgements, overlap=overlap, hours=hours, address=address, port=port,
        guideline=guideline, axes=_names(axes),
    )  # fmt: skip
    online(
        name=name, rounds=rounds, until=until, annotator=annotator, recipe=recipe, overrides=overrides or [],
        in_rounds=in_rounds or [], waiting=waiting,
    )  # fmt: skip


@app.command()
def status(name: Name = "online") -> None:
    """What came of each round, and which policy is the current one."""
    folder = find_root() / ".rlhf" / name
    if not (folder / "campaign.json").is_file():
        raise MissingArtifact(f"Found no campaign {name}. `rlhf online run {name}` begins one.")
    from flows.campaign import Campaign, words

    campaign = Campaign(name, folder)
    decisions = campaign.decisions()
    for decision in decisions:
        typer.echo(words(decision))
    if not decisions:
        typer.echo("Round 0, the pipeline itself, is not over yet.")
        return
    current = campaign.promoted()
    typer.echo(f"The current policy is {campaign.round_folder(current) / 'ppo/policy'}, of round {current}.")
    if campaign.under_way():
        typer.echo(f"Round {campaign.next_round()} is under way. `rlhf online run {name}` goes on with it.")


@app.command()
def serve(
    name: Name = "online",
    cron: Annotated[
        str | None, typer.Option(help='When a round begins by itself, such as "0 18 * * 5": Fridays at six.')
    ] = None,
    annotator: AnnotatorName = None,
    hours: Hours = 72.0,
    judgements: Judgements = None,
    overlap: Overlap = 1,
    address: Address = None,
    guideline: Guideline = None,
    axes: Axes = "",
    server_port: Annotated[int, typer.Option(help="Port of Prefect's server, started if none answers.")] = 4200,
) -> None:
    """Wait for scheduled rounds, and for those begun on Prefect's pages, and run them here. Ctrl-C ends it.

    - `rlhf online serve --cron "0 18 * * 5" --hours 60` asks people over the weekend
    """
    guideline = guideline and str(Path(guideline).resolve())
    root = find_root()
    os.chdir(root)  # runs start in the folder that the server was told
    from flows.server import check_schedule, use_lasting_server

    def check() -> None:  # what would fail at every round, with nobody to see it
        check_schedule(cron)
        from flows.online import PEOPLE, check_annotator

        check_annotator(annotator or PEOPLE)

    served = f"{name}-served"
    with serving_lock(root, f"online/{served}"):
        server = use_lasting_server(
            root, "rlhf online serve", port=server_port, option="--server-port", meanwhile=check
        )
        from flows.online import online
        from flows.people import Waiting

        typer.echo(f"Prefect: {server.removesuffix('/api')}   (Ctrl-C ends it)")
        waiting = Waiting(
            judgements=judgements, overlap=overlap, hours=hours, address=address, guideline=guideline,
            axes=_names(axes),
        )  # fmt: skip
        parameters = {"name": name, "annotator": annotator, "waiting": waiting.model_dump()}
        online.serve(name=served, cron=cron, limit=1, parameters=parameters)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
