"""People's blind comparisons of two policies beside the gold model's word on the same answers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from rlhf_core.agreement import krippendorff_alpha, table
from rlhf_core.config import Gate
from rlhf_core.config import People as Config
from rlhf_core.data import parse_prompt
from rlhf_core.gate import Pair, Rates, in_percent, rates
from rlhf_core.records import Message


class People(NamedTuple):
    """What people said, and what the gold model says of the answers that they saw."""

    rates: Rates
    gold: Rates  # on the same pairs
    judgements: int
    annotators: int
    agreement: float  # share of decided judgements in which the gold model prefers the same answer; a tie of its is ½
    alpha: float | None  # Krippendorff's among people; None where no pair was judged twice, or all said the same
    new_first: float | None  # share of judgements in which the new policy's answer stood first; None where not kept
    chose_first: float | None  # share of decided judgements for what stood first

    def metrics(self) -> dict[str, float]:
        """As numbers with names."""
        found = {
            **self.rates.metrics(),
            "gold_win_rate": self.gold.plain.mean,
            "gold_length_controlled_win_rate": self.gold.equal.mean,
            "judgements": float(self.judgements),
            "annotators": float(self.annotators),
            "gold_agreement": self.agreement,
        }
        rest = {"alpha": self.alpha, "new_first": self.new_first, "chose_first": self.chose_first}
        return {**found, **{name: value for name, value in rest.items() if value is not None}}

    def lines(self, new: str = "the new policy") -> list[str]:
        """As Markdown; `new` says whose win rate it is."""
        head = ["| on the answers that people saw | by the gold model | by people |"]
        rows = [f"| {what} | {gold} | {people} |" for what, gold, people in self.rows(new)]
        return [*head, "|---|---:|---:|", *rows, "", " ".join(self.remarks(new))]

    def rows(self, new: str) -> list[tuple[str, str, str]]:
        """Which win rate it is, its value by the gold model, and by people."""
        return [
            (f"win rate of {new}", in_percent(self.gold.plain), in_percent(self.rates.plain)),
            ("the same at equal length", in_percent(self.gold.equal), in_percent(self.rates.equal)),
        ]

    def remarks(self, new: str) -> list[str]:
        """How many judged, how far all agree, and which sides they chose, a sentence each."""
        who = "1 person" if self.annotators == 1 else f"{self.annotators} people"
        found = [
            f"{who} made {self.judgements} judgement{'s' * (self.judgements != 1)}.",
            f"Where they decided, the gold model prefers the same answer in {self.agreement:.0%}.",
            "How far people agree cannot be told."
            if self.alpha is None
            else f"People agree among themselves with a Krippendorff's alpha of {self.alpha:.2f}.",
        ]
        if self.new_first is not None:
            found.append(f"What {new} said stood first in {self.new_first:.0%}.")
        if self.chose_first is not None:
            found.append(f"People chose what stood first in {self.chose_first:.0%}.")
        return found


SECTION = Markup(
    """<section id="people">
  <h2>What people said</h2>
  <p>{lead}</p>
  <table class="policies">
  <thead><tr><th scope="col"><span class="hidden">Win rate</span></th>
  <th scope="col">by the gold model</th><th scope="col">by people</th></tr></thead>
  <tbody>
{rows}
  </tbody></table>
  <p style="margin-top: 1.2rem">{remarks}</p>
</section>

"""
)
ROW = Markup('  <tr><th scope="row">{}</th><td>{}</td><td>{}</td></tr>')
LINK, PLACE = '<a href="#policies">', '<section id="policies">'  # of the report, before which people's part stands


def in_report(page: str, people: People, new: str, current: str) -> str:
    """Stage evaluate's report with what people said, which is known after it only.

    Args:
        new, current: whose answers they compared, such as "PPO" and "SFT".
    """
    lead = (
        f"Blind, and on sides drawn anew for each person and pair, people compared what {new} and {current} answered. "
        f"They prefer {new} in {in_percent(people.rates.plain)}, over prompts, by an interval that holds whenever one "
        "looks and stops; a tie and both bad count half."
    )
    rows = Markup("\n").join(ROW.format(what[:1].upper() + what[1:], *values) for what, *values in people.rows(new))
    assert page.count(LINK) == page.count(PLACE) == 1, "the report has one section of policies"
    page = page.replace(LINK, f'<a href="#people">People</a>{LINK}')
    return page.replace(PLACE, str(SECTION.format(lead=lead, rows=rows, remarks=" ".join(people.remarks(new)))) + PLACE)


def people_beside_gold(
    rows: Sequence[Mapping[str, Any]], pairs: Sequence[Pair], config: Gate | Config
) -> People | None:
    """Compare; None where nobody judged any of the pairs. Several judgements of a pair count as their mean.

    Args:
        rows: judgements with `prompt`, `responses` (new policy's first), `ranks` and `annotator`; both bad is a tie.
            Where they have `first`, it is the index of the response that stood first on the page.
        pairs: the answers that could be judged.
    """
    pair_of = {(pair.prompt, pair.new, pair.current): pair for pair in pairs}
    said: list[tuple[str, tuple[tuple[Message, ...], str, str], float]] = []
    first: list[float] = []  # 1 where the new policy's answer stood first
    chosen: list[float] = []  # 1 where what stood first was preferred
    for row in rows:
        key = (parse_prompt(row).prompt, *row["responses"])
        if key in pair_of:
            new, current = row["ranks"]
            said.append((row["annotator"], key, 1.0 if new < current else 0.5 if new == current else 0.0))
            if "first" in row:
                first.append(float(row["first"] == 0))
                chosen += [float((new < current) == (row["first"] == 0))] if new != current else []
    if not said:
        return None
    won_by_pair: dict[tuple[tuple[Message, ...], str, str], list[float]] = {}
    for _, key, won in said:
        won_by_pair.setdefault(key, []).append(won)
    seen = [pair_of[key] for key in won_by_pair]
    longer, prompts = [pair.longer for pair in seen], [pair.prompt for pair in seen]
    wins = [sum(part) / len(part) for part in won_by_pair.values()]
    decided = [(pair_of[key].gold, won) for _, key, won in said if won != 0.5]
    ratings_AI = table(said).ratings_AI
    twice = bool((np.isfinite(ratings_AI).sum(0) > 1).any())
    alpha = krippendorff_alpha(ratings_AI, metric="ordinal").mean if twice else math.nan
    return People(
        # Somebody may watch the results, and end the comparison by Resume or a number of judgements when they please.
        rates(wins, longer, prompts, config, peeked=True),
        rates([pair.gold for pair in seen], longer, prompts, config),
        len(said),
        len({who for who, _, _ in said}),
        float(np.mean([1.0 - abs(gold - won) for gold, won in decided])) if decided else 0.5,
        alpha if math.isfinite(alpha) else None,
        float(np.mean(first)) if first else None,
        float(np.mean(chosen)) if chosen else None,
    )
