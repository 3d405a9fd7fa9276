"""Writes benchmarks/RESULTS.md from the figures in benchmarks/results: python benchmarks/report.py"""

from __future__ import annotations

import json
from pathlib import Path

import attribution
import searching
from markdown import machine, shown, table

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def importing(found: dict) -> str:
    sizes = found["sizes"]
    says = {
        "lance": "`lance.write_dataset` on the same Arrow stream",
        "attrdb": "`attrdb ingest corpus`",
        "again": "the same command again, with nothing left to do",
        "read": "only reading and converting (part of the first two)",
    }
    rows = [[says[way], shown(found["seconds"][way]), f"{found['peak_gib'][way]:.2f}"] for way in says]
    return (
        f"## Importing embeddings\n\n{sizes['rows']:,} x {sizes['dimension']}, float16, {sizes['shards']} shards; "
        f"seed {found['seed']}, {found['ratio']['n']} rounds, each run in its own process. {machine(found['machine'])}\n"
        + table(["what", "seconds, median (range)", "peak memory, GiB"], rows)
        + f"\nRatio attrdb / lance per round: **{shown(found['ratio'])}**. Required: at most 1.5, and less than 1.5 GiB.\n"
    )


def appending(found: dict) -> str:
    sizes, every = found["sizes"], found["optimize_every"]
    head = [
        "milliseconds, median (range)",
        "first tenth",
        "last tenth, not optimized",
        f"last tenth, optimized every {every}",
    ]
    rows = [
        [
            name,
            shown(found["first_tenth"]["left alone"][name], 0, 1000),
            shown(found["last_tenth"]["left alone"][name], 0, 1000),
            shown(found["last_tenth"]["optimized"][name], 0, 1000),
        ]
        for name in found["first_tenth"]["left alone"]
    ]
    rounds = [
        [
            str(one["after_appends"]),
            f"{one['seconds']:.1f}",
            " -> ".join(f"{n:,}" for n in one["fragments"]),
            " -> ".join(f"{n:,}" for n in one["n_unindexed"]),
            " -> ".join(f"{n / 2**20:,.0f}" for n in one["bytes"]),
        ]
        for one in found["optimize_rounds"]
        if one["after_appends"]
    ]
    left = found["tables"]["left alone"]
    return (
        f"## Appending models\n\n{sizes['models']} models of {sizes['images_a_model']} images each, appended to "
        f"{sizes['rows']:,} x {sizes['dimension']}; seed {found['seed']}. The next SQL statement sees a new model, "
        f"and no index is rebuilt. {machine(found['machine'])}\n"
        + table(head, rows)
        + f"\nWithout optimize, the table images has {left['fragments']:,} fragments and {left['versions_kept']:,} versions "
        + "at the end.\n\n"
        + table(
            ["optimize after appends", "seconds", "fragments", "rows not indexed", "MiB, old versions kept"], rounds
        )
    )


def encoding(found: dict) -> str:
    rows = [
        [
            f"`{one['encoder']}`",
            f"{one['images']} x {one['bytes_a_picture'] / 1024:.1f} KiB",
            shown(one["images_a_second"]["bare"], 1),
            shown(one["images_a_second"]["stream"], 1),
            shown(one["ratio"]),
            f"{one['processor_ratio']:.2f}",
            f"{one['bound_on_cpu']:.2f}",
        ]
        for one in found["results"]
    ]
    head = [
        "encoder",
        "pictures",
        "network alone, images/s",
        "whole stream, images/s",
        "ratio",
        "ratio of processor time",
        "bound",
    ]
    return (
        f"## Encoding\n\nFrom encoded bytes to features, compared with the network alone on preloaded batches; "
        f"{found['rounds']} rounds, seed {found['seed']}. The bound is the highest possible ratio if reading and network "
        "share the cores. "
        f"{machine(found['machine'])}\n" + table(head, rows)
    )


def customizing(found: dict) -> str:
    ways = {
        "attrdb": "`attrdb ingest model`, precision auto",
        "attrdb, float32": "the same, float32",
        "peer": "plain loop, float32",
    }
    seconds = ("seconds", "customize_seconds", "synthesize_seconds", "processor_seconds")
    runs = [
        [says, *(shown(found[way][what], 1) for what in seconds), f"{found[way]['peak_gib']['max']:.2f}"]
        for way, says in ways.items()
    ]
    ratios = [
        [ways[way], *(shown(found[f"{what}, peer / {way}"]) for what in ("seconds", "processor_seconds"))]
        for way in list(ways)[:2]
    ]
    n_samples = round(found["attrdb"]["n_samples"]["median"])
    return (
        f"## Customizing\n\nOne model of icon-sd: {found['steps']} steps of batch {found['batch']}, {n_samples} samples, "
        f"features, one append; {found['attrdb']['seconds']['n']} rounds, each run in its own process, seed 0. The plain "
        "loop is written like public training scripts, with unmodified diffusers: data set, autoencoder and text encoder "
        f"run in every step, and samples are generated one prompt at a time. {found['threads']} threads. "
        f"{machine(found['machine'])}\n"
        + table(["what", "seconds", "training", "sampling", "processor seconds", "peak memory, GiB"], runs)
        + "\n"
        + table(["plain loop / attrdb per round; required: at least 1.5", "seconds", "processor seconds"], ratios)
        + "\n"
        + closely(found)
    )


