"""Stage evaluate: the policies on held-out prompts, and the report. See rlhf_core/evaluate.py and report.py."""

import json
from pathlib import Path
from typing import Any

from rlhf_core.data import load_prepared, prompt_field
from rlhf_core.ensemble import load_ensemble
from rlhf_core.evaluate import POLICIES, Evaluation, Response, evaluate_policies
from rlhf_core.models import Roles, load_tokenizer
from rlhf_core.records import Prompt
from rlhf_core.report import Answer, FrontierPoint, ReportData, SideBySide, write_report
from rlhf_core.statistics import LengthBin, ReliabilityBin
from tasks.dpo import NO_POLICY
from tasks.dpo import POLICY_FOLDER as DPO_FOLDER
from tasks.files import read_csv, write_csv, write_jsonl
from tasks.ppo import POLICY_FOLDER
from tasks.prepare import BASE, PREPARED
from tasks.reward import FOLDERS as REWARD_FOLDERS
from tasks.sft import MODEL as SFT_MODEL
from tasks.stage import stage_run

FOLDER = Path("artifacts/evaluate")


def main() -> None:
    deps: list[str | Path] = [BASE, SFT_MODEL, *REWARD_FOLDERS.values(), POLICY_FOLDER, DPO_FOLDER, PREPARED]
    with stage_run("evaluate", deps=deps) as run:
        config = run.params.evaluate
        prompts = load_prepared(PREPARED, "prompts", ["test"])
        demonstrations = load_prepared(PREPARED, "demonstrations", ["test"])
        run.log_dataset("prepared", PREPARED, context="evaluation", prompts=len(prompts))
        base, tuned = Roles(BASE), Roles(SFT_MODEL)
        tuned.add("ppo", start=POLICY_FOLDER)
        policies: tuple[str, ...] = POLICIES
        if not NO_POLICY.is_file():
            tuned.add("dpo", start=DPO_FOLDER)
            policies = (*POLICIES, "dpo")
        for role, folder in REWARD_FOLDERS.items():
            load_ensemble(tuned, role, folder)
        evaluation = evaluate_policies(
            base, tuned, prompts, demonstrations, config,
            tokenizer=load_tokenizer(BASE), system=run.params.prepare.system, tracker=run, policies=policies,
            cost_axis=run.params.ppo.cost_axis,
        )  # fmt: skip
        if not run.main:
            return
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_jsonl(FOLDER / "answers.jsonl", _answer_rows(evaluation, prompts))
        write_csv(Path("plots/frontier.csv"), _frontier_rows(evaluation))
        write_csv(Path("plots/evaluate_lengths.csv"), _length_rows(evaluation))
        if run.params.ppo.cost_axis:
            evaluation.metrics["cost_limit"] = run.params.ppo.cost_limit
        run.finish_metrics(evaluation.metrics)
        write_report(FOLDER / "report.html", _report(evaluation, prompts, run.params.model_dump(mode="json")))


def _frontier_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    """KL and scores along PPO's path, then on held-out prompts of the policies and of the best of n."""
    rows: list[dict[str, Any]] = [
        {"point": f"update {step}", "kl": kl, "reward": score, "gold_reward": gold}
        for step, kl, score, gold in _ppo_path()
    ]
    points = {policy: evaluation.metrics[policy] for policy in evaluation.policies}
    points |= {f"best of {n}": found for n, found in evaluation.metrics.get("best_of_n", {}).items()}
    for point, found in points.items():
        rows.append({"point": point, "kl": found["kl"], "reward": found["reward"], "gold_reward": found["gold_reward"]})
    return rows


def _ppo_path() -> list[tuple[str, str, str, str]]:
    """Step, KL, score and gold score of each of PPO's updates; the last empty where it was not watched."""
    rows = read_csv(Path("plots/ppo.csv"))
    return [(row["step"], row["ppo/kl"], row["ppo/score"], row.get("ppo/gold_score", "")) for row in rows]


def _length_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [
        {"policy": policy, "prompt": response.prompt, "tokens": response.tokens}
        for policy in evaluation.policies
        for response in evaluation.sampled[policy]
    ]


def _answer_rows(evaluation: Evaluation, prompts: list[Prompt]) -> list[dict[str, Any]]:
    """Every response that was judged, for whoever wants to judge again."""
    rows = []
    for how, by_policy in (("greedy", evaluation.greedy), ("sampled", evaluation.sampled)):
        for policy in evaluation.policies:
            for response in by_policy[policy]:
                row = {name: value for name, value in response._asdict().items() if value != {}}  # no axes, no keys
                row["prompt"] = prompt_field(prompts[response.prompt].prompt)
                rows.append({"policy": policy, "how": how, "category": prompts[response.prompt].category, **row})
    return rows


def _report(evaluation: Evaluation, prompts: list[Prompt], params: dict[str, Any]) -> ReportData:
    stages = {
        stage: json.loads(Path(f"metrics/{stage}.json").read_text())
        for stage in ("prepare", "sft", "reward", "ppo", "dpo")
    }
    curves = {stage: read_csv(Path(f"plots/{stage}.csv")) for stage in ("sft", "reward", "ppo", "dpo")}
    bins = [row for row in read_csv(Path("plots/calibration.csv")) if row["model"] == "reward"]
    metrics = evaluation.metrics
    return ReportData(
        params=params,
        evaluate=metrics,
        **stages,
        curves=curves,
        frontier=[
            FrontierPoint("", float(kl), float(score), float(gold) if gold else None)
            for _, kl, score, gold in _ppo_path()
        ],
        policies=[
            FrontierPoint(name, metrics[name]["kl"], metrics[name]["reward"], metrics[name]["gold_reward"])
            for name in evaluation.policies
        ],
        calibration=[_bin(row) for row in bins if row["scaled"] == "0"],
        calibration_scaled=[_bin(row) for row in bins if row["scaled"] == "1"],
        accuracy_by_length=_length_bins(stages["reward"]["accuracy_by_length"]),
        response_lengths={
            name: [response.tokens for response in evaluation.sampled[name]] for name in evaluation.policies
        },
        answers=_side_by_side(evaluation, prompts, params["evaluate"]["report_prompts"]),
    )


def _bin(row: dict[str, str]) -> ReliabilityBin:
    numbers = {name: float(row[name]) for name in ("low", "high", "confidence", "accuracy")}
    return ReliabilityBin(**numbers, pairs=int(row["pairs"]))


def _length_bins(found: dict[str, dict[str, float]]) -> list[LengthBin]:
    bins = []
    for name, part in found.items():
        low, high = (float(edge) for edge in name.split("_to_"))
        bins.append(LengthBin(low, high, part["accuracy"], int(part["pairs"])))
    return sorted(bins)


def _side_by_side(evaluation: Evaluation, prompts: list[Prompt], count: int) -> list[SideBySide]:
    """Prompts spread over the kinds: one of each in turn, in the order of the split."""
    by_kind: dict[str, list[int]] = {}
    for row, record in enumerate(prompts):
        by_kind.setdefault(record.category, []).append(row)
    queues = [by_kind[kind] for kind in sorted(by_kind)]
    order = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    return [
        SideBySide(
            prompt="\n\n".join(content for _, content in prompts[row].prompt),
            category=prompts[row].category,
            **{policy: _answer(evaluation.greedy[policy][row]) for policy in POLICIES},
        )
        for row in order[:count]
    ]


def _answer(response: Response) -> Answer:
    return Answer(response.text, response.reward, response.gold_reward, response.stopped)


if __name__ == "__main__":
    main()
