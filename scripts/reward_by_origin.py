"""Prints how often the reward models are right on held-out pairs, with the demonstration among them and without.

`python scripts/reward_by_origin.py`, after the reward stage. Most pairs of the starter data hold the demonstration, and
to tell that from a small model's answer is the easy part; the pairs of sampled responses are the ones that PPO meets.
"""

from pathlib import Path

from rlhf_core.config import load_params
from rlhf_core.data import load_prepared
from rlhf_core.models import Roles, load_tokenizer
from rlhf_core.records import Ranking
from rlhf_core.reward import EncodedRanking, accuracy, encode_rankings, judge_rankings
from tasks.prepare import BASE, PREPARED
from tasks.reward import FOLDERS
from tasks.sft import MODEL


def without(ranking: Ranking, response: str) -> Ranking:
    """The ranking of the other responses."""
    kept = [index for index, text in enumerate(ranking.responses) if text != response]
    responses, ranks = ([column[index] for index in kept] for column in (ranking.responses, ranking.ranks))
    return ranking._replace(responses=tuple(responses), ranks=tuple(ranks))


def right(roles: Roles, role: str, rankings: list[EncodedRanking], pad_id: int) -> tuple[float, int]:
    """How many pairs the role gets right, and of how many."""
    judged = judge_rankings(roles, role, rankings, pad_id)
    return accuracy(judged) * len(judged.margins), len(judged.margins)


def main() -> None:
    """One line a model."""
    prepare = load_params(Path("params.yaml")).prepare
    tokenizer = load_tokenizer(BASE)
    rankings = load_prepared(PREPARED, "rankings", ["test"])
    shown = {record.prompt: record.response for record in load_prepared(PREPARED, "demonstrations", ["test"])}
    sampled = [without(ranking, shown[ranking.prompt]) for ranking in rankings]
    whole_ids, sampled_ids = (
        encode_rankings(part, tokenizer, system=prepare.system, max_response_tokens=prepare.max_response_tokens)
        for part in (rankings, sampled)
    )
    roles = Roles(MODEL)
    for role, folder in FOLDERS.items():
        roles.add(role, head=True, start=folder)
    for role in FOLDERS:
        all_right, pairs = right(roles, role, whole_ids, tokenizer.pad_token_id)
        sampled_right, sampled_pairs = right(roles, role, sampled_ids, tokenizer.pad_token_id)
        shown_right, shown_pairs = all_right - sampled_right, pairs - sampled_pairs
        print(
            f"{role:<7} all {all_right / pairs:.1%} of {pairs}   "
            f"with the demonstration {shown_right / shown_pairs:.1%} of {shown_pairs}   "
            f"sampled only {sampled_right / sampled_pairs:.1%} of {sampled_pairs}"
        )


if __name__ == "__main__":
    main()
