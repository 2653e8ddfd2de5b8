"""Two objectives on one plane: who is beaten, what is said of limits and weights, and a page that stands alone."""

import re

from rlhf_core.pareto import Outcome, Reached, against_the_weights, render_pareto, unbeaten, verdicts
from rlhf_core.statistics import Interval

AXES = ("helpful", "harmless")


def point(name: str, x: float, y: float, *, gold: tuple[float, float] | None = None, **more: float) -> Reached:
    """A point with intervals of ±0.1, the same by both judges unless `gold` says otherwise."""

    def outcome(x: float, y: float) -> Outcome:
        return Outcome(Interval(x, x - 0.1, x + 0.1), Interval(y, y - 0.1, y + 0.1))

    by = {"gold": outcome(*(gold or (x, y))), "reward": outcome(x, y)}
    return Reached(name, f"settings of {name}", by, 2.0, **more)


POINTS = [
    point("SFT", 0.0, 0.0),
    point("w0", 1.0, 0.1, weight=0.0),
    point("w0.5", 0.7, 0.5, weight=0.5),
    point("w0.8", 0.6, 0.5, weight=0.8),
    point("w1", -0.2, 0.9, gold=(-0.2, 0.2), weight=1.0),
    point("limit", 0.8, 0.4, limit=-0.3),
]


def test_a_point_is_beaten_by_one_with_as_much_of_both_and_more_of_one() -> None:
    # w0.8 has as much of y as w0.5 and less of x. By gold w1 falls behind.
    assert unbeaten(POINTS, "reward") == [False, True, True, False, True, True]
    assert unbeaten(POINTS, "gold") == [False, True, True, False, False, True]
    assert unbeaten([POINTS[1], POINTS[1]], "reward") == [True, True]  # equals beat each other not


def test_the_frontier_falls() -> None:
    for judge in ("gold", "reward"):
        best = [one.by[judge] for one, on in zip(POINTS, unbeaten(POINTS, judge), strict=True) if on]
        ys = [one.y.mean for one in sorted(best, key=lambda one: one.x.mean)]
        assert ys == sorted(ys, reverse=True)


def test_weights_are_followed_within_the_intervals_or_the_pair_is_named() -> None:
    assert against_the_weights(POINTS, "reward") == []
    # y falls from 0.5, twice, to 0.2.
    assert against_the_weights(list(reversed(POINTS)), "gold") == [("w0.5", "w1"), ("w0.8", "w1")]
    risen = [POINTS[1], point("more", 1.25, 0.2, weight=0.5), point("within", 1.4, 0.3, weight=1.0)]
    # x rises by 0.25, then by 0.15 only, which is 0.4 together.
    assert against_the_weights(risen, "reward") == [("w0", "more"), ("w0", "within")]
    assert against_the_weights([POINTS[0], POINTS[5]], "gold") == []


def test_a_slow_drift_is_against_the_weights_too() -> None:
    # y falls by 0.2 from each to the next, which ±0.15 twice allow, and by 0.4 from the first to the third.
    def drifting(place: int) -> Reached:
        y = 0.4 - 0.2 * place
        outcome = Outcome(Interval(0.0, -0.15, 0.15), Interval(y, y - 0.15, y + 0.15))
        return Reached(f"w{place}", "", {"gold": outcome, "reward": outcome}, 2.0, weight=place / 4)

    assert against_the_weights([drifting(0), drifting(1)], "gold") == []
    found = against_the_weights([drifting(place) for place in range(5)], "gold")
    assert found == [("w0", "w2"), ("w0", "w3"), ("w0", "w4"), ("w1", "w3"), ("w1", "w4"), ("w2", "w4")]


def test_a_limit_is_told_with_the_best_weighted_run_that_keeps_it() -> None:
    said = "\n".join(verdicts(POINTS, AXES))
    # The cost is −y: −0.4 with ±0.1, so −0.5 to −0.3, which the limit of −0.3 just allows.
    assert (
        "By the reward model that PPO was trained on, limit ends within its limit: mean cost −0.40 (−0.50 to −0.30), "
        "limit −0.30. It has more helpful (0.80, 0.70 to 0.90) than the best weighted run that keeps the limit, w0.5 "
        "(0.70, 0.60 to 0.80)."
    ) in said
    assert "By the reward model that PPO was trained on, as harmless gains weight it never falls and helpful" in said
    assert "an axis moves against the weights by more than the intervals between w0.5 and w1, w0.8 and w1." in said


def test_a_limit_that_was_passed_or_that_no_weights_keep_is_told_too() -> None:
    (_, said) = verdicts([POINTS[1], point("tight", 0.2, 0.35, limit=-0.4)], AXES)
    assert "tight ends above its limit: mean cost −0.35" in said
    assert "though the interval holds both. No weighted run keeps that limit." in said
    (_, less) = verdicts([POINTS[2], point("loose", 0.2, 0.9, limit=-0.4)], AXES)
    assert "It has less helpful (0.20, 0.10 to 0.30) than the best" in less
    assert len(verdicts([POINTS[0]], AXES)) == 0


def test_the_page_stands_alone_and_runs_nothing() -> None:
    hostile = POINTS[0]._replace(name="<script>alert(1)</script>", settings="{body}")
    page = render_pareto([*POINTS, hostile], AXES, "a sweep")
    assert page == render_pareto([*POINTS, hostile], AXES, "a sweep")
    assert page.count("<svg") == page.count("</svg>") == 2
    assert "<script" not in page
    assert not re.search(r"(?:src|href)=\"(?!#)|https?://", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert set(re.findall(r"var\(--(\w+)\)", page)) <= set(re.findall(r"--(\w+):", page))
    assert re.findall(r'<tr class="beaten"><td>(\d)</td>', page) == ["1", "4", "7"]
    assert "2, w0: 1.00 and 0.10" in page
    assert "<small>0.90 to 1.10</small>" in page
