"""benchmarks/: the operations are counted as torch counts them, and the page says what the results say."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from benchmarks import flops, measure, run
from benchmarks.machine import product_gflops
from benchmarks.measure import Endless, Stopwatch, between, reward_work, sft_work
from benchmarks.page import exponent, page
from benchmarks.run import UPDATE, Bench, compared, generation, operations_a_token, peak_of, rates_of, seconds_of
from rlhf_core import matrices
from rlhf_core.folding import fold_rows
from rlhf_core.models import Roles, pack
from rlhf_core.ppo import POLICY, VALUE, add_roles, losses, measure_rollouts
from rlhf_core.records import Sampled
from rlhf_core.reward import EncodedRanking
from rlhf_core.sft import Example
from rlhf_core.tiny import make_llama
from rlhf_core.watch import GOLD

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "benchmarks/results.json"
LENGTH, COUNT = 12, 3
RUN = {"started": "2026-01-01 00:00:00", "model": "artifacts/base", "rounds": 2, "threads": 2, "peak_gflops": 180.0,
       "plain_gflops": 90.0, "bandwidth_gb_s": 30.0}  # fmt: skip


@pytest.fixture
def llama(tokenizer: PreTrainedTokenizerFast) -> Any:
    return make_llama(tokenizer, num_hidden_layers=3, attn_implementation="eager").eval()


@pytest.fixture
def shape(llama: Any) -> flops.Shape:
    return flops.Shape.of(llama.config, rank=4)


def counted(work: Any) -> int:
    # Multiplied by PyTorch itself, whose products it counts: it knows none of oneDNN's.
    with mock.patch.object(matrices, "packs", return_value=False), FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def test_a_forward_pass_is_counted_as_torch_counts_it(llama: Any, shape: flops.Shape) -> None:
    ids = torch.randint(0, 50, (COUNT, LENGTH))
    # Eager attention computes the positions that the mask hides too.
    layers = flops.forward(shape, 3, COUNT * LENGTH, COUNT * LENGTH**2)
    with torch.no_grad():
        assert counted(lambda: llama(ids)) == layers + flops.head(shape, COUNT * LENGTH)


def test_learning_in_full_is_counted_as_torch_counts_it(llama: Any, shape: flops.Shape) -> None:
    ids = torch.randint(0, 50, (COUNT, LENGTH))
    layers = flops.learn(shape, 3, COUNT * LENGTH, COUNT * LENGTH**2, full=True)
    found = counted(lambda: llama(ids).logits.sum().backward())
    assert found == layers + 3 * flops.head(shape, COUNT * LENGTH)


def test_a_pair_is_counted_as_torch_counts_it(
    tmp_path: Path, llama: Any, shape: flops.Shape, tokenizer: PreTrainedTokenizerFast, section: Any
) -> None:
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    roles = Roles(tmp_path, section("reward"))
    roles.model.set_attn_implementation("eager")
    roles.add("reward", method="full", head=True)
    roles.trainable("reward")
    assert roles.folds
    pair = [[5] * 10 + [6] * 4, [5] * 10 + [7] * 6]
    work = reward_work([EncodedRanking(pair, (1, 2), [4, 6])], folded=True)
    found = counted(lambda: roles.output_rows(pair, ["reward"], 0).sum().backward())
    # Attention computes the positions that the mask hides too; the score head has one output for each text.
    whole = flops.training(shape, work._replace(seen=work.tokens**2), layers=3, full=True)
    assert found == whole + 3 * 2 * 2 * shape.width
    packed = pack(pair, None, 0)
    fold = fold_rows(packed.mask_BS, [(2, 10)])
    assert (work.given, work.tokens, work.seen) == (30, fold.of_GF.numel(), int(fold.sees_GFF.sum()))


def test_layers_that_are_checkpointed_are_counted_as_torch_counts_them(llama: Any, shape: flops.Shape) -> None:
    ids, rows = torch.randint(0, 50, (COUNT, LENGTH)), Eager(COUNT, 0, LENGTH)
    plain, again = (flops.ppo_trl(shape, rows, epochs=1, lora=False, checkpointed=on) for on in (False, True))
    found = counted(lambda: llama(ids, use_cache=False).logits.sum().backward())
    llama.activation_checkpointing_enable()
    llama.train()
    more = counted(lambda: llama(ids, use_cache=False).logits.sum().backward()) - found
    assert 2 * more == again - plain  # policy and value model


def test_texts_of_a_pair_that_stand_apart_are_counted_apart() -> None:
    pairs = [EncodedRanking([[1] * 9 + [2], [1] * 9 + [3, 3]], (1, 2), [1, 2])]
    assert reward_work(pairs, folded=False) == (21, 21, 55 + 66, 0)
    assert reward_work(pairs, folded=True) == (21, 12, 55 + 66 - 45, 0)
    assert sft_work([Example([1, 2], [3]), Example([1], [2])]) == (5, 5, 6 + 3, 2)


def test_layers_below_the_adapters_cost_nothing_the_second_time(shape: flops.Shape) -> None:
    # 10 tokens a step, two steps an epoch, the first of four not timed: one of three comes for the first time.
    work = flops.Work(20, 20, 110, 0)
    found = operations_a_token(shape, {"work": work, "tokens": [10, 10, 10]}, layers=2, full=False, steps=2)
    lower, upper = flops.forward(shape, 1, 20, 110), flops.learn(shape, 2, 20, 110, full=False)
    assert found == pytest.approx((lower / 2 + upper * 3 / 2) / 30, rel=1e-9)


def test_a_ratio_is_told_with_what_it_comes_from() -> None:
    assert compared("_x", 3.0, 2.0) == {"ratio_x": 3.0, "flops_ratio_x": 2.0, "efficiency_ratio_x": 1.5}


def test_learning_by_adapters_is_counted_as_torch_counts_it(
    tmp_path: Path, llama: Any, shape: flops.Shape, tokenizer: PreTrainedTokenizerFast, section: Any
) -> None:
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    roles = Roles(tmp_path, section("sft", lora_rank=4, lora_layers=2))
    roles.model.set_attn_implementation("eager")
    roles.add("policy")
    roles.trainable("policy")
    packed = pack([[5] * LENGTH] * COUNT, None, 0)
    trunk = roles.trunk(packed)
    found = counted(lambda: roles.hidden(trunk, "policy").sum().backward())
    whole = flops.learn(shape, 2, COUNT * LENGTH, COUNT * LENGTH**2, full=False)
    # Nothing below the lowest adapter asks for a gradient, so queries, keys and values of that layer pass none on.
    spared = sum(2 * out * inside + 2 * 4 * inside for out, inside in shape.matrices[:3]) * COUNT * LENGTH
    assert found == whole - spared


def test_rows_see_what_comes_before_them() -> None:
    rows = flops.Rows(2, 1, 2)
    assert (rows.tokens, rows.answered, rows.seen) == (6, 4, 2 * (1 + 2 + 3))


def test_a_prompt_that_comes_twice_is_sampled_from_once(shape: flops.Shape) -> None:
    rows = flops.Rows(2, 10, 5)
    apart, shared = (flops.sampling(shape, rows, prompts=prompts) for prompts in (2, 1))
    assert apart - shared == flops.forward(shape, 3, 10, 55)


def test_fewer_layers_with_adapters_are_fewer_operations() -> None:
    shape, rows = flops.Shape(30, 576, 1536, 9, 3, 64, 49152, 16), flops.Rows(16, 32, 48)
    top, every = (flops.ppo_ours(shape, rows, prompts=16, layers=layers, epochs=2) for layers in (12, 30))
    shared = flops.ppo_ours(shape, rows, prompts=16, layers=30, epochs=2, shared=True)
    lora, full = (flops.ppo_trl(shape, rows, epochs=2, lora=lora) for lora in (True, False))
    assert top < shared < every < lora < full


def test_the_gold_model_is_counted_where_it_looks(shape: flops.Shape) -> None:
    rows = flops.Rows(2, 3, 4)
    never, often = (flops.ppo_ours(shape, rows, prompts=2, layers=2, epochs=1, watch_every=every) for every in (0, 2))
    assert often - never == flops.forward(shape, 2, 14, 56, adapter=True) / 2


@pytest.mark.parametrize("job", ["sft_ours", "sft_trl"])
def test_ours_is_as_deterministic_as_its_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], job: str
) -> None:
    monkeypatch.setitem(
        measure.JOBS, job, lambda: {"deterministic": torch.are_deterministic_algorithms_enabled(), "seconds": []}
    )
    monkeypatch.setattr("sys.argv", ["measure", job, "{}"])
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        measure.main()
    finally:
        torch.use_deterministic_algorithms(before)
    assert json.loads(capsys.readouterr().out)["deterministic"] == (job == "sft_ours")


class Eager(flops.Rows):
    """Rows whose attention computes the positions that the mask hides too."""

    @property
    def seen(self) -> int:
        return self.count * (self.prompt + self.response) ** 2


@pytest.mark.parametrize("layers", [2, 3])
def test_a_head_on_the_policy_spares_what_torch_counts_less(
    tmp_path: Path, llama: Any, shape: flops.Shape, tokenizer: PreTrainedTokenizerFast, section: Any, layers: int
) -> None:
    llama.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = {"lora_rank": 4, "lora_layers": layers}
    judge = Roles(tmp_path / "base", section("reward", **lora))
    judge.add("reward", head=True)
    judge.save("reward", tmp_path / "reward")
    response = LENGTH - 5
    mask_BT = torch.ones((COUNT, response), dtype=torch.bool)
    prompts = [[5 + row] * 5 for row in range(COUNT)]  # nothing is computed once for several of them
    sampled = Sampled(prompts, torch.full((COUNT, response), 7), mask_BT, mask_BT[:, 0])
    rows, found = Eager(COUNT, 5, response), {}
    for network in ("own", "shared"):
        roles, config = Roles(tmp_path / "base", section("ppo", **lora)), section("ppo", value_network=network)
        roles.model.set_attn_implementation("eager")
        add_roles(roles, str(tmp_path / "reward"), method="lora", value_network=network)
        roles.trainable(POLICY)
        roles.trainable(VALUE)
        assert roles.depth == 3 - layers

        def update(roles: Roles = roles, config: Any = config) -> None:
            part = measure_rollouts(roles, sampled, config, kl_coef=0.0).rollouts
            losses(roles, part, config, rows.answered, kl_coef=0.0)

        counts = flops.ppo_ours(shape, rows, prompts=COUNT, layers=layers, epochs=1, shared=network == "shared")
        found[network] = (counted(update), counts)
    less, expected = (own - shared for own, shared in zip(found["own"], found["shared"], strict=True))
    # As above: queries, keys and values of the lowest layer with adapters pass no gradient on.
    spared = sum(2 * out * inside + 2 * 4 * inside for out, inside in shape.matrices[:3]) * COUNT * LENGTH
    assert less == expected - spared > 0


def test_joined_matrices_are_the_same_matrices(shape: flops.Shape) -> None:
    apart = sum(out * inside for out, inside in shape.matrices) * shape.layers + shape.vocabulary * shape.width
    assert sum(out * inside for out, inside in shape.joined) == apart


def test_the_peak_is_of_whatever_multiplies_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((2.0, 0.5, 0.5, 2.0))  # of a product as it is, of one laid out, and again
    monkeypatch.setattr("benchmarks.machine.timed", lambda work: (work(), next(seconds))[1])
    assert product_gflops(size=1000) == pytest.approx({"plain_gflops": 1.0, "peak_gflops": 4.0})
    assert product_gflops(size=1000) == pytest.approx({"plain_gflops": 4.0, "peak_gflops": 4.0})


def test_the_first_step_is_not_timed() -> None:
    watch = Stopwatch()
    for tokens in (5, 6, 7):
        watch.progress(1, 3, unit="steps", tokens=tokens)
    watch.moments = [1.0, 3.0, 4.0]
    assert watch.result() == {"seconds": [2.0, 1.0], "tokens": [6, 7]}
    assert between([1.0]) == []


def test_rounds_are_put_together() -> None:
    runs = [
        {"seconds": [2.0, 1.0], "tokens": [30, 30], "peak_bytes": 3},
        {"seconds": [4.0], "tokens": [40], "peak_bytes": 5},
    ]
    assert (seconds_of(runs), rates_of(runs), peak_of(runs)) == ([2.0, 1.0, 4.0], [20.0, 10.0], 4)


def test_memory_beyond_the_models_leaves_out_what_loading_held(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not measure.settle()["peak_reset"]:
        pytest.skip("this system does not let the peak be set back")
    megabyte = 1 << 20

    def job() -> dict[str, Any]:
        loading = bytearray(b"1") * (300 * megabyte)
        del loading
        found = measure.settle()
        assert found["loading_peak_bytes"] > found["loaded_bytes"] + 200 * megabyte
        working = bytearray(b"1") * (100 * megabyte)
        del working
        return found

    monkeypatch.setitem(measure.JOBS, "job", job)
    monkeypatch.setattr("sys.argv", ["measure", "job", "{}"])
    measure.main()
    found = json.loads(capsys.readouterr().out)
    assert 90 * megabyte < found["working_bytes"] < 150 * megabyte
    assert found["peak_bytes"] >= found["loaded_bytes"] + 200 * megabyte


def test_a_peak_that_cannot_be_set_back_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "CLEAR", tmp_path / "no-folder/clear_refs")
    found = measure.settle()
    assert not found["peak_reset"]
    assert found["loaded_bytes"] == found["loading_peak_bytes"] > 0


@pytest.mark.parametrize("options", [["--quick"], ["--model", "other"], ["--quick", "--results", str(RESULTS)]])
def test_a_quick_or_a_foreign_run_takes_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> None:
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr("sys.argv", ["run", *options])
    with pytest.raises(SystemExit, match="Add --results FILE"):
        run.main()


def test_a_part_keeps_the_run_that_it_is_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, llama: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    llama.save_pretrained(tmp_path)
    peaks = iter((100.04, 200.0))
    others = {"plain_gflops": 90.0, "bandwidth_gb_s": 30.0, "threads": 2}
    monkeypatch.setattr(Bench, "child", lambda *_: {"peak_gflops": next(peaks), **others})
    for part in ("sft", "reward"):
        monkeypatch.setattr(run, "training", lambda bench, peak, stage: {"stage": stage, "peak": peak})
        monkeypatch.setattr(
            "sys.argv", ["run", "--only", part, "--model", str(tmp_path), "--results", str(tmp_path / "results.json")]
        )
        monkeypatch.setattr(run, "PREPARED", tmp_path)
        run.main()
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["sft"]["run"]["peak_gflops"], found["reward"]["run"]["peak_gflops"]) == (100.0, 200.0)
    assert (found["peak_gflops"], found["sft"]["peak"], found["sft"]["run"]["rounds"]) == (200.0, 100.04, 3)


def test_an_exponent_is_the_slope_of_the_logarithms() -> None:
    points = [{"rows": n, "seconds": 3 * n**2} for n in (1, 2, 4)]
    assert exponent(points, "rows", "seconds") == pytest.approx(2, rel=1e-9)


def test_points_too_small_to_measure_stay_out_of_an_exponent_and_are_told() -> None:
    memory = {16: 0.0, 32: 0.0, 64: 0.064, 256: 0.256}
    points = [{"response": n, "seconds": float(n), "working_gb": gb} for n, gb in memory.items()]
    assert exponent(points, "response", "working_gb") == pytest.approx(1, rel=1e-9)
    assert math.isnan(exponent(points[:3], "response", "working_gb"))
    points = [{**point, "samples": 1, "peak_reset": point["response"] > 16} for point in points]
    text = page({"growth": {"run": RUN, "models": {"135M": {"response": points}}}})
    assert "| 4 | 1.00 | 1.00, without 2 of 4 points: too little to measure |" in text
    assert "A point is of 1 sample," in text
    assert "did not let the peak of loading be set back" in text


def test_the_page_says_of_which_run_a_part_is() -> None:
    later = {**RUN, "started": "2026-01-02 00:00:00", "peak_gflops": 150.0}
    side = {"seconds": [2.0], "median_seconds": 2.0, "tokens_per_second": 640.0, "gflop": 2000.0, "peak_share": 0.5}
    names = ("default", "trl", "separate", "shared", "trl_lora", "trl_checkpointed")
    ratios = {
        name: value
        for which in ("_default", "_default_lora", "_separate", "_shared", "_equal")
        for name, value in compared(which, 3.0, 2.0).items()
    }
    memory = {"memory_ratio": 0.4, "memory_ratio_checkpointed": 0.6}
    sides = {name: {**side, "peak_gb": 4.0, "trained": 10**6} for name in names}
    update = {"run": RUN, "work": {**UPDATE, "updates": 2}, "sides": sides, **ratios, **memory}
    trained = {"tokens_per_second": [90.0], "mflop_per_token": 800.0, "peak_share": 0.7, "peak_gb": 3.0}
    sft = {"run": RUN, "sides": dict.fromkeys(("default", "trl", "full"), trained), **ratios, "peak_share": 0.7}
    one = page({"ppo_update": update, "sft": sft})
    assert "in one run" in one
    assert "2 threads, 180 GFLOP/s" in one
    assert "needs **40%** of the memory of TRL as timed, and **60%** of that of TRL with gradient" in one
    assert one.count("**3.00 times** as fast: 2.00 by fewer operations × 1.50 by efficiency") == 6
    assert "is at 70% of the peak, and at 140% of what PyTorch's own product reaches, 90 GFLOP/s." in one
    two = page({"ppo_update": update, "sft": {**sft, "run": later}})
    assert "in one run" not in two
    assert "| SFT | 2026-01-02 00:00:00 | SmolLM2-135M | 2 | 2 | 150 | 30 |" in two


def test_a_step_of_either_sampler_is_told_without_the_prompt(
    shape: flops.Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(self: Bench, job: str, **spec: Any) -> dict[str, Any]:
        if job == "products":
            return {"plain": 0.05, "joined": 0.04, "peak_bytes": 1}
        first, step, peak = (0.5, 0.1, 2e9) if job == "generation_ours" else (2.0, 0.2, 3e9)
        seconds = [first + step * (spec["response"] - 1)]
        return {"seconds": seconds, "first_seconds": [first], "tokens": [16 * spec["response"]], "peak_bytes": peak}

    monkeypatch.setattr(Bench, "child", child)
    bench = object.__new__(Bench)
    bench.model, bench.rounds, bench.quick, bench.shape = "m", 1, True, shape
    found = generation(bench, 1.0)
    assert found["first_token_ms"] == {"ours": 500.0, "generate": 2000.0}
    assert found["step_ms"] == {"ours": 100.0, "generate": 200.0}
    assert [side["peak_gb"] for side in found["sides"].values()] == [2.0, 3.0]
    assert [side["tokens_per_second"] for side in found["sides"].values()] == [150.6, 70.1]  # 1024 in 6.8 s, in 14.6 s
    assert (found["ratio"], found["bound_ratio"]) == (2.15, 2.5)  # 14.6 s by 6.8 s, the prompt included; 0.1 by 0.04


@pytest.mark.parametrize("network", ["own", "shared"])
def test_our_update_is_timed_with_every_response_at_full_length(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, network: Any
) -> None:
    make_llama(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(
        measure, "prompts_of", lambda model, count, length: [[5 + row] * length for row in range(count)]
    )
    looked = []
    scores = Roles.scores

    def scored(roles: Roles, trunk: Any, role: str, **named: Any) -> Any:
        looked.append(len(trunk.mask_BS))
        assert role == GOLD
        return scores(roles, trunk, role, **named)

    monkeypatch.setattr(Roles, "scores", scored)
    monkeypatch.chdir(PROJECT)
    found = measure.ppo_ours(
        model=str(tmp_path), layers=1, rollouts=4, prompt=3, response=5, epochs=1, updates=1, value_network=network,
        watch_every=2,
    )  # fmt: skip
    assert found["tokens"] == [4 * (3 + 5)]
    assert len(found["seconds"]) == 1
    assert found["loaded_bytes"] > 0
    assert looked == [4]  # at the first update, before the one that is timed
    # Adapters in the one layer, for each role with a body; a head.
    adapters = 16 * sum(map(sum, flops.Shape.of(make_llama(tokenizer).config).matrices))
    assert found["trained"] == adapters * (2 if network == "own" else 1) + make_llama(tokenizer).config.hidden_size + 1


def test_an_endless_tokenizer_has_no_end_of_turn() -> None:
    endless = Endless(SimpleNamespace(pad_token_id=0, decode=lambda ids, **_: str(ids)))
    assert (endless.eos_token_id, endless.pad_token_id, endless.decode([1])) == (-1, 0, "[1]")


@pytest.mark.skipif(not RESULTS.is_file(), reason="no results yet")
def test_the_page_says_what_the_results_say() -> None:
    results = json.loads(RESULTS.read_text())
    assert (PROJECT / "docs/performance.md").read_text() == page(results), "run python -m benchmarks.page"
