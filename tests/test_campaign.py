"""A campaign on disk: how rounds begin, what they start from, what they leave. No stage is run here."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from sqlalchemy import select
from toy import PROJECT

from flows import campaign as campaigns
from flows import online, people, recipe, sweeps
from flows.campaign import FEEDBACK, KEPT, START, Campaign, begin_round, end_round, open_campaign, overview, words
from flows.constitution import lay_out
from rlhf_core.config import check_params, load_params
from rlhf_core.errors import ConfigError, MissingArtifact, ResourceError
from rlhf_core.feedback import judging
from rlhf_core.feedback.accounts import add_user, local_admin
from rlhf_core.feedback.store import Annotator, Item, open_store
from tasks.files import write_jsonl
from tasks.pipeline import version_data, workspace_lock
from tasks.stage import write_text

CHECK = {"name": "win_rate", "value": 0.6, "limit": 0.5, "passed": True, "words": "gold prefers the new policy in 60%"}


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Campaign:
    monkeypatch.setattr(campaigns, "make_base", lambda params, folder: None)
    return open_campaign("try", project=make_project(tmp_path / "project"), recipe="tiny")


def make_project(project: Path) -> Path:
    project.mkdir()
    for name in ("rlhf_core", "tasks", "data", "recipes", "dvc.yaml", "params.yaml", ".dvcignore", "constitution.yaml"):
        (project / name).symlink_to(PROJECT / name)
    return project


def project_of(campaign: Campaign) -> Path:
    return campaign.folder.parents[1]


def run_round(campaign: Campaign, promoted: bool = True, *, judge: bool = True) -> dict[str, Any]:
    """Begin a round, write what stages would write, and end it."""
    number = begin_round(campaign)
    for source in KEPT.values():
        if source not in ("params.yaml", "dvc.yaml", "metrics"):
            file = campaign.folder / source
            write_text(file if file.suffix or file.name == "dvc.lock" else file / "weights", f"of round {number}")
    write_text(campaign.folder / "metrics/ppo.json", "{}")
    if number and judge:
        write_text(campaign.feedback_file(number), f"judged in round {number}\n")
    check = CHECK | {"passed": promoted}
    return end_round(campaign, number, {"promoted": promoted, "checks": [check] if number else [], "judged": 3})


def start(campaign: Campaign) -> str:
    return (campaign.folder / START / "ppo/policy/weights").read_text()


def test_round_0_is_the_pipeline_as_it_is(campaign: Campaign) -> None:
    assert begin_round(campaign) == 0
    assert (campaign.folder / "dvc.yaml").read_text() == (PROJECT / "dvc.yaml").read_text()
    params = load_params(campaign.folder / "params.yaml")
    assert (params.reward.start, params.reward.feedback, params.ppo.start) == ("", "", "")
    assert params.ppo.response_tokens == 12  # of the recipe
    assert f"dir = {project_of(campaign) / '.dvc/cache'}" in (campaign.folder / ".dvc/config").read_text()


def test_a_later_round_continues_from_the_promoted_one(campaign: Campaign) -> None:
    run_round(campaign)
    assert begin_round(campaign) == 1
    params = load_params(campaign.folder / "params.yaml")
    assert params.preferences.round == 1
    assert (params.reward.start, params.ppo.start) == ("artifacts/start/reward", "artifacts/start/ppo")
    assert (params.preferences.seed, params.reward.seed, params.ppo.seed, params.sft.seed) == (1, 1, 1, 0)
    stages = yaml.safe_load((campaign.folder / "dvc.yaml").read_text())["stages"]
    original = yaml.safe_load((PROJECT / "dvc.yaml").read_text())["stages"]
    assert set(stages) - set(original) == {"preferences", "gate"}
    for name in ("prepare", "sft", "evaluate"):
        assert stages[name] == original[name]
    assert stages["dpo"] == {**original["dpo"], "deps": [*original["dpo"]["deps"], "data/feedback"]}
    assert {"artifacts/start/reward", "data/feedback"} == set(stages["reward"]["deps"]) - set(
        original["reward"]["deps"]
    )
    assert start(campaign) == "of round 0"


def test_what_a_key_names_is_among_what_dvc_watches(campaign: Campaign) -> None:
    run_round(campaign)
    begin_round(campaign)
    stages = yaml.safe_load((campaign.folder / "dvc.yaml").read_text())["stages"]
    params = load_params(campaign.folder / "params.yaml")
    assert params.reward.start in stages["reward"]["deps"]
    assert params.reward.feedback in stages["reward"]["deps"]
    assert params.reward.feedback in stages["dpo"]["deps"]
    assert params.ppo.start in stages["ppo"]["deps"]
    assert params.preferences.policy in stages["preferences"]["deps"]


def test_a_rejected_round_is_not_built_on_and_its_judgements_are_set_aside(campaign: Campaign) -> None:
    run_round(campaign)
    run_round(campaign)
    run_round(campaign, promoted=False)
    assert campaign.promoted() == 1
    begin_round(campaign)
    assert start(campaign) == "of round 1"
    assert [path.name for path in (campaign.folder / FEEDBACK).iterdir()] == ["001.jsonl"]
    assert (campaign.round_folder(2) / "feedback.jsonl").read_text() == "judged in round 2\n"
    assert campaign.decisions()[2]["start"] == 1


def test_each_round_keeps_the_version_of_what_was_judged(campaign: Campaign) -> None:
    run_round(campaign)
    for name in ("dvc.lock", f"{FEEDBACK}.dvc"):  # of this test's making, which DVC could not read
        (campaign.folder / name).unlink()
    for number in (1, 2):
        begin_round(campaign)
        write_text(campaign.feedback_file(number), f"judged in round {number}\n")
        version_data(FEEDBACK, root=campaign.folder)
        kept = (campaign.folder / f"{FEEDBACK}.dvc").read_text()
        end_round(campaign, number, {"promoted": True, "checks": [CHECK], "judged": 1})
        assert (campaign.round_folder(number) / "feedback.yaml").read_text() == kept
    hashes = [yaml.safe_load((campaign.round_folder(number) / "feedback.yaml").read_text())["outs"][0]["md5"]
              for number in (1, 2)]  # fmt: skip
    cache = project_of(campaign) / ".dvc/cache/files/md5"
    files = [json.loads((cache / found[:2] / found[2:]).read_text()) for found in hashes]
    assert [[file["relpath"] for file in part] for part in files] == [["001.jsonl"], ["001.jsonl", "002.jsonl"]]
    assert not list((campaign.folder / "rounds").rglob("*.dvc"))


def test_judgements_of_a_rejected_round_can_be_kept(campaign: Campaign) -> None:
    values = yaml.safe_load((campaign.folder / "campaign.yaml").read_text())
    values["gate"]["keep_rejected"] = True
    write_text(campaign.folder / "campaign.yaml", yaml.safe_dump(values))
    run_round(campaign)
    run_round(campaign, promoted=False)
    begin_round(campaign)
    assert [path.name for path in (campaign.folder / FEEDBACK).iterdir()] == ["001.jsonl"]


def test_a_round_that_was_cut_off_is_begun_again_as_it_was(campaign: Campaign) -> None:
    run_round(campaign)
    begin_round(campaign)
    write_text(campaign.feedback_file(1), "judged before the kill\n")
    assert campaign.under_way()
    again = open_campaign("try", project=project_of(campaign))
    assert begin_round(again) == 1
    assert again.feedback_file(1).read_text() == "judged before the kill\n"
    assert "preferences" in yaml.safe_load((campaign.folder / "dvc.yaml").read_text())["stages"]
    assert again.identity() == campaign.identity()


def test_a_round_cut_off_while_it_is_put_away_is_not_over(campaign: Campaign) -> None:
    run_round(campaign)
    begin_round(campaign)
    write_text(campaign.folder / "rounds/.001/decision.json", json.dumps({"round": 1, "promoted": True}))
    assert campaign.next_round() == 1
    run_round(campaign)
    assert campaign.next_round() == 2
    assert not (campaign.folder / "rounds/.001").exists()
    assert not campaign.under_way()


def test_a_campaign_keeps_what_it_began_with(campaign: Campaign) -> None:
    project = project_of(campaign)
    open_campaign("try", project=project)
    open_campaign("try", project=project, recipe="tiny")
    with pytest.raises(ConfigError, match="Campaign try began with recipe tiny and overrides"):
        open_campaign("try", project=project, overrides=["ppo.kl_coef=0.2"])


def test_values_for_the_rounds_alone_leave_the_pipeline_as_it_is(campaign: Campaign) -> None:
    project = project_of(campaign)
    begun = {"recipe": "tiny", "overrides": ["ppo.kl_coef=0.2"], "in_rounds": ["reward.weights={human: 3}"]}
    other = open_campaign("other", project=project, **begun)
    pipeline, rounds = (load_params(other.folder / name) for name in ("params.yaml", "campaign.yaml"))
    assert (pipeline.ppo.kl_coef, rounds.ppo.kl_coef) == (0.2, 0.2)
    assert (pipeline.reward.weights, rounds.reward.weights) == ({}, {"human": 3.0})
    run_round(other)
    begin_round(other)
    assert load_params(other.folder / "params.yaml").reward.weights == {"human": 3.0}
    assert sorted(path.name for path in other.folder.iterdir() if path.name.startswith("tmp")) == []
    open_campaign("other", project=project, **begun)
    with pytest.raises(ConfigError, match=r"in its rounds \['reward.weights=\{human: 3\}'\]"):
        open_campaign("other", project=project, in_rounds=["reward.weights={human: 2}"])


def test_a_campaign_from_before_a_key_was_takes_it_from_the_project(
    campaign: Campaign, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name in ("params.yaml", "campaign.yaml"):
        path = campaign.folder / name
        found[path] = yaml.safe_load(path.read_text())
        older = yaml.safe_load(path.read_text())
        del older["sft"]["keep"], older["gate"]
        path.write_text(yaml.safe_dump(older))
        with pytest.raises(ConfigError, match=r"sft\.keep is missing"):
            load_params(path)
    capsys.readouterr()
    open_campaign("try", project=project_of(campaign))
    ours = load_params(PROJECT / "params.yaml")
    for path, before in found.items():
        params = load_params(path)
        assert params.model_dump(exclude={"gate"}) == check_params(before).model_dump(exclude={"gate"})
        assert params.gate == ours.gate
    assert capsys.readouterr().out.count("is older than sft.keep = 'best', gate.") == 2
    untouched = [path.stat().st_mtime_ns for path in found]
    open_campaign("try", project=project_of(campaign))
    assert [path.stat().st_mtime_ns for path in found] == untouched
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("text", "error", "why"),
    [
        ("[", ConfigError, "is not valid YAML"),
        ("[]", ConfigError, "holds a list; expected sections"),
        ("sft: 3", ConfigError, "sft"),
        (None, MissingArtifact, r"Found no \S*params\.yaml"),
    ],
)
def test_what_is_wrong_with_a_campaigns_parameters_is_told(
    campaign: Campaign, text: str | None, error: type[Exception], why: str
) -> None:
    path = campaign.folder / "params.yaml"
    path.unlink()
    if text is not None:
        path.write_text(text)
    with pytest.raises(error, match=why):
        open_campaign("try", project=project_of(campaign))


@pytest.mark.parametrize("name", ["", "../other", "a b", ".hidden"])
def test_a_campaigns_name_is_a_plain_word(campaign: Campaign, name: str) -> None:
    with pytest.raises(ConfigError, match="expected letters, digits, - and _"):
        open_campaign(name, project=project_of(campaign))


def test_a_recipes_workspace_is_not_taken(campaign: Campaign) -> None:
    write_text(project_of(campaign) / ".rlhf/tiny/dvc.lock", "")
    with pytest.raises(ConfigError, match="is the workspace of a recipe"):
        open_campaign("tiny", project=project_of(campaign))


def test_what_a_round_leaves_is_no_pipeline_to_dvc(campaign: Campaign) -> None:
    run_round(campaign)
    assert not list((campaign.folder / "rounds").rglob("dvc.yaml"))
    assert (campaign.round_folder(0) / "stages.yaml").read_text() == (PROJECT / "dvc.yaml").read_text()


def test_decisions_are_told_in_words(campaign: Campaign) -> None:
    run_round(campaign)
    assert words(run_round(campaign)) == "Round 1 is promoted: gold prefers the new policy in 60%."
    rejected = words(run_round(campaign, promoted=False))
    assert rejected == "Round 2 is rejected, round 1's policy stays: gold prefers the new policy in 60%."
    table = overview("try", campaign.decisions()).splitlines()
    assert table[-1] == "| 2 | 1 | 3 | rejected | gold prefers the new policy in 60%. |"


def test_a_workspace_of_another_kind_is_not_taken(campaign: Campaign) -> None:
    with pytest.raises(ConfigError, match=r"Found try to be a campaign of `rlhf online`\. Name another"):
        campaigns.open_workspace("try", "constitution", project=project_of(campaign))


def test_a_mistake_is_told_before_anything_is_written(campaign: Campaign) -> None:
    project = project_of(campaign)
    for mistake in ({"overrides": ["ppo.updtes=10"]}, {"in_rounds": ["ppo.updtes=10"]}):
        with pytest.raises(ConfigError, match=r"unknown key ppo\.updtes; did you mean ppo\.updates\?"):
            open_campaign("typo", project=project, **mistake)
    with pytest.raises(MissingArtifact, match=r"Found no recipes/huge\.yaml"):
        open_campaign("typo", project=project, recipe="huge")
    assert not (project / ".rlhf/typo").exists()


def test_a_workspace_that_was_cut_off_in_the_making_is_made_anew(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = project_of(campaign)
    write_text(project / "dvc.lock", "stages: {}\n")  # what the project has computed is taken over

    def killed(*, root: Path) -> None:
        write_text(root / "artifacts/half", "")
        write_text(root / ".rlhf/tiny-model/half", "")
        raise KeyboardInterrupt

    monkeypatch.setattr(campaigns, "checkout", killed)
    with pytest.raises(KeyboardInterrupt):
        open_campaign("cut", project=project, overrides=["ppo.updates=10"])
    begun = open_campaign("cut", project=project, recipe="tiny")
    assert load_params(begun.folder / "params.yaml").ppo.updates != 10
    assert [part for part in ("artifacts", "dvc.lock", ".rlhf/tiny-model") if (begun.folder / part).exists()] == []
    write_text(begun.folder / "artifacts/whole", "")
    assert (open_campaign("cut", project=project).folder / "artifacts/whole").exists()


def test_the_code_under_a_running_round_is_left_alone(campaign: Campaign) -> None:
    known = campaign.folder / "rlhf_core/known"
    known.touch()
    with workspace_lock(campaign.folder), pytest.raises(ResourceError, match="Another pipeline run works in"):
        open_campaign("try", project=project_of(campaign))
    assert known.exists()
    open_campaign("try", project=project_of(campaign))
    assert not known.exists()


# ---- what people are asked


ANSWER = {"policy": "ppo", "how": "sampled", "prompt": "Why?", "tokens": 1, "stopped": True, "gold_reward": 1.0}
ITEM = {"prompt": [{"role": "user", "content": "Why?"}], "responses": ["One.", "Two."], "origins": ["round-1"] * 2}


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The items that people would be asked about."""
    found: list[Any] = []

    def wait(campaign: Campaign, items: list[Any], waiting: Any, *, what: str) -> online.Asked:
        found.extend(items)
        (tmp_path / "mark").touch()
        return online.Asked(open_store(tmp_path / "feedback.db"), [item.key() for item in items], tmp_path / "mark")

    monkeypatch.setattr(online, "_wait", wait)
    monkeypatch.setattr(online, "get_run_logger", lambda: logging.getLogger("test"))
    return found


