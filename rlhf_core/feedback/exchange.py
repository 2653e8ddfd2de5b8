"""Items in; rankings, demonstrations and pairs out: the formats of docs/data.md, and the answers of stage evaluate."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Set
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from rlhf_core.errors import DataError
from rlhf_core.feedback.judging import LIVE, LONGEST, Kind, storable
from rlhf_core.feedback.store import Item, Judgement

MOST_RESPONSES = 9  # one digit each
MOST_AXES = 9
SHOWN = 10  # bad rows named in the error
Row = tuple[int, Any]  # line and content


class Found(NamedTuple):
    """An item as a file tells it."""

    kind: Kind
    prompt: list[tuple[str, str]]
    responses: list[str]
    sources: list[str]
    category: str
    gold: list[int] | None = None  # the ranks that are right; None where that is what is asked

    @property
    def identical(self) -> bool:
        """Whether it compares two equal texts, which nobody can judge."""
        return self.kind == "compare" and self.responses[0].strip() == self.responses[1].strip()

    def key(self) -> str:
        """Hash of the content, whatever order the responses came in."""
        told = [self.kind, self.prompt, sorted(zip(self.responses, self.sources, strict=True))]
        return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest()


class Imported(NamedTuple):
    """What became of a file's rows."""

    added: dict[str, int]
    known: int
    identical: int  # comparisons of two equal texts, which nobody can judge
    more: int  # known ones that more people judge now
    gold: int  # known ones whose answer is known now, or is another

    def __str__(self) -> str:
        words = [f"{number} to {kind}" for kind, number in self.added.items() if number]
        text = f"Added {' and '.join(words) or 'nothing'}."
        text += f" {self.known} were there already." if self.known else ""
        text += f" {self.more} of them go to more people now." if self.more else ""
        text += f" {self.gold} of them have a known answer now." if self.gold else ""
        return text + (f" {self.identical} left out: both answers are the same." if self.identical else "")


