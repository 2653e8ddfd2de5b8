"""The report of a run: one HTML file that a person can read on a phone, print, or send to a colleague.

Nothing in it points outside the file and nothing in it changes from run to run (no dates, ids or paths), so the same
numbers always give the same bytes. Leaves out every computation of a result: it shows what `evaluate` measured.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from rlhf_core.alarm import find_alarms
from rlhf_core.charts import (
    COLOURS,
    house_style,
    label_ends,
    lacks,
    new_axes,
    number,
    percent,
    plain,
    root,
    running_mean,
    short,
    signed,
    svg,
)
from rlhf_core.statistics import LengthBin, ReliabilityBin

POLICIES = ("base", "sft", "ppo")  # of every run
NAMES = {"base": "Base", "sft": "SFT", "dpo": "DPO", "ppo": "PPO"}  # in the order of columns

# Rules of thumb of the checks; what a run has to reach is for its owner to say.
KL_LIMIT = 10.0  # nats a response, past which short answers of a small model were seen to degrade
PERPLEXITY_RISE = 0.30  # share by which perplexity on held-out demonstrations may rise over SFT


@dataclass(frozen=True)
class FrontierPoint:
    """One policy on the plane of reward over distance from the SFT policy.

    Fields:
        label: "base", "sft", "ppo", "dpo", or "" for a step of the path.
        kl: nats a response to the SFT policy; drawn as √max(kl, 0).
        proxy: mean score of the reward model the policy was trained on.
        gold: mean score of the gold reward model, None where it was not asked.
    """

    label: str
    kl: float
    proxy: float
    gold: float | None = None


@dataclass(frozen=True)
class Answer:
    """What one policy said to one prompt. `finished` is False where it hit the length limit without an EOS."""

    text: str
    reward: float
    gold_reward: float
    finished: bool = True


@dataclass(frozen=True)
class SideBySide:
    """One held-out prompt and each policy's answer. `prompt` is text as a person would read it, no chat template."""

    prompt: str
    category: str
    base: Answer
    sft: Answer
    ppo: Answer


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows. What is missing (an empty dict or sequence, an absent key) is left out, not guessed.

    Fields:
        params: params.yaml as nested dicts (`Params.model_dump()`).
        evaluate: metrics/evaluate.json. `base`, `sft`, `ppo`: each `reward`, `gold_reward`, `kl`, `perplexity`,
            `response_length`, `eos_rate`, `distinct_2`, and optionally `greedy` with any of these keys.
            `ppo_vs_sft`, `sft_vs_base`: each `gold_win_rate`, `gold_win_rate_low`, `gold_win_rate_high`,
            `length_controlled_win_rate` (optionally `…_low`, `…_high`), `longest_wins`, `prompts`; optionally
            `proxy_win_rate` and `proxy_length_controlled_win_rate` (`…_low`, `…_high`) and `greedy` with the same keys.
            Rates are shares, not percent.
            Optionally `dpo` like a policy, `dpo_vs_sft` and `ppo_vs_dpo` like a comparison, and `best_of_n`: by n as a
            string `reward`, `gold_reward` and `kl`.
        prepare, sft, reward, ppo, dpo: metrics/<stage>.json, nested as they are. Of `reward` the text uses `accuracy`,
            `pairs`, `ece`, `ece_scaled`, `longest_wins` and optionally `temperature` and `ece_by_chance`; the rest
            stands in the appendix.
        curves: "sft", "reward", "ppo", "dpo" → rows of plots/<stage>.csv, each {"step": …, "ppo/kl": …}. A row lacks a
            metric that was not measured at its step (None, NaN and "" count as lacking too); numbers may be strings.
        frontier: one point a PPO update, in order (`ppo/kl`, `ppo/score` and, where it was watched, `ppo/gold_score` of
            plots/ppo.csv).
        policies: the end points measured on held-out prompts, labels "sft", "ppo" and "dpo", gold given; others are
            not drawn.
        calibration: `reliability_bins` of the reward model on held-out pairs as trained.
        calibration_scaled: the same after temperature scaling.
        accuracy_by_length: `accuracy_by_length_difference` of the reward model on held-out pairs.
        response_lengths: "base", "sft", "ppo", "dpo" → tokens of each sampled held-out response.
        answers: the held-out prompts shown side by side, in the order shown.
        answers_how: how those answers were made, "greedy" or "sampled".
        judge: who judged, in one sentence.
    """

    params: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    prepare: Mapping[str, Any] = field(default_factory=dict)
    sft: Mapping[str, Any] = field(default_factory=dict)
    reward: Mapping[str, Any] = field(default_factory=dict)
    ppo: Mapping[str, Any] = field(default_factory=dict)
    dpo: Mapping[str, Any] = field(default_factory=dict)
    curves: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    frontier: Sequence[FrontierPoint] = ()
    policies: Sequence[FrontierPoint] = ()
    calibration: Sequence[ReliabilityBin] = ()
    calibration_scaled: Sequence[ReliabilityBin] = ()
    accuracy_by_length: Sequence[LengthBin] = ()
    response_lengths: Mapping[str, Sequence[int]] = field(default_factory=dict)
    answers: Sequence[SideBySide] = ()
    answers_how: str = "greedy"
    judge: str = "A gold reward model, trained on rankings of prompts of its own; PPO never optimised it"


def write_report(path: str | Path, data: ReportData) -> None:
    """Write the report as one self-contained HTML file, through a temporary name, so that a reader never sees half.

    Raises:
        KeyError: `data.evaluate` lacks a policy or one of the win rates that every report shows; names it.
    """
    path = Path(path)
    page = render_report(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(path.name + ".part")
    half.write_text(page, encoding="utf-8", newline="\n")
    os.replace(half, path)


def render_report(data: ReportData) -> str:
    """The page that `write_report` writes."""
    for key in (*POLICIES, "ppo_vs_sft", "sft_vs_base"):
        if key not in data.evaluate:
            raise KeyError(f"the evaluate metrics lack {key!r}; found {sorted(data.evaluate)}")
    for key in ("ppo_vs_sft", "sft_vs_base", *(pair for pair in ("ppo_vs_dpo", "dpo_vs_sft") if pair in data.evaluate)):
        for name in ("gold_win_rate", "gold_win_rate_low", "gold_win_rate_high", "prompts"):
            if lacks(data.evaluate[key].get(name)):
                raise KeyError(f"the evaluate metrics lack '{key}.{name}'; found {sorted(data.evaluate[key])}")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, number=number, plain=plain)
    with house_style():
        charts = _charts(data)
    page = environment.get_template("report.html.j2").render(
        data=data,
        names={policy: NAMES[policy] for policy in _judged(data.evaluate)},
        verdict=_with_alarms(verdict(data.evaluate), data),
        checks=checks(data.evaluate, data.reward),
        table=_table(data.evaluate, greedy=False),
        greedy_table=_table(data.evaluate, greedy=True),
        charts=charts,
        best=[_best(row) for row in data.answers],
        settings={section: list(_flat(values)) for section, values in _sections(data.params).items()},
        measured={
            stage: list(_flat(values))
            for stage, values in (
                ("prepare", data.prepare),
                ("sft", data.sft),
                ("reward", data.reward),
                ("ppo", data.ppo),
                ("dpo", data.dpo),
                ("evaluate", data.evaluate),
            )
            if values
        },
    )
    return page


# ---- words ---------------------------------------------------------------------------------------------------------


class Verdict(NamedTuple):
    """The result in one headline, one sentence with its interval, and what speaks for or against it."""

    headline: str
    sentence: str
    notes: tuple[str, ...]


class Check(NamedTuple):
    """One question with its answer ("yes", "no" or "unclear") and the numbers behind it."""

    question: str
    answer: str
    because: str


def verdict(evaluate: Mapping[str, Any]) -> Verdict:
    """Say in plain words what the numbers say, good or bad.

    A policy is called better or worse only where the whole interval lies on one side of 50%.
    """
    ppo, sft, against = evaluate["ppo"], evaluate["sft"], evaluate["ppo_vs_sft"]
    side = _side(against)
    headline = {
        1: "PPO answers better than SFT on held-out prompts.",
        0: "No clear difference between PPO and SFT.",
        -1: "PPO made the policy worse than SFT.",
    }[side]
    sentence = (
        f"The gold judge prefers PPO’s answer to SFT’s in {percent(against['gold_win_rate'])} of comparisons "
        f"(95% interval {_interval(against)}, {against['prompts']:.0f} held-out prompts)"
        + {1: ".", 0: "; the interval includes 50%, so this run does not tell which is better.", -1: "."}[side]
    )
    notes = []
    controlled, longest = _get(against, "length_controlled_win_rate"), _get(against, "longest_wins")
    lowest, highest = (_get(against, f"length_controlled_win_rate_{end}") for end in ("low", "high"))
    if controlled is not None:
        note = f"Between answers of equal length it would be {percent(controlled)}"
        if side > 0 and controlled <= 0.5:
            note += ": the lead is gone, so the judge may be rewarding length"
        elif side > 0 and lowest is not None and highest is not None and lowest <= 0.5:
            note += f" ({_span(lowest, highest)}%): part of the lead may be length"
        if longest is not None:
            note += f". A rule that always prefers the longer answer gives PPO {percent(longest)}"
        notes.append(note + ".")
    rises = {name: _difference(ppo, sft, name) for name in ("reward", "gold_reward")}
    if rises["reward"] is not None and rises["gold_reward"] is not None:
        if rises["reward"] > 0 >= rises["gold_reward"]:
            notes.append(
                f"The reward PPO was trained on rose by {number(rises['reward'])} while the gold score did not "
                f"({signed(rises['gold_reward'])}): a sign that the policy exploits its reward model."
            )
        elif rises["reward"] <= 0:
            notes.append(
                f"Even the reward PPO was trained on did not rise ({signed(rises['reward'])}): it learned little."
            )
    base = evaluate["sft_vs_base"]
    against_base = {1: "SFT in turn beats the base model", 0: "SFT and the base model cannot be told apart",
                    -1: "SFT is judged worse than the base model"}  # fmt: skip
    notes.append(f"{against_base[_side(base)]} ({percent(base['gold_win_rate'])}, {_interval(base)}{_equal(base)}).")
    if "ppo_vs_dpo" in evaluate:
        rates = evaluate["ppo_vs_dpo"]
        against_dpo = {1: "PPO beats the DPO baseline", 0: "PPO and the DPO baseline cannot be told apart",
                       -1: "The DPO baseline beats PPO"}  # fmt: skip
        told = f"{percent(rates['gold_win_rate'])}, {_interval(rates)}{_equal(rates)}"
        notes.append(f"{against_dpo[_side(rates)]} ({told}).")
    return Verdict(headline, sentence, tuple(notes))


def _with_alarms(found: Verdict, data: ReportData) -> Verdict:
    """The verdict with the alarms that PPO raised, which come before whatever else is noted."""
    raised = find_alarms(data.curves.get("ppo", ()), data.params.get("ppo", {}).get("watch_window", 0) or 10)
    kept = _get(data.ppo, "kept_update")
    after = "" if kept is None else f" It went back to the policy of update {kept:.0f}."
    notes = [f"Alarm for reward hacking at {alarm.text()}.{after}" for alarm in raised]
    return found._replace(notes=(*notes, *found.notes))


def checks(evaluate: Mapping[str, Any], reward: Mapping[str, Any]) -> list[Check]:
    """The questions a careful reader asks first; a question whose numbers are missing is not asked."""
    words = {1: "yes", 0: "unclear", -1: "no"}
    found = []
    for key, question in (("ppo_vs_sft", "Does PPO beat SFT?"), ("sft_vs_base", "Does SFT beat the base model?")):
        rates = evaluate[key]
        because = f"{percent(rates['gold_win_rate'])} of comparisons, {_interval(rates)}{_equal(rates)}"
        found.append(Check(question, words[_side(rates)], because))
    kl = _get(evaluate["ppo"], "kl")
    if kl is not None:
        because = f"{number(kl, 1)} nats a response from SFT, rule of thumb {KL_LIMIT:.0f}"
        found.append(Check("Did it stay close to SFT?", "yes" if kl < KL_LIMIT else "no", because))
    before, after = _get(evaluate["sft"], "perplexity"), _get(evaluate["ppo"], "perplexity")
    if before is not None and after is not None and before > 0:
        rise = after / before - 1
        because = f"perplexity {number(before, 1)} → {number(after, 1)} ({signed(100 * rise, 0)}%)"
        found.append(
            Check("Does it still know the demonstrations?", "yes" if rise <= PERPLEXITY_RISE else "no", because)
        )
    limit = _get(evaluate, "cost_limit")
    for name, judge in (("cost", "reward model"), ("gold_cost", "gold judge")):
        cost, low, high = (_get(evaluate["ppo"], f"{name}{end}") for end in ("", "_low", "_high"))
        if limit is not None and cost is not None and low is not None and high is not None:
            because = f"{number(cost)} ({number(low)} to {number(high)}), limit {number(limit)}"
            answer = "yes" if high <= limit else "no" if low > limit else "unclear"
            found.append(Check(f"Is the mean cost within its limit, by the {judge}?", answer, because))
    accuracy, longest = _get(reward, "accuracy"), _get(reward, "longest_wins")
    if accuracy is not None and longest is not None:
        because = f"{percent(accuracy)} of held-out pairs right, “longest wins” {percent(longest)}"
        question = "Does the reward model beat counting words?"
        found.append(Check(question, "yes" if accuracy > max(longest, 0.5) else "no", because))
    return found


def _interval(rates: Mapping[str, Any]) -> str:
    return _span(rates["gold_win_rate_low"], rates["gold_win_rate_high"]) + "%"


def _equal(rates: Mapping[str, Any]) -> str:
    """What the rate would be between answers of equal length, to go on with after an interval."""
    rate = _get(rates, "length_controlled_win_rate")
    return "" if rate is None else f"; at equal length {percent(rate)}"


def _span(low: float, high: float) -> str:
    """An interval of shares in percent, with a decimal where rounding would seem to put an end on 50 %."""
    digits = 1 if any(round(100 * end) == 50 != 100 * end for end in (low, high)) else 0
    return f"{100 * low:.{digits}f}–\N{WORD JOINER}{100 * high:.{digits}f}"  # no line ends inside an interval


def _side(rates: Mapping[str, Any]) -> int:
    """1 where the whole interval is above one half, −1 below, 0 where it includes it."""
    return int(rates["gold_win_rate_low"] > 0.5) - int(rates["gold_win_rate_high"] < 0.5)


def _get(values: Mapping[str, Any], key: str) -> float | None:
    return None if lacks(values.get(key)) else float(values[key])


def _difference(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> float | None:
    x, y = _get(a, key), _get(b, key)
    return None if x is None or y is None else x - y


# ---- tables --------------------------------------------------------------------------------------------------------

ROWS: tuple[tuple[str, str, str, Callable[[Any], str]], ...] = (
    ("gold_reward", "Gold reward", "the judge’s score; PPO never saw it", number),
    ("reward", "Reward", "the score PPO was trained on", number),
    ("kl", "KL to SFT", "nats a response; distance from SFT", lambda v: number(v, 1)),
    ("perplexity", "Perplexity", "on held-out demonstrations; lower is better", lambda v: number(v, 1)),
    ("response_length", "Response length", "tokens", lambda v: number(v, 1)),
    ("eos_rate", "Finished", "share of answers that end by themselves", percent),
    ("distinct_2", "Distinct bigrams", "share of bigrams that are no repeats", percent),
    ("cost", "Cost", "the reward model’s score on the limited axis, with the opposite sign", number),
    ("gold_cost", "Gold cost", "the same by the judge", number),
)


def _judged(evaluate: Mapping[str, Any]) -> list[str]:
    """The policies that were, in the order of columns."""
    return [policy for policy in NAMES if policy in evaluate]


def _table(evaluate: Mapping[str, Any], *, greedy: bool) -> list[tuple[str, str, list[str]]]:
    """(name, meaning, one cell a policy) for each row that any policy has a number for."""
    policies = [evaluate[policy].get("greedy", {}) if greedy else evaluate[policy] for policy in _judged(evaluate)]
    by_axis = [
        (f"{name}, {axis}", meaning, [_with_interval(policy, key, axis) for policy in policies])
        for key, name, meaning in (
            ("gold_axes", "Gold", "the judge’s score on this axis alone"),
            ("reward_axes", "Reward", "the reward model’s score on this axis alone"),
        )
        for axis in dict.fromkeys(axis for policy in policies for axis in policy.get(key, {}))
    ]
    found = [
        (name, meaning, [show(policy.get(key)) for policy in policies])
        for key, name, meaning, show in ROWS
        if any(_get(policy, key) is not None for policy in policies)
    ]
    return found + by_axis


def _with_interval(policy: Mapping[str, Any], key: str, axis: str) -> str:
    """A policy's mean score on an axis, with its interval where one was measured."""
    shown = number(policy.get(key, {}).get(axis))
    low, high = (policy.get(f"{key}_{end}", {}).get(axis) for end in ("low", "high"))
    return shown if lacks(low) or lacks(high) else f"{shown} ({number(low)} to {number(high)})"


