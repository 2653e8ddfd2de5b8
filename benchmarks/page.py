"""docs/performance.md and its plots, from benchmarks/results.json: python -m benchmarks.page."""

import json
import math
from pathlib import Path
from statistics import median
from typing import Any

PAGE, IMAGES = Path("docs/performance.md"), Path("docs/images")
NAMES = {
    "default": "ours, as params.yaml has it",
    "separate": "ours, LoRA on every layer, a value network of its own",
    "shared": "ours, LoRA on every layer, the value a head on the policy",
    "trl": "TRL as it comes, trained in full",
    "trl_lora": "TRL, policy by LoRA on all linear layers",
}


def write_page(results: dict[str, Any]) -> None:
    """The page and its plots, as far as the results have parts."""
    if "growth" in results:
        _plot(results["growth"])
    PAGE.write_text(page(results), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """The text."""
    parts = [
        "# Performance",
        "What a step costs here and with TRL 1.10.0 on the same work, on the same machine, in one run, in turn. Made\n"
        "by `make bench`; every sample is in [benchmarks/results.json](../benchmarks/results.json).",
        f"The machine: {results['threads']} threads, {results['peak_gflops']:.0f} GFLOP/s in a 2048 × 2048 product in "
        f"float32, {results['bandwidth_gb_s']:.0f} GB/s in a\ncopy. The model is SmolLM2-135M in float32. Times are "
        "medians, with the fastest and the slowest sample in brackets.",
    ]
    if "ppo_update" in results:
        parts += _ppo(results["ppo_update"])
    if "reward" in results or "sft" in results:
        parts += _training(results)
    if "generation" in results:
        parts += _generation(results["generation"], results)
    if "growth" in results:
        parts += _growth(results["growth"])
    return "\n\n".join(parts) + "\n"


def _spread(values: list[float], digits: int = 1) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def _ppo(found: dict[str, Any]) -> list[str]:
    work, sides = found["work"], found["sides"]
    table = [
        "| | seconds | TFLOP | share of peak | peak memory, GB | weights trained |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, side in sides.items():
        table.append(
            f"| {NAMES[name]} | {_spread(side['seconds'])} | {side['gflop'] / 1e3:.2f} | {side['peak_share']:.0%} | "
            f"{side['peak_gb']:.1f} | {side['trained'] / 1e6:.1f}M |"
        )
    efficiency = found["ratio_default"] / found["flops_ratio_default"]
    return [
        "## A PPO update",
        f"{work['rollouts']} rollouts of {work['prompt']} prompt and {work['response']} response tokens, "
        f"{work['epochs']} epochs in batches of 8; no response stops early.\nThe work is equal in rollouts, tokens and "
        "epochs, not in trained weights.",
        "\n".join(table),
        f"- Our default recipe is **{found['ratio_default']:.2f} times** as fast as TRL as it comes: "
        f"{found['flops_ratio_default']:.2f} times fewer operations, each\n  {efficiency:.2f} times as fast. Against "
        f"TRL with LoRA it is {found['ratio_default_lora']:.2f} times as fast.\n"
        f"- With LoRA on every layer and a value network of its own: **{found['ratio_separate']:.2f} times**, with "
        f"{found['flops_ratio_separate']:.2f} times fewer operations.\n"
        f"- With LoRA on every layer and the value a head on the policy: **{found['ratio_shared']:.2f} times**, with "
        f"{found['flops_ratio_shared']:.2f} times fewer operations.\n"
        f"- Our default recipe needs {found['memory_ratio']:.0%} of the memory.",
        "Operations are counted by [benchmarks/flops.py](../benchmarks/flops.py), for each method what it computes. "
        "TRL's\ndefaults, bfloat16 and gradient checkpointing, are off: all is float32, and nothing is computed twice.",
    ]


def _training(results: dict[str, Any]) -> list[str]:
    table = [
        "| tokens a second, without padding | ours, params.yaml | ours, in full | TRL, in full | default ÷ TRL | "
        "full ÷ TRL | share of peak, in full |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for stage in ("reward", "sft"):
        if stage in results:
            found = results[stage]
            rates = found["tokens_per_second"]
            table.append(
                f"| {'reward model' if stage == 'reward' else 'SFT'} | {_spread(rates['default'], 0)} | "
                f"{_spread(rates['full'], 0)} | {_spread(rates['trl'], 0)} | **{found['ratio_default']:.2f}** | "
                f"**{found['ratio_equal']:.2f}** | {found['peak_share']:.0%} |"
            )
    return [
        "## SFT and reward model",
        "The starter data, the batch sizes of params.yaml. Ours by params.yaml runs all its epochs, and its later ones "
        'find the\nlower layers computed. "In full" trains every weight on both sides.',
        "\n".join(table),
    ]


def _generation(found: dict[str, Any], results: dict[str, Any]) -> list[str]:
    work, step, products, seconds = (found[name] for name in ("work", "step_ms", "products_ms", "seconds"))
    by_bytes = 1e3 * found["bytes_a_step"] / results["bandwidth_gb_s"] / 1e9
    by_flops = 1e3 * found["flop_a_step"] / results["peak_gflops"] / 1e9
    included = "" if "first_token_ms" in found else ", the prompt included"  # in results of before that was told apart
    rows = [
        "| milliseconds a step | |", "|---|---:|",
        f"| ours | {step['ours']:.0f} |",
        f"| transformers' `generate`{included} | {step['generate']:.0f} |",
        *(f"| the matrix products alone, {name} | {value:.0f} |" for name, value in products.items()),
        f"| bound by bandwidth: {found['bytes_a_step'] / 1e6:.0f} MB of weights | {by_bytes:.0f} |",
        f"| bound by operations: {found['flop_a_step'] / 1e9:.1f} GFLOP | {by_flops:.0f} |",
    ]  # fmt: skip
    return [
        "## Generation",
        f"{work['rows']} rows, {work['prompt']} prompt tokens, {work['response']} new tokens, temperature sampling.",
        "\n".join(rows),
        f"Ours takes {_spread(seconds['ours'], 2)} s, `generate` {_spread(seconds['generate'], 2)} s:\n"
        f"**{found['ratio']:.2f} times** as fast. A step takes **{found['bound_ratio']:.2f} times** the fastest "
        f"products of its shapes ({found['fastest_products']}).",
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
    table = ["| | time | memory beyond the models |", "|---|---:|---:|"]
    for name, series in found.items():
        for over, points in series.items():
            what = "rollouts" if over == "rollouts" else "response length"
            time, memory = (_told(points, over, of) for of in ("seconds", "working_gb"))
            table.append(f"| {name}, over {what} {points[0][over]} to {points[-1][over]} | {time} | {memory} |")
    return [
        "## Growth",
        "An update of the default recipe, over the number of rollouts (32 + 48 tokens each) and, with 4 rollouts, over "
        'the length\nof their responses. Exponents fitted on the logarithms; 1 is linear. "Wider" is a random model '
        "of 36 layers and width 768.",
        "![Seconds and memory of an update over rollouts and response length](images/performance-growth.png)",
        "\n".join(table),
        "No tensor of (rows, tokens, vocabulary) is ever held: logits are made for 512 tokens at a time.",
    ]


def _plot(found: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    panels = [(over, of) for over in ("rollouts", "response") for of in ("seconds", "working_gb")]
    for axis, (over, of) in zip(axes, panels, strict=True):
        for name, series in found.items():
            points = series[over]
            label = f"{name}: exponent {_told(points, over, of)}"
            axis.loglog([p[over] for p in points], [p[of] for p in points], "o-", label=label)
        axis.set_xlabel("rollouts" if over == "rollouts" else "response tokens, 4 rollouts")
        axis.set_title("seconds an update" if of == "seconds" else "GB beyond the models", fontsize=11)
        axis.grid(True, which="both", alpha=0.25)
        axis.legend(fontsize=8)
    IMAGES.mkdir(exist_ok=True)
    figure.savefig(IMAGES / "performance-growth.png", dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    write_page(json.loads(Path("benchmarks/results.json").read_text(encoding="utf-8")))
