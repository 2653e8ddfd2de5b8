"""Trains SFT, a reward model, DPO and PPO as plan.json says, in one process or several, for test_processes.py."""

import json
import os
import random
import signal
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save, save_file

from rlhf_core import checkpoints as module
from rlhf_core import ppo, processes
from rlhf_core.checkpoints import Checkpoints
from rlhf_core.config import DPO, PPO, SFT, Reward
from rlhf_core.dpo import Preference, pairs_of, train_dpo
from rlhf_core.ensemble import add_members, member_seed, members_of, save_ensemble
from rlhf_core.models import Roles, load_tokenizer
from rlhf_core.ppo import POLICY, REWARD, VALUE, add_roles, train_ppo
from rlhf_core.records import Sampled
from rlhf_core.reward import EncodedRanking, judge_heads, normalise_on_samples, train_reward
from rlhf_core.rollouts import sample
from rlhf_core.sft import Example, train_sft
from rlhf_core.tracking import MemoryTracker

MEMBERS, TRAINED = 22, 19  # batches of 16 and of 3, which two processes share unevenly


class Tracker(MemoryTracker):
    """In the last process, kills it with -9 when the given number of reports is up, whatever loop they are of."""

    left: int | None = None

    def metrics(self, values: Mapping[str, float], *, step: int) -> None:
        if Tracker.left is not None and processes.state().is_last_process:
            Tracker.left -= 1
            if Tracker.left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        super().metrics(values, step=step)


def rows(count: int, *, seed: int) -> list[list[int]]:
    chance = random.Random(seed)
    return [[chance.randrange(3, 290) for _ in range(chance.randrange(2, 9))] for _ in range(count)]


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    plan = json.loads((folder / "plan.json").read_text())
    base, found, weights = plan["base"], {}, {}
    Tracker.left = plan.get("dies_after")
    module.LARGEST_SHARE = 1.0  # a checkpoint a step
    place = Path(plan["checkpoints"]) if "checkpoints" in plan else None
    saved = Checkpoints(place, writes=processes.state().is_main_process)
    prompts = rows(MEMBERS, seed=1)

    def keep(stage: str, roles: Roles, names: list[str], final: Any, tracker: MemoryTracker) -> None:
        found[stage] = {"final": final, "history": tracker.history}
        for name in names:
            weights.update({f"{stage}.{name}.{i}": p.detach().clone() for i, p in enumerate(roles.trainable(name))})

    tracker, config = Tracker(), SFT.model_validate(plan["sft"])
    roles = Roles(base, config)
    roles.add("policy", method=config.method)
    examples = [Example(prompt, answer) for prompt, answer in zip(prompts, rows(MEMBERS, seed=2), strict=True)]
    final = train_sft(
        roles, examples[:TRAINED], examples[TRAINED:], config,
        pad_id=0, tracker=tracker, checkpoints=saved.below("sft"),
    )  # fmt: skip
    keep("sft", roles, ["policy"], final, tracker)

    tracker, section = Tracker(), Reward.model_validate(plan["reward"])
    roles = Roles(base, section)
    roles.add(REWARD, method=section.method, head=True, axes=section.axes)
    add_members(roles, REWARD, section)
    members = members_of(roles, REWARD)
    answers = [rows(3, seed=10 + row) for row in range(MEMBERS)]
    rankings = [
        EncodedRanking(
            [prompt + answer for answer in three],
            (1, 2, 2 + row % 2),
            [len(answer) for answer in three],
            axes={"kind": [row % 3, 2, len(three[2])]} if row % 4 else {},
        )
        for row, (prompt, three) in enumerate(zip(prompts, answers, strict=True))
    ]
    final = {}
    for number, name in enumerate(members, start=1):
        final[name] = train_reward(
            roles, name, rankings[:TRAINED], rankings[TRAINED:],
            section.model_copy(update={"seed": member_seed(section.seed, number)}),
            pad_id=0, tracker=tracker, prefix=name, checkpoints=saved.below(name),
        )  # fmt: skip
    tokenizer = load_tokenizer(base)
    final["statistics"] = normalise_on_samples(
        roles, members, prompts, count=7, max_tokens=5, tokenizer=tokenizer, seed=0
    )
    judged = judge_heads(roles, REWARD, rankings, 0)
    final["margins"] = {str(axis): of_axis.margins.tolist() for axis, of_axis in judged.items()}
    keep("reward", roles, members, final, tracker)
    if processes.state().is_main_process:
        save_ensemble(roles, REWARD, folder / "reward", temperature=1.0)
    processes.wait()

    tracker, preferring = Tracker(), DPO.model_validate(plan["dpo"])
    roles = Roles(base, preferring)
    torch.manual_seed(1)
    roles.add("policy", method=preferring.method)
    pairs = [
        Preference([Example(prompt, answer) for answer in three], pairs_of(ranking.ranks))
        for prompt, three, ranking in zip(prompts, answers, rankings, strict=True)
    ]
    final = train_dpo(
        roles, pairs[:TRAINED], pairs[TRAINED:], preferring,
        pad_id=0, tracker=tracker, checkpoints=saved.below("dpo"),
    )  # fmt: skip
    for _, values in tracker.history[:1]:
        values.pop("dpo/accuracy")  # of equal policies: rounding decides which response is the better
    keep("dpo", roles, ["policy"], final, tracker)

    tracker, options = Tracker(), PPO.model_validate(plan["ppo"])
    roles = Roles(base, options)
    torch.manual_seed(1)
    add_roles(
        roles,
        str(folder / "reward"),
        method=options.method,
        cost_axis=options.cost_axis,
        value_network=options.value_network,
    )
    drawn = []

    def drawing(*given: Any, **named: Any) -> Sampled:
        sampled = sample(*given, **named)
        drawn.append(sampled.responses())
        return sampled

    ppo.sample = drawing
    final, shown = train_ppo(
        roles, prompts, options, tokenizer=tokenizer, tracker=tracker, checkpoints=saved.below("ppo")
    )
    keep("ppo", roles, [POLICY, VALUE], {**final, "shown": shown}, tracker)
    found["drawn"] = drawn

    minibatches = [values["ppo/minibatches"] for _, values in tracker.history]
    each = gather_object([{"minibatches": minibatches, "weights": sha256(save(weights)).hexdigest()}])
    if processes.state().is_main_process:
        found |= {"processes": processes.count(), "each": each}
        (folder / "found.json").write_text(json.dumps(found))
        save_file(weights, folder / "weights.safetensors")
    processes.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
