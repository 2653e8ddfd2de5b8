"""Who says which of several responses is better: what every annotator takes and gives, and the rules among them.

A rule is a preference that is written down and cannot err, so that what was learned can be held against what was
taught. People judge on the pages of app.py; models and endpoints that judge are in judges.py.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol

from rlhf_core.errors import ConfigError
from rlhf_core.records import Message

Source = Literal["human", "ai", "rule"]


class Item(NamedTuple):
    """A prompt and K ≥ 2 responses to be ranked."""

    prompt: tuple[Message, ...]  # chat messages, as in rlhf_core.records; the last is the user's
    responses: tuple[str, ...]
    question: str = ""  # what decides, for judges that can read; empty for what makes a good answer in general


class Judgement(NamedTuple):
    """What an annotator says of an item. All ranks equal says nothing, and teaches nothing."""

    ranks: tuple[int, ...]  # one a response, in the item's order; 1 is best, equal ones share a rank: 1, 2, 2, 4
    scores: dict[str, list[float]] | None = None  # an axis' name -> one number a response, more is better
    reason: str = ""
    confidence: float = 1.0  # 0 no better than a coin, 1 certain


class Annotator(Protocol):
    """Ranks the responses of items."""

    @property
    def name(self) -> str:
        """Who it is, as `annotator` of a ranking says it."""

    @property
    def source(self) -> Source:
        """What kind it is, as `source` of a ranking says it."""

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement an item, in their order.

        Raises:
            RLHFError: it had to stop, such as at a limit of spending. Whatever was paid for is kept by the annotator,
                so that the same call, made again, goes on where this one stopped.
        """


def as_ranking(said: Judgement, annotator: Annotator) -> dict[str, Any]:
    """What a ranking of docs/data.md says of its judgement: ranks, source, annotator, how sure, and scores if given."""
    about = {"source": annotator.source, "annotator": annotator.name, "confidence": round(said.confidence, 4)}
    scores = {"scores": said.scores} if said.scores else {}
    return {"ranks": list(said.ranks), **about, "comment": said.reason, **scores}


def ranks_of(values: Sequence[object]) -> tuple[int, ...]:
    """Ranks by falling value: the greatest gets 1, and equal ones share a rank, as in 1, 2, 2, 4.

    Args:
        values: K things of one kind that can be ordered, such as numbers or tuples of numbers.
    """
    descending = sorted(values, reverse=True)  # type: ignore[type-var]
    return tuple(descending.index(value) + 1 for value in values)


class Rule(NamedTuple):
    """An annotator that ranks by a documented function of prompt and response; greater is better."""

    name: str
    value: Callable[[Item, str], object]
    source: Source = "rule"

    def judge(self, items: Sequence[Item]) -> list[Judgement]:
        """One judgement an item, in their order; certain, for a rule is right by definition."""
        return [
            Judgement(ranks_of([self.value(item, response) for response in item.responses]), reason=f"rule {self.name}")
            for item in items
        ]


_SENTENCE_END = re.compile(r"[.!?…。！？]['\"”’»)\]*`]*$")
_READER = frozenset({"you", "your", "yours", "yourself", "yourselves"})


def words_of(text: str) -> list[str]:
    """The text's words in lower case, without what follows an apostrophe: "You'll" is "you"."""
    return [re.split("['’]", word)[0] for word in re.findall(r"\w+(?:['’]\w+)*", text.lower())]


def _short(item: Item, response: str) -> object:
    """A response that ends as a sentence does comes before one that does not; then the one with fewer words."""
    return bool(_SENTENCE_END.search(response.rstrip())), -len(response.split())


def _reader(item: Item, response: str) -> object:
    """The greater share of words that address the reader (you, your, yours, yourself), the better."""
    words = words_of(response)
    return sum(word in _READER for word in words) / max(len(words), 1)


def _longest(item: Item, response: str) -> object:
    """The more characters, the better: what a judge who only counts would say."""
    return len(response)


def _random(seed: int) -> Callable[[Item, str], object]:
    """A coin, thrown once for each response to each prompt and seed, wherever the response stands."""

    def value(item: Item, response: str) -> object:
        return hashlib.sha256(json.dumps([seed, item.prompt, response]).encode()).hexdigest()

    return value


RULES: dict[str, Callable[[int], Callable[[Item, str], object]]] = {
    "short": lambda seed: _short,
    "reader": lambda seed: _reader,
    "longest": lambda seed: _longest,
    "random": _random,
}


def rule(name: str, *, seed: int = 0) -> Rule:
    """The rule of that name.

    - `short`: ends as a sentence does, and is short
    - `reader`: addresses the reader, by the share of "you" and its like
    - `longest`: has more characters
    - `random`: a coin by `seed`, which stands for an annotator who does not read, or means harm

    Raises:
        ConfigError: there is no such rule.
    """
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1, cutoff=0.0)[0]
        raise ConfigError(f"Found no rule {name!r}, expected one of {', '.join(RULES)}. Did you mean rule:{near}?")
    return Rule(name if name != "random" else f"random-{seed}", RULES[name](seed))
