"""Ranks K responses by comparing them two at a time, each pair in both orders.

A judge that leans to what it reads first says one thing in one order and the other in the other. That is a tie here,
and it is counted. What looks at a pair, and says which of the two it prefers, is passed in: chat.py asks an endpoint,
local.py a model on this machine.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple, Protocol

from rlhf_core.feedback.annotators import Item, Judgement, Source, ranks_of
from rlhf_core.records import Message


class Look(NamedTuple):
    """Two responses to a prompt in the order in which a judge sees them."""

    prompt: tuple[Message, ...]
    first: str
    second: str
    turn: int = 0  # a second look at the same has another number, so that no remembered answer stands for it
    question: str = ""  # what decides, where it is not what makes a good answer in general


class Opinion(NamedTuple):
    """What a judge says at one look."""

    first: float  # how sure it is that the first is better: 1 surely, 0 surely not, ½ a tie
    scores: dict[str, tuple[float, float]] = {}  # noqa: RUF012  (never changed)  axis -> first's and second's
    reason: str = ""

    @property
    def choice(self) -> float:
        """1 for the first, 0 for the second, ½ for a tie."""
        return float(self.first > 0.5) + 0.5 * (self.first == 0.5)


class Comparer(Protocol):
    """Looks at two responses and says which it prefers."""

    name: str

    def compare(self, looks: Sequence[Look]) -> list[Opinion | None]:
        """One opinion a look, in their order; None where the judge was asked and gave no valid answer."""

    def costs(self) -> dict[str, float]:
        """What it took so far, by name."""


class Verdict(NamedTuple):
    """A pair of an item's responses, by their places, and what was said of it in both orders."""

    i: int
    j: int
    forward: Opinion | None  # i was shown first
    backward: Opinion | None  # j was shown first

    @property
    def outcome(self) -> float:
        """1 where i is better, 0 where j is; ½ for a tie, for orders that disagree, and for a missing answer."""
        if self.forward is None or self.backward is None:
            return 0.5
        chosen = self.forward.choice, 1 - self.backward.choice
        return chosen[0] if chosen[0] == chosen[1] else 0.5

    @property
    def disagrees(self) -> bool:
        """Whether both orders were answered, and differently."""
        both = self.forward is not None and self.backward is not None
        return both and self.forward.choice != 1 - self.backward.choice  # type: ignore[union-attr]

    @property
    def probability(self) -> float:
        """That i is better, averaged over both orders (Lee et al. 2023, §2.1); ½ where an answer is missing.

        One order alone would bring back the judge's lean to a place, which the other order takes out.
        """
        if self.forward is None or self.backward is None:
            return 0.5
        return (self.forward.first + (1 - self.backward.first)) / 2


class PairwiseJudge:
    """An annotator that compares every two responses of an item in both orders: K(K − 1) looks an item.

    A response has a point for each one that it beats and half a point for a tie (Copeland's rule); ranks are by points.
    An item's confidence is the mean over its pairs of |2p − 1|, with p the mean probability over both orders, 0 for
    pairs that end in a tie. Two equal responses are a tie without a look.
    """

    source: Source = "ai"

    def __init__(self, comparer: Comparer) -> None:
        self.comparer = comparer
        self.name = comparer.name
        self.pairs = self.disagreements = self.unanswered = 0

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement an item; raises what the comparer raises where it has to stop."""
        return [_ranked(item, of_item) for item, of_item in zip(items, self.verdicts(items), strict=True)]

    def verdicts(self, items: Sequence[Item], *, turn: int = 0) -> list[list[Verdict]]:
        """What was said of each pair of each item.

        Args:
            turn: another number asks anew what was asked before.
        """
        places: dict[Look, int] = {}  # the same look is taken once
        for item in items:
            for i, j in combinations(range(len(item.responses)), 2):
                for look in _both_orders(item, i, j, turn):
                    places.setdefault(look, len(places))
        opinions = self.comparer.compare(list(places))
        found = []
        for item in items:
            of_item = []
            for i, j in combinations(range(len(item.responses)), 2):
                looks = _both_orders(item, i, j, turn)
                said = [opinions[places[look]] for look in looks] or [Opinion(0.5)] * 2
                of_item.append(Verdict(i, j, said[0], said[1]))
                self.pairs += 1
                self.disagreements += of_item[-1].disagrees
                self.unanswered += None in said
            found.append(of_item)
        return found

    def counts(self) -> dict[str, float]:
        """Pairs judged, orders that disagreed and pairs without a valid answer so far, and what the comparer took."""
        own = {"pairs": self.pairs, "disagreements": self.disagreements, "unanswered": self.unanswered}
        return {**own, **self.comparer.costs()}


def _both_orders(item: Item, i: int, j: int, turn: int) -> list[Look]:
    one, other = item.responses[i], item.responses[j]
    shown = [] if one == other else [(one, other), (other, one)]
    return [Look(item.prompt, *pair, turn, item.question) for pair in shown]


def _ranked(item: Item, verdicts: Sequence[Verdict]) -> Judgement:
    points = [0.0] * len(item.responses)
    sure, reasons = 0.0, []
    given: dict[str, list[list[float]]] = {}  # axis -> response -> its scores
    for verdict in verdicts:
        points[verdict.i] += verdict.outcome
        points[verdict.j] += 1 - verdict.outcome
        sure += abs(2 * verdict.probability - 1) if verdict.outcome != 0.5 else 0.0
        for opinion, first, second in (
            (verdict.forward, verdict.i, verdict.j),
            (verdict.backward, verdict.j, verdict.i),
        ):
            for axis, (of_first, of_second) in (opinion.scores if opinion else {}).items():
                of_axis = given.setdefault(axis, [[] for _ in item.responses])
                of_axis[first].append(of_first)
                of_axis[second].append(of_second)
        if verdict.forward and verdict.forward.reason:
            reasons.append(f"{verdict.i + 1} beside {verdict.j + 1}: {verdict.forward.reason}")
    # An axis that some response has no score on says nothing that could be compared.
    scores = {
        axis: [sum(of_one) / len(of_one) for of_one in of_axis] for axis, of_axis in given.items() if all(of_axis)
    }
    return Judgement(ranks_of(points), scores or None, " · ".join(reasons), sure / len(verdicts))
