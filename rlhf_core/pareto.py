"""What runs with other weights or limits reach on two axes at once: which are beaten, as a chart and a page.

The plane of two objectives, as frontier.py is that of reward over distance. Leaves out where the numbers come from:
that is flows/frontier.py's business.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

from markupsafe import Markup

from rlhf_core.charts import COLOURS, house_style, new_axes, number, plain, short, svg
from rlhf_core.frontier import number_marks, render_page
from rlhf_core.statistics import Interval

JUDGES = {"gold": "By the gold model", "reward": "By the reward model that PPO was trained on"}
MARKS = {"sft": ("s", "sft"), "weight": ("o", "ppo"), "limit": ("D", "dpo")}
KEY = "■ SFT   ● weights   ◆ a limit on the cost   bars: 95% intervals   grey: beaten"


class Outcome(NamedTuple):
    """What a policy reaches on held-out prompts, by one judge."""

    x: Interval  # on the first axis
    y: Interval  # on the second


class Reached(NamedTuple):
    """One run of a sweep."""

    name: str
    settings: str  # in words
    by: dict[str, Outcome]  # under each of JUDGES
    kl: float  # to SFT, nats a response
    weight: float | None = None  # of the second axis, where there are weights
    limit: float | None = None  # most mean cost, which is y with the opposite sign, where it is limited

    @property
    def kind(self) -> str:
        """One of MARKS."""
        return "limit" if self.limit is not None else "weight" if self.weight is not None else "sft"


def unbeaten(points: Sequence[Reached], judge: str) -> list[bool]:
    """Whether no other point reaches at least as much on both axes, and more on one; by the means."""

    def beats(one: Outcome, other: Outcome) -> bool:
        at_least = one.x.mean >= other.x.mean and one.y.mean >= other.y.mean
        return at_least and (one.x.mean > other.x.mean or one.y.mean > other.y.mean)

    return [not any(beats(other.by[judge], point.by[judge]) for other in points) for point in points]


def against_the_weights(points: Sequence[Reached], judge: str) -> list[tuple[str, str]]:
    """Pairs of points between which an axis moved the wrong way by more than the two intervals allow.

    As the second axis gains weight, y should not fall and x should not rise. Empty: monotone within the intervals. All
    pairs are compared, since a slow drift may be within them from each point to the next.
    """
    weighted = sorted((point for point in points if point.weight is not None), key=lambda point: point.weight or 0.0)
    wrong = []
    for one, other in combinations(weighted, 2):
        low, high = one.by[judge], other.by[judge]
        if high.y.high < low.y.low or high.x.low > low.x.high:
            wrong.append((one.name, other.name))
    return wrong


def verdicts(points: Sequence[Reached], axes: tuple[str, str]) -> list[str]:
    """What the points say, in sentences: is the frontier monotone, are limits kept, and what did they cost."""
    said = []
    for judge, by in JUDGES.items():
        weighted = [point for point in points if point.weight is not None]
        if len(weighted) > 1:
            wrong = against_the_weights(points, judge)
            said.append(
                f"{by}, as {axes[1]} gains weight it never falls and {axes[0]} never rises by more than the intervals."
                if not wrong
                else f"{by}, an axis moves against the weights by more than the intervals between "
                + ", ".join(f"{one} and {other}" for one, other in wrong) + "."
            )  # fmt: skip
        for point in points:
            if point.limit is None:
                continue
            x, y = point.by[judge]
            kept = "within" if -y.mean <= point.limit else "above"
            sure = "" if (-y.low <= point.limit) == (-y.high <= point.limit) else ", though the interval holds both"
            allowed = [other for other in weighted if -other.by[judge].y.mean <= point.limit]
            best = max(allowed, key=lambda other: other.by[judge].x.mean, default=None)
            text = (
                f"{by}, {point.name} ends {kept} its limit: mean cost {number(-y.mean)} ({number(-y.high)} to "
                f"{number(-y.low)}), limit {number(point.limit)}{sure}."
            )
            if best is None:
                text += " No weighted run keeps that limit."
            else:
                beside = best.by[judge].x
                more = "more" if x.mean > beside.mean else "less"
                text += (
                    f" It has {more} {axes[0]} ({number(x.mean)}, {number(x.low)} to {number(x.high)}) than the best "
                    f"weighted run that keeps the limit, {best.name} ({number(beside.mean)}, {number(beside.low)} to "
                    f"{number(beside.high)})."
                )
            said.append(text)
    return said


def render_pareto(points: Sequence[Reached], axes: tuple[str, str], title: str) -> str:
    """The page: a chart a judge, what they say in words, and a table with every number."""
    with house_style():
        charts = [_chart(points, axes, judge) for judge in JUDGES]
    words = Markup("").join(Markup("<li>{}</li>").format(plain(line)) for line in verdicts(points, axes))
    lead = (
        f"What each run's PPO policy reaches on held-out prompts: {axes[0]} to the right, {axes[1]} upwards, in "
        "deviations of what SFT answers at temperature 1. A mark has a number, and its row is bold, where no other run "
        "reaches as much on both. The gold model is the one to believe: no policy was trained on it."
    )
    body = Markup('<section><div class="charts">{}</div><ul>{}</ul>{}</section>').format(
        Markup("").join(charts), words, _table(points, axes)
    )
    return render_page(title=plain(title), lead=plain(lead), body=body)


def _chart(points: Sequence[Reached], axes: tuple[str, str], judge: str) -> Markup:
    figure, plane = new_axes(width=430 / 72, height=350 / 72)
    best = unbeaten(points, judge)
    line = sorted(
        (point.by[judge].x.mean, point.by[judge].y.mean) for point, on in zip(points, best, strict=True) if on
    )
    plane.step(*zip(*line, strict=True), where="pre", color=COLOURS["muted"], linewidth=1, dashes=(3, 3))
    said, labels = [], []
    for place, (point, on) in enumerate(zip(points, best, strict=True), start=1):
        (x, y), (marker, colour) = point.by[judge], MARKS[point.kind]
        size, colour = (9, colour) if on else (6, "grid")
        plane.plot([x.low, x.high], [y.mean, y.mean], color=COLOURS[colour], linewidth=1, alpha=0.6, zorder=size - 1)
        plane.plot([x.mean, x.mean], [y.low, y.high], color=COLOURS[colour], linewidth=1, alpha=0.6, zorder=size - 1)
        plane.plot(x.mean, y.mean, marker, color=COLOURS[colour], markersize=size, zorder=size)
        if on:
            labels.append((x.mean, y.mean, str(place), colour))
            said.append(f"{place}, {plain(point.name)}: {number(x.mean)} and {number(y.mean)}")
    for limit in sorted({point.limit for point in points if point.limit is not None}):
        plane.axhline(-limit, color=COLOURS["dpo"], linewidth=0.8, dashes=(1, 3))  # allowed lies above
    plane.margins(x=0.09, y=0.12)
    number_marks(plane, labels)
    plane.set_xlabel(plain(axes[0]))
    plane.set_ylabel(plain(axes[1]))
    for axis in (plane.xaxis, plane.yaxis):
        axis.set_major_formatter(lambda value, _: short(value))
    alt = f"{axes[1]} over {axes[0]}, {len(points)} points. Not beaten: " + "; ".join(said) + "."
    return Markup("<figure><figcaption><h2>{}</h2><p>{}</p></figcaption>{}</figure>").format(
        JUDGES[judge], KEY, svg(figure, alt)
    )


def _table(points: Sequence[Reached], axes: tuple[str, str]) -> Markup:
    best = {judge: unbeaten(points, judge) for judge in JUDGES}
    rows = []
    for place, point in enumerate(points, start=1):
        on = {judge: best[judge][place - 1] for judge in JUDGES}
        cells = Markup("").join(
            Markup('<td class="{}">{}<small>{} to {}</small></td>').format(
                "on" if on[judge] else "", number(found.mean), number(found.low), number(found.high)
            )
            for judge in JUDGES
            for found in point.by[judge]
        )
        rows.append(
            Markup('<tr class="{}"><td>{}</td><th scope="row">{}</th><td>{}</td>{}<td>{}</td></tr>').format(
                "" if any(on.values()) else "beaten", place, plain(point.name), plain(point.settings), cells,
                number(point.kl, 1),
            )
        )  # fmt: skip
    heads = ["", "run", "settings", *(f"{axis}, {judge}" for judge in JUDGES for axis in axes), "KL, nats a response"]
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(plain(name)) for name in heads)
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, Markup("").join(rows))
