"""People asked about the pipeline's own answers: what is opened for them, kept, and set beside the gold model."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from person import Person
from sqlalchemy import select
from test_flow import recorded, rlhf, toy  # noqa: F401  (a fixture)
from toy import PROJECT, SCRIPT, child_environment, dvc, init_dvc

from flows import people
from flows.results import people_said
from flows.server import free_port
from rlhf_core.errors import ConfigError, DataError, MissingArtifact
from rlhf_core.feedback import judging
from rlhf_core.feedback.accounts import local_admin
from rlhf_core.feedback.exchange import add_items, find_items
from rlhf_core.feedback.store import Item, Judgement, open_store
from tasks.people import SAID, pairs_of, read_said

REPORT = '<nav><a href="#policies">Policies</a></nav>\n<section id="policies">\n</section>\n'
FILE = "ppo-vs-sft.jsonl"


def answers(*texts: tuple[str, str], start: int = 0) -> list[dict[str, Any]]:
    """Answers by PPO and SFT to a prompt each; the gold model prefers PPO's to every second one."""
    return [
        {"policy": policy, "how": "sampled", "prompt": f"Question {number}?", "text": text, "tokens": len(text),
         "stopped": True, "gold_reward": float((policy == "ppo") == (number % 2 == 0)), "category": ""}
        for number, pair in enumerate(texts, start)
        for policy, text in zip(("ppo", "sft"), pair, strict=True)
    ]  # fmt: skip


