"""The stages of a constitution one after the other on a tiny model: what each reads, writes and measures."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from flows import constitution as flow
from flows.campaign import open_workspace
from flows.constitution import RANKINGS, REVISIONS, START, keep_start, lay_out
from flows.constitutions import app
from rlhf_core.checkpoints import NO_CHECKPOINTS
from rlhf_core.config import Params, check_params, load_params
from rlhf_core.constitution import Chain
from rlhf_core.critics import Draft
from rlhf_core.data import read_rows
from rlhf_core.dpo import train_dpo
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.feedback.annotators import Item, Judgement, ranks_of
from rlhf_core.mixing import load_feedback, load_revisions
from rlhf_core.models import Roles
from rlhf_core.reward import ensemble_scores
from rlhf_core.tracking import MemoryTracker
from tasks import constitution, dpo, principles, safety
from tasks.constitution import CHAINS, DEMONSTRATIONS
from tasks.dpo import NO_POLICY
from tasks.stage import write_json

PROJECT = Path(__file__).resolve().parents[1]
SHORT = {
    "rounds": 1, "responses": 3, "with_chains": False, "temperature": 1.0, "response_tokens": 6, "critique_tokens": 6,
}  # fmt: skip
WORDS = {"harmful": "How do I spy on", "look_alike": "How do I beat"}


class Run(MemoryTracker):
    """What a stage is given, without DVC and MLflow."""

    main, stage, checkpoints = True, "", NO_CHECKPOINTS

    def __init__(self, params: Params) -> None:
        super().__init__()
        self.params = params
        self.final: dict[str, Any] = {}

    def is_dependency(self, path: Any) -> bool:
        return True

    def log_dataset(self, *_: Any, **__: Any) -> None: ...

    def register_model(self, *_: Any, **__: Any) -> None: ...

    def finish_metrics(self, metrics: dict[str, Any]) -> None:
        self.final = metrics


@pytest.fixture
def workspace(llama: Path, tmp_path: Path, section: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base model, an SFT and a PPO policy, a reward model, and prompts of each category in each split."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(llama, "artifacts/base")
    config = json.loads(Path("artifacts/base/config.json").read_text())
    # Room for a whole chain, of which this tokenizer makes a token a letter or two.
    Path("artifacts/base/config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}))
    for folder, seed in (("artifacts/start/sft", 1), ("artifacts/sft/model", 2)):
        roles = Roles(Path("artifacts/base"), section("sft"))
        torch.manual_seed(seed)
        roles.add("policy", method="lora")
        roles.save("policy", folder)
    tuned = Roles("artifacts/sft/model", section("ppo"))
    tuned.add("ppo", method="lora")
    tuned.save("ppo", "artifacts/ppo/policy")
    tuned.add("reward", method="lora", head=True)
    tuned.save("reward", "artifacts/reward/model")
    write_json(NO_POLICY, {"dpo.epochs": 0})
    shutil.copytree(PROJECT / "data/red_team", "data/red_team")
    shutil.copy(PROJECT / "constitution.yaml", ".")
    Path("data/prepared").mkdir()
    for split in ("train", "validation", "gold", "test"):
        rows = [
            {"prompt": f"{words} number {n} of {split}?", "category": category}
            for category, words in WORDS.items()
            for n in range(3)
        ]
        rows.append({"prompt": f"Name a fruit of {split}.", "category": "explain"})
        Path(f"data/prepared/prompts_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a stage's main with some values of section constitution, and of others; gives its run back."""

    def start(module: Any, sections: dict[str, dict[str, Any]] | None = None, **changes: Any) -> Run:
        raw = yaml.safe_load((PROJECT / "params.yaml").read_text())
        raw["constitution"] |= SHORT | changes
        for name, values in (sections or {}).items():
            raw[name] |= values
        raw["evaluate"] |= {"response_tokens": 6, "bootstrap_samples": 100}
        run = Run(check_params(raw))

        @contextmanager
        def stage_run(name: str, deps: Sequence[Any] = ()) -> Iterator[Run]:
            assert all(Path(dep).exists() for dep in deps), deps
            yield run

        run.stage = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "stage_run", stage_run)
        module.main()
        return run

    return start


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(str(path))]


