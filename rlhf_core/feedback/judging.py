"""Which item a person sees next and in which order, and what becomes of their judgement.

Annotators never learn who wrote a response: nothing here returns an item's sources.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from heapq import nsmallest
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from sqlalchemy import BindParameter, ColumnElement, Select, Subquery, bindparam, case, func, select
from sqlalchemy.orm import Session

from rlhf_core.feedback.store import Claim, Guideline, Item, Judgement, now

Kind = Literal["rank", "compare", "write"]
MOST_SCORE = 5  # of an axis; 1 is the least
LOOKS = 20  # free items that are looked at once more before the whole search is done again
LONGEST = 20_000  # characters that a person writes
KEPT = timedelta(minutes=30)  # how long an item that was shown to one person is kept from the others
LIVE = Judgement.withdrawn_at.is_(None)
COUNTS = LIVE & (Judgement.verdict != "skipped")


class Refused(Exception):
    """A judgement that may not be stored: a status of HTTP, and why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def storable(text: Any) -> Any:
    """The text without what a database refuses: NUL, which PostgreSQL has no place for, and halves of characters.

    What is no text stays as it is, for others to refuse.
    """
    if not isinstance(text, str):
        return text
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


Storable = Annotated[str, BeforeValidator(storable)]


class Submission(BaseModel):
    """What the page sends. `ranks` and `scores` stand in the order of the page; rank 1 is best, score 5 is."""

    model_config = ConfigDict(extra="forbid")
    client_id: Storable = Field(min_length=8, max_length=64)
    item: Storable = Field(max_length=32)  # its ticket
    verdict: Literal["ranked", "none", "written", "skipped"]
    ranks: list[int] | None = Field(None, max_length=9)
    scores: dict[Storable, list[int]] | None = None
    written: Storable | None = Field(None, max_length=LONGEST)
    comment: Storable = Field("", max_length=4000)
    seconds: float = Field(ge=0, le=86400)


class Shown(NamedTuple):
    """An item as its annotator sees it."""

    item: str  # its ticket
    category: str
    prompt: list[tuple[str, str]]
    responses: list[str]  # in the order of the page
    axes: list[str]  # what each response is scored on too
    ranks: list[int] | None  # of the judgement that was undone, in the order of the page, as are scores
    scores: dict[str, list[int]]
    written: str | None
    comment: str


class Progress(NamedTuple):
    """Judgements of a kind: by this person, by all, how many are wanted, and what is left of today's work."""

    mine: int
    done: int
    wanted: int
    today: int  # by this person
    left: int  # for this person today: what they may still judge, or what is missing of the day's number


def show_next(
    session: Session, annotator: int, kind: Kind, *, lock: Callable[[Session], None] = lambda _: None
) -> Shown | None:
    """The item that a person judges next, kept for them for half an hour; None if nothing is left for them.

    One that was undone comes first, then the one that was shown last, then the rest in an order of this person's own.

    Args:
        lock: `Store.lock`, so that two people who ask in one moment do not both take the last place of one item.
    """
    undone = session.scalar(_UNDONE, {"me": annotator, "kind": kind})
    item = undone.item if undone else _choose(session, annotator, kind, lock)
    if item is None:
        return None
    claim = session.get(Claim, (annotator, item.id)) or Claim(annotator_id=annotator, item_id=item.id)
    claim.shown_at = now()
    session.add(claim)
    order = presented_order(annotator, item)

    def as_shown(values: list[Any] | None) -> list[Any] | None:
        return [values[index] for index in order] if values else None

    scores = (undone.scores if undone else None) or {}
    return Shown(
        item=item.ticket,
        category=item.category,
        prompt=[(role, content) for role, content in item.prompt],
        responses=[item.responses[index] for index in order],
        axes=item.axes,
        ranks=as_shown(undone.ranks if undone else None),
        scores={axis: as_shown(values) or [] for axis, values in scores.items()},
        written=undone.written if undone else None,
        comment=undone.comment if undone else "",
    )


def presented_order(annotator: int, item: Item) -> list[int]:
    """Indexes of an item's responses as one person sees them: random over people and items, the same at each look."""
    order = list(range(len(item.responses)))
    random.Random(_draw(annotator, item.key)).shuffle(order)
    return order