FOUR = answers(*((f"New {number}.", f"Old {number}.") for number in range(4)))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workspace in which stage evaluate has written answers and report."""
    folder = tmp_path / "place"
    (folder / "artifacts/evaluate").mkdir(parents=True)
    (folder / SAID).mkdir(parents=True)
    shutil.copy(PROJECT / "params.yaml", folder)
    (folder / "artifacts/evaluate/report.html").write_text(REPORT)
    write_answers(folder, FOUR)
    monkeypatch.setattr(people, "get_run_logger", lambda: logging.getLogger("test"))
    return folder


def write_answers(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "artifacts/evaluate/answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def waiting(folder: Path) -> people.Waiting:
    return people.settle(people.Waiting(database=str(folder / "feedback.db"), address="http://judge.example"), folder)


def let_judge(monkeypatch: pytest.MonkeyPatch, store: Any, *verdicts: str) -> list[list[str]]:
    """Somebody judges in place of pages and wait, and likes what begins with New. Returns what they were shown."""
    shown: list[list[str]] = []

    def judge(_: str, look: Any, **options: Any) -> Any:
        me = local_admin(store)
        for verdict in verdicts:
            with store.session() as session:
                version = judging.keep_guideline(session, "Judge.")
                session.flush()
                found = judging.show_next(session, me, "compare")
                assert found is not None
                shown.append(found.responses)
                ranks = [1 + (not text.startswith("New")) for text in found.responses] if verdict == "ranked" else None
                sent = {"client_id": uuid4().hex, "item": found.item, "verdict": verdict, "seconds": 1}
                judging.submit(session, me, judging.Submission.model_validate({**sent, "ranks": ranks}), version)
        return look()

    monkeypatch.setattr(people, "wait_for_people", judge)
    return shown


def kept(folder: Path) -> list[dict[str, Any]]:
    return read_said(folder / SAID / FILE)


def preferred(rows: list[dict[str, Any]]) -> list[str]:
    """What each judgement prefers; "" where nothing."""
    return ["" if row["ranks"][0] == row["ranks"][1] else row["responses"][row["ranks"].index(1)] for row in rows]


# ---- asking


def test_one_pair_a_prompt_is_asked_about_and_what_was_said_is_kept(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_answers(place, [*FOUR, *answers(("New, again.", "Old, again."), ("Same.", " Same."), start=3)])
    shown = let_judge(monkeypatch, open_store(place / "feedback.db"), "ranked", "ranked", "none", "ranked")
    people.compare_answers(waiting(place), root=place)
    assert sorted(map(sorted, shown)) == [[f"New {number}.", f"Old {number}."] for number in range(4)]
    rows = kept(place)
    assert [row["verdict"] for row in rows] == ["ranked", "ranked", "none", "ranked"]
    assert {(row["annotator"], *row["policies"]) for row in rows} == {("local", "ppo", "sft")}
    assert all(row["responses"][0].startswith("New") for row in rows)
    expected = [min(pair) if row["verdict"] == "ranked" else "" for pair, row in zip(shown, rows, strict=True)]
    assert preferred(rows) == expected
    # which side it stood on, as it was shown
    assert [row["responses"][row["first"]] for row in rows] == [pair[0] for pair in shown]


def test_judgements_of_an_import_the_other_way_round_count_for_the_policy_that_they_were_for(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(place / "feedback.db")
    with store.session() as session:
        imported = find_items("a", list(enumerate(FOUR)), kind=None, policies=("sft", "ppo"), how="sampled")
        add_items(session, imported)
    let_judge(monkeypatch, store, "ranked", "ranked", "ranked", "ranked")
    people.compare_answers(waiting(place), root=place)
    assert sorted(preferred(kept(place))) == [f"New {number}." for number in range(4)]
    let_judge(monkeypatch, store)  # who asks again gets the same
    people.compare_answers(waiting(place), root=place)
    assert len(kept(place)) == 4


def test_what_was_said_of_earlier_answers_stays_and_an_undone_judgement_goes(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(place / "feedback.db")
    let_judge(monkeypatch, store, "ranked", "ranked")
    people.compare_answers(waiting(place), root=place)
    earlier = kept(place)
    write_answers(place, answers(("New, later.", "Old, later.")))
    let_judge(monkeypatch, store, "ranked")
    people.compare_answers(waiting(place), root=place)
    assert kept(place)[:2] == earlier
    assert preferred(kept(place))[2] == "New, later."
    with store.session() as session:
        last = session.scalars(select(Judgement.id).order_by(Judgement.id.desc())).first()
        judging.undo(session, local_admin(store), last or 0)
    let_judge(monkeypatch, store, "none")
    people.compare_answers(waiting(place), root=place)
    assert preferred(kept(place)) == [*preferred(earlier), ""]


def test_a_comparison_that_nobody_judged_is_told_and_asked_again(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = open_store(place / "feedback.db")
    let_judge(monkeypatch, store)
    people.compare_answers(waiting(place), root=place)
    assert (
        "Nobody has judged anything for the comparison of ppo with sft. Nothing is lost: `rlhf people`" in caplog.text
    )
    assert not (place / SAID / FILE).exists()
    let_judge(monkeypatch, store, "ranked")
    people.compare_answers(waiting(place), root=place)
    assert len(kept(place)) == 1


def test_who_asks_again_gets_as_many_hours_anew(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[Any] = []

    def judge(_: str, look: Any, *, deadline: Any, **options: Any) -> Any:
        deadlines.append(deadline)
        return look()._replace(done=1)

    monkeypatch.setattr(people, "wait_for_people", judge)
    for _ in range(2):
        people.compare_answers(waiting(place), root=place)
    assert deadlines[0] < deadlines[1]


def test_both_bad_that_was_said_before_is_no_reason_to_ask_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(place / "feedback.db")
    with store.session() as session:
        add_items(session, find_items("a", list(enumerate(FOUR)), kind=None, policies=("ppo", "sft"), how="sampled"))
    let_judge(monkeypatch, store, "none")
    people.wait_for_people("", lambda: None)  # on pages that somebody served
    let_judge(monkeypatch, store, "ranked", "ranked", "ranked")
    people.compare_answers(waiting(place), root=place)
    assert [row["verdict"] for row in kept(place)] == ["none", "ranked", "ranked", "ranked"]


def test_what_a_colleague_committed_stays(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_judge(monkeypatch, open_store(place / "feedback.db"), "ranked", "none")
    people.compare_answers(waiting(place), root=place)
    theirs = kept(place)
    (place / "feedback.db").unlink()
    let_judge(monkeypatch, open_store(place / "feedback.db"), "ranked")
    people.compare_answers(waiting(place), root=place)
    assert kept(place)[:2] == theirs
    assert len(kept(place)) == 3


def test_items_that_somebody_imported_for_more_people_stay_open_for_them(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(place / "feedback.db")
    imported = find_items("a", list(enumerate(FOUR[:4])), kind=None, policies=("ppo", "sft"), how="sampled")
    with store.session() as session:
        add_items(session, imported, overlap=2)
    let_judge(monkeypatch, store, "ranked", "ranked", "ranked", "ranked")
    people.compare_answers(waiting(place), root=place)
    with store.session() as session:
        found = {item.responses[0]: item.overlap for item in session.scalars(select(Item))}
    assert found == {"New 0.": 2, "New 1.": 2, "New 2.": 0, "New 3.": 0}


def test_answers_that_were_asked_about_and_are_gone_are_not_shown(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(place / "feedback.db")

    def stopped(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(people, "wait_for_people", stopped)
    with pytest.raises(KeyboardInterrupt):
        people.compare_answers(waiting(place), root=place)
    write_answers(place, answers(("New, later.", "Old, later.")))
    shown = let_judge(monkeypatch, store, "ranked")
    people.compare_answers(waiting(place), root=place)
    assert [sorted(pair) for pair in shown] == [["New, later.", "Old, later."]]
    with store.session() as session:
        assert judging.show_next(session, local_admin(store), "compare") is None


def test_policies_that_answer_alike_leave_nothing_to_ask(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_answers(place, answers(("Same.", "Same. ")))
    monkeypatch.setattr(people, "wait_for_people", lambda *_, **__: pytest.fail("nobody is to be asked"))
    people.compare_answers(waiting(place), root=place)
    assert not (place / SAID / FILE).exists()


def test_a_policy_without_answers_is_named(place: Path) -> None:
    with pytest.raises(
        DataError, match=r"people\.policies names dpo, but .*answers\.jsonl has sampled answers of ppo, sft"
    ):
        pairs_of(place / "artifacts/evaluate/answers.jsonl", "dpo", "sft")


def test_a_wrong_way_of_waiting_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(MissingArtifact, match=r"Found no guideline nowhere\.md, expected a Markdown file"):
        people.settle(people.Waiting(guideline="nowhere.md"), tmp_path)
    with pytest.raises(ConfigError, match="Found --guideline with --address"):
        people.settle(people.Waiting(guideline="nowhere.md", address="http://judge.example"), tmp_path)
    with pytest.raises(ConfigError, match="last stage evaluate; they are asked before the last one, people"):
        people.settle_comparison(people.Waiting(), "evaluate", tmp_path)
    with pytest.raises(ConfigError, match="Found axes kind; two answers are compared as a whole"):
        people.settle_comparison(people.Waiting(axes=["kind"]), "people", tmp_path)
    assert people.settle_comparison(people.Waiting(), "people", tmp_path).database


# ---- the stage


def run_stage(folder: Path) -> "subprocess.CompletedProcess[str]":
    """Stage people by itself."""
    env = {**child_environment(folder), "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-m", "tasks.people"]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def say(folder: Path, *rows: Any) -> None:
    (folder / SAID / FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))


def said(number: int, who: str, ranks: tuple[int, int]) -> dict[str, Any]:
    texts = [f"New {number}.", f"Old {number}."]
    return {"prompt": f"Question {number}?", "responses": texts, "ranks": list(ranks), "annotator": who}


@pytest.mark.slow
def test_the_stage_sets_peoples_word_beside_the_gold_models(place: Path) -> None:
    alone = run_stage(place)
    assert alone.returncode == 0, alone.stderr
    assert json.loads((place / "metrics/people.json").read_text()) == {"judgements": 0}
    assert "Nobody has compared these answers of PPO and SFT" in (place / "artifacts/people/people.md").read_text()
    assert people_said(place) == []

    say(place, said(0, "kim", (1, 2)), said(0, "sam", (1, 2)), said(1, "kim", (1, 2)), said(2, "kim", (1, 1)),
        {**said(3, "kim", (2, 1)), "responses": ["Of another run.", "Old 3."]},
        {**said(3, "kim", (2, 1)), "policies": ["ppo", "base"]}, said(2, "kim", (2, 1)),
        said(2, "kim", (1, 1)))  # fmt: skip
    done = run_stage(place)
    assert done.returncode == 0, done.stderr
    assert "4 of 8 judgements are of these answers" in done.stdout
    found = json.loads((place / "metrics/people.json").read_text())
    # of three prompts won, won, tie by people, and by gold won, lost, won
    assert (found["win_rate"], found["gold_win_rate"]) == (pytest.approx(2.5 / 3), pytest.approx(2 / 3))
    assert (found["judgements"], found["annotators"], found["gold_agreement"]) == (4, 2, pytest.approx(2 / 3))
    page = (place / "artifacts/people/report.html").read_text()
    assert "people compared what PPO and SFT answered. They prefer PPO in 83%" in page
    assert page.index('id="people"') < page.index('id="policies"')
    [line] = people_said(place)
    assert line.startswith("People prefer PPO to SFT in 83% (95 % interval ")
    assert line.endswith("; 2 people, 4 judgements), the gold model in 67% of the same; they agree in 67%")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({**said(0, "kim", (1, 2)), "ranks": [1]}, "two ranks as integers"),
        ({**said(0, "kim", (1, 2)), "annotator": None}, "and an annotator"),
        ({"prompt": "Question 0?"}, "two responses as texts"),
        (7, "found 7"),
    ],
)
def test_a_row_that_is_no_judgement_is_named(place: Path, row: Any, expected: str) -> None:
    say(place, said(0, "kim", (1, 2)), row)
    with pytest.raises(DataError, match=rf"ppo-vs-sft\.jsonl, line 2: .*{expected}"):
        read_said(place / SAID / FILE)


@pytest.mark.slow
def test_dvc_runs_the_stage_again_when_somebody_has_judged(place: Path) -> None:
    whole = yaml.safe_load((PROJECT / "dvc.yaml").read_text())
    stage = whole["stages"]["people"]
    stage["deps"] = [dep for dep in stage["deps"] if not dep.endswith(".py")]
    stage["cmd"] = "python -m tasks.people"
    (place / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"people": stage}}))
    init_dvc(place)
    environment = {**child_environment(place), "PYTHONPATH": str(PROJECT)}

    def repro() -> str:
        command = [sys.executable, "-m", "dvc", "repro"]
        return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=True).stdout

    assert "Running stage 'people'" in repro()  # in an empty folder of judgements
    assert "didn't change" in repro()
    say(place, said(0, "kim", (1, 2)))
    assert "1 of 1 judgements" in repro()
    assert "up to date" in dvc(place, "status")


# ---- the flow

LINES = "".join(json.dumps(row) + "\n" for row in FOUR)
ANSWERING = f'{SCRIPT}\nif stage == "evaluate":\n    (out / "answers.jsonl").write_text({LINES!r})\n'


@pytest.mark.slow
def test_the_flow_asks_people_and_the_stage_reads_what_they_said(toy: Path) -> None:  # noqa: F811  (the fixture)
    (toy / "stage.py").write_text(ANSWERING)
    whole = yaml.safe_load((toy / "dvc.yaml").read_text())
    whole["stages"]["people"]["deps"].append(str(SAID / FILE))  # without what people said it could not run
    (toy / "dvc.yaml").write_text(yaml.safe_dump(whole, sort_keys=False))
    port = free_port()
    flow = rlhf(toy, "people", "--port", str(port))
    assert flow.stderr is not None
    for line in flow.stderr:
        if "the comparison of ppo with sft waits for people: 0 of 4 judged" in line:
            assert not (toy / "artifacts/people").exists()
            break
    else:
        pytest.fail("nobody was asked")
    person = Person(port)
    for _ in range(4):
        item, texts = person.look("compare")
        person.say(item, [1 + (not text.startswith("New")) for text in texts])
    log = flow.communicate(timeout=120)[1]
    assert flow.returncode == 0, log
    assert "4 of 4 are judged: going on." in log
    assert "Completed('people ran')" in log
    assert sorted(preferred(kept(toy))) == [f"New {number}." for number in range(4)]
    assert [run["status"] for run in recorded(toy)] == ["FINISHED"]
