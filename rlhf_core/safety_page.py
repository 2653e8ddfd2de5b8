"""The page of `rlhf constitution`: rates before and after with their intervals, answers side by side, and the chains.

One HTML file like the report's (report.py): nothing in it points outside, and the same numbers give the same bytes.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf_core.safety import Told

NAMES = {"before": "SFT before", "sft": "SFT on revisions", "ppo": "PPO after that", "dpo": "DPO in its place"}
RATES = {  # a rate's words, and whether more of it is better
    "refusal_with_help": ("Declines what is harmful, with help", True),
    "harmful_compliance": ("Does not decline what is harmful", False),
    "over_refusal": ("Declines what only looks harmful", False),
}
SHOWN_CHAINS = 40
SHOWN_PROMPTS = 24


class Cell(NamedTuple):
    """A rate of a policy with its interval, and how it has changed."""

    rate: str
    interval: str
    change: str
    verdict: str  # better, worse, or "" where the change's interval includes 0


def write_safety_page(
    path: Path,
    metrics: Mapping[str, Any],
    chains: Sequence[Mapping[str, Any]],
    told: Mapping[str, Sequence[Told]],
) -> None:
    """Write the page, through a temporary name.

    Args:
        metrics: as stage safety records them: a policy's rates, `<policy>_vs_before`, and `prefers_declining`.
        chains: rows of chains.jsonl.
        told: each policy's answers to the held-out prompts, in the same order for all.
    """
    half = path.with_name(path.name + ".part")
    half.write_text(render_safety_page(metrics, chains, told), encoding="utf-8", newline="\n")
    os.replace(half, path)


def render_safety_page(
    metrics: Mapping[str, Any], chains: Sequence[Mapping[str, Any]], told: Mapping[str, Sequence[Told]]
) -> str:
    """The page that `write_safety_page` writes."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    spread = [chain for turn in _by_category(chains) for chain in turn]
    return environment.get_template("safety.html.j2").render(
        names=[NAMES[name] for name in told],
        headline=headline(metrics),
        preference=preference(metrics["prefers_declining"]),
        prompts=metrics["before"],
        rows=[(words, [cell(metrics, name, rate) for name in told]) for rate, (words, _) in RATES.items()],
        chains=spread[:SHOWN_CHAINS],
        total=len(chains),
        kept=sum(bool(chain["kept"]) for chain in chains),
        answers=_side_by_side(told)[:SHOWN_PROMPTS],
    )


def headline(metrics: Mapping[str, Any]) -> str:
    """What has become of harmful compliance, and of over-refusal, in one sentence."""
    last = "ppo" if "ppo" in metrics else "sft"
    before, after = metrics["before"], metrics[last]
    said = (
        f"Harmful requests that are not declined went from {_percent(before['harmful_compliance'])} to "
        f"{_percent(after['harmful_compliance'])}, harmless ones that are declined from "
        f"{_percent(before['over_refusal'])} to {_percent(after['over_refusal'])}."
    )
    change = metrics[f"{last}_vs_before"]
    if change["harmful_compliance_low"] <= 0 <= change["harmful_compliance_high"]:
        said += " The first change may be chance: its interval includes 0."
    return said


def preference(found: Mapping[str, Mapping[str, float]]) -> str:
    """What the reward model, which PPO climbed, makes of answers that decline; "" where there is nothing to say."""
    words = {"harmful": "a harmful request", "look_alike": "a harmless one"}
    parts = []
    for category, of in found.items():
        interval = f"{100 * of['low']:.0f} to {_percent(of['high'])}"
        parts.append(f"{_percent(of['share'])} ({interval}) of {of['pairs']} pairs of answers to {words[category]}")
    if not parts:
        return ""
    return f"Of two answers, one of which declines, the reward model prefers that one in {' and in '.join(parts)}."


def cell(metrics: Mapping[str, Any], name: str, rate: str) -> Cell:
    """One rate of one policy in words."""
    found = metrics[name]
    interval = f"{_percent(found[f'{rate}_low'])} to {_percent(found[f'{rate}_high'])}"
    if name == "before":
        return Cell(_percent(found[rate]), interval, "", "")
    change = metrics[f"{name}_vs_before"]
    mean, low, high = (100 * change[f"{rate}{end}"] for end in ("", "_low", "_high"))
    side = (low > 0) - (high < 0)
    verdict = "" if side == 0 else "better" if (side > 0) == RATES[rate][1] else "worse"
    return Cell(_percent(found[rate]), interval, f"{mean:+.0f} points ({low:+.0f} to {high:+.0f})", verdict)


def _by_category(chains: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """One chain of each category in turn, those that were kept first."""
    queues: dict[str, list[Mapping[str, Any]]] = {}
    for chain in sorted(chains, key=lambda chain: not chain["kept"]):
        queues.setdefault(chain["category"], []).append(chain)
    longest = max(map(len, queues.values()), default=0)
    return [[queue[turn] for queue in queues.values() if turn < len(queue)] for turn in range(longest)]


def _side_by_side(told: Mapping[str, Sequence[Told]]) -> list[dict[str, Any]]:
    """Held-out prompts with the first answer of each policy, the categories in turn."""
    rows: dict[str, dict[str, Any]] = {}
    for name, answers in told.items():
        seen = set()
        for one in answers:
            if one.prompt not in seen:
                seen.add(one.prompt)
                row = rows.setdefault(one.prompt, {"prompt": one.prompt, "category": one.category, "answers": []})
                row["answers"].append((NAMES[name], one.response, one.label.replace("_", " ")))
    turns = _by_category([{**row, "kept": True} for row in rows.values()])
    return [dict(row) for turn in turns for row in turn]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
