"""The commands of `rlhf constitution`: run it all, and look at the principles."""

from typing import Annotated

import typer

from rlhf_core.errors import ResourceError
from tasks import preflight
from tasks.pipeline import find_root

HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(rich_markup_mode="markdown", pretty_exceptions_enable=False, context_settings=HELP)
STAGES = ("prepare", "constitution", "sft", "principles", "reward", "ppo", "dpo", "evaluate", "safety")


@app.callback(invoke_without_command=True)
def about(context: typer.Context) -> None:
    """Let a policy criticise and revise its own answers by the principles of constitution.yaml, and learn from that.

    - `rlhf constitution run` does it all, and ends with rates before and after, and a page with the chains
    - `rlhf constitution check` says whether constitution.yaml can be used, and how often each principle is drawn
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def run(
    name: Annotated[str, typer.Argument(metavar="CAMPAIGN", help="Its workspace is .rlhf/CAMPAIGN.")] = "constitution",
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME", help="Begin with recipes/NAME.yaml, such as: tiny")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-S", metavar="SECTION.KEY=VALUE", help="Begin with another value of params.yaml."),
    ] = None,
    then: Annotated[
        list[str] | None,
        typer.Option(
            "--then",
            "-T",
            metavar="SECTION.KEY=VALUE",
            help="Begin with another value for the second part alone: the SFT policy before is not trained with it.",
        ),
    ] = None,
    until: Annotated[str, typer.Option(metavar="STAGE", help="Stop after it: " + ", ".join(STAGES))] = "safety",
) -> None:
    """Red-team prompts → answers → critiques → revisions → SFT → comparisons by principle → reward → ppo → rates.

    What the project has computed already is taken over. A run that was stopped goes on at the stage where it was.

    - `rlhf constitution run --recipe tiny` tries it all in some minutes, with a random model
    - `rlhf constitution run scripted -S constitution.critic=script:careful -S constitution.annotator=script:careful`
    - `rlhf constitution run ai -S constitution.critic=judge` lets the chat endpoint of section judge write
    """
    if until not in STAGES:
        raise typer.BadParameter(f"Found STAGE {until!r}, expected one of {', '.join(STAGES)}.")
    project = find_root()
    if missing := preflight.problems(str(project), light=bool(recipe)):
        raise ResourceError("\n".join(missing))
    from flows.server import use_server

    use_server(project)
    from flows.constitution import constitution

    constitution(name=name, recipe=recipe, overrides=overrides or [], then=then or [], until=until)


@app.command()
def check(
    file: Annotated[
        str | None, typer.Argument(metavar="FILE", help="A file of principles; params.yaml's if not given.")
    ] = None,
) -> None:
    """Check a file of principles, and tell how often each is drawn."""
    from rlhf_core.config import load_params
    from rlhf_core.constitution import load_principles

    root = find_root()
    path = file or root / load_params(root / "params.yaml").constitution.principles
    principles = load_principles(path)
    total = sum(principle.weight for principle in principles)
    width = max(len(principle.id) for principle in principles)
    for principle in principles:
        typer.echo(
            f"{principle.id:<{width}}  {principle.theme:<12}  {principle.weight / total:6.1%}  {principle.question}"
        )
    typer.echo(f"{len(principles)} principles. They can be used.")
