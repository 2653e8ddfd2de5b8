"""Several sources as one training set: judgements and revisions beside the data that `prepare` checked.

A weight says how often an epoch sees a record. docs/decisions/0016 says why it does not stand in the loss.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_core.config import SFT, Reward
from rlhf_core.data import BadField, load_prepared, parse_demonstration, parse_ranking, read_rows
from rlhf_core.errors import ConfigError, DataError, MissingArtifact
from rlhf_core.records import Demonstration, Ranking

STARTER = "starter"  # the source of rankings that tell none
SPLITS = ("train", "validation")
Record = TypeVar("Record", Ranking, Demonstration)


def load_rankings(
    config: Reward, prepared: Path, splits: Sequence[str] = (*SPLITS, "gold", "test")
) -> dict[str, list[Ranking]]:
    """The rankings of each split, judgements among them; those of train as often as config.weights says.

    Stage dpo learns from the same as stage reward: they are two ways to one end.

    Args:
        splits: train, validation and whatever others.

    Raises:
        ConfigError: an axis of config.axes is in no ranking of a split, or the weights leave nothing to learn from.
        MissingArtifact, DataError: see `load_feedback`.
    """
    records = {split: load_prepared(prepared, "rankings", [split]) for split in splits}
    require_axes(records, config.axes)
    if config.feedback:
        for split, rows in load_feedback(Path(config.feedback), prepared).items():
            records[split] += rows
    if config.weights:
        everything = records["train"]
        weights = config.weights
        records["train"] = weigh(
            everything,
            weights,
            by=lambda one: one.category if one.category in weights else source_of(one),
            seed=config.seed,
        )
        _require_telling(records["train"], config, count_sources(everything))
    return records


def load_feedback(folder: Path, prepared: Path) -> dict[str, list[Ranking]]:
    """Judgements by the split of their prompt; those to prompts of other splits, or to none of them, are left out.

    Args:
        folder: files *.jsonl of rankings, read in the order of their names.
        prepared: what stage prepare wrote, which says what prompt is in which split.

    Raises:
        MissingArtifact: there is no such folder.
        DataError: a row is no ranking; names file and line.
    """
    if not folder.is_dir():
        raise MissingArtifact(f"Found no folder {folder} of judgements, which reward.feedback names.")
    found = _by_split(folder, parse_ranking, prepared, {split: split for split in SPLITS})
    return {split: [one for one in rankings if _differ(one.ranks)] for split, rankings in found.items()}


def load_demonstrations(config: SFT, prepared: Path) -> dict[str, list[Demonstration]]:
    """The demonstrations of train and validation, revisions among them; those of train as often as config.weights says.

    Raises:
        ConfigError: a weight is of a category that no demonstration of train has, or the weights leave none.
        MissingArtifact, DataError: see `load_revisions`.
    """
    records = {split: load_prepared(prepared, "demonstrations", [split]) for split in SPLITS}
    if config.feedback:
        for split, rows in load_revisions(Path(config.feedback), prepared).items():
            records[split] += rows
    if config.weights:
        everything = records["train"]
        records["train"] = weigh(everything, config.weights, by=_category, seed=config.seed)
        _require_weighed(everything, records["train"], config.weights)
    return records


def _require_weighed(
    everything: Sequence[Demonstration], kept: Sequence[Demonstration], weights: Mapping[str, float]
) -> None:
    """Stop where a weight is of no demonstration, so that a misspelt one does not pass, or where none is left."""
    counts = Counter(map(_category, everything))
    unknown = sorted(weights.keys() - counts.keys())
    if kept and not unknown:
        return
    wrong = f"name {', '.join(unknown)}, which no demonstration of split train is of" if unknown else "leave nothing"
    told = ", ".join(f"{category}: {weight:g}" for category, weight in weights.items())
    held = ", ".join(f"{category or 'none'} ({count} demonstrations)" for category, count in sorted(counts.items()))
    raise ConfigError(
        f"sft.weights {{{told}}} {wrong}; categories found there: {held}. Change sft.weights in params.yaml."
    )


def load_revisions(folder: Path, prepared: Path) -> dict[str, list[Demonstration]]:
    """Further demonstrations, by train and validation; those to test prompts, or to none of these, are left out.

    Prompts of split gold train too: what is kept apart there is rankings.

    Args:
        folder: files *.jsonl of demonstrations, read in the order of their names.
        prepared: as above.

    Raises:
        MissingArtifact: there is no such folder.
        DataError: a row is no demonstration; names file and line.
    """
    if not folder.is_dir():
        raise MissingArtifact(f"Found no folder {folder} of demonstrations, which sft.feedback names.")
    return _by_split(folder, parse_demonstration, prepared, {**{split: split for split in SPLITS}, "gold": "train"})


def _by_split(
    folder: Path, parse: Callable[[dict[str, Any]], Record], prepared: Path, goes_to: Mapping[str, str]
) -> dict[str, list[Record]]:
    """The records of a folder by the split that a prompt's own split goes to, each with its prompt's category."""
    split_of = {
        prompt.prompt: (to, prompt.category)
        for split, to in goes_to.items()
        for prompt in load_prepared(prepared, "prompts", [split])
    }
    found: dict[str, list[Record]] = {split: [] for split in SPLITS}
    for path in sorted(folder.glob("*.jsonl")):
        for line, row in read_rows(str(path)):
            try:
                record = parse(row)
            except BadField as bad:
                raise DataError(f"{path}, line {line}, {bad}") from bad
            if record.prompt in split_of:
                split, category = split_of[record.prompt]
                found[split].append(record._replace(category=category))
    return found


def weigh(
    records: Sequence[Record], weights: Mapping[str, float], *, by: Callable[[Record], str], seed: int
) -> list[Record]:
    """Each group's records as often as its weight says, in their order; all of them once without weights.

    The fraction of a weight is a share of the group's records, drawn without replacement: 0.5 of 7 is 4.

    Args:
        weights: group -> how often; a group that is not named has 1.
        by: the group of a record, such as its source.
    """
    groups = [by(record) for record in records]
    drawn: dict[str, set[int]] = {}
    for group, total in sorted(Counter(groups).items()):
        share = weights.get(group, 1.0) % 1
        chance = random.Random(f"{seed} {group}")  # of each group's own: one weight changes no other's draw
        drawn[group] = set(chance.sample(range(total), int(share * total + 0.5)))
    kept: list[Record] = []
    seen: Counter[str] = Counter()
    for record, group in zip(records, groups, strict=True):
        kept += [record] * (int(weights.get(group, 1.0)) + (seen[group] in drawn[group]))
        seen[group] += 1
    return kept


def require_axes(rankings: Mapping[str, Sequence[Ranking]], axes: Sequence[str]) -> None:
    """Stop before training where an axis has nothing to learn from, or to be measured on.

    Args:
        rankings: by split; each has to hold a ranking that the axis tells two responses of apart.

    Raises:
        ConfigError: names the axis, the split, and the axes that the data holds.
    """
    for split, records in rankings.items():
        told = Counter(axis for record in records for axis, values in (record.scores or {}).items() if _differ(values))
        for axis in axes:
            if not told[axis]:
                held = ", ".join(f"{name} ({count} rankings)" for name, count in sorted(told.items())) or "none"
                raise ConfigError(
                    f"reward.axes names {axis!r}, but no ranking of split {split} has `scores` that tell two responses "
                    f"apart on it; axes found there: {held}. Change reward.axes in params.yaml, or add such rankings."
                )


def _require_telling(rankings: Sequence[Ranking], config: Reward, sources: Mapping[str, int]) -> None:
    """Stop where weights leave nothing to train on, which would leave a random head.

    Args:
        rankings: what is left of split train.
        sources: of all of it, how many rankings each source has.

    Raises:
        ConfigError: no ranking prefers one response, or none does on an axis of config.axes; names the weights.
    """
    told = {"": sum(_differ(ranking.ranks) for ranking in rankings)}
    told |= {axis: sum(_differ((one.scores or {}).get(axis, ())) for one in rankings) for axis in config.axes}
    for axis, count in told.items():
        if not count:
            weights = ", ".join(f"{source}: {weight:g}" for source, weight in config.weights.items())
            held = ", ".join(f"{source} ({total} rankings)" for source, total in sources.items())
            on_axis = f" on axis {axis!r}" if axis else ""
            raise ConfigError(
                f"reward.weights {{{weights}}} leave no ranking of split train that tells two responses apart"
                f"{on_axis}; found there: {held}. Raise the weight of one of these sources in params.yaml."
            )


def _differ(values: Sequence[float]) -> bool:
    return len(set(values)) > 1


def _category(demonstration: Demonstration) -> str:
    return demonstration.category


def count_sources(rankings: Sequence[Ranking]) -> dict[str, int]:
    """How many rankings there are of each source."""
    return dict(sorted(Counter(source_of(ranking) for ranking in rankings).items()))


def source_of(ranking: Ranking) -> str:
    """human, ai or rule, as the row says; starter where it says nothing."""
    return ranking.source or STARTER