def begin_comparison(campaign: Campaign, new: str, current: str) -> None:
    """A round in which people are to compare these two answers."""
    values = yaml.safe_load((campaign.folder / "campaign.yaml").read_text())
    values["gate"]["judge"] = "people"
    write_text(campaign.folder / "campaign.yaml", yaml.safe_dump(values))
    run_round(campaign)
    begin_round(campaign)
    for path, text in ((campaigns.ANSWERS, new), (f"{START}/answers.jsonl", current)):
        write_jsonl(campaign.folder / path, [{**ANSWER, "text": text}])


def test_two_campaigns_of_one_name_ask_about_items_of_their_own(
    campaign: Campaign, tmp_path: Path, asked: list[Any]
) -> None:
    other = open_campaign("try", project=make_project(tmp_path / "other"), recipe="tiny")
    for one in (campaign, other):
        begin_comparison(one, "New.", "Old.")
        online._ask(one, 1, [ITEM], online.Waiting())
        online._compare(one, 1, online.Waiting())
    assert len({item.key() for item in asked}) == 4
    for one, (ranked, compared) in ((campaign, asked[:2]), (other, asked[2:])):
        name = f"of try-{one.identity()[:8]}"
        assert ranked.sources == [f"round-1 {name}"] * 2
        assert compared.sources == [f"round-1 {name}", f"round-0 {name}"]