def read_text(text: str) -> Iterator[Row]:
    """Number and content of each line of JSON lines, as rlhf_core.data reads a file."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, or brackets without end
                yield number, line


def find_items(
    name: str, rows: Sequence[Row], *, kind: Kind | None, policies: tuple[str, str], how: str, gold: bool = False
) -> list[Found]:
    """The items in a file: answers by policy become comparisons, rows with responses become rankings or comparisons.

    To write, a row has a prompt, and a response where one is to be corrected; of answers, the first policy's are.

    Args:
        name: the file, for messages.
        kind: None takes what the rows are: answers are compared, rankings are ranked.
        policies: whose answers are compared.
        how: which answers: sampled or greedy.
        gold: the ranks that stand in the file are known to be right, and annotators are measured by them.

    Raises:
        DataError: bad rows (the first ten and the count), or nothing to judge.
    """
    answers = [row for _, row in rows if isinstance(row, dict) and "policy" in row and "text" in row]
    if answers and len(answers) == len(rows):
        if gold:
            raise DataError(f"{name} holds answers, which have no ranks; gold questions need rows with ranks.")
        items = list(_from_answers(answers, policies[:1] if kind == "write" else policies, how, kind or "compare"))
        if not items:
            seen = sorted({f"{row['policy']} {row.get('how', '')}".strip() for row in answers})
            raise DataError(f"{name} has no answers by both {' and '.join(policies)}, {how}; found {', '.join(seen)}.")
        return items
    items, bad = [], []
    for line, row in rows:
        try:
            items.append(_to_write(row) if kind == "write" else _from_row(row, kind, gold))
        except DataError as error:
            bad.append(f"  {name}, line {line}, {error}")
    if bad:
        raise DataError(
            f"{len(bad)} bad row{'s' * (len(bad) > 1)}, nothing was imported:\n"
            + "\n".join(bad[:SHOWN]) + ("\n  ..." if len(bad) > SHOWN else "")
        )  # fmt: skip
    if not items:
        raise DataError(f"{name} is empty; expected rows with prompt and responses, or answers by policy.")
    return items


def pair_files(first: tuple[str, Sequence[Row]], second: tuple[str, Sequence[Row]]) -> list[Found]:
    """Comparisons of two files of `prompt` and `response` (or `text`), by prompt; the files' names are the sources.

    Raises:
        DataError: a row has no such fields, or no prompt is in both.
    """
    (name, rows), (other_name, other_rows) = first, second
    by_policy = [
        {"policy": source, "prompt": row.get("prompt"), "text": row.get("response", row.get("text")),
         "category": row.get("category", "")}
        for source, part in ((name, rows), (other_name, other_rows))
        for row in (_mapping(source, line, row) for line, row in part)
    ]  # fmt: skip
    items = list(_from_answers(by_policy, (name, other_name), ""))
    if not items:
        raise DataError(f"{name} and {other_name} share no prompt; expected rows with prompt and response in both.")
    return items


def add_items(session: Session, items: Sequence[Found], *, overlap: int = 1, axes: Sequence[str] = ()) -> Imported:
    """Store what is not there yet. What is there goes to more people if more are wanted now, and to no fewer; and its
    answer is known from now on if the file tells it.

    Args:
        overlap: how many people judge each item.
        axes: what each response of an item to rank is scored on too, such as helpful, harmless.

    Raises:
        DataError: an axis is empty, long, there twice or the tenth.
    """
    if len({*axes}) != len(axes) or len(axes) > MOST_AXES or not all(0 < len(axis.strip()) <= 40 for axis in axes):
        raise DataError(f"Found axes {list(axes)}, expected up to {MOST_AXES} different names of 1 to 40 characters.")
    known: dict[str, int | None] = dict(session.execute(select(Item.key, Item.id)).tuples().all())
    added = {"rank": 0, "compare": 0, "write": 0}
    identical = repeated = more = golds = 0
    for item in map(stored, items):
        if item.identical:
            identical += 1
        elif (key := item.key()) in known:
            repeated += 1
            if (number := known[key]) is not None:
                there = session.get_one(Item, number)
                more += _wanted_by_more(there, overlap)
                golds += _known_from_now_on(there, item)
        else:
            known[key] = None
            scored = list(axes) if item.kind == "rank" else []
            session.add(Item(key=key, overlap=overlap, axes=scored, **item._asdict()))
            added[item.kind] += 1
    return Imported(added, repeated, identical, more, golds)


def _wanted_by_more(there: Item, overlap: int) -> bool:
    fewer = there.overlap < overlap
    there.overlap = max(there.overlap, overlap)
    return fewer


def _known_from_now_on(there: Item, item: Found) -> bool:
    """Whether the file tells another answer than was known; its responses may stand in another order than here."""
    if item.gold is None:
        return False
    ours = sorted(range(len(item.gold)), key=lambda place: (there.responses[place], there.sources[place]))
    theirs = sorted(range(len(item.gold)), key=lambda place: (item.responses[place], item.sources[place]))
    before, gold = there.gold, dict(zip(ours, (item.gold[place] for place in theirs), strict=True))
    there.gold, there.gold_from = [gold[place] for place in range(len(gold))], None
    return there.gold != before


def export_rankings(session: Session, *, keys: Set[str] | None = None) -> Iterator[dict[str, Any]]:
    """Every judgement that ranks, as a row of rankings that stage prepare reads; withdrawn ones are left out.

    Skipped items and those with no acceptable response rank nothing. Nor does the reader take an empty response.

    Args:
        keys: those of the items that count; all if None.
    """
    for judgement in _live(session, "ranked", keys):
        item = judgement.item
        if all(text.strip() for text in item.responses):
            fields = {"responses": item.responses, "ranks": judgement.ranks, "scores": judgement.scores}
            yield _row(judgement, **fields, origins=item.sources if any(item.sources) else None)


def export_demonstrations(session: Session) -> Iterator[dict[str, Any]]:
    """Everything that people wrote, a corrected response too, as demonstrations."""
    for judgement in _live(session, "written"):
        yield _row(judgement, response=judgement.written)


def export_pairs(session: Session) -> Iterator[dict[str, Any]]:
    """Every correction as a pair: what a person made of a response is better than the response. Without a change, none.

    A response that said nothing makes no pair either, since the reader refuses empty texts.
    """
    for judgement in _live(session, "written"):
        for before, source in zip(judgement.item.responses, judgement.item.sources, strict=True):
            if before.strip() and before.strip() != judgement.written:
                origins = [judgement.annotator.name, source] if source else None
                yield _row(judgement, chosen=judgement.written, rejected=before, origins=origins)


EXPORTS = {"rankings": export_rankings, "demonstrations": export_demonstrations, "pairs": export_pairs}


def _live(session: Session, verdict: str, keys: Set[str] | None = None) -> Iterator[Judgement]:
    query = select(Judgement).where(LIVE, Judgement.verdict == verdict).order_by(Judgement.id)
    if keys is not None:
        query = query.join(Item).where(Item.key.in_(keys))
    yield from session.scalars(query)


def _row(judgement: Judgement, **content: Any) -> dict[str, Any]:
    turns = [{"role": role, "content": text} for role, text in judgement.item.prompt]
    single = len(turns) == 1 and turns[0]["role"] == "user"
    origins = content.pop("origins", None)
    row = {
        "prompt": turns[0]["content"] if single else turns,
        **content,
        "source": "human",
        "annotator": judgement.annotator.name,
        "category": judgement.item.category,
        "origins": origins,
        "comment": judgement.comment,
        "seconds": judgement.seconds,
        "guideline": judgement.guideline,
        "judged": judgement.created_at.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return {field: value for field, value in row.items() if value not in (None, "")}


def as_lines(rows: Iterator[dict[str, Any]]) -> str:
    """Rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def stored(item: Found) -> Found:
    """The item with texts that every database takes."""
    return item._replace(
        prompt=[(role, storable(content)) for role, content in item.prompt],
        responses=[storable(text) for text in item.responses],
        sources=[storable(source)[:80] for source in item.sources],
        category=storable(item.category)[:80],
    )