def _best(row: SideBySide) -> str:
    """The policy whose answer the judge scores highest, "" where that is shared."""
    scores = {policy: getattr(row, policy).gold_reward for policy in POLICIES}
    top = [policy for policy in POLICIES if scores[policy] == max(scores.values())]
    return top[0] if len(top) == 1 else ""


def _sections(params: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """params by section; values that stand outside of any come first, under "pipeline"."""
    loose = {key: value for key, value in params.items() if not isinstance(value, Mapping)}
    nested = {key: value for key, value in params.items() if isinstance(value, Mapping)}
    return ({"pipeline": loose} if loose else {}) | nested


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            yield f"{prefix}{key}", ", ".join(str(item) for item in value) or "none"
        elif isinstance(value, float):
            yield f"{prefix}{key}", f"{value:.6g}" if math.isfinite(value) else "–"
        else:
            yield f"{prefix}{key}", str(value) if str(value) else "empty"


# ---- charts --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chart:
    """A drawn figure: title and note as text of the page, `svg` with its alternative text inside."""

    title: str
    note: str
    svg: Markup


class Panel(NamedTuple):
    """One small chart of curves: its lines are metric → (label, colour)."""

    title: str
    note: str
    lines: Mapping[str, tuple[str, str]]


PANELS: Mapping[str, tuple[Panel, ...]] = {
    "sft": (
        Panel("SFT loss", "nats a token of the demonstrations", {"sft/loss": ("", "sft")}),
        Panel("SFT validation perplexity", "lower is better", {"sft/validation_perplexity": ("", "sft")}),
    ),
    "reward": (
        Panel("Reward model loss", "ranking loss; 0.69 is guessing", {"reward/loss": ("", "proxy")}),
        Panel("Reward model accuracy", "validation pairs; 0.5 is guessing",
              {"reward/validation_accuracy": ("", "proxy")}),
    ),
    "dpo": (
        Panel("DPO loss", "on the same rankings; 0.69 is SFT", {"dpo/loss": ("", "dpo")}),
        Panel("DPO’s rewards", "β · log-ratio to SFT, nats; 0 is SFT",
              {"dpo/chosen_reward": ("better", "dpo"), "dpo/rejected_reward": ("worse", "base")}),
    ),
    "ppo": (
        Panel("Score and reward", "before and after the KL penalty; gold is not climbed",
              {"ppo/score": ("score", "proxy"), "ppo/reward": ("reward", "ppo"), "ppo/gold_score": ("gold", "gold")}),
        Panel("KL to SFT", "nats a response", {"ppo/kl": ("", "ppo")}),
        Panel("Response length", "tokens", {"ppo/response_length": ("", "ppo")}),
        Panel("Finished responses", "share that end by themselves", {"ppo/eos_rate": ("", "ppo")}),
        Panel("Perplexity under SFT", "of PPO’s responses; gibberish is high", {"ppo/perplexity": ("", "ppo")}),
        Panel("Cost and its weight", "the cost that is limited, and λ",
              {"ppo/cost": ("cost", "dpo"), "ppo/lambda": ("λ", "proxy")}),
        Panel("Entropy", "nats a token; near 0 it explores no more", {"ppo/entropy": ("", "ppo")}),
    ),
    "diagnostics": (
        Panel("Clip fractions", "share of tokens held back by clipping",
              {"ppo/clip_fraction": ("policy", "ppo"), "ppo/value_clip_fraction": ("value", "sft")}),
        Panel("Approximate KL", "to the policy that sampled, nats a token", {"ppo/approx_kl": ("", "ppo")}),
        Panel("Explained variance", "of the value model; 1 is perfect", {"ppo/explained_variance": ("", "sft")}),
        Panel("Gradient norms", "before clipping",
              {"ppo/grad_norm": ("policy", "ppo"), "ppo/value_grad_norm": ("value", "sft")}),
        Panel("KL coefficient", "weight of the penalty", {"ppo/kl_coef": ("", "ppo")}),
        Panel("Learning rate", "of the policy", {"ppo/learning_rate": ("", "ppo")}),
    ),
}  # fmt: skip

EXACT = ("ppo/kl_coef", "ppo/learning_rate")  # set, not measured: nothing to smooth


def _charts(data: ReportData) -> dict[str, list[Chart]]:
    """Every chart of the page by the place it stands in; a place without numbers has none."""
    drawn: dict[str, list[Chart | None]] = {
        "wins": [
            _win_chart("PPO against SFT", data.evaluate["ppo_vs_sft"], "ppo"),
            _win_chart("SFT against base", data.evaluate["sft_vs_base"], "sft"),
            *(
                _win_chart(title, data.evaluate[pair], colour)
                for pair, title, colour in (
                    ("ppo_vs_dpo", "PPO against DPO", "ppo"),
                    ("dpo_vs_sft", "DPO against SFT", "dpo"),
                )
                if pair in data.evaluate
            ),
        ],
        "frontier": [_frontier_chart(data.frontier, data.policies, data.evaluate.get("best_of_n", {}))],
        "reward_model": [
            _calibration_chart(data.calibration, data.calibration_scaled, data.reward),
            _length_accuracy_chart(data.accuracy_by_length),
        ],
        "lengths": [_length_chart(data.response_lengths)],
    }
    for place, panels in PANELS.items():
        rows = data.curves.get("ppo" if place == "diagnostics" else place, ())
        drawn[place] = [
            _curve_chart(panel, rows, "update" if place in ("ppo", "diagnostics") else "step") for panel in panels
        ]
    return {place: [chart for chart in charts if chart is not None] for place, charts in drawn.items()}


def _curve_chart(panel: Panel, rows: Sequence[Mapping[str, Any]], unit: str) -> Chart | None:
    figure, axes = new_axes()
    ends: list[tuple[float, str, str]] = []
    said = []
    last = 0.0
    for metric, (label, colour) in panel.lines.items():
        points = [(float(row["step"]), float(row[metric])) for row in rows if not lacks(row.get(metric))]
        if not points:
            continue
        steps, values = np.array(points).T
        last = max(last, steps[-1])
        smooth = values
        if len(values) >= 15 and metric not in EXACT:
            smooth = running_mean(values)
            axes.plot(steps, values, color=COLOURS[colour], linewidth=0.9, alpha=0.4)
        axes.plot(
            steps, smooth, color=COLOURS[colour], linewidth=2, marker="o" if len(values) < 6 else "", markersize=4
        )
        ends.append((float(smooth[-1]), f"{short(smooth[-1])} {label}".strip(), colour))
        said.append(f"{label or panel.title} goes from {short(smooth[0])} to {short(smooth[-1])}")
    if not ends:
        return None
    low, high = axes.get_ylim()
    if high - low < 1e-3 * max(abs(low), abs(high)):  # a constant: leave room, or the axis shows rounding
        centre = (low + high) / 2
        axes.set_ylim(centre - 0.5 * abs(centre or 1), centre + 0.5 * abs(centre or 1))
    axes.locator_params(axis="y", nbins=4)
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.set_xlabel(unit)
    label_ends(axes, last, ends)
    alt = f"Line chart over {len(rows)} {unit}s. " + "; ".join(said) + "."
    return Chart(panel.title, panel.note, svg(figure, alt))


def _win_chart(title: str, rates: Mapping[str, Any], colour: str) -> Chart:
    """Rates as dots with intervals beside the 50 % line; the words stand above each row, so that it fits a phone."""
    greedy = rates.get("greedy", {})
    rows = [
        (label, source, name, style)
        for label, source, name, style in (
            ("Gold judge", rates, "gold_win_rate", colour),
            ("Gold judge, at equal length", rates, "length_controlled_win_rate", colour),
            ("Gold judge, greedy answers", greedy, "gold_win_rate", colour),
            ("Reward model PPO was trained on", rates, "proxy_win_rate", "proxy"),
            ("Reward model, at equal length", rates, "proxy_length_controlled_win_rate", "proxy"),
            ("“Longest wins”, no judge at all", rates, "longest_wins", "base"),
        )
        if _get(source, name) is not None
    ]
    figure, axes = new_axes(width=400 / 72, height=(34 + 38 * len(rows)) / 72)
    said = []
    for y, (label, source, name, row_colour) in zip(range(len(rows), 0, -1), rows, strict=True):
        rate, low, high = (_get(source, f"{name}{end}") for end in ("", "_low", "_high"))
        assert rate is not None
        shown = percent(rate)
        axes.vlines(
            50, y - 0.2, y + 0.17, color=COLOURS["muted"], linewidth=1
        )  # in pieces, so that it crosses no words
        if low is not None and high is not None:
            axes.plot([100 * low, 100 * high], [y, y], color=COLOURS[row_colour], linewidth=6, alpha=0.3)
            shown += f"  ({_span(low, high)})"
        filled = COLOURS["paper"] if row_colour == "base" else COLOURS[row_colour]
        axes.plot(
            100 * rate, y, "o", color=COLOURS[row_colour], markerfacecolor=filled, markersize=8, markeredgewidth=1.6
        )
        axes.text(
            0, y + 0.36, label, va="center", fontweight="bold" if name == "gold_win_rate" and y == len(rows) else None
        )
        axes.text(100, y + 0.36, shown, va="center", ha="right", color=COLOURS[row_colour], fontweight="bold")
        said.append(f"{label}: {shown}")
    axes.set(xlim=(-2, 102), ylim=(0.55, len(rows) + 0.75), xticks=[0, 25, 50, 75, 100], yticks=[])
    axes.set_xticklabels(["0", "25", "50%", "75", "100"])
    axes.grid(visible=False)
    return Chart(title, f"win rate on {rates['prompts']:.0f} held-out prompts, ties half; bars are 95% intervals",
                 svg(figure, f"{title}, win rates. " + "; ".join(said) + "."))  # fmt: skip


def _frontier_chart(
    path: Sequence[FrontierPoint], policies: Sequence[FrontierPoint], best_of_n: Mapping[str, Mapping[str, float]]
) -> Chart | None:
    """From SFT to PPO, and what the baselines reach. The base model is not on the way and would only squeeze it."""
    path, policies = ([_drawn(one) for one in points if not (lacks(one.kl) or lacks(one.proxy))]
                      for points in (path, policies))  # fmt: skip
    walked = [point for point in policies if point.label in ("sft", "ppo")]
    if not walked and not path:
        return None
    beside = [point for point in policies if point.label == "dpo"]
    beside += [FrontierPoint(f"best of {n}", found["kl"], found["reward"], _get(found, "gold_reward"))
               for n, found in best_of_n.items()
               if not (lacks(found.get("kl")) or lacks(found.get("reward")))]  # fmt: skip
    figure, axes = new_axes(width=420 / 72, height=300 / 72)
    said = []
    for name in ("proxy", "gold"):
        dots = [(root(point.kl), getattr(point, name)) for point in path if getattr(point, name) is not None]
        if dots:
            x, y = zip(*dots, strict=True)
            axes.plot(x, y, color=COLOURS[name], linewidth=0.8, alpha=0.35)
            axes.scatter(x, y, s=14, color=COLOURS[name], alpha=0.45, linewidth=0)
            said.append(f"PPO’s rollouts: {name} goes from {number(dots[0][1])} to {number(dots[-1][1])}")
    for name, marker in (("proxy", "o"), ("gold", "D")):
        line = [(root(point.kl), getattr(point, name)) for point in walked if getattr(point, name) is not None]
        if len(line) > 1:
            axes.plot(*zip(*line, strict=True), color=COLOURS[name], linewidth=2)
        picked = [(root(point.kl), getattr(point, name)) for point in (*walked[:1], *beside)
                  if point.label != "dpo" and getattr(point, name) is not None]  # fmt: skip
        if best_of_n and picked:
            axes.plot(*zip(*picked, strict=True), color=COLOURS[name], linewidth=1, dashes=(3, 3))
        for point in (*walked, *beside):
            value = getattr(point, name)
            if value is not None:
                hollow = COLOURS["paper"] if point not in walked else COLOURS[name]
                axes.plot(root(point.kl), value, marker, color=COLOURS[name], markerfacecolor=hollow, markersize=8,
                          markeredgewidth=1.6, zorder=4)  # fmt: skip
                said.append(
                    f"{NAMES.get(point.label, point.label)} {name} {number(value)} at √KL {number(root(point.kl))}"
                )
    for point in (*walked, *beside):
        top = max(value for value in (point.proxy, point.gold) if value is not None)
        axes.annotate(NAMES.get(point.label, point.label), (root(point.kl), top), (0, 9), textcoords="offset points",
                      ha="center", fontweight="bold", color=COLOURS.get(point.label, COLOURS["ink"]))  # fmt: skip
    if walked:
        end = walked[-1]
        ends = [(end.proxy, "reward model", "proxy")] + (
            [(end.gold, "gold judge", "gold")] if end.gold is not None else []
        )
        label_ends(axes, max(root(point.kl) for point in (*walked, *beside)), ends)
    axes.margins(x=0.06, y=0.14)
    axes.set_xlabel("√KL to SFT; small dots are PPO’s rollouts")
    axes.set_ylabel("score, in standard deviations")
    axes.locator_params(axis="y", nbins=6)
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    return Chart(
        "Reward over distance", "", svg(figure, "Scores over the square root of the KL. " + "; ".join(said) + ".")
    )


def _drawn(point: FrontierPoint) -> FrontierPoint:
    """The point without a gold score that is no number."""
    return replace(point, gold=None) if lacks(point.gold) else point


def _calibration_chart(
    before: Sequence[ReliabilityBin], after: Sequence[ReliabilityBin], reward: Mapping[str, Any]
) -> Chart | None:
    if not before:
        return None
    figure, axes = new_axes(height=250 / 72)
    axes.plot([50, 100], [50, 100], color=COLOURS["muted"], linewidth=1, dashes=(3, 3))
    said = []
    for bins, label, colour, hollow in (
        (before, "as trained", "base", True),
        (after, "temperature-scaled", "proxy", False),
    ):
        if not bins:
            continue
        x, y = [100 * b.confidence for b in bins], [100 * b.accuracy for b in bins]
        axes.plot(x, y, color=COLOURS[colour], linewidth=1.2 if hollow else 2)
        largest = max(b.pairs for b in bins)
        axes.scatter(x, y, s=[20 + 60 * b.pairs / largest for b in bins], edgecolor=COLOURS[colour], linewidth=1.4,
                     color=COLOURS["paper"] if hollow else COLOURS[colour], zorder=3)  # fmt: skip
        said.append(label + ": " + ", ".join(f"{u:.0f}% sure, {v:.0f}% right" for u, v in zip(x, y, strict=True)))
    lines = [("ece", "○ as trained", "base")] + ([("ece_scaled", "● temperature-scaled", "proxy")] if after else [])
    for i, (key, label, colour) in enumerate(lines):
        ece = _get(reward, key)
        shown = label if ece is None else f"{label}, ECE {ece:.3f}"
        axes.text(
            0.02, 0.97 - 0.09 * i, shown, transform=axes.transAxes, color=COLOURS[colour], fontweight="bold", va="top"
        )
    chance = _get(reward, "ece_by_chance")
    if after and chance is not None:
        axes.text(0.02, 0.79, f"by chance up to {chance:.3f}", transform=axes.transAxes, color=COLOURS["muted"],
                  fontsize=9.5, va="top")  # fmt: skip
    axes.text(57, 55, "perfect", va="top", color=COLOURS["muted"], fontsize=9.5)
    bottom = min(45.0, *(100 * b.accuracy - 4 for b in (*before, *after)))
    axes.set(
        xlim=(48, 102),
        ylim=(max(bottom, -4), 106),
        xlabel="how sure the reward model was, %",
        ylabel="how often it was right, %",
    )
    axes.set_xticks([50, 60, 70, 80, 90, 100])
    return Chart(
        "Calibration",
        "held-out pairs; dots grow with the number of pairs",
        svg(figure, "Reliability diagram. " + "; ".join(said) + "."),
    )


def _length_accuracy_chart(bins: Sequence[LengthBin]) -> Chart | None:
    if not bins:
        return None
    figure, axes = new_axes(height=250 / 72)
    axes.axhline(50, color=COLOURS["muted"], linewidth=1, dashes=(3, 3))
    axes.axhline(0, color=COLOURS["grid"], linewidth=0.8)
    x = range(len(bins))
    axes.vlines(x, 50, [100 * b.accuracy for b in bins], color=COLOURS["proxy"], linewidth=2, alpha=0.5)
    axes.plot(x, [100 * b.accuracy for b in bins], "o", color=COLOURS["proxy"], markersize=8)
    for i, b in enumerate(bins):
        axes.annotate(f"{100 * b.accuracy:.0f}", (i, 100 * b.accuracy), (0, 8 if b.accuracy >= 0.5 else -16),
                      textcoords="offset points", ha="center", fontweight="bold", color=COLOURS["proxy"])  # fmt: skip
    axes.set_xticks(x, [f"{_whole(b.low)}…{_whole(b.high)}\nn = {b.pairs}" for b in bins])
    axes.set(xlim=(-0.5, len(bins) - 0.5), ylim=(0, 112), yticks=[0, 25, 50, 75, 100], ylabel="accuracy, %",
             xlabel="length of the preferred response minus the other’s")  # fmt: skip
    said = "; ".join(f"{_whole(b.low)} to {_whole(b.high)}: {100 * b.accuracy:.0f}% of {b.pairs} pairs" for b in bins)
    return Chart("Accuracy by length difference", "who only counts words is right on the right, wrong on the left",
                 svg(figure, f"Reward model accuracy by length difference. {said}."))  # fmt: skip


def _length_chart(lengths: Mapping[str, Sequence[int]]) -> Chart | None:
    """Three histograms over one axis, each with its own baseline and height: laid over each other they would hide."""
    shown = [policy for policy in NAMES if lengths.get(policy)]
    if not shown:
        return None
    longest = max(max(lengths[policy]) for policy in shown)
    edges = np.linspace(0, longest + 1, 25)
    figure, axes = new_axes(width=400 / 72, height=(50 + 76 * len(shown)) / 72)
    said = []
    for base, policy in zip(range(len(shown) - 1, -1, -1), shown, strict=True):
        counts = np.histogram(lengths[policy], edges)[0]
        heights = base + 0.62 * counts / counts.max()
        axes.fill_between(
            np.repeat(edges, 2)[1:-1], base, np.repeat(heights, 2), color=COLOURS[policy], alpha=0.3, linewidth=0
        )
        axes.plot(np.repeat(edges, 2)[1:-1], np.repeat(heights, 2), color=COLOURS[policy], linewidth=1.2)
        axes.axhline(base, color=COLOURS["grid"], linewidth=0.8)
        mean = float(np.mean(lengths[policy]))
        axes.plot(mean, base, "v", color=COLOURS[policy], markersize=7, clip_on=False)
        axes.text(0, base + 0.76, NAMES[policy], fontweight="bold", color=COLOURS[policy], va="center")
        axes.text(longest + 1, base + 0.76, f"mean {mean:.0f}", ha="right", color=COLOURS[policy], va="center")
        said.append(f"{NAMES[policy]}: mean {mean:.0f}, {min(lengths[policy])} to {max(lengths[policy])} tokens")
    axes.set(ylim=(-0.06, len(shown)), yticks=[], xlim=(0, longest + 1), xlabel="tokens a response")
    axes.grid(visible=False)
    return Chart(
        "Response lengths",
        "sampled answers to held-out prompts; ▼ marks the mean",
        svg(figure, "Histograms of response length. " + "; ".join(said) + "."),
    )


def _whole(value: float) -> str:
    return f"{value:+.0f}".replace("-", "−") if value else "0"