def test_answers_that_look_alike_are_not_asked_about(campaign: Campaign, asked: list[Any]) -> None:
    begin_comparison(campaign, " Sa\0me.", "Same.\n")
    online._compare(campaign, 1, online.Waiting())
    assert asked == []
    assert json.loads((campaign.folder / campaigns.COMPARISONS).read_text()) == []


def test_a_round_in_which_nothing_was_ranked_is_asked_about_again(
    campaign: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, verdicts = open_store(tmp_path / "feedback.db"), ["none", "skipped", "ranked"]
    deadlines: list[Any] = []

    def judged(_: str, look: Any, *, deadline: Any, **options: Any) -> Any:
        """Somebody judges, in place of the pages and of the wait for it."""
        deadlines.append(deadline)
        verdict = verdicts.pop(0)
        me = local_admin(store)
        with store.session() as session:
            shown = judging.show_next(session, me, "rank")
            assert shown is not None, "what was said nothing by comes back"
            sent = {"client_id": f"person-{verdict}", "item": shown.item, "verdict": verdict, "seconds": 1.0}
            ranks = [1, 2] if verdict == "ranked" else None
            version = judging.keep_guideline(session, "Judge.")
            session.flush()
            judging.submit(session, me, judging.Submission(**sent, ranks=ranks), version)
        return look()

    monkeypatch.setattr(people, "wait_for_people", judged)
    monkeypatch.setattr(people, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(online, "get_run_logger", lambda: logging.getLogger("test"))
    run_round(campaign)
    begin_round(campaign)
    write_jsonl(campaign.folder / campaigns.ITEMS, [ITEM])
    waiting = online.Waiting(database=str(tmp_path / "feedback.db"), address="http://judge.example")
    with pytest.raises(ConfigError, match=r"ranks anything.*The same command asks people again"):
        online._judge(campaign, 1, "people", waiting, "")
    with pytest.raises(ConfigError, match="Nobody has judged anything"):
        online._judge(campaign, 1, "people", waiting, "")
    assert online._judge(campaign, 1, "people", waiting, "") == 1
    assert deadlines == sorted(set(deadlines))  # each time the hours begin anew


def test_a_misspelt_kind_of_prompts_is_told_before_a_round_is_sampled(
    campaign: Campaign, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_comparison(campaign, "New.", "Old.")
    write_jsonl(campaign.folder / START / "answers.jsonl", [{**ANSWER, "text": "Old.", "category": "unsafe"}])
    online._check_kinds(campaign)
    write_jsonl(campaign.folder / START / "answers.jsonl", [{**ANSWER, "text": "Old.", "category": "unsaef"}])
    with pytest.raises(ConfigError, match=r"gate\.safety_kinds names unsafe, but no test prompt.*Found unsaef"):
        online._check_kinds(campaign)


def test_the_guideline_and_the_axes_that_were_given_last_are_kept(campaign: Campaign, tmp_path: Path) -> None:
    assert campaigns.for_people(campaign, None, []) == (None, [])
    file = tmp_path / "mine.md"
    for text, axes in (("Be kind.", ["kind"]), ("Be kind and short.", ["kind", "short"])):
        file.write_text(text)
        kept, scored = campaigns.for_people(campaign, str(file), axes)
        file.unlink()
        assert campaigns.for_people(open_campaign("try", project=project_of(campaign)), None, []) == (kept, scored)
        assert (Path(kept or "").read_text(), scored) == (text, axes)
    with pytest.raises(MissingArtifact, match=r"Found no guideline .*mine\.md, expected a Markdown file"):
        people.settle(people.Waiting(guideline=str(file)), tmp_path)


@pytest.mark.parametrize(
    ("given", "of_reward", "asked_for"), [([], [], []), (["kind"], ["short"], ["kind"]), ([], ["short"], ["short"])]
)
def test_people_are_asked_for_scores_on_the_axes(
    campaign: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], of_reward: list[str],
    asked_for: list[str],
) -> None:  # fmt: skip
    values = yaml.safe_load((campaign.folder / "params.yaml").read_text())
    values["reward"]["axes"] = of_reward
    write_text(campaign.folder / "params.yaml", yaml.safe_dump(values))
    monkeypatch.setattr(people, "wait_for_people", lambda _, look, **options: look()._replace(done=1))
    monkeypatch.setattr(people, "get_run_logger", lambda: logging.getLogger("test"))
    database = tmp_path / "feedback.db"
    waiting = online.Waiting(database=str(database), address="http://judge.example", axes=given)
    online._ask(campaign, 1, [ITEM], waiting)
    with open_store(database).session() as session:
        assert session.scalars(select(Item.axes)).all() == [asked_for]


@pytest.mark.parametrize("promoted", [True, False])
def test_what_was_judged_after_its_round_had_ended_is_taken_into_the_next_one_once(
    campaign: Campaign, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, promoted: bool
) -> None:
    store = open_store(tmp_path / "feedback.db")
    add_user(store, "kim", "correct horse", admin=False)
    local = local_admin(store)

    def look(who: int) -> str:
        with store.session() as session:
            shown = judging.show_next(session, who, "rank")
            return shown.item if shown else ""

    def rank(who: int, item: str) -> None:
        sent = {"client_id": f"{who}-{item}", "item": item, "verdict": "ranked", "seconds": 1.0, "ranks": [1, 2]}
        with store.session() as session:
            version = judging.keep_guideline(session, "Judge.")
            session.flush()
            judging.submit(session, who, judging.Submission.model_validate(sent), version)

    with store.session() as session:
        kim = session.scalars(select(Annotator.id).where(Annotator.name == "kim")).one()
    opened: list[str] = []

    def judged(_: str, count: Any, **options: Any) -> Any:
        opened.append(look(kim))  # who has the page open, and goes for lunch
        rank(local, look(local))
        return count()

    monkeypatch.setattr(people, "wait_for_people", judged)
    monkeypatch.setattr(people, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(online, "get_run_logger", lambda: logging.getLogger("test"))
    waiting = online.Waiting(database=str(tmp_path / "feedback.db"), address="http://judge.example", overlap=2)
    run_round(campaign)
    found = []
    for number in (1, 2, 3):
        begin_round(campaign)
        prompt = [{"role": "user", "content": f"Question {number}?"}]
        write_jsonl(campaign.folder / campaigns.ITEMS, [{**ITEM, "prompt": prompt}])
        online._judge(campaign, number, "people", waiting, "")
        found.append([row["annotator"] for row in campaigns.read_rows(campaign.feedback_file(number))])
        end_round(campaign, number, {"promoted": promoted, "checks": [CHECK], "judged": 1})
        if number == 1:
            rank(kim, opened[0])
    assert found == [["local"], ["local", "kim"] if promoted else ["local"], ["local"]]


def test_a_users_own_files_are_in_every_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (recipe, campaigns, sweeps):
        monkeypatch.setattr(module, "make_base", lambda params, folder: None)
    monkeypatch.setattr(sweeps, "checkout", lambda *, root: None)
    project = make_project(tmp_path / "project")
    (project / "data").unlink()
    for part in (PROJECT / "data").iterdir():
        (project / "data").mkdir(exist_ok=True)
        (project / "data" / part.name).symlink_to(part)
    write_text(project / "models/judge/config.json", "{}")
    write_text(project / "mine.yaml", (PROJECT / "constitution.yaml").read_text())
    write_text(project / "artifacts/base/config.json", "{}")
    values = yaml.safe_load((PROJECT / "params.yaml").read_text())
    values["prepare"]["demonstrations"] = ["data/mine.jsonl", "hub:a/b@1"]
    values["judge"] |= {"kind": "local", "model": "models/judge"}
    values["constitution"]["principles"] = "mine.yaml"
    stages = yaml.safe_load((PROJECT / "dvc.yaml").read_text())
    stages["stages"]["prepare"]["deps"] += ["data/mine.jsonl", "data/watched"]
    write_text(project / "data/watched/rows.jsonl", "watched\n")
    for name, content in (("params.yaml", values), ("dvc.yaml", stages)):
        (project / name).unlink()
        write_text(project / name, yaml.safe_dump(content))
    (project / "recipes").unlink()
    shutil.copytree(PROJECT / "recipes", project / "recipes")
    write_text(project / "recipes/small.yaml", "ppo: {updates: 3}\n")

    def workspaces() -> list[Path]:
        recipe.make_workspace("small", project / ".rlhf/small", project=project)
        sweep = sweeps.open_sweep("swept", project=project, axes=["helpfulness", "harmlessness"], weights=[0.5])
        points = [sweeps.begin_point(sweep, point, project=project) for point in sweep.points]
        kind = campaigns.open_workspace("chain", "constitution", project=project)
        return [project / ".rlhf/small", sweep.folder, *points, open_campaign("rounds", project=project).folder, kind]

    for content in ("mine\n", "mine, with a row more\n"):
        write_text(project / "data/mine.jsonl", content)
        for folder in workspaces():
            assert (folder / "data/mine.jsonl").read_text() == content, folder
            assert (folder / "data/watched/rows.jsonl").is_file()
            assert (folder / "models/judge/config.json").is_file()
            assert (folder / "mine.yaml").is_file()
            assert not (folder / "artifacts").exists()
            watched = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]["prepare"]["deps"]
            assert {"data/mine.jsonl", "data/watched"} <= set(watched)
    chain = project / ".rlhf/chain"
    lay_out(chain)
    stages = yaml.safe_load((chain / "dvc.yaml").read_text())["stages"]
    assert stages["constitution"]["deps"][-1] == "mine.yaml"
    assert stages["principles"]["deps"][-2:] == ["mine.yaml", "models/judge"]