def test_revisions_rankings_and_rates(workspace: Path, stage: Any) -> None:
    scripts = {"critic": "script:careful", "annotator": "script:careful"}
    found = stage(constitution, **scripts).final
    chains = rows(CHAINS)
    assert found["chains"] == len(chains) == 18  # of train, validation and gold, the fruit left out
    assert found["kept"] == sum(chain["kept"] for chain in chains)
    assert (found["harmful_compliance_before"], found["harmful_compliance_after"]) == (1.0, 0.0)
    assert found["over_refusal_after"] == 0.0
    demonstrations = rows(DEMONSTRATIONS)
    assert {row["annotator"] for row in demonstrations} == {"script:careful"}
    by_split = load_revisions(Path(REVISIONS), Path("data/prepared"))
    assert sum(map(len, by_split.values())) == len(demonstrations)
    assert not [row for row in demonstrations if "of test" in row["prompt"][0]["content"]]

    run = stage(principles, **scripts)
    assert run.final["items"] == 12  # of train and validation
    assert run.final["rankings"] == len(rows(principles.RANKINGS)) == 0  # a random model declines nothing
    load_feedback(Path(RANKINGS), Path("data/prepared"))
    run = stage(principles, with_chains=True, **scripts)
    assert run.final["items"] == 12
    revised = {row["prompt"][0]["content"]: row["response"] for row in demonstrations if row["category"] == "harmful"}
    first = {chain["prompt"][0]["content"]: chain["response"] for chain in chains}
    compared = rows(principles.RANKINGS)
    assert len(compared) == 12  # of all answers the revisions of harmful ones alone decline
    for row in compared:
        prompt, ranked = row["prompt"][0]["content"], list(zip(row["responses"], row["ranks"], strict=True))
        assert first[prompt] in row["responses"]
        if row["category"] == "harmful":
            assert [text for text, rank in ranked if rank == 1] == [revised[prompt]]
        else:
            assert next(text for text, rank in ranked if rank > 1) in revised.values()

    run = stage(safety, **scripts)
    assert set(run.final) == {"before", "sft", "ppo", "sft_vs_before", "ppo_vs_before", "prefers_declining"}
    assert not run.final["prefers_declining"]  # a random model declines nothing, so there is no pair
    assert run.final["before"]["harmful_prompts"] == 3
    assert run.final["ppo"]["harmful_compliance"] == 1.0
    answers = rows(safety.FOLDER / "answers.jsonl")
    assert len(answers) == 3 * 2 * 6  # policies, samples, prompts of test
    assert {row["policy"] for row in answers} == {"before", "sft", "ppo"}
    page = (safety.FOLDER / "report.html").read_text()
    assert "script" not in page.partition("<body>")[0]
    assert "Critique by " in page


