"""Several sources as one training set: judgements and revisions beside the data that `prepare` checked.

A weight says how often an epoch sees a ranking. docs/decisions/0016 says why it does not stand in the loss.
"""

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_core.data import BadField, load_prepared, parse_demonstration, parse_ranking, read_rows
from rlhf_core.errors import DataError, MissingArtifact
from rlhf_core.records import Demonstration, Ranking

STARTER = "starter"  # the source of rankings that tell none
SPLITS = ("train", "validation")
Record = TypeVar("Record", Ranking, Demonstration)


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
    return {split: [one for one in rankings if len(set(one.ranks)) > 1] for split, rankings in found.items()}


def load_demonstrations(folder: Path, prepared: Path) -> dict[str, list[Demonstration]]:
    """Demonstrations for SFT, by train and validation; those to test prompts, or to none of these, are left out.

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


def weigh(rankings: Sequence[Ranking], weights: Mapping[str, float], *, seed: int) -> list[Ranking]:
    """Each source's rankings as often as its weight says, in their order; all of them once without weights.

    The fraction of a weight is a share of the source's rankings, drawn without replacement: 0.5 of 7 is 4.

    Args:
        weights: source -> how often; a source that is not named has 1.
    """
    totals = Counter(source_of(ranking) for ranking in rankings)
    drawn: dict[str, set[int]] = {}
    for source, total in sorted(totals.items()):
        share = weights.get(source, 1.0) % 1
        chance = random.Random(f"{seed} {source}")  # of each source's own: one weight changes no other's draw
        drawn[source] = set(chance.sample(range(total), int(share * total + 0.5)))
    kept: list[Ranking] = []
    seen: Counter[str] = Counter()
    for ranking in rankings:
        source = source_of(ranking)
        kept += [ranking] * (int(weights.get(source, 1.0)) + (seen[source] in drawn[source]))
        seen[source] += 1
    return kept


def count_sources(rankings: Sequence[Ranking]) -> dict[str, int]:
    """How many rankings there are of each source."""
    return dict(sorted(Counter(source_of(ranking) for ranking in rankings).items()))


def source_of(ranking: Ranking) -> str:
    """human, ai or rule, as the row says; starter where it says nothing."""
    return ranking.source or STARTER
