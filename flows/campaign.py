"""A campaign of online rounds on disk: its workspace, how a round begins, and what it leaves under rounds/NNN.

A round is over when its folder is there, so there is nothing else to keep in step. docs/decisions/0016 gives the
reasons. Nothing here knows Prefect; flows/online.py runs the rounds.
"""

import json
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from flows.recipe import (
    copy_code,
    copy_named,
    first_params,
    init_dvc,
    is_unfinished,
    make_base,
    making,
    take_new_keys,
)
from rlhf_core.config import Params, check_params, load_params
from rlhf_core.errors import ConfigError, MissingArtifact
from tasks.pipeline import STAGES, apply_overrides, checkout, workspace_lock
from tasks.stage import write_json, write_text

ONLINE = "online"  # what the workspace is for
FIRST = STAGES  # round 0: the pipeline as it is
SAMPLING, LEARNING, VERDICT = "preferences", ("reward", "ppo", "evaluate"), "gate"
START, FEEDBACK, COMPARISONS = "artifacts/start", "data/feedback", "data/comparisons.json"
ITEMS, ANSWERS = "artifacts/preferences/items.jsonl", "artifacts/evaluate/answers.jsonl"
KEPT = {  # what a round leaves, by its place in rounds/NNN
    "ppo/policy": "artifacts/ppo/policy",
    "ppo/value": "artifacts/ppo/value",
    "reward/model": "artifacts/reward/model",
    "reward/gold": "artifacts/reward/gold",
    "answers.jsonl": ANSWERS,
    "report.html": "artifacts/evaluate/report.html",
    "gate.md": "artifacts/gate/report.md",
    "items.jsonl": ITEMS,
    "comparisons.json": COMPARISONS,
    "metrics": "metrics",
    "params.yaml": "params.yaml",
    "feedback.yaml": f"{FEEDBACK}.dvc",  # the version of all that was learned from; by its own name DVC would take it
    "stages.yaml": "dvc.yaml",  # for a file of its own, and this for a pipeline
    "dvc.lock": "dvc.lock",
}
PEOPLES_REPORT = "artifacts/gate/report.html"  # the same with what people said, where they were asked
CONTINUED = ("ppo", "reward", "answers.jsonl")  # what the next round starts from
GUIDELINE, AXES = "guideline.md", "axes.json"  # what people judge by, and score on, where somebody said so