def _to_write(row: Any) -> Found:
    from rlhf_core import data

    if not isinstance(row, Mapping) or "response" not in row:
        prompt, category = data.parse_prompt(row)
        return Found("write", list(prompt), [], [], category)
    prompt, response, category = data.parse_demonstration(row)
    if len(response) > LONGEST:
        raise DataError(f"response: found {len(response)} characters, expected {LONGEST} at most to be corrected")
    return Found("write", list(prompt), [response], [str(row.get("origin", ""))], category)


def _from_row(row: Any, kind: Kind | None, gold: bool) -> Found:
    from rlhf_core import data  # it brings transformers, which takes seconds

    fields = dict(row) if isinstance(row, Mapping) else row
    if isinstance(row, Mapping) and isinstance(row.get("responses"), list) and not gold:
        fields.setdefault("ranks", [1] * len(row["responses"]))  # what a ranking says is not asked for here
    ranking = data.parse_ranking(fields)
    number = len(ranking.responses)
    if number > MOST_RESPONSES or (kind == "compare" and number != 2):
        expected = "2 to compare" if kind == "compare" else f"{MOST_RESPONSES} at most"
        raise DataError(f"responses: found {number}, expected {expected}")
    known = list(ranking.ranks) if gold else None
    sources = _sources(fields)
    return Found(kind or "rank", list(ranking.prompt), list(ranking.responses), sources, ranking.category, known)


def _sources(fields: Mapping[str, Any]) -> list[str]:
    """Who wrote each response, where a row tells: `origins` as names, or as objects with `model`."""
    if "responses" not in fields:
        return ["chosen", "rejected"]
    origins = fields.get("origins")
    if not isinstance(origins, list) or len(origins) != len(fields["responses"]):
        return [""] * len(fields["responses"])
    return [str(origin.get("model", "") if isinstance(origin, Mapping) else origin) for origin in origins]


def _from_answers(
    answers: Sequence[Mapping[str, Any]], policies: Sequence[str], how: str, kind: Kind = "compare"
) -> Iterator[Found]:
    """The n-th answer of one policy to a prompt beside the n-th of the other."""
    texts: dict[tuple[str, str, int], str] = {}
    prompts: dict[str, tuple[Any, str]] = {}
    for row in answers:
        if row.get("how", "") not in ("", how):
            continue
        prompt, text = row.get("prompt"), row.get("text")
        if not isinstance(text, str) or not prompt:
            raise DataError(
                f"Found an answer by {row['policy']} with prompt {prompt!r:.60} and text {text!r:.60}, expected both."
            )
        name = json.dumps(prompt, ensure_ascii=False)
        prompts.setdefault(name, (prompt, str(row.get("category") or "")))
        place = next(number for number in count() if (name, row["policy"], number) not in texts)
        texts[name, row["policy"], place] = text
    for name, (prompt, category) in prompts.items():
        for place in count():
            pair = [texts.get((name, policy, place)) for policy in policies]
            if None in pair:
                break
            yield Found(kind, as_turns(prompt), [text or "" for text in pair], list(policies), category)


def as_turns(prompt: Any) -> list[tuple[str, str]]:
    """A prompt, a text or messages, as pairs of role and content."""
    from rlhf_core import data

    return list(data.parse_prompt({"prompt": prompt}).prompt)


def _mapping(name: str, line: int, row: Any) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataError(f"{name}, line {line}: found {row!r:.60}, expected one JSON object a line")
    return row


def names(text: str) -> list[str]:
    """Names that are separated by commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def read_file(path: str) -> list[Row]:
    """The rows of a file in any form that stage prepare reads."""
    from rlhf_core.data import read_rows

    return list(read_rows(path))


def label(path: str) -> str:
    """A file's name without its endings, as the source of its responses."""
    return Path(path).name.partition(".")[0]
