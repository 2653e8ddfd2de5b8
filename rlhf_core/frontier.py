"""Reward over distance across runs: every run's PPO, DPO and best-of-n on one plane, and who is beaten there.

After Gao et al. 2022, https://arxiv.org/abs/2210.10760. A page that stands alone, like the report, with the report's
look. Leaves out where runs come from: that is tasks/frontier.py's business.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from rlhf_core.charts import COLOURS, house_style, new_axes, number, plain, root, short, svg

MARKS = {"SFT": ("o", "sft"), "PPO": ("o", "ppo"), "DPO": ("D", "dpo"), "best of": ("s", "gold")}
JUDGES = {"gold_reward": "Gold reward", "reward": "Reward that PPO was trained on"}
LEAD = (
    "What each method reaches on held-out prompts, and how far from the SFT policy it went for it. Up and to the left "
    "is better. A score is bold, and its mark has a number, where no other point reaches as much at no more distance. "
    "The gold judge is the one to believe: no policy was trained on it. The KL of best-of-n is an upper bound, "
    "log n − (n − 1)/n."
)
CORNERS = ((-11, 9), (11, -9), (11, 9), (-11, -9))  # of a mark, points
KEY = "● SFT and PPO   ◆ DPO   ■ best of n SFT answers   grey: beaten"


class Point(NamedTuple):
    """What one method of one run reaches on held-out prompts."""

    run: str
    method: str  # SFT, PPO, DPO or "best of 4"
    kl: float  # to SFT, nats a response; of best-of-n an upper bound
    reward: float
    gold_reward: float
    settings: str = ""  # what tells the run from the others


class Group(NamedTuple):
    """Points that may be compared: the same judges, SFT policy, held-out prompts and sampling."""

    conditions: str
    points: Sequence[Point]


def on_frontier(points: Sequence[Point], judge: str) -> list[bool]:
    """Whether no other point has at least the score at no more KL, one of the two strictly better.

    Args:
        judge: "reward" or "gold_reward".
    """

    def beats(one: Point, other: Point) -> bool:
        ours, theirs = getattr(one, judge), getattr(other, judge)
        return one.kl <= other.kl and ours >= theirs and (one.kl < other.kl or ours > theirs)

    return [not any(beats(other, point) for other in points) for point in points]


def render_frontier(groups: Sequence[Group]) -> str:
    """The page: for each group a chart a judge, and a table in which the chart's numbers are explained."""
    parts = []
    for group in groups:
        # By gold score, the best first: a reader looks for the top left corner.
        points = sorted(group.points, key=lambda point: (-point.gold_reward, point.kl))
        with house_style():
            charts = [_chart(points, judge) for judge in JUDGES]
        parts.append(
            Markup('<section><p class="muted">{}</p><div class="charts">{}</div>{}</section>').format(
                plain(group.conditions), Markup("").join(charts), _table(points)
            )
        )
    apart = (
        "These runs differ in their judge, SFT policy, held-out prompts or sampling, so scores of one section say "
        "nothing about those of another."
    )
    note = Markup("<p>{}</p>").format(apart) if len(groups) > 1 else Markup("")
    return render_page(
        title="Reward over distance, across runs", lead=LEAD, body=note + Markup("\n") + Markup("").join(parts)
    )


def render_page(*, title: str, lead: str, body: Markup) -> str:
    """A page that stands alone, in this look; title and lead are text."""
    return PAGE.format(title=title, lead=lead, body=body)


def _chart(points: Sequence[Point], judge: str) -> Markup:
    figure, axes = new_axes(width=430 / 72, height=330 / 72)
    best = on_frontier(points, judge)
    line = sorted((root(point.kl), getattr(point, judge)) for point, on in zip(points, best, strict=True) if on)
    axes.step(*zip(*line, strict=True), where="post", color=COLOURS["muted"], linewidth=1, dashes=(3, 3))
    said, labels = [], []
    for place, (point, on) in enumerate(zip(points, best, strict=True), start=1):
        marker, colour = next(mark for method, mark in MARKS.items() if point.method.startswith(method))
        x, y = root(point.kl), getattr(point, judge)
        size, colour = (9, colour) if on else (6, "grid")
        axes.plot(x, y, marker, color=COLOURS[colour], markersize=size, zorder=size)
        if on:
            labels.append((x, y, str(place), colour))
            said.append(f"{place}, {point.method} of {plain(point.run)}: {number(y)} at √KL {number(x)}")
    axes.margins(x=0.09, y=0.12)
    number_marks(axes, labels)
    axes.set_xlabel("√KL to SFT")
    axes.locator_params(axis="y", nbins=6)
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    alt = f"{JUDGES[judge]} over the square root of the KL, {len(points)} points. Not beaten: " + "; ".join(said) + "."
    return Markup("<figure><figcaption><h2>{}</h2><p>{}</p></figcaption>{}</figure>").format(
        JUDGES[judge], KEY, svg(figure, alt)
    )


