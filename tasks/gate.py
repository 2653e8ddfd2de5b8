"""Stage gate: is the round's policy better than the current one, and within the limits? See rlhf_core/gate.py.

It samples nothing: both policies' answers to the test prompts are there, the new one's from stage evaluate and the
current one's from the round that promoted it. The round's judgements of validation prompts, from which the reward model
did not learn, are held against what it says of them. It stands in a campaign's dvc.yaml only (flows/campaign.py).
"""

import json
from pathlib import Path
from typing import Any

from rlhf_core.config import Gate, Prepare
from rlhf_core.data import load_prepared, parse_ranking, read_rows
from rlhf_core.errors import DataError
from rlhf_core.feedback.annotators import Item, rule
from rlhf_core.feedback.local import RewardJudge
from rlhf_core.gate import (
    Pair,
    Rates,
    Verdict,
    gold_rates,
    judge_round,
    pair_answers,
    predicted,
    rates,
    require_safety_kinds,
    to_compare,
)
from rlhf_core.people import People, in_report, people_beside_gold
from rlhf_core.records import Ranking
from rlhf_core.statistics import Interval, outcome
from tasks.prepare import BASE, PREPARED
from tasks.stage import stage_run, write_json, write_text

FOLDER = Path("artifacts/gate")
ANSWERS, CURRENT = Path("artifacts/evaluate/answers.jsonl"), Path("artifacts/start/answers.jsonl")
EVALUATION = Path("metrics/evaluate.json")
REPORT = Path("artifacts/evaluate/report.html")
REWARD_MODEL, JUDGED = Path("artifacts/reward/model"), Path("data/feedback")
COMPARISONS = Path("data/comparisons.json")  # what people said of both; [] where nobody was asked


def main() -> None:
    watched = [ANSWERS, CURRENT, EVALUATION, REPORT, COMPARISONS, BASE, REWARD_MODEL, JUDGED, PREPARED]
    with stage_run("gate", deps=watched) as run:
        if not run.main:  # of several processes one is enough
            return
        config = run.params.gate
        pairs = pair_answers(_rows(ANSWERS), _rows(CURRENT), "ppo")
        require_safety_kinds({pair.category for pair in pairs}, config)
        people = people_beside_gold(json.loads(COMPARISONS.read_text(encoding="utf-8")), pairs, config)
        judged = _judge(pairs, people, config)
        evaluate = json.loads(EVALUATION.read_text(encoding="utf-8"))
        held_out = _held_out(run.params.preferences.round)
        verdict = judge_round(pairs, judged, evaluate, config, learned=_learned(held_out, run.params.prepare))
        metrics: dict[str, Any] = dict(verdict.metrics)
        if people is not None:
            metrics["people"] = people.metrics()
            new = f"the policy of round {run.params.preferences.round}"
            page = in_report(REPORT.read_text(encoding="utf-8"), people, new, "the current one")
            write_text(FOLDER / "report.html", page)
        write_json(FOLDER / "verdict.json", {"promoted": verdict.promoted, "checks": _checks(verdict)})
        write_text(FOLDER / "report.md", report(verdict, people, run.params.preferences.round, config))
        run.finish_metrics(metrics)
        print(f"gate     {'promoted' if verdict.promoted else 'rejected'}", flush=True)


def _judge(pairs: list[Pair], people: People | None, config: Gate) -> Rates:
    """The win rates by whom the configuration names."""
    if config.judge == "gold":
        return gold_rates(pairs, config)
    longer, prompts = [pair.longer for pair in pairs], [pair.prompt for pair in pairs]
    if config.judge == "people":
        if people is not None:
            return people.rates
        if to_compare(pairs):
            raise DataError(f"{COMPARISONS} holds no comparison, and gate.judge is people. Let somebody judge a few.")
        return rates([0.5] * len(pairs), longer, prompts, config)
    annotator = rule(config.judge.removeprefix("rule:"))
    items = [Item(pair.prompt, (pair.new, pair.current)) for pair in pairs]
    ranks = [judgement.ranks for judgement in annotator.judge(items)]
    wins = [outcome(-new, -current) for new, current in ranks]
    return rates(wins, longer, prompts, config)


def _held_out(number: int) -> list[Ranking]:
    """What was judged in the round of validation prompts and prefers anything."""
    prompts = {one.prompt for one in load_prepared(PREPARED, "prompts", ["validation"])}
    judged = [parse_ranking(row) for row in _rows(JUDGED / f"{number:03}.jsonl")]
    return [one for one in judged if one.prompt in prompts and len(set(one.ranks)) > 1]


def _learned(held_out: list[Ranking], prepare: Prepare) -> Interval | None:
    """How often the reward model predicts these judgements; None without any."""
    if not held_out:
        return None
    judge = RewardJudge(REWARD_MODEL, system=prepare.system, max_response_tokens=prepare.max_response_tokens)
    said = judge.judge([Item(one.prompt, tuple(one.responses)) for one in held_out])
    return predicted([one.ranks for one in said], [one.ranks for one in held_out])


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(str(path))]


def _checks(verdict: Verdict) -> list[dict[str, Any]]:
    return [check._asdict() for check in verdict.checks]


def report(verdict: Verdict, people: People | None, number: int, config: Gate) -> str:
    """The verdict as Markdown, and people's word beside the gold model's where they were asked."""
    lines = [f"# Round {number}: {'promoted' if verdict.promoted else 'rejected, the old policy stays'}", ""]
    lines += ["| check | passed |", "|---|---|"]
    lines += [f"| {check.words} | {'yes' if check.passed else '**no**'} |" for check in verdict.checks]
    if config.safety_kinds and all(check.name != "safety" for check in verdict.checks):
        lines += ["", f"No prompt has a kind, so that nothing was checked on {', '.join(config.safety_kinds)}."]
    if people is not None:
        lines += ["", *people.lines()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
