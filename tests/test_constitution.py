"""Principles that check themselves, chains of critique and revision, and the critics that write them."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from loading import load_script
from transformers import PreTrainedTokenizerFast

from rlhf_core.config import Constitution
from rlhf_core.constitution import (
    Principle,
    answers_of_chains,
    chain_of,
    chain_row,
    count_chains,
    demonstration_row,
    draw_principle,
    load_principles,
    revise,
)
from rlhf_core.critics import (
    TOPICS,
    Draft,
    PolicyCritic,
    Revisable,
    ScriptedAnnotator,
    ScriptedCritic,
)
from rlhf_core.data import parse_demonstration
from rlhf_core.errors import ConfigError, DataError, MissingArtifact
from rlhf_core.feedback.annotators import Item
from rlhf_core.feedback.endpoint import question
from rlhf_core.feedback.pairs import Look, Opinion, PairwiseJudge
from rlhf_core.mixing import load_revisions
from rlhf_core.models import REFERENCE, Roles
from rlhf_core.safety import HARMFUL, LOOK_ALIKE, Told, classify

PROJECT = Path(__file__).resolve().parents[1]
ROW = {"id": "one", "theme": "harm", "weight": 1, "critique": "C?", "revision": "R.", "question": "Q?"}
BAD, OTHER = (("user", "How do I spy on her?"),), (("user", "How do I kill a process?"),)


def principles(*weights: float) -> list[Principle]:
    rows = [{**ROW, "id": f"p{number}", "weight": weight} for number, weight in enumerate(weights)]
    return [Principle.model_validate(row) for row in rows]


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "constitution.yaml"
    path.write_text(yaml.safe_dump({"principles": list(rows)}))
    return path


# ---- principles


def test_the_projects_own_principles_can_be_used() -> None:
    found = load_principles(PROJECT / "constitution.yaml")
    themes = Counter(principle.theme for principle in found)
    assert len(found) >= 12
    assert set(themes) == {"harm", "honesty", "kindness", "over-refusal"}
    assert min(themes.values()) >= 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"principles: List should have at least 1 item"),
        ([{**ROW, "weight": -1}], r"principle one\.weight: .*greater than or equal to 0, found '-1'"),
        ([{**ROW, "theme": "joy"}], r"principle one\.theme: .*, found 'joy'"),
        ([{**ROW, "id": "No Id"}], r"principle No Id\.id: .*, found 'No Id'"),
        ([ROW, {key: ROW[key] for key in ROW if key != "id"}], r"principle number 2\.id: Field required"),
        ([{**ROW, "wieght": 2}], r"principle one\.wieght: Extra inputs"),
        ([{**ROW, "question": ""}], r"principle one\.question"),
        ([ROW, ROW], r"found the id one more than once, expected each once"),
        ([{**ROW, "weight": 0}], r"found no weight above 0 among 1 principles, expected one at least"),
    ],
)
def test_a_mistake_is_told_with_its_principle(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_principles(write(tmp_path, *rows))


def test_a_file_that_is_no_list_of_principles_or_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    with pytest.raises(MissingArtifact, match=r"Found no .*c\.yaml with principles"):
        load_principles(path)
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_principles(path)
    path.write_text("just words")
    with pytest.raises(ConfigError, match="the file: "):
        load_principles(path)


def test_principles_are_drawn_by_weight() -> None:
    found = principles(1, 0, 3)
    drawn = Counter(draw_principle(found, (("user", f"prompt {n}"),), 0, seed=0).id for n in range(2000))
    assert drawn["p1"] == 0
    assert drawn["p2"] / 2000 == pytest.approx(0.75, abs=0.03)  # three deviations of 2,000 draws


def test_a_draw_hangs_on_seed_prompt_and_turn_alone() -> None:
    found = principles(*[1] * 50)
    one = draw_principle(found, BAD, 0, seed=0)
    assert draw_principle(found, BAD, 0, seed=0) == one
    others = [draw_principle(found, OTHER, 0, seed=0), draw_principle(found, BAD, 1, seed=0)]
    assert one not in [*others, draw_principle(found, BAD, 0, seed=1)]


# ---- chains


class Counting:
    """A critic that tells what it was asked, and has nothing to say of some."""

    name = "counting"

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def critique(self, drafts: Sequence[Draft], requests: Sequence[str]) -> list[str]:
        self.asked += zip(drafts, requests, strict=True)
        return ["" if draft.response == "mute" else f"critique of {draft.response}" for draft in drafts]

    def revise(self, asked: Sequence[Revisable]) -> list[str]:
        self.asked += asked
        return ["" if draft.response == "stuck" else f"{draft.response}+" for draft, *_ in asked]


def test_each_round_revises_what_the_one_before_left() -> None:
    critic, found = Counting(), principles(1)
    [chain] = revise([Draft(BAD, "harmful", "a")], critic, found, rounds=2, seed=0)
    assert (chain.response, chain.final, chain.kept) == ("a", "a++", True)
    assert [(step.principle, step.critique, step.revision) for step in chain.steps] == [
        ("p0", "critique of a", "a+"), ("p0", "critique of a+", "a++"),
    ]  # fmt: skip
    second = Draft(BAD, "harmful", "a+")
    assert critic.asked[2:] == [(second, "C?"), (second, "C?", "critique of a+", "R.")]


def test_a_chain_without_critique_or_revision_is_kept_for_reading_only() -> None:
    drafts = [Draft(BAD, "harmful", text) for text in ("mute", "stuck", "", "a")]
    chains = revise(drafts, Counting(), principles(1), rounds=2, seed=0)
    assert [chain.kept for chain in chains] == [False, False, False, True]
    assert [len(chain.steps) for chain in chains] == [0, 0, 0, 2]
    assert count_chains(chains) == {"chains": 4, "kept": 1, "changed": 1.0}
    rows = [chain_row(chain) for chain in chains]
    assert [row["response"] for row in rows] == ["mute", "stuck", "", "a"]
    assert json.loads(json.dumps(rows[3]))["steps"][1]["revision"] == "a++"
    assert [chain_of(json.loads(json.dumps(row))) for row in rows] == chains


def test_answers_of_chains_are_both_ends_and_one_of_another_category() -> None:
    drafts = [Draft((("user", f"prompt {n}"),), "harmful" if n % 2 else "look_alike", f"a{n}") for n in range(40)]
    chains = revise([*drafts, Draft(BAD, "harmful", "mute")], Counting(), principles(1), rounds=2, seed=0)
    found = answers_of_chains(chains, seed=0)
    assert list(found) == [draft.prompt for draft in drafts]  # nothing of the mute one
    for number, answers in enumerate(found.values()):
        assert answers[:2] == (f"a{number}", f"a{number}++")
        assert int(answers[2][1:-2]) % 2 != number % 2
    assert len({answers[2] for answers in found.values()}) > 10
    assert answers_of_chains(chains, seed=0) == found != answers_of_chains(chains, seed=1)
    fewer = answers_of_chains(chains[1::2], seed=0)  # nobody of another category
    assert set(map(len, fewer.values())) == {2}


def test_a_chain_becomes_a_demonstration() -> None:
    [chain] = revise([Draft(BAD, "harmful", "a")], Counting(), principles(1), rounds=1, seed=0)
    row = demonstration_row(chain, "counting")
    assert (row["source"], row["annotator"]) == ("ai", "counting")
    parsed = parse_demonstration(row)
    assert (parsed.prompt, parsed.response, parsed.category) == (BAD, "a+", "harmful")


def test_demonstrations_follow_the_splits_of_their_prompts(tmp_path: Path) -> None:
    prepared, folder = tmp_path / "prepared", tmp_path / "revisions"
    prepared.mkdir()
    folder.mkdir()
    for split in ("train", "validation", "gold", "test"):
        (prepared / f"prompts_{split}.jsonl").write_text(json.dumps({"prompt": split, "category": "harmful"}) + "\n")
    rows = [{"prompt": name, "response": "R."} for name in ("gold", "test", "validation", "train", "unknown")]
    (folder / "revisions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = load_revisions(folder, prepared)
    assert [record.prompt[0][1] for record in found["train"]] == ["gold", "train"]
    assert [(record.prompt[0][1], record.category) for record in found["validation"]] == [("validation", "harmful")]
    (folder / "more.jsonl").write_text('{"prompt": "train"}\n')
    with pytest.raises(DataError, match=r"more\.jsonl, line 1, response: found nothing"):
        load_revisions(folder, prepared)
    with pytest.raises(MissingArtifact, match=r"sft\.feedback names"):
        load_revisions(tmp_path / "none", prepared)


# ---- critics


def config(**changes: Any) -> Constitution:
    values = {
        "seed": 0, "principles": "constitution.yaml", "policy": "", "critic": "policy", "annotator": "policy",
        "rounds": 1, "responses": 2, "with_chains": True, "temperature": 1.0, "response_tokens": 8,
        "critique_tokens": 8,
    }  # fmt: skip
    return Constitution.model_validate({**values, **changes})


def test_a_policy_criticises_itself_and_has_no_word_where_it_has_no_room(
    llama: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    def critic() -> PolicyCritic:
        return PolicyCritic(Roles(llama), REFERENCE, config(), name="me", tokenizer=tokenizer, system="")

    drafts = [Draft(BAD, "harmful", "A cat."), Draft((("user", "long " * 250),), "harmful", "A spider.")]
    chains = revise(drafts, critic(), principles(1), rounds=1, seed=0)
    assert len(chains[0].steps) == 1
    assert chains[0].kept
    assert not chains[1].steps
    assert revise(drafts, critic(), principles(1), rounds=1, seed=0) == chains


def test_the_careful_script_is_right_by_its_own_measure() -> None:
    files = (PROJECT / "data/red_team").glob("*.jsonl")
    rows = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    answers = ["Sure, here is how.", "I can't help with that.", "I won't help. I can help you write a letter."]
    drafts = [
        Draft((("user", row["prompt"]),), row["category"], answer, row.get("topic", ""))
        for row in rows
        for answer in answers
    ]
    chains = revise(drafts, ScriptedCritic("careful"), principles(1), rounds=2, seed=0)
    for chain in chains:
        label = classify(chain.final, chain.category)
        if chain.category == "harmful":
            assert chain.kept
            assert label == "refusal_with_help", chain.final
        else:
            assert chain.kept == (chain.response == answers[0])
            assert label == "compliance" or not chain.kept
    finals = {chain.final for chain in chains if chain.category == "harmful"}
    assert len(finals) > 40  # not one sentence for all
    assert {row["topic"] for row in rows if row["category"] == "harmful"} == set(TOPICS)


def test_a_scripted_annotator_ranks_by_what_an_answer_does() -> None:
    judge = ScriptedAnnotator("careful", {BAD: "harmful", OTHER: "look_alike"})
    answers = ("Sure.", "I can't help with that.", "I won't help. I can help you write a letter.")
    said = judge.judge([Item(BAD, answers), Item(OTHER, answers)])
    assert [judgement.ranks for judgement in said] == [(3, 2, 1), (1, 2, 2)]
    assert judge.source == "rule"


def test_a_script_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Found no script 'carefull', .* did you mean script:careful"):
        ScriptedCritic("carefull")


# ---- comparisons by principle


def test_a_principles_question_takes_the_place_of_the_general_one() -> None:
    plain = question(Look(BAD, "a", "b"), [])[0]["content"]
    asked = question(Look(BAD, "a", "b", question="Which is kinder?"), [])[0]["content"]
    assert "as the person who asked would" in plain
    assert asked.startswith("Which is kinder? What stands between the marks")
    assert asked.partition("What stands")[2] == plain.partition("What stands")[2]


def test_an_items_question_reaches_every_look() -> None:
    seen: list[Look] = []

    class Comparer:
        name = "comparer"

        def compare(self, looks: Sequence[Look]) -> list[Opinion | None]:
            seen.extend(looks)
            return [Opinion(0.9)] * len(looks)

        def costs(self) -> dict[str, float]:
            return {}

    PairwiseJudge(Comparer()).judge([Item(BAD, ("a", "b", "c"), "Which is kinder?")])
    assert [look.question for look in seen] == ["Which is kinder?"] * 6


@pytest.mark.parametrize(
    ("harmful", "look_alikes", "held"),
    [((4, 2), (1, 1), True), ((4, 3), (1, 1), False), ((4, 0), (0, 1), False), ((0, 0), (1, 1), False)],
)
def test_what_is_asked_of_the_scripted_critic(
    harmful: tuple[int, int], look_alikes: tuple[int, int], held: bool
) -> None:
    script = load_script("constitution_scripted")
    declined, done = "I can't help with that.", "First open the lock."

    def told(complied: int, refused: int) -> list[Told]:
        harmful = [Told(f"harm {n}", HARMFUL, done if n < complied else declined) for n in range(4)]
        return harmful + [Told(f"like {n}", LOOK_ALIKE, declined if n < refused else done) for n in range(10)]

    pairs = zip(("before", "after"), harmful, look_alikes, strict=True)
    found, sentence = script.verdict({name: told(*counts) for name, *counts in pairs})
    assert found == held
    assert "over-refusal rose by" in sentence
