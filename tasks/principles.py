"""Stage principles: answers to red-team prompts, compared by the question of a principle.

They are the revised SFT policy's, and with `constitution.with_chains` those of chains: see rlhf_core/constitution.py.
It stands in the dvc.yaml of `rlhf constitution` only (flows/constitution.py).
"""

from pathlib import Path
from typing import Any

from rlhf_core.constitution import answers_of_chains, chain_of, draw_principle, load_principles, messages
from rlhf_core.critics import ScriptedAnnotator
from rlhf_core.data import load_prepared, read_rows
from rlhf_core.feedback.annotators import Annotator, Item, as_ranking
from rlhf_core.feedback.judges import admit, counts_of, open_judge
from rlhf_core.feedback.local import LabelComparer
from rlhf_core.feedback.pairs import PairwiseJudge
from tasks.constitution import CHAINS, safety_prompts, speaker
from tasks.environment import how_to_set, record_folder
from tasks.files import write_jsonl
from tasks.prepare import BASE, PREPARED
from tasks.sft import MODEL as SFT_MODEL
from tasks.stage import StageRun, require_watched, stage_run

RANKINGS = Path("artifacts/principles/rankings.jsonl")
SPLITS = ("train", "validation")  # test judges the policies, and gold the judge


def main() -> None:
    with stage_run("principles", deps=[BASE, SFT_MODEL, PREPARED]) as run:
        config = run.params.constitution
        require_watched(run, "constitution.principles", config.principles)
        if config.annotator == "judge" and run.params.judge.kind in ("local", "reward"):
            require_watched(run, "judge.model", run.params.judge.model)
        principles = load_principles(config.principles)
        prompts = safety_prompts(SPLITS)
        policy = speaker(run, SFT_MODEL)
        chats = [record.prompt for record in prompts for _ in range(config.responses)]
        said = policy.answer(chats, max_tokens=config.response_tokens, note="answers")
        if not run.main:  # one process judges
            return
        chains = [chain_of(row) for _, row in read_rows(str(CHAINS))] if config.with_chains else []
        more = answers_of_chains(chains, seed=config.seed)
        items, drawn = [], []
        for place, record in enumerate(prompts):
            own = said[place * config.responses : (place + 1) * config.responses]
            distinct = tuple(dict.fromkeys(text for text in (*own, *more.get(record.prompt, ())) if text))
            if len(distinct) > 1:
                by = draw_principle(principles, record.prompt, "question", seed=config.seed)
                items.append(Item(record.prompt, distinct, by.question))
                drawn.append((by.id, record.category))
        annotator = _open_annotator(run)
        rows: list[dict[str, Any]] = []
        for item, (principle, category), judged in zip(items, drawn, annotator.judge(items), strict=True):
            if len(set(judged.ranks)) > 1:
                asked = {"prompt": messages(item.prompt), "responses": list(item.responses)}
                rows.append({**asked, **as_ranking(judged, annotator), "principle": principle, "category": category})
        if not rows:  # the rest can still run: the reward model learns from the starter rankings
            print(
                f"principles  all {len(items)} comparisons by {annotator.name} are ties and teach nothing", flush=True
            )
        write_jsonl(RANKINGS, rows)
        if counts := counts_of(annotator):
            run.metrics(counts, step=0)
        run.finish_metrics(
            {
                "items": len(items),
                "rankings": len(rows),
                "responses": sum(len(item.responses) for item in items),
            }
        )


def _open_annotator(run: StageRun) -> Annotator:
    """Who compares, by constitution.annotator; section judge has to reach its bar, as everywhere.

    Raises:
        RLHFError: there is no such script or judge, or it misses the bar.
    """
    params = run.params
    who = params.constitution.annotator
    if who.startswith("script:"):
        categories = {record.prompt: record.category for record in safety_prompts(SPLITS)}
        return ScriptedAnnotator(who.removeprefix("script:"), categories)
    if who == "policy":
        return PairwiseJudge(LabelComparer(SFT_MODEL, tracker=run))
    judge = open_judge(params.judge, params.prepare, memory=record_folder() / "judge.db", tracker=run)
    if params.judge.bar > 0:
        known = load_prepared(PREPARED, "rankings", ["test"])
        admit(judge, known, params.judge, anyway=how_to_set("judge", "bar", "0"))
    return judge


if __name__ == "__main__":
    main()
