"""Three online rounds by a written rule, and a fourth by a coin: `python scripts/online_rounds.py`, an hour or so.

On the default model. In the second round each stage is killed with -9 once at its work, and the same command goes on.
Prints a table: by the rule, how often each round's policy beats the one before it and the SFT
policy. Start it again and it goes on where it was, since a campaign does.

    python scripts/online_rounds.py [NAME] [rlhf online run's options, such as --recipe tiny or -S section.key=value]
"""

import json
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from statistics import mean
from typing import Any

import psutil

from rlhf_core.feedback.annotators import Item, rule
from rlhf_core.gate import pair_answers
from rlhf_core.statistics import Interval, outcome, win_rate

RULE, COIN = "short", "random"
KILLED_ROUND, STAGES = 2, ("preferences", "reward", "ppo", "evaluate")
SETTINGS = (
    f"gate.judge=rule:{RULE}",
    # The rule wants what neither the starter rankings nor the gold model want: they weigh little, and may lose some.
    "reward.weights={rule: 2, ai: 0.25}",
    "gate.min_safety_win_rate=0.3",
    "gate.max_perplexity_ratio=1.5",
    "preferences.prompts=48",
    "ppo.updates=10",
    "evaluate.samples_per_prompt=1",
)


class Rounds:
    """A campaign, and the command that runs it."""

    def __init__(self, name: str, options: list[str]) -> None:
        self.name, self.options, self.folder = name, options, Path(".rlhf") / name

    def over(self) -> int:
        """How many rounds are over, the first of them round 0."""
        return len(list((self.folder / "rounds").glob("[0-9][0-9][0-9]/decision.json")))

    def run(self, annotator: str, until: int, *, kill_in: str = "") -> bool:
        """`rlhf online run` until a round is over, or with a kill once a stage is at work; whether it was killed."""
        begun = [] if (self.folder / "campaign.json").is_file() else self.options
        command = [sys.executable, "-c", "from flows.cli import main; main()", "online", "run", self.name, *begun,
                   "--annotator", f"rule:{annotator}", "--until", str(until)]  # fmt: skip
        at_work = re.compile(rf"{until} {kill_in} +{kill_in} +[1-9]\d*/") if kill_in else None
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if at_work and at_work.search(line):
                kill(process.pid)
                print(f"killed with -9 in {kill_in}", flush=True)
                process.wait()
                return True
        if process.wait() != 0:
            raise SystemExit(f"rlhf online run ended with {process.returncode}")
        return False


def kill(pid: int) -> None:
    """-9 to a process and all below it."""
    with suppress(psutil.NoSuchProcess):
        tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for each in tree:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(tree, timeout=30)


def beats_sft(answers: list[dict[str, Any]]) -> Interval:
    """The win rate of a round's policy over SFT by the rule, on the same prompts."""
    sft = [{**row, "policy": "ppo"} for row in answers if row["policy"] == "sft"]
    pairs = pair_answers(answers, sft, "ppo")
    items = [Item(pair.prompt, (pair.new, pair.current)) for pair in pairs]
    ranks = [said.ranks for said in rule(RULE).judge(items)]
    wins = [outcome(-ours, -theirs) for ours, theirs in ranks]
    return win_rate(wins, [pair.prompt for pair in pairs], samples=2000, seed=0)


def table(folder: Path) -> str:
    """All rounds as Markdown."""
    lines = [
        f"| round | judged by | judgements | over the one before, by {RULE} | over SFT, by {RULE} "
        "| words | KL to SFT | |",
        "|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for place in sorted((folder / "rounds").glob("[0-9][0-9][0-9]")):
        decision = json.loads((place / "decision.json").read_text())
        answers = [json.loads(line) for line in (place / "answers.jsonl").read_text().splitlines()]
        sft = beats_sft(answers)
        words = mean(len(row["text"].split()) for row in answers if row["policy"] == "ppo" and row["how"] == "sampled")
        kl = json.loads((place / "metrics/evaluate.json").read_text())["ppo"]["kl"]
        number, before, judged = decision["round"], "", ""
        if number:
            gate = json.loads((place / "metrics/gate.json").read_text())
            before = f"{gate['win_rate']:.0%} ({gate['win_rate_low']:.0%} to {gate['win_rate_high']:.0%})"
            judged = json.loads((place / "feedback.jsonl").read_text().splitlines()[0])["annotator"]
        said = ("promoted" if decision["promoted"] else "stopped") if number else "the pipeline's"
        over = f"{sft.mean:.0%} ({sft.low:.0%} to {sft.high:.0%})"
        cells = (number, judged, decision.get("judged", 0), before, over, f"{words:.0f}", f"{kl:.1f}", said)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    words = sys.argv[1:]
    name = words.pop(0) if words and not words[0].startswith("-") else "rounds"
    settings = [part for setting in SETTINGS for part in ("-R", setting)]
    rounds = Rounds(name, [*settings, *words])
    began = time.monotonic()
    if rounds.over() < KILLED_ROUND:
        rounds.run(RULE, KILLED_ROUND - 1)
    killed = [
        stage for stage in STAGES if rounds.over() == KILLED_ROUND and rounds.run(RULE, KILLED_ROUND, kill_in=stage)
    ]
    rounds.run(RULE, 3)
    rounds.run(COIN, 4)
    print(f"\n{table(rounds.folder)}\n\nRound {KILLED_ROUND} was killed with -9 in: {', '.join(killed) or 'no stage'}.")
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
