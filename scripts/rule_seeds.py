"""Does a policy learn a taste that a judge has? One online round by a written rule, four seeds.

    python scripts/rule_seeds.py [SEED ...] [rlhf online run's options, such as --recipe tiny]

After `make run`, whose models each round begins from. The rule, and all settings but the seeds, are those of
scripts/online_rounds.py: the rule ranks answers, the reward model learns them beside the starter rankings, PPO climbs
it. Prints by the rule how often each policy beats SFT's on the held-out prompts, and exits with 1 unless that is above
one half with its whole interval for every seed. Start it again and it goes on where it was.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from online_rounds import RULE, RUN, SETTINGS, Round, read_round, table

SEEDED = ("preferences.seed", "reward.seed", "ppo.seed")


def run(seed: int, options: Sequence[str]) -> Round:
    """Round 1 of a campaign of its own, where that is not over yet."""
    folder = Path(".rlhf") / f"{RULE}-{seed}"
    settings = [*(f"{name}={seed}" for name in SEEDED), *SETTINGS]
    new = [*options, *(part for one in settings for part in ("-R", one))]
    begun = [] if (folder / "campaign.json").is_file() else new
    command = [*RUN, folder.name, *begun, "--annotator", f"rule:{RULE}", "--until", "1"]
    if subprocess.run(command).returncode:
        raise SystemExit(f"rlhf online run {folder.name} failed")
    return read_round(folder / "rounds" / "001")


def verdict(rounds: Sequence[Round]) -> tuple[bool, str]:
    """Whether every one beats SFT by the rule, and the words for it."""
    won = [one for one in rounds if one.over_sft.low > 0.5]
    return len(won) == len(rounds), f"Above one half with the whole interval: {len(won)} of {len(rounds)} seeds."


def main() -> int:
    words = sys.argv[1:]
    seeds = [int(words.pop(0)) for _ in words[:] if words and words[0].isdigit()] or [0, 1, 2, 3]
    rounds = [run(seed, words) for seed in seeds]
    held, sentence = verdict(rounds)
    print(f"\nSeeds {', '.join(map(str, seeds))}:\n\n{table(rounds)}\n\n{sentence}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
