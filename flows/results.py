"""The end of a run: the policies side by side, in the terminal and as a Prefect artifact."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_core.alarm import find_alarms
from rlhf_core.config import load_params
from tasks.files import read_csv

METRICS = Path("metrics/evaluate.json")
CURVES = Path("plots/ppo.csv")
REPORT = Path("artifacts/evaluate/report.html")
PEOPLE, PEOPLES_REPORT = Path("metrics/people.json"), Path("artifacts/people/report.html")
NAMES = {"base": "base", "sft": "SFT", "dpo": "DPO", "ppo": "PPO"}  # in the order of columns
ROWS = {  # key of metrics/evaluate.json → what a reader sees, and its digits
    "reward": ("reward", 2),
    "gold_reward": ("gold reward (never trained on)", 2),
    "kl": ("KL to SFT, nats a response", 1),
    "perplexity": ("perplexity of demonstrations", 1),
    "response_length": ("response length, tokens", 0),
    "eos_rate": ("share that ends by itself", 2),
    "distinct_2": ("distinct bigrams", 2),
}


def judged(evaluate: Mapping[str, Any]) -> list[str]:
    """The columns: DPO's only where there is one."""
    return [policy for policy in NAMES if policy in evaluate or policy != "dpo"]


def table_rows(evaluate: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row a quantity: its name, then one value a policy."""
    rows = []
    for key, (label, digits) in ROWS.items():
        values = [evaluate.get(policy, {}).get(key) for policy in judged(evaluate)]
        rows.append((label, *(_number(value, f"z.{digits}f") for value in values)))
    return rows


def win_rates(evaluate: Mapping[str, Any]) -> list[str]:
    """The comparisons in words, and what the best of n SFT answers is worth."""
    lines = []
    for key in ("ppo_vs_sft", "ppo_vs_dpo", "dpo_vs_sft", "sft_vs_base"):
        label = " against ".join(NAMES[policy] for policy in key.split("_vs_"))
        if found := evaluate.get(key):
            rate, low, high, controlled, longest = (
                _number(found.get(name), ".0%")
                for name in ("gold_win_rate", "gold_win_rate_low", "gold_win_rate_high", "length_controlled_win_rate",
                             "longest_wins")
            )  # fmt: skip
            lines.append(
                f"{label}: {rate} of comparisons won (95 % interval {low} to {high}), length-controlled {controlled}; "
                f"the longest answer would win {longest}"
            )
    for n, found in evaluate.get("best_of_n", {}).items():
        reward, gold = (_number(found.get(name), ".2f") for name in ("reward", "gold_reward"))
        lines.append(
            f"Best of {n} SFT answers by the reward model: reward {reward}, gold reward {gold}, KL to SFT at most "
            f"{_number(found.get('kl'), '.1f')}"
        )
    return lines


def _number(value: float | None, form: str) -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def people_said(root: Path) -> list[str]:
    """In words what people said of held-out answers, where they were asked, and where the report with it lies."""
    if not (root / PEOPLES_REPORT).is_file():
        return []
    found = json.loads((root / PEOPLE).read_text(encoding="utf-8"))
    new, current = (NAMES[policy] for policy in load_params(root / "params.yaml").people.policies)
    rate, low, high, gold, same = (
        _number(found[name], ".0%")
        for name in ("win_rate", "win_rate_low", "win_rate_high", "gold_win_rate", "gold_agreement")
    )
    who, judged = (
        f"{found[name]:.0f} {one if found[name] == 1 else many}"
        for name, one, many in (("annotators", "person", "people"), ("judgements", "judgement", "judgements"))
    )
    return [
        f"People prefer {new} to {current} in {rate} (95 % interval {low} to {high}; {who}, {judged}), the gold model "
        f"in {gold} of the same; they agree in {same}"
    ]


def markdown(evaluate: Mapping[str, Any], people: Sequence[str] = (), report: Path = REPORT) -> str:
    """The table and the win rates as markdown, and what people said."""
    names = [NAMES[policy] for policy in judged(evaluate)]
    head = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    body = ["| " + " | ".join(row) + " |" for row in table_rows(evaluate)]
    said = [f"- {line}" for line in (*win_rates(evaluate), *people)]
    return "\n".join([*head, *body, "", *said, "", f"Report: `{report}`"])


def alarms(root: Path) -> list[str]:
    """What PPO's alarm said in the last run, one line each: the rule over its curves, as the loop applied it."""
    curves = root / CURVES
    history = read_csv(curves) if curves.is_file() else []
    if not any("ppo/alarm" in row for row in history):  # nothing was watched
        return []
    window = load_params(root / "params.yaml").ppo.watch_window
    return [f"Alarm for reward hacking at {alarm.text()}" for alarm in find_alarms(history, window)]


def publish_results(root: Path, *, people: bool = False) -> None:
    """Print the table and keep it as an artifact of the flow run; nothing where evaluate has not run yet.

    Args:
        people: whether stage people is up to date too.
    """
    if not (root / METRICS).is_file():
        return
    evaluate = json.loads((root / METRICS).read_text(encoding="utf-8"))
    said = people_said(root) if people else []
    report = PEOPLES_REPORT if said else REPORT
    print_results(evaluate, said, root / report)
    from prefect.artifacts import create_markdown_artifact

    if raised := alarms(root):
        print(*raised, sep="\n")
        text = "\n".join(["# Alarm for reward hacking", "", *(f"- {line}" for line in raised)])
        create_markdown_artifact(text, key="rlhf-alarm", description="The reward rose while what it stands for fell")
    create_markdown_artifact(
        markdown(evaluate, said, report), key="rlhf-results", description="The policies side by side"
    )


def print_results(evaluate: Mapping[str, Any], people: Sequence[str], report: Path) -> None:
    """The table in the terminal, what people said, and where the report lies."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", *(NAMES[policy] for policy in judged(evaluate)), title="Held-out prompts")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in table_rows(evaluate):
        table.add_row(*row)
    console = Console(file=sys.stdout)
    console.print(table)
    for line in (*win_rates(evaluate), *people):
        console.print(line, highlight=False)
    console.print(f"Report: {report}", highlight=False, soft_wrap=True)