def number_marks(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Write a number beside each mark, at the corner of it where none stands yet."""
    axes.autoscale_view()
    taken: list[Any] = []
    for x, y, text, colour in labels:
        at = axes.transData.transform((x, y))
        free = [corner for corner in CORNERS if all(np.hypot(*(at + np.array(corner) - other)) > 14 for other in taken)]
        corner = (free or CORNERS)[0]
        taken.append(at + np.array(corner))
        axes.annotate(text, (x, y), corner, textcoords="offset points", ha="center", va="center", fontweight="bold",
                      color=COLOURS[colour])  # fmt: skip


def _table(points: Sequence[Point]) -> Markup:
    gold, proxy = on_frontier(points, "gold_reward"), on_frontier(points, "reward")
    rows = []
    for place, (point, by_gold, by_proxy) in enumerate(zip(points, gold, proxy, strict=True), start=1):
        at_most = "≤ " if point.method.startswith("best of") else ""
        cells = [
            Markup('<td class="{}">{}</td>').format(shown, text)
            for shown, text in (
                ("on" if by_gold else "", number(point.gold_reward)),
                ("on" if by_proxy else "", number(point.reward)),
                ("", at_most + number(point.kl, 1)),
                ("", number(root(point.kl))),
            )
        ]
        rows.append(
            Markup('<tr class="{}"><td>{}</td><th scope="row">{}</th><td>{}<small>{}</small></td>{}</tr>').format(
                "" if by_gold or by_proxy else "beaten", place, point.method, plain(point.run), plain(point.settings),
                Markup("").join(cells),
            )
        )  # fmt: skip
    heads = ("", "method", "run", "gold reward", "reward", "KL, nats a response", "√KL")
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in heads)
    return Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(head, Markup("").join(rows))


# Braces of the style sheet are doubled for `format`.
PAGE = Markup(
    re.sub(
        r"\n +",
        "\n",
        """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>RLHF runs: {title}</title>
<style>
:root {{
  --paper: #fdfcf9; --ink: #1d1c1a; --muted: #66625b; --grid: #cfcac0; --base: #6b6b6b;
  --sft: #0067a5; --ppo: #b84a00; --dpo: #00705a; --proxy: #8a4a86; --gold: #8a6a00;
  --sans: -apple-system, BlinkMacSystemFont, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --paper: #17171a; --ink: #ecebe7; --muted: #a3a09a; --grid: #4a494d; --base: #b4b4b4;
    --sft: #6bb8ee; --ppo: #f5935a; --dpo: #4ec7a4; --proxy: #d59bd1; --gold: #e0b84c;
  }}
}}
* {{ box-sizing: border-box; }}
html {{ background: var(--paper); color: var(--ink); font: 16px/1.5 var(--sans); -webkit-text-size-adjust: 100%; }}
body {{ max-width: 1080px; margin: 0 auto; padding: 2.5rem 1.2rem 4rem; }}
h1 {{ font-size: 1.7rem; line-height: 1.2; }} h2 {{ font-size: 1rem; margin: 0; }} p {{ max-width: 46em; }}
.muted, figcaption p, small {{ color: var(--muted); font-size: .82rem; }}
section {{ border-top: 1px solid var(--grid); margin-top: 2rem; padding-top: .6rem; overflow-x: auto; }}
.charts {{ display: grid; gap: 1.5rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); }}
figure {{ margin: 0; min-width: 0; }} figcaption p {{ margin: .2rem 0 .6rem; white-space: pre-wrap; }}
svg {{ display: block; width: 100%; height: auto; overflow: visible; font-family: var(--sans); }}
svg text {{ fill: var(--ink); }}
table {{ border-collapse: collapse; width: 100%; margin-top: 2rem; font-size: .88rem; }}
table {{ font-variant-numeric: tabular-nums; }}
th, td {{ text-align: right; padding: .45rem 0 .45rem 1rem; border-bottom: 1px solid var(--grid); font-weight: 400; }}
th:nth-child(2), td:nth-child(3), th:nth-child(3) {{ text-align: left; }} td small {{ display: block; }}
tbody th {{ white-space: nowrap; }} .on {{ font-weight: 700; }} .beaten {{ color: var(--muted); }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{lead}</p>
{body}
</body>
</html>
""",
    )
)
