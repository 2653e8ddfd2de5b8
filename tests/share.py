"""Trains SFT, a reward model, DPO and PPO as plan.json says, in one process or several, for test_processes.py."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rlhf_core import processes
from rlhf_core.config import DPO, PPO, SFT, Reward
from rlhf_core.dpo import Preference, pairs_of, train_dpo
from rlhf_core.models import Normaliser, Roles, load_tokenizer
from rlhf_core.ppo import POLICY, REWARD, VALUE, add_roles, train_ppo
from rlhf_core.reward import EncodedRanking, judge_rankings, normalise_on_samples, train_reward
from rlhf_core.sft import Example, train_sft
from rlhf_core.tracking import MemoryTracker

MEMBERS, TRAINED = 22, 19  # batches of 16 and of 3, which two processes share unevenly


def rows(count: int, *, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, 290) for _ in range(chance.randrange(2, 9))] for _ in range(count)]


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plan = json.loads((folder / "plan.json").read_text())
    base, found, weights = plan["base"], {}, {}
    prompts = rows(MEMBERS, seed=1)

    def keep(stage: str, roles: Roles, names: list[str], final: Any, tracker: MemoryTracker) -> None:
        found[stage] = {"final": final, "history": tracker.history}
        for name in names:
            weights.update({f"{stage}.{name}.{i}": p.detach().clone() for i, p in enumerate(roles.trainable(name))})

    tracker, config = MemoryTracker(), SFT.model_validate(plan["sft"])
    roles = Roles(base, config)
    roles.add("policy", method=config.method)
    examples = [Example(prompt, answer) for prompt, answer in zip(prompts, rows(MEMBERS, seed=2), strict=True)]
    final = train_sft(roles, examples[:TRAINED], examples[TRAINED:], config, pad_id=0, tracker=tracker)
    keep("sft", roles, ["policy"], final, tracker)

    tracker, section = MemoryTracker(), Reward.model_validate(plan["reward"])
    roles = Roles(base, section)
    roles.add(REWARD, method=section.method, head=True)
    answers = [rows(3, seed=10 + row) for row in range(MEMBERS)]
    rankings = [
        EncodedRanking([prompt + answer for answer in three], (1, 2, 2 + row % 2), [len(answer) for answer in three])
        for row, (prompt, three) in enumerate(zip(prompts, answers, strict=True))
    ]
    final = train_reward(roles, REWARD, rankings[:TRAINED], rankings[TRAINED:], section, pad_id=0, tracker=tracker)
    tokenizer = load_tokenizer(base)
    statistics = normalise_on_samples(roles, [REWARD], prompts, count=7, max_tokens=5, tokenizer=tokenizer, seed=0)[
        REWARD
    ]
    margins = judge_rankings(roles, REWARD, rankings, 0).margins.tolist()
    keep("reward", roles, [REWARD], {**final, "statistics": statistics, "margins": margins}, tracker)
    roles.normalisers[REWARD] = Normaliser(*statistics)
    if processes.state().is_main_process:
        roles.save(REWARD, folder / "reward")
    processes.wait()

    tracker, preferring = MemoryTracker(), DPO.model_validate(plan["dpo"])
    roles = Roles(base, preferring)
    torch.manual_seed(1)
    roles.add("policy", method=preferring.method)
    pairs = [
        Preference([Example(prompt, answer) for answer in three], pairs_of(ranking.ranks))
        for prompt, three, ranking in zip(prompts, answers, rankings, strict=True)
    ]
    final = train_dpo(roles, pairs[:TRAINED], pairs[TRAINED:], preferring, pad_id=0, tracker=tracker)
    tracker.history[0][1].pop("dpo/accuracy")  # of equal policies: rounding decides which response is the better
    keep("dpo", roles, ["policy"], final, tracker)

    tracker, options = MemoryTracker(), PPO.model_validate(plan["ppo"])
    roles = Roles(base, options)
    torch.manual_seed(1)
    add_roles(roles, str(folder / "reward"), method=options.method)
    final, shown = train_ppo(roles, prompts, options, tokenizer=tokenizer, tracker=tracker)
    keep("ppo", roles, [POLICY, VALUE], {**final, "shown": shown}, tracker)

    if processes.state().is_main_process:
        found["processes"] = processes.count()
        (folder / "found.json").write_text(json.dumps(found))
        save_file(weights, folder / "weights.safetensors")
    processes.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
