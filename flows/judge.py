"""The command `rlhf judge-check`: how good a judge is, before anything is learned from it."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_core.errors import JudgeRefused
from tasks.environment import how_to_set, record_folder
from tasks.pipeline import apply_overrides, find_root

if TYPE_CHECKING:
    from rlhf_core.feedback.quality import Quality
    from rlhf_core.records import Ranking
    from rlhf_core.statistics import Interval


def judge_check(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE", help="Rankings, pairs or HH dialogues; the test split's rankings if not given."),
    ] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="At most so many; judge.check_pairs if not given.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", "-S", metavar="JUDGE.KEY=VALUE", help="Another value than params.yaml's, this once."),
    ] = None,
    recipe: Annotated[str | None, typer.Option(metavar="NAME", help="In the recipe's workspace, .rlhf/NAME.")] = None,
) -> None:
    """Let a judge judge pairs whose answer is known, and say how far it can be trusted.

    Each pair is shown in both orders. Exits with 1 where the judge misses the bar, judge.bar. What an endpoint says is
    kept in .rlhf/judge.db, so that nothing is paid for twice; its key is read from RLHF_JUDGE_KEY.

    - `rlhf judge-check` checks the judge of params.yaml
    - `rlhf judge-check -S judge.kind=reward -S judge.model=artifacts/reward/model`
    - `rlhf judge-check -S judge.kind=endpoint -S judge.url=http://127.0.0.1:8080/v1 -S judge.model=NAME`
    - `rlhf judge-check hh.jsonl --pairs 500`
    """
    root = find_root()
    if file and not file.startswith("hub:"):
        file = str(Path.cwd() / file)
    memory = record_folder(root) / "judge.db"
    from flows.recipe import workspace_of

    os.chdir(workspace_of(recipe, root))
    params = apply_overrides(overrides or [], root=Path.cwd(), keep=False)
    from rlhf_core.feedback.judges import open_judge, refusal
    from rlhf_core.feedback.quality import check_judge
    from tasks.progress import ProgressTracker

    rankings = _rankings(file)
    config = params.judge
    judge = open_judge(config, params.prepare, memory=memory, tracker=ProgressTracker("judge"))
    quality = check_judge(judge, rankings, pairs=pairs or config.check_pairs, seed=config.seed)
    counts: dict[str, float] = getattr(judge, "counts", dict)()
    typer.echo(table(judge.name, quality, cost=counts.get("cost")))
    if quality.agreement.low < config.bar:
        raise JudgeRefused(refusal(judge.name, quality, config.bar, how_to_set("judge", "bar", "0")))
    typer.echo(f"It may judge: the lower end of its agreement reaches judge.bar, {config.bar:.1%}.")


def _rankings(file: str | None) -> "Sequence[Ranking]":
    from rlhf_core.data import load_prepared, parse_ranking, read_rows
    from rlhf_core.errors import DataError

    if file is None:
        return load_prepared(Path("data/prepared"), "rankings", ["test"])
    rankings = []
    for line, row in read_rows(file, named_in="the command"):
        try:
            rankings.append(parse_ranking(row))
        except DataError as error:
            raise DataError(f"{file}, line {line}, {error}") from error
    return rankings


def table(name: str, quality: "Quality", *, cost: float | None) -> str:
    """What was found, a line a number, with its interval and what to compare it with."""
    found = quality
    lines = [
        ("agreement with the known answers", _share(found.agreement), "a tie counts half"),
        ("  the longest wins", _share(found.longest), "the judge leads by " + _points(found.lead)),
        ("  a coin", _share(found.coin), ""),
        ("decided", f"{found.decided:.1%}", "the rest are ties"),
        ("  agreement on those", _share(found.agreement_decided), ""),
    ]
    if found.disagreements is not None and found.first_chosen is not None and found.averaged is not None:
        lines += [
            ("orders that disagree", f"{found.disagreements:.1%}", "each is a tie"),
            ("chose what stood first", _share(found.first_chosen), "50 % is fair"),
            ("agreement if orders were averaged", _share(found.averaged), "not used"),
            ("without a valid answer", f"{found.unanswered:.1%}", "each is a tie"),
        ]
    lines += [
        ("chose the longer one", _share(found.longer_chosen), f"the longer one is better in {found.longer_better:.1%}"),
        ("same when asked again", f"{found.self_agreement:.1%}", ""),
    ]
    if cost is not None:
        lines.append(("cost", f"{cost:.4f}", "in the money of judge.prompt_price"))
    first, second = (max(len(line[column]) for line in lines) for column in (0, 1))
    shown = [f"{what:<{first}}  {value:<{second}}  {note}".rstrip() for what, value, note in lines]
    return "\n".join(
        [f"{name} on {found.pairs} pairs of {found.prompts} prompts, 95 % intervals over prompts:", *shown]
    )


def _share(found: "Interval") -> str:
    return "none" if math.isnan(found.mean) else f"{found.mean:.1%} ({found.low:.1%} to {found.high:.1%})"


def _points(found: "Interval") -> str:
    mean, low, high = (100 * end for end in found)
    return f"{mean:.1f} points ({low:.1f} to {high:.1f})"
