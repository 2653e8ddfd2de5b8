"""Stage ppo: the policy that climbs the reward model. The algorithm is rlhf_core/ppo.py, from top to bottom."""

from pathlib import Path

import torch

from rlhf_core.data import encode_prompt, load_prepared
from rlhf_core.models import Roles, load_tokenizer
from rlhf_core.ppo import POLICY, VALUE, add_roles, train_ppo
from tasks.files import write_jsonl
from tasks.prepare import BASE, PREPARED
from tasks.reward import FOLDERS as REWARD_FOLDERS
from tasks.sft import MODEL as SFT_MODEL
from tasks.stage import require_watched, stage_run

POLICY_FOLDER, VALUE_FOLDER = "artifacts/ppo/policy", "artifacts/ppo/value"
SAMPLES = Path("artifacts/ppo/samples.jsonl")
SPLITS = ("train", "validation", "gold")  # every prompt that is not in test; PPO sees no ranking of them


def main() -> None:
    with stage_run("ppo", deps=[BASE, SFT_MODEL, REWARD_FOLDERS["reward"], PREPARED]) as run:
        config = run.params.ppo
        require_watched(run, "ppo.start", config.start)
        tokenizer = load_tokenizer(BASE)
        prompts = [
            encode_prompt(tokenizer, record.prompt, run.params.prepare.system)
            for record in load_prepared(PREPARED, "prompts", SPLITS)
        ]
        run.log_dataset("prepared", PREPARED, prompts=len(prompts))
        torch.manual_seed(config.seed)
        roles = Roles(SFT_MODEL, config)
        add_roles(roles, REWARD_FOLDERS["reward"], method=config.method, start=config.start)
        final, shown = train_ppo(roles, prompts, config, tokenizer=tokenizer, tracker=run, checkpoints=run.checkpoints)
        if run.main:
            roles.save(POLICY, POLICY_FOLDER)
            roles.save(VALUE, VALUE_FOLDER)
            write_jsonl(SAMPLES, shown)
        run.finish_metrics(final)
        run.register_model("policy", POLICY_FOLDER, final)


if __name__ == "__main__":
    main()