def closely(found: dict) -> str:
    """What a step and a sample take, per method."""
    rows = [
        [
            f"`{one['method']}`" + (", gradient checkpointing" if one["gradient_checkpointing"] else ""),
            one["precision"],
            f"{one['steps_a_second']:.3g}",
            f"{one['customize_seconds']:.1f}",
            f"{one['training_share']:.2f}",
            f"{one['samples_a_second']:.3g}",
            f"{one['sampling_share']:.2f}",
            f"{one['memory_before_gib']:.2f} -> {one['memory_gib']:.2f}",
            f"{one['delta_mb']:.1f}",
        ]
        for one in found["methods"]
    ]
    one, kept = found["methods"][0], found["kept_gib_a_picture"]
    head = [
        "method",
        "precision",
        "steps/s",
        "seconds",
        "share of peak",
        "samples/s",
        "share of peak",
        "memory, GiB",
        "delta, MB",
    ]
    return (
        f"{one['steps']} steps of batch {one['batch']}, and {one['sample_batch']} samples of {one['solver_steps']} solver "
        f"steps with guidance, {one['resolution']} pixels per side, on {found['device']}. Shares are relative to the rate of "
        f"large matrix products there in the same precision, {one['peak_gflops']:,.0f} GFLOP/s in the first row. Memory is "
        "that of the process, after loading and at the peak of training.\n\n"
        + table(head, rows)
        + f"\nA training step keeps {kept['plain']:.2g} GiB per image for the backward pass in {kept['precision']}, and "
        f"{kept['gradient checkpointing']:.2g} GiB with gradient checkpointing.\n"
    )


def sd15(found: dict) -> str:
    return (
        "## Stable Diffusion 1.5's shape\n\nThe architecture of SD 1.5 with random weights, to measure time and memory only. "
        "No accelerator was available: these figures are for a CPU, at a smaller batch, and do not apply to a GPU. "
        f"{machine(found['machine'])}\n{closely(found)}"
    )


def quality(found: dict) -> str:
    def with_interval(one: dict) -> str:
        return f"{one['mean']:.3f} ({one['interval'][0]:.3f} to {one['interval'][1]:.3f})"

    rows = [
        [kind, str(of_kind["n_models"]), f"{of_kind['n_samples']:,}"]
        + [with_interval(of_kind[what]) for what in ("customized", "base", "difference")]
        + [f"{of_kind['chance']:.3f}"]
        for kind, of_kind in found["kinds"].items()
    ]
    n_gallery = found["n_gallery"]
    head = ["kind", "models", "samples", "customized", "base model, same prompts", "difference", "chance"]
    return (
        "## Quality of customization\n\nThe share of samples whose nearest exemplar belongs to their own model, among the "
        f"{n_gallery} exemplars of all models, by {found['encoder']}. icon-sd with the settings of its profile, on the "
        "models of IconAbC. Mean over models, with the 95 % interval of a bootstrap over models. The base model used the "
        f"same prompts without the token, and the same seeds. {machine(found['machine'])}\n" + table(head, rows)
    )


def training(found: dict) -> str:
    sizes, seconds = found["sizes"], found["seconds"]
    says = {
        "loader": "only the loader: the query of an epoch's pairs, and gathering their features",
        "step": "only the step, on one preloaded batch",
        "together": "together, as `attrdb train` does it",
    }
    rows = [[says[way], shown(of, 0)] for way, of in found["rates"].items()]
    return (
        f"## Reading pairs for training\n\n{sizes['pairs']:,} pairs of {sizes['models']:,} models, {sizes['dimension']}-d, "
        f"batches of {sizes['batch']:,}. Once per run, features are gathered into one file ({seconds['prepare']:.1f} s). "
        f"One query draws and orders the pairs of an epoch ({seconds['query']:.1f} s). {machine(found['machine'])}\n"
        + table(["what", "pairs per second, median (range)"], rows)
        + f"\nTogether / the slower of the two, per round: **{shown(found['ratio'])}**. Required: 0.8. Peak memory "
        f"{found['peak_gib']:.2f} GiB.\n"
    )


# The section of each file of figures, and the command that measures them.
SECTIONS = {
    "importing": (importing, "benchmarks/importing.py --json importing.json"),
    "appending": (appending, "benchmarks/appending.py --json appending.json"),
    "encoding": (encoding, "benchmarks/encoding.py --json encoding.json"),
    "customizing": (customizing, "benchmarks/customize.py --json customizing.json"),
    "sd15": (sd15, "benchmarks/shapes.py --shape sd15 --steps 250 --json sd15.json"),
    "quality": (quality, "benchmarks/quality.py iconabc.attrdb --models 30 --json quality.json"),
    "training": (training, "benchmarks/training.py --json training.json"),
    "search": (searching.section, "benchmarks/search.py PART ... --json search.json"),
    "iconabc": (attribution.section, "benchmarks/iconabc/run.py runs/iconabc --json iconabc.json"),
}


def page() -> str:
    parts = ["# Results\n\nGenerated by `python benchmarks/report.py` from benchmarks/results; do not edit.\n"]
    for name, (section, command) in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            parts.append(f"{section(json.loads(file.read_text()))}\nTo rerun: `python {command}`\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if (RESULTS / "iconabc.json").exists():
        attribution.write_plots(json.loads((RESULTS / "iconabc.json").read_text()))
    (HERE / "RESULTS.md").write_text(page(), encoding="utf-8")