@dataclass(frozen=True)
class Campaign:
    """Where a campaign lies."""

    name: str
    folder: Path

    def round_folder(self, number: int) -> Path:
        """What the round left, or will leave."""
        return self.folder / "rounds" / f"{number:03}"

    def feedback_file(self, number: int) -> Path:
        """The round's judgements."""
        return self.folder / FEEDBACK / f"{number:03}.jsonl"

    def decisions(self) -> list[dict[str, Any]]:
        """Of all rounds that are over, in order; the first is round 0."""
        found = sorted((self.folder / "rounds").glob("[0-9][0-9][0-9]/decision.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in found]

    def next_round(self) -> int:
        """The number of the round that is under way or comes next."""
        return len(self.decisions())

    def promoted(self) -> int:
        """The round whose policy is the current one."""
        return max(decision["round"] for decision in self.decisions() if decision["promoted"])

    def under_way(self) -> bool:
        """Whether a round was begun that is not over."""
        state = self.folder / "round.json"
        return state.is_file() and json.loads(state.read_text(encoding="utf-8"))["round"] == self.next_round()

    def identity(self) -> str:
        """A name that no other campaign has, also one of the same name before or after."""
        return str(json.loads((self.folder / "campaign.json").read_text(encoding="utf-8"))["id"])

    def origin(self, number: int) -> str:
        """Who wrote a round's answers, as pages know it: those of a team may hold other campaigns of this name."""
        return f"round-{number} of {self.name[:50]}-{self.identity()[:8]}"


def open_campaign(
    name: str,
    *,
    project: Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    in_rounds: Sequence[str] = (),
) -> Campaign:
    """Bring a campaign's workspace up to date with the project's code, or make one; raises as `open_workspace` does."""
    folder = open_workspace(name, ONLINE, project=project, recipe=recipe, overrides=overrides, in_rounds=in_rounds)
    campaign = Campaign(name, folder)
    with workspace_lock(folder):
        write_text(folder / "dvc.yaml", _stages(campaign))
    return campaign


def open_workspace(
    name: str,
    kind: str,
    *,
    project: Path,
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    in_rounds: Sequence[str] = (),
) -> Path:
    """Bring the workspace .rlhf/NAME up to date with the project's code, or make one; it has the project's stages.

    Its parameters are the project's of the day it began, in campaign.yaml, so that what it computes can be compared;
    keys that are newer than that come from the project.

    Args:
        kind: what it is for.
        in_rounds: overrides that campaign.yaml has on top, so that the pipeline itself need not be computed anew.

    Raises:
        ConfigError: the name is not one, or is taken by another kind; a value is impossible; or recipe or overrides are
            given for one that has begun with others.
        ResourceError: a run works in it, and would find other code under its feet.
    """
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(f"Found a campaign named {name!r}, expected letters, digits, - and _.")
    folder = project / ".rlhf" / name
    wanted = {"recipe": recipe, "overrides": list(overrides), "in_rounds": list(in_rounds)}
    if not _has_begun(folder, kind, wanted):
        with TemporaryDirectory() as draft:  # a mistake is told before anything is written
            first_params(recipe, overrides, Path(draft), project=project)
            apply_overrides(in_rounds, root=Path(draft))
    with workspace_lock(folder):
        if _has_begun(folder, kind, wanted):  # asked again: another command may have begun it meanwhile
            _copy_code(folder, project)
            for name in ("params.yaml", "campaign.yaml"):  # of the round under way, and of those to come
                take_new_keys(folder / name, project)
                copy_named(load_params(folder / name), folder, project)
            return folder
        with making(folder):
            _copy_code(folder, project)
            _begin(folder, project, recipe, overrides, in_rounds)
            write_json(folder / "campaign.json", {**wanted, "kind": kind, "id": uuid.uuid4().hex, "began": _now()})
    return folder


def _begin(folder: Path, project: Path, recipe: str | None, overrides: Sequence[str], in_rounds: Sequence[str]) -> None:
    """The parameters that all rounds share, and what the project has computed already."""
    init_dvc(folder, cache=(project / ".dvc" / "cache").resolve())
    params = first_params(recipe, overrides, folder, project=project)
    make_base(params, folder)
    if not recipe and (project / "dvc.lock").is_file():  # what the project has computed need not be computed again
        shutil.copy(project / "dvc.lock", folder)
        for part in ("metrics", "plots"):
            if (project / part).is_dir():
                shutil.copytree(project / part, folder / part, dirs_exist_ok=True)
        checkout(root=folder)
    with TemporaryDirectory(dir=folder) as draft:
        shutil.copy(folder / "params.yaml", draft)
        in_round = apply_overrides(in_rounds, root=Path(draft))
        shutil.copy(Path(draft) / "params.yaml", folder / "campaign.yaml")
    for one in (params, in_round):
        copy_named(one, folder, project)


def _has_begun(folder: Path, kind: str, wanted: Mapping[str, Any]) -> bool:
    """Whether the campaign is there; raises as `open_workspace` does where the folder is another's."""
    begun, name = folder / "campaign.json", folder.name
    if begun.is_file():
        known = {"in_rounds": [], **json.loads(begun.read_text(encoding="utf-8"))}
        if (other := known.get("kind", ONLINE)) != kind:
            raise ConfigError(f"Found {name} to be a campaign of `rlhf {other}`. Name another one for `rlhf {kind}`.")
        if any(wanted.values()) and wanted != {key: known[key] for key in wanted}:
            raise ConfigError(
                f"Campaign {name} began with recipe {known['recipe']} and overrides {known['overrides']}, in its "
                f"rounds {known['in_rounds']}. Leave them out to go on with it, or name another campaign."
            )
        return True
    if any((folder / part).exists() for part in ("dvc.lock", "artifacts")) and not is_unfinished(folder):
        raise ConfigError(f"{folder} is the workspace of a recipe. Give the campaign another name.")
    return False


def _copy_code(folder: Path, project: Path) -> None:
    copy_code(folder, project)
    shutil.copy(project / "dvc.yaml", folder / "pipeline.yaml")


def for_people(campaign: Campaign, guideline: str | None, axes: Sequence[str]) -> tuple[str | None, list[str]]:
    """The guideline's file that people judge by and the axes that they score on; those given are kept for later."""
    text, scored = campaign.folder / GUIDELINE, campaign.folder / AXES
    if guideline:
        write_text(text, Path(guideline).read_text(encoding="utf-8"))
    if axes:
        write_json(scored, list(axes))
    kept = json.loads(scored.read_text(encoding="utf-8")) if scored.is_file() else []
    return str(text) if text.is_file() else None, kept


def begin_round(campaign: Campaign) -> int:
    """Lay out the next round: parameters, stages, what it starts from, what was judged before. May be repeated."""
    number = campaign.next_round()
    write_text(campaign.folder / "dvc.yaml", _stages(campaign))  # the one before it may have been round 0
    if number == 0:
        return number
    values = yaml.safe_load((campaign.folder / "campaign.yaml").read_text(encoding="utf-8"))
    # Another seed each round, or every round would ask the same prompts and draw the same numbers.
    for section in ("preferences", "reward", "ppo"):
        values[section]["seed"] += number
    values["preferences"] |= {"round": number, "policy": f"{START}/ppo/policy"}
    values["reward"] |= {"start": f"{START}/reward", "feedback": FEEDBACK}
    values["ppo"]["start"] = f"{START}/ppo"
    check_params(values, source=f"round {number}")
    write_text(campaign.folder / "params.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    _lay_out(campaign, number)
    return number


def _lay_out(campaign: Campaign, number: int) -> None:
    """Put what the round reads in its place, unless a start that was cut off has done so."""
    current, state = campaign.promoted(), campaign.folder / "round.json"
    if state.is_file() and (known := json.loads(state.read_text(encoding="utf-8")))["round"] == number:
        assert known["start"] == current, "a round's start does not change while it is under way"
        return
    for name in CONTINUED:
        _copy(campaign.round_folder(current) / name, campaign.folder / START / name)
    keep_all = load_params(campaign.folder / "params.yaml").gate.keep_rejected
    feedback = campaign.folder / FEEDBACK
    shutil.rmtree(feedback, ignore_errors=True)
    feedback.mkdir(parents=True)
    for decision in campaign.decisions():
        judged = campaign.round_folder(decision["round"]) / "feedback.jsonl"
        if judged.is_file() and (keep_all or decision["promoted"]):
            shutil.copy(judged, campaign.feedback_file(decision["round"]))
    (campaign.folder / COMPARISONS).unlink(missing_ok=True)
    write_json(state, {"round": number, "start": current, "began": _now()})


def end_round(campaign: Campaign, number: int, verdict: Mapping[str, Any]) -> dict[str, Any]:
    """Keep what the round left, with its decision, in one move; returns the decision."""
    partial, final = campaign.folder / "rounds" / f".{number:03}", campaign.round_folder(number)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, source in KEPT.items():
        if (campaign.folder / source).exists():
            _copy(campaign.folder / source, partial / name)
    if number and (campaign.folder / PEOPLES_REPORT).is_file():
        _copy(campaign.folder / PEOPLES_REPORT, partial / "report.html")
    if campaign.feedback_file(number).is_file():
        shutil.copy(campaign.feedback_file(number), partial / "feedback.jsonl")
    start = None if number == 0 else campaign.promoted()
    decision = {"round": number, "start": start, "ended": _now(), **verdict}
    write_json(partial / "decision.json", decision)
    partial.rename(final)
    return decision


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines.

    Raises:
        MissingArtifact: it is not there.
    """
    if not path.is_file():
        raise MissingArtifact(f"{path} is not there. `rlhf online run` writes it.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


# ---- words


def words(decision: dict[str, Any]) -> str:
    """A round's decision in one line, with the check that stopped it."""
    if decision["round"] == 0:
        return "Round 0 is the pipeline's own policy; later rounds have to beat it."
    failed = [check["words"] for check in decision["checks"] if not check["passed"]]
    if decision["promoted"]:
        return f"Round {decision['round']} is promoted: {decision['checks'][0]['words']}."
    return f"Round {decision['round']} is rejected, round {decision['start']}'s policy stays: {'; '.join(failed)}."


def overview(name: str, decisions: list[dict[str, Any]]) -> str:
    """All rounds of a campaign as a Markdown table."""
    lines = [f"# Campaign {name}", "", "| round | from | judged | | why |", "|---:|---:|---:|---|---|"]
    for one in decisions:
        start = "" if one["start"] is None else one["start"]
        said = "promoted" if one["promoted"] else "rejected"
        lines.append(f"| {one['round']} | {start} | {one['judged']} | {said} | {words(one).partition(': ')[2]} |")
    return "\n".join(lines) + "\n"


def _stages(campaign: Campaign) -> str:
    """dvc.yaml of the round under way: the project's, and for rounds after the first with two stages more."""
    return with_stages(campaign.folder, "recipes/online/stages.yaml" if campaign.next_round() else None)


def with_stages(folder: Path, added: str | None) -> str:
    """dvc.yaml of a workspace: the project's, with the stages of a file, and what it adds to those that are there."""
    text = (folder / "pipeline.yaml").read_text(encoding="utf-8")
    if added is None:
        return text
    whole = yaml.safe_load(text)
    del whole["stages"]["people"]  # `rlhf people` asks about the pipeline's own answers only
    more = yaml.safe_load((folder / added).read_text(encoding="utf-8"))
    for name, parts in more["stages"].items():
        if name not in whole["stages"]:
            whole["stages"][name] = parts
            continue
        for kind, entries in parts.items():
            whole["stages"][name][kind] = [*whole["stages"][name].get(kind, []), *entries]
    return yaml.safe_dump(whole, sort_keys=False)


def load_round_params(campaign: Campaign) -> Params:
    """The parameters of the round under way."""
    return load_params(campaign.folder / "params.yaml")


def _copy(source: Path, target: Path) -> None:
    """Put a copy of a file or folder in place of what is there."""
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(".gitignore"))
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