def submit(
    session: Session,
    annotator: int,
    sent: Submission,
    guideline: str,
    *,
    queue: Callable[[Session], None] = lambda _: None,
) -> bool:
    """Store a judgement; False if it was stored before.

    Args:
        queue: `Store.queue`, called when all is checked and only the writing is left.

    Raises:
        Refused: it is not this person's to give, there is one already, or it is not whole.
    """
    item = session.scalar(select(Item).where(Item.ticket == sent.item))
    # Looked up before the repeat: sent twice at once, the one that comes second finds the first one in both.
    judged = item and session.scalar(select(Judgement.id).where(_of(annotator, item.id), LIVE))
    known = session.scalar(select(Judgement).where(Judgement.client_id == sent.client_id))
    if known is not None:
        if (known.annotator_id, known.item.ticket) != (annotator, sent.item):
            raise Refused(409, "This judgement was stored for another item.")
        return False
    if item is None or session.get(Claim, (annotator, item.id)) is None:
        raise Refused(404, "There is no such item of yours.")
    _check(sent, item)
    if judged is not None:
        raise Refused(409, "You have judged this item already.")
    order = presented_order(annotator, item)
    queue(session)

    def by_item(values: Sequence[int]) -> list[int]:
        return [value for _, value in sorted(zip(order, values, strict=True))]

    session.add(
        Judgement(
            client_id=sent.client_id, annotator_id=annotator, item_id=item.id, verdict=sent.verdict,
            ranks=by_item(sent.ranks) if sent.ranks else None,
            scores={axis: by_item(values) for axis, values in sent.scores.items()} if sent.scores else None,
            written=sent.written.strip() if sent.written else None,
            presented=order, comment=sent.comment.strip(), seconds=sent.seconds, guideline=guideline,
        )
    )  # fmt: skip
    session.flush()
    return True


def undo(session: Session, annotator: int, judgement: int) -> None:
    """Withdraw a judgement; the item comes again. The judgement stays in the database.

    Raises:
        Refused: it is another person's, or there is none; or a ranking whose round is over, which learned from it.
    """
    found = session.get(Judgement, judgement)
    if found is None or found.annotator_id != annotator:
        raise Refused(404, "There is no such judgement of yours.")
    if found.item.kind == "rank" and not found.item.overlap and found.withdrawn_at is None:
        raise Refused(409, "What you ranked last is of a round that is over: it was learned from as it is.")
    found.withdrawn_at = found.withdrawn_at or now()
    if found.item.gold_from == judgement:
        found.item.gold = found.item.gold_from = None


def last_judgement(session: Session, annotator: int, kind: Kind) -> int | None:
    """The id of what a person said last, which undo takes back; of rankings, of items that are open."""
    return session.scalar(_LAST, {"me": annotator, "kind": kind})


def progress(session: Session, annotator: int | None, kind: Kind, *, a_day: int = 0) -> Progress:
    """How far a kind is. What is judged more often than wanted counts as often as wanted.

    Args:
        a_day: judgements of this kind that a person is asked for a day; 0 for as many as there are.
    """
    midnight = datetime.now().astimezone().replace(hour=0, minute=0, second=0, microsecond=0).astimezone(UTC)
    about = {"me": annotator, "kind": kind}
    done, wanted, left = session.execute(_ALL, about).one()
    mine, today = session.execute(_MINE, {**about, "midnight": midnight}).one()
    today, left = today or 0, (left or 0) if annotator is not None else 0
    left = min(left, max(0, a_day - today)) if a_day else left
    return Progress(mine, done or 0, wanted or 0, today, left)


def keep_guideline(session: Session, text: str) -> str:
    """The version of a guideline: its hash. The text is kept, so that it can be read later."""
    version = hashlib.sha256(text.encode()).hexdigest()[:12]
    if session.get(Guideline, version) is None:
        session.add(Guideline(version=version, text=text))
    return version


def _choose(session: Session, annotator: int, kind: Kind, lock: Callable[[Session], None]) -> Item | None:
    """Look first and lock then: what was free a moment ago is looked at once more, which takes little time."""
    about = {"me": annotator, "kind": kind, "since": now() - KEPT}
    rows = session.execute(_OPEN, about).all()
    first = nsmallest(LOOKS, rows, key=lambda row: (row.shown_at is None, _draw(annotator, row.key)))
    if first:  # what will nearly always be taken is read before the others have to wait
        session.get(Item, first[0].id)
        session.get(Claim, (annotator, first[0].id))
    lock(session)
    for row in first:
        if session.execute(_OPEN_ONE, {**about, "item": row.id}).first():
            return session.get(Item, row.id)
    if len(rows) <= LOOKS:
        return None
    still = session.execute(_OPEN, about).all()  # many people took many items in this moment
    chosen = min(still, key=lambda row: _draw(annotator, row.key), default=None)
    return session.get(Item, chosen.id) if chosen else None


# ---- the questions to the database, put together once: that costs more than most of the answers
#
# `me` is who asks, `kind` of which items, `item` which one, `since` how long an item that was shown is kept. Judgements
# of this person count as others' do where it is asked whether a place is left: an item that they judged is not open.

ME: BindParameter[int] = bindparam("me")
KIND: BindParameter[str] = bindparam("kind")
_JUDGED_BY_ME = select(Judgement.item_id).where(Judgement.annotator_id == ME, LIVE)


def _count_by_item(*conditions: ColumnElement[bool]) -> Subquery:
    query = select(Judgement.item_id, func.count().label("number")).where(COUNTS, *conditions)
    return query.group_by(Judgement.item_id).subquery()


