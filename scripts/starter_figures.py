"""Prints the figures of the data card (docs/data.md) from data/starter: `python scripts/starter_figures.py`.

Lengths are in characters. Nothing is sampled or trained here.
"""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from statistics import mean, median
from typing import Any

from rlhf_core.config import load_params
from rlhf_core.data import SPLITS, split_of
from rlhf_core.statistics import kendall_tau

PROJECT = Path(__file__).resolve().parents[1]
STARTER = PROJECT / "data" / "starter"
AXES = ("helpfulness", "harmlessness", "truthfulness")


def read(name: str) -> list[dict[str, Any]]:
    """The rows of a file of data/starter."""
    return [json.loads(line) for line in (STARTER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def demonstration_of(row: dict[str, Any]) -> int:
    """Which of a ranking's responses is the demonstration."""
    return [origin["model"] for origin in row["origins"]].index("demonstration")


def untied(ranks: list[int]) -> list[tuple[int, int]]:
    """(better, worse) for each pair of responses that is not a tie."""
    pairs = [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(len(ranks)), 2)]
    return [(better, worse) for better, worse in pairs if ranks[better] != ranks[worse]]


def counts() -> list[str]:
    """Prompts by kind and by split."""
    prompts, config = read("prompts"), load_params(PROJECT / "params.yaml").prepare
    kinds = Counter(row["category"] for row in prompts)
    splits = Counter(split_of((("user", row["prompt"]),), config) for row in prompts)
    words = [len(row["response"].split()) for row in read("demonstrations")]
    return [
        f"prompts                                    {len(prompts)}",
        f"kinds                                      {', '.join(f'{kind} {n}' for kind, n in sorted(kinds.items()))}",
        f"prompts by split                           {', '.join(f'{split} {splits[split]}' for split in SPLITS)}",
        f"words a demonstration                      median {median(words):g}, longest {max(words)}",
    ]


def rankings() -> list[str]:
    """How the four responses were ranked, and what length or origin alone would say."""
    rows = read("rankings")
    pairs = longer = of_demonstration = first = longest = shortest = 0
    demonstrated: list[int] = []
    sampled: list[int] = []
    scores: dict[bool, dict[str, list[int]]] = {True: {axis: [] for axis in AXES}, False: {axis: [] for axis in AXES}}
    for row in rows:
        lengths, ranks, own = [len(text) for text in row["responses"]], row["ranks"], demonstration_of(row)
        found = untied(ranks)
        pairs += len(found)
        longer += sum(lengths[better] > lengths[worse] for better, worse in found)
        of_demonstration += sum(own in pair for pair in found)
        first += ranks[own] == min(ranks)
        longest += ranks[lengths.index(max(lengths))] == min(ranks)
        shortest += ranks[lengths.index(min(lengths))] == min(ranks)
        for index, length in enumerate(lengths):
            (demonstrated if index == own else sampled).append(length)
            for axis in AXES:
                scores[index == own][axis].append(row["scores"][axis][index])
    ties = 6 * len(rows) - pairs
    style = (of_demonstration + (pairs - of_demonstration) / 2) / pairs
    return [
        f"pairs that are not ties                    {pairs}",
        f"ties                                       {ties}",
        f"longest response ranked first              {longest / len(rows):.1%} of prompts (chance 25 %)",
        f"shortest response ranked first             {shortest / len(rows):.1%} of prompts (chance 25 %)",
        f"the longer response is the better one      {longer / pairs:.1%} of pairs",
        f"demonstration ranked first                 {first} of {len(rows)} prompts",
        f"pairs that hold the demonstration          {of_demonstration} ({of_demonstration / pairs:.1%} of pairs)",
        f'accuracy of "demonstration, else a coin"   {style:.1%} of pairs',
        f"characters, demonstration and sampled      median {median(demonstrated):g} and {median(sampled):g}",
        *(
            f"{f'mean {axis}, these two':<42} {mean(scores[True][axis]):.2f} and {mean(scores[False][axis]):.2f}"
            for axis in AXES
        ),
    ]


def agreement() -> list[str]:
    """What the second, blind scoring says of the first."""
    first = {row["prompt"]: row for row in read("rankings")}
    second = read("second_scores")
    every, sampled = [], []
    same = both = same_sampled = both_sampled = 0
    for row in second:
        one, two, own = first[row["prompt"]]["ranks"], row["ranks"], demonstration_of(first[row["prompt"]])
        others = [index for index in range(len(one)) if index != own]
        every.append(kendall_tau(one, two))
        sampled.append(kendall_tau([one[i] for i in others], [two[i] for i in others]))
        for i, j in untied(one):
            if two[i] != two[j]:
                agreed, inside = two[i] < two[j], own not in (i, j)
                same, both = same + agreed, both + 1
                same_sampled, both_sampled = same_sampled + (agreed and inside), both_sampled + inside
    inner = same_sampled / both_sampled
    return [
        f"prompts scored a second time               {len(second)}",
        f"Kendall's tau-b, four responses            {mean(every):.2f} (mean over prompts)",
        f"Kendall's tau-b, three sampled ones        {mean(sampled):.2f} (mean over prompts)",
        f"same order, pairs untied in both           {same / both:.1%} ({same} of {both})",
        f"same order, the sampled ones among them    {inner:.1%} ({same_sampled} of {both_sampled})",
    ]


def report() -> str:
    """All figures, a line each."""
    return "\n".join([*counts(), *rankings(), *agreement()])


if __name__ == "__main__":
    print(report())
