"""docs/performance.md and its plots, from benchmarks/results.json: python -m benchmarks.page."""

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

PAGE, IMAGES = Path("docs/performance.md"), Path("docs/images")
PARTS = {
    "ppo_update": "a PPO update",
    "reward": "reward model",
    "sft": "SFT",
    "generation": "generation",
    "growth": "growth",
}
NAMES = {
    "default": "ours, as params.yaml has it",
    "separate": "ours, LoRA on every layer, a value network of its own",
    "shared": "ours, LoRA on every layer, the value a head on the policy",
    "full": "ours, trained in full, one epoch",
    "trl": "TRL, trained in full",
    "trl_lora": "TRL, policy by LoRA on all linear layers",
    "trl_checkpointed": "TRL, trained in full, gradient checkpointing on",
    "ours": "ours",
    "generate": "transformers' `generate`",
}


def write_page(results: dict[str, Any]) -> None:
    """The page and its plots, as far as the results have parts."""
    if "growth" in results:
        _plot(results["growth"]["models"])
    PAGE.write_text(page(results), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """The text."""
    runs = {name: results[name]["run"] for name in PARTS if name in results}
    together = len({run["started"] for run in runs.values()}) == 1
    parts = [
        "# Performance",
        "What a step costs here and with TRL 1.10.0 on the same work and the same machine, in turn"
        f"{', in one run' if together else ''}. Made by\n`make bench`; every sample is in "
        "[benchmarks/results.json](../benchmarks/results.json).",
        *_machine(runs, together),
        "Operations are those that a method has to compute, of real tokens alone: 2·N·in·out for N tokens through a "
        "matrix, 4·H·w·s\nin each layer for the attention of a token that sees s positions, H heads of width w. "
        "Learning costs a matrix 3 times its\nforward pass if it is trained, 2 times if it is frozen, once below the "
        "lowest adapter. The share of peak is operations ÷\nseconds ÷ peak, so padding counts against whoever computes "
        "it; a ratio is fewer operations × efficiency. Details:\n[benchmarks/flops.py](../benchmarks/flops.py).",
    ]
    if "ppo_update" in results:
        parts += _ppo(results["ppo_update"])
    if "reward" in results or "sft" in results:
        parts += _training(results)
    if "generation" in results:
        parts += _generation(results["generation"])
    if "growth" in results:
        parts += _growth(results["growth"]["models"])
    return "\n\n".join(parts) + "\n"


def _machine(runs: dict[str, dict[str, Any]], together: bool) -> list[str]:
    lead = "Everything is in float32. Times are medians, with the fastest and the slowest sample in brackets."
    peaks = (
        "GFLOP/s are of a 2048 × 2048 product in float32, PyTorch's own or by a matrix laid out beforehand, whichever "
        "is faster;\nGB/s are of a copy."
    )
    if together:
        run = next(iter(runs.values()))
        return [
            f"The machine: {run['threads']} threads, {run['peak_gflops']:.0f} GFLOP/s, {run['bandwidth_gb_s']:.0f} "
            f"GB/s; the model: {_model(run)}; rounds: {run['rounds']}.\n{peaks}\n{lead}"
        ]
    table = [
        "| measured in | started, UTC | model | rounds | threads | GFLOP/s | GB/s |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for name, run in runs.items():
        table.append(
            f"| {PARTS[name]} | {run['started']} | {_model(run)} | {run['rounds']} | {run['threads']} | "
            f"{run['peak_gflops']:.0f} | {run['bandwidth_gb_s']:.0f} |"
        )
    return [
        "The parts come from several runs. Both sides of a part are of one run, and its shares are of that run's "
        f"peaks.\n{peaks}\n{lead}",
        "\n".join(table),
    ]


def _model(run: dict[str, Any]) -> str:
    return "SmolLM2-135M" if run["model"] == "artifacts/base" else run["model"]


def _spread(values: list[float], digits: int = 1) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _split(found: dict[str, Any], which: str) -> str:
    """A ratio and what it comes from."""
    ratio, fewer, efficiency = (found[f"{name}{which}"] for name in ("ratio", "flops_ratio", "efficiency_ratio"))
    return f"**{ratio:.2f} times** as fast: {fewer:.2f} by fewer operations × {efficiency:.2f} by efficiency"


def _sides(sides: dict[str, Any], digits: int = 1) -> str:
    table = [
        "| | seconds | tokens a second | GFLOP | share of peak | peak memory, GB | weights trained |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, side in sides.items():
        trained = f"{side['trained'] / 1e6:.1f}M" if "trained" in side else "none"
        table.append(
            f"| {NAMES[name]} | {_spread(side['seconds'], digits)} | {side['tokens_per_second']:.0f} | "
            f"{side['gflop']:.0f} | {side['peak_share']:.0%} | {side['peak_gb']:.1f} | {trained} |"
        )
    return "\n".join(table)


def _ppo(found: dict[str, Any]) -> list[str]:
    work, sides = found["work"], found["sides"]
    checkpointed = sides["trl_checkpointed"]
    return [
        "## A PPO update",
        f"{work['rollouts']} rollouts of {work['prompt']} prompt and {work['response']} response tokens, "
        f"{work['epochs']} epochs in batches of 8; no response stops early.\nThe work is equal in rollouts, tokens and "
        "epochs, not in trained weights. In ours as params.yaml has it the gold model\nlooks at every so many updates, "
        "as it does in a run, and is counted by its share of them.",
        _sides(sides),
        "Against TRL trained in full:\n\n"
        f"- ours as params.yaml has it is {_split(found, '_default')};\n"
        f"- with LoRA on every layer and a value network of its own, {_split(found, '_separate')};\n"
        f"- with LoRA on every layer and the value a head on the policy, {_split(found, '_shared')}.\n\n"
        f"Against TRL with LoRA, ours as params.yaml has it is {_split(found, '_default_lora')}.",
        "Switched in TRL: bfloat16, its default, is off, so that both sides compute in float32. Gradient checkpointing "
        "is off too, so\nthat nothing is computed twice: TRL is then faster and takes more memory. PPOConfig asks for "
        "it by default, but PPOTrainer\n1.10.0 never switches it on; the last row has it switched on by hand, in "
        "policy and value model, for one update.",
        f"Ours as params.yaml has it needs **{found['memory_ratio']:.0%}** of the memory of TRL as timed, and "
        f"**{found['memory_ratio_checkpointed']:.0%}** of that of TRL with gradient\ncheckpointing, which takes "
        f"{median(checkpointed['seconds']) / sides['trl']['median_seconds']:.2f} times as long as without.",
    ]


def _training(results: dict[str, Any]) -> list[str]:
    parts = [
        "## SFT and reward model",
        "The starter data, the batch sizes of params.yaml; tokens are those of the texts, without padding. Ours as "
        "params.yaml has it\nruns all its epochs, and its later ones find the lower layers computed. In full, both "
        "sides train every weight on the same rows\nonce. TRL's defaults bfloat16 and gradient checkpointing are off: "
        "it is faster without, and takes more memory.",
    ]
    for stage in ("reward", "sft"):
        if stage not in results:
            continue
        found = results[stage]
        table = [
            f"| {PARTS[stage]} | tokens a second | MFLOP a token | share of peak | peak memory, GB |",
            "|---|---:|---:|---:|---:|",
        ]
        for name, side in found["sides"].items():
            table.append(
                f"| {NAMES[name]} | {_spread(side['tokens_per_second'], 0)} | {side['mflop_per_token']:.0f} | "
                f"{side['peak_share']:.0%} | {side['peak_gb']:.1f} |"
            )
        parts += [
            "\n".join(table),
            f"Against TRL, ours as params.yaml has it is {_split(found, '_default')};\nin full, "
            f"{_split(found, '_equal')}.",
            _against_plain(found),
        ]
    return parts


def _against_plain(found: dict[str, Any]) -> str:
    """What is trained in full as a share of the peak, and of what TRL's products are made by."""
    run, share = found["run"], found["peak_share"]
    of_plain = share * run["peak_gflops"] / run["plain_gflops"]
    return (
        f"In full, ours is at {share:.0%} of the peak, and at {of_plain:.0%} of what PyTorch's own product reaches, "
        f"{run['plain_gflops']:.0f} GFLOP/s."
    )


def _generation(found: dict[str, Any]) -> list[str]:
    work, step, products, run = (found[name] for name in ("work", "step_ms", "products_ms", "run"))
    by_bytes = 1e3 * found["bytes_a_step"] / run["bandwidth_gb_s"] / 1e9
    by_flops = 1e3 * found["flop_a_step"] / run["peak_gflops"] / 1e9
    rows = [
        "| milliseconds a step | |", "|---|---:|",
        *(f"| {NAMES[name]} | {value:.0f} |" for name, value in step.items()),
        *(f"| the matrix products alone, {name} | {value:.0f} |" for name, value in products.items()),
        f"| bound by bandwidth: {found['bytes_a_step'] / 1e6:.0f} MB of weights | {by_bytes:.0f} |",
        f"| bound by operations: {found['flop_a_step'] / 1e9:.1f} GFLOP | {by_flops:.0f} |",
    ]  # fmt: skip
    return [
        "## Generation",
        f"{work['rows']} rows, {work['prompt']} prompt tokens, {work['response']} new tokens, which alone are counted; "
        "temperature sampling.",
        _sides(found["sides"], 2),
        "\n".join(rows),
        f"Ours is {_split(found, '')}.\nA step takes **{found['bound_ratio']:.2f} times** the fastest products of its "
        f"shapes ({found['fastest_products']}).",
    ]


def exponent(points: list[dict[str, Any]], over: str, of: str) -> float:
    """The slope of log `of` over log `over`, by least squares; without the points where `of` is 0."""
    points = [point for point in points if point[of] > 0]
    if len(points) < 2:
        return math.nan
    x = [math.log(point[over]) for point in points]
    y = [math.log(point[of]) for point in points]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    along = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return along / sum((a - mean_x) ** 2 for a in x)


def _told(points: list[dict[str, Any]], over: str, of: str) -> str:
    """The exponent, and how many points it was fitted without."""
    left_out = sum(point[of] <= 0 for point in points)
    without = f", without {left_out} of {len(points)} points: too little to measure" if left_out else ""
    return f"{exponent(points, over, of):.2f}{without}"


def _growth(found: dict[str, Any]) -> list[str]:
    table = ["| | points | time | memory beyond the models |", "|---|---:|---:|---:|"]
    for name, series in found.items():
        for over, points in series.items():
            what = "rollouts" if over == "rollouts" else "response length"
            time, memory = (_told(points, over, of) for of in ("seconds", "working_gb"))
            table.append(
                f"| {name}, over {what} {points[0][over]} to {points[-1][over]} | {len(points)} | {time} | {memory} |"
            )
    every = [point for series in found.values() for points in series.values() for point in points]
    samples = sorted({point["samples"] for point in every})
    not_reset = "" if all(point["peak_reset"] for point in every) else (
        "\nThis system did not let the peak of loading be set back, so memory is too small by what loading held for a "
        "while."
    )  # fmt: skip
    return [
        "## Growth",
        "An update of the default recipe, over the number of rollouts (32 + 48 tokens each) and, with 4 rollouts, over "
        "the length\nof their responses. It is one at which the gold model does not look. A point is of "
        f"{' or '.join(map(str, samples))} sample{'s' if samples != [1] else ''}, so trust\nthe slopes, not single "
        'points. Exponents fitted on the logarithms; 1 is linear. "Wider" is a random model of 36 layers\nand width '
        f"768, measured at every second point.{not_reset}",
        "![Seconds and memory of an update over rollouts and response length](images/performance-growth.png)",
        "\n".join(table),
        "No tensor of (rows, tokens, vocabulary) is ever held: logits are made for 512 tokens at a time.",
    ]


def _plot(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullLocator

    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    panels = [(over, of) for over in ("rollouts", "response") for of in ("seconds", "working_gb")]
    for axis, (over, of) in zip(axes, panels, strict=True):
        for name, series in found.items():
            points = series[over]
            label = f"{name}: exponent {_told(points, over, of)}"
            axis.loglog([p[over] for p in points], [p[of] for p in points], "o-", label=label)
        axis.set_xticks(sorted({p[over] for series in found.values() for p in series[over]}))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_locator(NullLocator())
        for each in (axis.xaxis, axis.yaxis):
            each.set_major_formatter("{x:g}")
        axis.set_xlabel("rollouts" if over == "rollouts" else "response tokens, 4 rollouts")
        axis.set_title("seconds an update" if of == "seconds" else "GB beyond the models", fontsize=11)
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(fontsize=8)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "performance-growth.png", dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    write_page(json.loads(Path("benchmarks/results.json").read_text(encoding="utf-8")))