def _open_to_me(taken: ColumnElement[int]) -> ColumnElement[bool]:
    """What makes an item one that this person may still judge. Gold questions are for everybody."""
    return Item.id.not_in(_JUDGED_BY_ME) & ((taken < Item.overlap) | Item.gold.is_not(None))


def _open_items(*, one: bool) -> Select[tuple[int, str, datetime]]:
    """Number, key and when it was last shown, of each item that this person may judge and others leave a place of.

    With one item only that; said in every part, since databases count all the others otherwise.
    """
    only = [column == bindparam("item") for column in (Judgement.item_id, Claim.item_id, Item.id) if one]
    given = _count_by_item(*only[:1])
    answered = select(Judgement.id).where(
        Judgement.annotator_id == Claim.annotator_id, Judgement.item_id == Claim.item_id, LIVE
    )
    held = (
        select(Claim.item_id, func.count().label("number"))
        .where(Claim.annotator_id != ME, Claim.shown_at > bindparam("since"), ~answered.exists(), *only[1:2])
        .group_by(Claim.item_id)
        .subquery()
    )
    taken = func.coalesce(given.c.number, 0) + func.coalesce(held.c.number, 0)
    return (
        select(Item.id, Item.key, Claim.shown_at)
        .outerjoin(given, given.c.item_id == Item.id)
        .outerjoin(held, held.c.item_id == Item.id)
        .outerjoin(Claim, (Claim.item_id == Item.id) & (Claim.annotator_id == ME))
        .where(Item.kind == KIND, _open_to_me(taken), *only[2:])
    )


def _all() -> Select[tuple[int, int, int]]:
    """Of a kind: judgements given, of each item as many as wanted at most; wanted; and items open to this person.

    Of an item that was closed, such as a round's after its end, as many are wanted as it has.
    """
    given = _count_by_item()
    number = func.coalesce(given.c.number, 0)
    wanted = case((Item.overlap == 0, number), else_=Item.overlap)
    return (
        select(
            func.sum(case((number < wanted, number), else_=wanted)),
            func.sum(wanted),
            func.sum(case((_open_to_me(number), 1), else_=0)),
        )
        .outerjoin(given, given.c.item_id == Item.id)
        .where(Item.kind == KIND)
    )


_OPEN, _OPEN_ONE, _ALL = _open_items(one=False), _open_items(one=True), _all()
_MINE = (
    select(func.count(), func.sum(case((Judgement.created_at >= bindparam("midnight"), 1), else_=0)))
    .select_from(Judgement)
    .join(Item)
    .where(COUNTS, Item.kind == KIND, Judgement.annotator_id == ME)
)
_LAST = (
    select(Judgement.id)
    .join(Item)
    .where(Judgement.annotator_id == ME, LIVE, Item.kind == KIND, (Item.overlap > 0) | (Item.kind != "rank"))
    .order_by(Judgement.id.desc())
    .limit(1)
)
_UNDONE = (
    select(Judgement)
    .join(Item)
    .where(Judgement.annotator_id == ME, Judgement.withdrawn_at.is_not(None), Item.kind == KIND)
    .where(Item.id.not_in(_JUDGED_BY_ME))
    .order_by(Judgement.withdrawn_at.desc(), Judgement.id.desc())
    .limit(1)
)


def _of(annotator: int, item: int) -> ColumnElement[bool]:
    return (Judgement.annotator_id == annotator) & (Judgement.item_id == item)


@lru_cache(maxsize=100_000)
def _draw(annotator: int, key: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{annotator} {key}".encode()).digest()[:8], "big")


def _check(sent: Submission, item: Item) -> None:
    """Refuse a judgement that is not whole, or that holds what its verdict has no place for."""
    number = len(item.responses)
    if sent.verdict != "skipped" and (sent.verdict == "written") != (item.kind == "write"):
        raise Refused(422, f"Found verdict {sent.verdict}, which an item to {item.kind} does not have.")
    if (sent.verdict == "written") != bool(sent.written and sent.written.strip()):
        raise Refused(422, f"Found {'no ' * (not sent.written)}text with verdict {sent.verdict}.")
    if sent.verdict != "ranked":
        if sent.ranks is not None or sent.scores:
            raise Refused(422, f"Found ranks or scores with verdict {sent.verdict}, expected none.")
        return
    if not sent.ranks or len(sent.ranks) != number or not all(1 <= rank <= number for rank in sent.ranks):
        raise Refused(422, f"Found ranks {sent.ranks}, expected {number} whole numbers from 1 to {number}.")
    scores = sent.scores or {}
    whole = all(len(of) == number and all(1 <= score <= MOST_SCORE for score in of) for of in scores.values())
    if set(scores) != set(item.axes) or not whole:
        axes = ", ".join(item.axes) or "no axis"
        raise Refused(422, f"Found scores {scores}, expected {number} from 1 to {MOST_SCORE} for {axes}.")