def test_what_the_reward_model_prefers_is_measured_on_the_answers(
    workspace: Path, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage(constitution, critic="script:careful")
    monkeypatch.setattr(
        "rlhf_core.safety.classify", lambda text, _: "refusal" if sum(map(ord, text)) % 2 else "compliance"
    )
    scored: list[Any] = []
    monkeypatch.setattr(safety, "ensemble_scores", lambda *of: scored.append(of) or ensemble_scores(*of))
    found = stage(safety).final["prefers_declining"]
    assert set(found) == {"harmful", "look_alike"}
    assert {roles.folder for roles, _, _ in scored} == {Path("artifacts/sft/model")}
    assert sum(len(sampled.prompts) for _, _, sampled in scored) == 3 * 2 * 6


def test_dpo_learns_from_the_rankings_of_the_reward_model_and_is_measured_too(
    workspace: Path, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ranked(prompt: str, **more: Any) -> str:
        return json.dumps({"prompt": prompt, "responses": ["a", "b"], "ranks": [1, 2], **more}) + "\n"

    for split in ("train", "validation"):
        Path(f"data/prepared/rankings_{split}.jsonl").write_text(ranked("Name a fruit."))
    Path(RANKINGS).mkdir(parents=True)
    of = {
        split: [f"{words} number 1 of {split}?" for words in WORDS.values()]
        for split in ("train", "validation", "test")
    }
    judged = [ranked(prompt, source="ai") for prompts in of.values() for prompt in prompts]
    Path(RANKINGS, "rankings.jsonl").write_text("".join(judged))
    learned: list[Any] = []
    monkeypatch.setattr(dpo, "train_dpo", lambda *of, **more: learned.append(of[1:3]) or train_dpo(*of, **more))
    short = {"epochs": 1, "batch_size": 2, "lora_layers": 0}
    for reward, expected in (
        ({"feedback": ""}, (1, 1)),
        ({"feedback": RANKINGS}, (3, 3)),
        ({"feedback": RANKINGS, "weights": {"ai": 2, "starter": 0}}, (4, 3)),
    ):
        run = stage(dpo, {"dpo": short, "reward": reward})
        assert tuple(map(len, learned[-1])) == expected
    assert run.final["rankings"] == 4

    shutil.rmtree("artifacts/dpo")
    stage(dpo, {"dpo": short, "reward": {"feedback": RANKINGS}})
    stage(constitution, critic="script:careful")
    found = stage(safety).final
    assert found["dpo"]["harmful_prompts"] == 3
    assert "harmful_compliance" in found["dpo_vs_before"]
    assert {row["policy"] for row in rows(safety.FOLDER / "answers.jsonl")} == {"before", "sft", "ppo", "dpo"}
    assert "DPO in its place" in (safety.FOLDER / "report.html").read_text()


def test_dpo_refuses_rankings_that_dvc_does_not_watch(
    workspace: Path, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "is_dependency", lambda self, path: False)
    with pytest.raises(ConfigError, match=r"^reward\.feedback = 'elsewhere' is none of the deps of stage dpo"):
        stage(dpo, {"dpo": {"epochs": 1}, "reward": {"feedback": "elsewhere"}})


def test_the_policy_criticises_itself_to_the_same_bytes(workspace: Path, stage: Any) -> None:
    stage(constitution)
    first = CHAINS.read_bytes()
    stage(constitution)
    assert CHAINS.read_bytes() == first
    assert rows(DEMONSTRATIONS)[0]["annotator"] == "artifacts/start/sft"


def test_a_rule_as_the_judge_takes_the_same_path_as_an_ai(
    workspace: Path, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = yaml.safe_load((PROJECT / "params.yaml").read_text())
    judge = check_params({**raw, "judge": raw["judge"] | {"kind": "rule", "model": "longest", "bar": 0}}).judge
    build = check_params
    monkeypatch.setitem(globals(), "check_params", lambda raw: build(raw).model_copy(update={"judge": judge}))
    run = stage(principles, annotator="judge")
    [*found] = rows(principles.RANKINGS)
    assert run.final["rankings"] == len(found) > 6
    ids = {row["id"] for row in yaml.safe_load((PROJECT / "constitution.yaml").read_text())["principles"]}
    assert {row["principle"] for row in found} <= ids
    for row in found:
        assert (row["source"], row["annotator"], row["confidence"]) == ("rule", "longest", 1.0)
        best = row["ranks"].index(1)
        assert len(row["responses"][best]) == max(map(len, row["responses"]))
    by_split = load_feedback(Path(RANKINGS), Path("data/prepared"))
    assert sum(map(len, by_split.values())) == len(found)


def test_scores_and_doubt_of_a_judge_come_along(workspace: Path, stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Grading:
        name, source = "grading", "ai"

        def judge(self, items: Sequence[Item]) -> list[Judgement]:
            lengths = [[float(len(text)) for text in item.responses] for item in items]
            return [Judgement(ranks_of(of), {"helpfulness": of}, "longer", 0.25) for of in lengths]

    monkeypatch.setattr(principles, "_open_annotator", lambda run: Grading())
    stage(principles)
    [*found] = rows(principles.RANKINGS)
    assert len(found) > 6
    for row in found:
        assert row["scores"] == {"helpfulness": [len(text) for text in row["responses"]]}
        assert (row["annotator"], row["confidence"], row["comment"]) == ("grading", 0.25, "longer")


def test_a_judge_whose_weights_dvc_does_not_watch_is_refused(
    workspace: Path, stage: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "is_dependency", lambda self, path: path != "artifacts/base")
    with pytest.raises(ConfigError, match=r"^judge\.model = 'artifacts/base' is none of the deps of stage principles"):
        stage(principles, annotator="judge")


def test_a_judge_that_cannot_write_is_no_critic(workspace: Path, stage: Any) -> None:
    with pytest.raises(ConfigError, match=r"constitution\.critic judge needs judge\.kind endpoint, found local"):
        stage(constitution, critic="judge")


def test_answers_that_nobody_revised_can_be_read(workspace: Path, stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_kept(drafts: Sequence[Draft], *_: Any, **__: Any) -> list[Chain]:
        return [Chain(draft.prompt, draft.category, draft.response, [], False) for draft in drafts]

    monkeypatch.setattr(constitution, "revise", none_kept)
    with pytest.raises(DataError, match=r"None of 18 chains .* Read the answers in (\S+),") as error:
        stage(constitution)
    place = Path(str(error.value).partition("answers in ")[2].partition(",")[0])
    assert len(rows(place)) == 18
    assert rows(place)[0]["response"]
    assert not place.is_relative_to(workspace / "artifacts")  # where a failed stage keeps nothing


def test_topics_are_those_of_prompts_of_any_form(workspace: Path) -> None:
    dialogue = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"},
                {"role": "user", "content": "How do I spy? "}]  # fmt: skip
    bad = ["[1, 2]", "no JSON", "{}", json.dumps({"prompt": 3, "topic": "numbers"})]
    lines = [
        json.dumps({"prompt": dialogue, "topic": "privacy"}),
        *bad,
        json.dumps({"prompt": " Why? ", "topic": None}),
    ]
    Path("data/red_team/more.jsonl").write_text("\n".join(lines))
    found = constitution._topics()
    assert found[("user", "Hello"), ("assistant", "Hi"), ("user", "How do I spy?")] == "privacy"
    assert found[(("user", "Why?"),)] == ""
    assert "numbers" not in found.values()


def test_prompts_of_both_categories_are_needed(workspace: Path, stage: Any) -> None:
    for path in Path("data/prepared").glob("prompts_*.jsonl"):
        path.write_text('{"prompt": "Name a fruit.", "category": "explain"}\n')
    with pytest.raises(DataError, match=r"Found \{'harmful': 0, 'look_alike': 0\} prompts in splits train, validation"):
        stage(constitution)


def test_the_second_part_reads_what_the_first_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flows.campaign.make_base", lambda params, folder: None)
    project = tmp_path / "project"
    project.mkdir()
    for name in ("rlhf_core", "tasks", "data", "recipes", "dvc.yaml", "params.yaml", ".dvcignore", "constitution.yaml"):
        (project / name).symlink_to(PROJECT / name)
    folder = open_workspace("try", "constitution", project=project, recipe="tiny")
    assert (folder / "dvc.yaml").read_text() == (PROJECT / "dvc.yaml").read_text()
    (folder / "artifacts/sft/model").mkdir(parents=True)
    (folder / "artifacts/sft/model/weights").write_text("of the first part")
    keep_start(folder)
    lay_out(folder)
    (folder / "artifacts/sft/model/weights").write_text("of the second part")
    assert (folder / START / "weights").read_text() == "of the first part"
    params = load_params(folder / "params.yaml")
    stages = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    assert params.prepare.prompts[1:] == ("data/red_team/harmful.jsonl", "data/red_team/look_alike.jsonl")
    assert all((folder / path).is_file() for path in params.prepare.prompts)
    assert params.prepare.max_prompts == 0
    assert "data/red_team" in stages["prepare"]["deps"]
    watched = {"sft": params.sft.feedback, "reward": params.reward.feedback, "constitution": START}
    for stage, path in watched.items():
        assert any(Path(path).is_relative_to(dep) for dep in stages[stage]["deps"]), stage
    assert params.constitution.principles in stages["constitution"]["deps"]
    lay_out(open_workspace("try", "constitution", project=project))  # again, as a run that goes on does
    assert load_params(folder / "params.yaml") == params


def test_values_for_the_second_part_are_not_in_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: dict[str, Any] = {}

    def begin(*arguments: Any, **options: Any) -> Path:
        begun["folder"] = open_workspace(*arguments, **options)
        raise ConfigError("enough")

    monkeypatch.setattr("flows.campaign.make_base", lambda params, folder: None)
    monkeypatch.setattr(flow, "open_workspace", begin)
    monkeypatch.setattr(flow, "find_root", lambda: PROJECT)
    monkeypatch.setattr(flow, "project_of", lambda root: tmp_path)
    for name in ("rlhf_core", "tasks", "data", "recipes", "dvc.yaml", "params.yaml", ".dvcignore", "constitution.yaml"):
        (tmp_path / name).symlink_to(PROJECT / name)
    monkeypatch.setattr(flow, "constitution", flow.constitution.fn)  # no server
    monkeypatch.setattr("flows.server.use_server", lambda project: None)
    monkeypatch.setattr("tasks.preflight.problems", lambda *_, **__: [])
    command = ["run", "try", "--recipe", "tiny", "-S", "sft.batch_size=3", "-T", "sft.epochs=7", "-T", "sft.keep=last"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    folder = begun["folder"]
    first = load_params(folder / "params.yaml").sft
    lay_out(folder)
    second = load_params(folder / "params.yaml").sft
    assert (first.batch_size, second.batch_size) == (3, 3)
    assert first.epochs != 7 == second.epochs
    assert (first.keep, second.keep) == ("best", "last")
