"""Stage reward: the reward model that PPO climbs, and the gold one that only judges. See rlhf_core/reward.py.

Both start from the SFT model and are trained in the same way, on rankings of different prompts.
"""

from pathlib import Path

import torch

from rlhf_core.data import encode_prompt, load_prepared
from rlhf_core.models import Normaliser, Roles, TrunkCache, load_tokenizer
from rlhf_core.reward import (
    accuracy_by_kind,
    encode_rankings,
    judge_rankings,
    measure,
    mistakes,
    normalise_on_samples,
    temperature_of,
    train_reward,
)
from tasks.files import write_csv, write_jsonl
from tasks.prepare import BASE, PREPARED
from tasks.sft import MODEL as SFT_MODEL
from tasks.stage import stage_run

FOLDERS = {"reward": "artifacts/reward/model", "gold": "artifacts/reward/gold"}
MISTAKES = Path("artifacts/reward/mistakes.jsonl")
SHOWN_MISTAKES = 50  # in MLflow's table
SPLIT_OF = {"reward": "train", "gold": "gold"}
PREFIX = {"reward": "reward", "gold": "reward/gold"}


def main() -> None:
    with stage_run("reward", deps=[BASE, SFT_MODEL, PREPARED]) as run:
        config, prepare = run.params.reward, run.params.prepare
        tokenizer = load_tokenizer(BASE)
        pad_id = int(tokenizer.pad_token_id)
        records = {
            split: load_prepared(PREPARED, "rankings", [split]) for split in ("train", "validation", "gold", "test")
        }
        rankings = {
            split: encode_rankings(
                of_split,
                tokenizer,
                system=prepare.system,
                max_response_tokens=prepare.max_response_tokens,
            )
            for split, of_split in records.items()
        }
        run.log_dataset("prepared", PREPARED, **{f"rankings_{split}": len(rows) for split, rows in rankings.items()})
        torch.manual_seed(config.seed)
        roles = Roles(SFT_MODEL, config)
        final, qualities, cache = {}, {}, TrunkCache()
        for role in FOLDERS:
            roles.add(role, method=config.method, head=True)
        for role, split in SPLIT_OF.items():
            trained = train_reward(
                roles, role, rankings[split], rankings["validation"], config, pad_id=pad_id, tracker=run,
                prefix=PREFIX[role], cache=cache, checkpoints=run.checkpoints.below(role),
            )  # fmt: skip
            judged = {
                split: judge_rankings(roles, role, rankings[split], pad_id, cache=cache)
                for split in ("validation", "test")
            }
            qualities[role] = measure(judged["test"], temperature_of(judged["validation"]))
            if role == "reward":
                by_kind = accuracy_by_kind(judged["test"], records["test"])
                wrong = mistakes(judged["test"], records["test"])
            final[role] = {**qualities[role].metrics, **trained}
        prompts = load_prepared(PREPARED, "prompts", ["train", "validation"])
        statistics = normalise_on_samples(
            roles,
            list(FOLDERS),
            [encode_prompt(tokenizer, record.prompt, prepare.system) for record in prompts],
            count=config.norm_samples,
            max_tokens=prepare.max_response_tokens,
            tokenizer=tokenizer,
            seed=config.seed,
        )
        for role, (mean, std) in statistics.items():
            roles.normalisers[role] = Normaliser(mean, std, final[role]["temperature"])
            final[role] |= {"score_mean": mean, "score_std": std}
            if run.main:
                roles.save(role, FOLDERS[role])
        metrics = {**final["reward"], "gold": final["gold"]}
        metrics["accuracy_by_length"] = {
            f"{part.low:+.0f}_to_{part.high:+.0f}": {"accuracy": part.accuracy, "pairs": part.pairs}
            for part in qualities["reward"].by_length
        }
        metrics["accuracy_by_kind"] = by_kind
        run.finish_metrics(metrics)
        run.table("reward/mistakes", wrong[:SHOWN_MISTAKES], step=0)
        if run.main:
            write_jsonl(MISTAKES, wrong)
            write_csv(Path("plots/calibration.csv"), _calibration(qualities))
        for role, folder in FOLDERS.items():
            run.register_model(role, folder, final[role])


def _calibration(qualities):  # type: ignore[no-untyped-def]
    """One row a bin of confidence, for both models, before and after temperature scaling."""
    rows = []
    for role, quality in qualities.items():
        for scaled, bins in ((False, quality.calibration), (True, quality.calibration_scaled)):
            rows += [{"model": role, "scaled": int(scaled), **part._asdict()} for part in bins]
    return rows


if __name__ == "__main__":
    main()
