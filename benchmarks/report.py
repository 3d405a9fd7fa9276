"""Writes benchmarks/RESULTS.md from the figures in benchmarks/results: python benchmarks/report.py"""

from __future__ import annotations

import json
from pathlib import Path

import attribution
import searching
import truth
from markdown import machine, shown, table

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def importing(results: dict) -> str:
    sizes = results["sizes"]
    says = {
        "lance": "`lance.write_dataset` on the same Arrow stream",
        "attrdb": "`attrdb ingest corpus`",
        "again": "the same command again, with nothing left to do",
        "read": "only reading and converting (part of the first two)",
    }
    rows = [[says[way], shown(results["seconds"][way]), f"{results['peak_gib'][way]:.2f}"] for way in says]
    return (
        f"## Importing embeddings\n\n{sizes['rows']:,} x {sizes['dimension']}, float16, {sizes['shards']} shards; "
        f"seed {results['seed']}, {results['ratio']['n']} rounds, each run in its own process. "
        f"{machine(results['machine'])}\n"
        + table(["what", "seconds, median (range)", "peak memory, GiB"], rows)
        + f"\nRatio attrdb / lance per round: **{shown(results['ratio'])}**. Required: at most 1.5, and less than 1.5 GiB.\n"
    )


def appending(results: dict) -> str:
    sizes, every = results["sizes"], results["optimize_every"]
    head = [
        "milliseconds, median (range)",
        "first tenth",
        "last tenth, not optimized",
        f"last tenth, optimized every {every}",
    ]
    rows = [
        [
            name,
            shown(results["first_tenth"]["left alone"][name], 0, 1000),
            shown(results["last_tenth"]["left alone"][name], 0, 1000),
            shown(results["last_tenth"]["optimized"][name], 0, 1000),
        ]
        for name in results["first_tenth"]["left alone"]
    ]
    rounds = [
        [
            str(row["after_appends"]),
            f"{row['seconds']:.1f}",
            " -> ".join(f"{n:,}" for n in row["fragments"]),
            " -> ".join(f"{n:,}" for n in row["n_unindexed"]),
            " -> ".join(f"{n / 2**20:,.0f}" for n in row["bytes"]),
        ]
        for row in results["optimize_rounds"]
        if row["after_appends"]
    ]
    left = results["tables"]["left alone"]
    return (
        f"## Appending models\n\n{sizes['models']} models of {sizes['images_a_model']} images each, appended to "
        f"{sizes['rows']:,} x {sizes['dimension']}; seed {results['seed']}. The next SQL statement sees a new model, "
        f"and no index is rebuilt. {machine(results['machine'])}\n"
        + table(head, rows)
        + f"\nWithout optimize, the table images has {left['fragments']:,} fragments and {left['versions_kept']:,} versions "
        + "at the end.\n\n"
        + table(
            ["optimize after appends", "seconds", "fragments", "rows not indexed", "MiB, old versions kept"], rounds
        )
    )


def encoding(results: dict) -> str:
    rows = [
        [
            f"`{row['encoder']}`",
            f"{row['images']} x {row['bytes_a_picture'] / 1024:.1f} KiB",
            shown(row["images_a_second"]["bare"], 1),
            shown(row["images_a_second"]["stream"], 1),
            shown(row["ratio"]),
            f"{row['processor_ratio']:.2f}",
            f"{row['bound_on_cpu']:.2f}",
        ]
        for row in results["results"]
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
        f"{results['rounds']} rounds, seed {results['seed']}. The bound is the highest possible ratio if reading and network "
        "share the cores. "
        f"{machine(results['machine'])}\n" + table(head, rows)
    )


def customizing(results: dict) -> str:
    ways = {
        "attrdb": "`attrdb ingest model`, precision auto",
        "attrdb, float32": "the same, float32",
        "peer": "plain loop, float32",
    }
    seconds = ("seconds", "customize_seconds", "synthesize_seconds", "processor_seconds")
    runs = [
        [says, *(shown(results[way][what], 1) for what in seconds), f"{results[way]['peak_gib']['max']:.2f}"]
        for way, says in ways.items()
    ]
    ratios = [
        [ways[way], *(shown(results[f"{what}, peer / {way}"]) for what in ("seconds", "processor_seconds"))]
        for way in list(ways)[:2]
    ]
    n_samples = round(results["attrdb"]["n_samples"]["median"])
    return (
        f"## Customizing\n\nOne model of {results['base_model']}: {results['steps']} steps of batch {results['batch']}, "
        f"{n_samples} samples, features, one append; {results['attrdb']['seconds']['n']} rounds, each run in its own "
        "process, seed 0. The plain loop is written like public training scripts, with unmodified diffusers: data "
        "set, autoencoder and text encoder run in every step, and samples are generated one prompt at a time. "
        f"{results['threads']} threads. "
        f"{machine(results['machine'])}\n"
        + table(["what", "seconds", "training", "sampling", "processor seconds", "peak memory, GiB"], runs)
        + "\n"
        + table(["plain loop / attrdb per round; required: at least 1.5", "seconds", "processor seconds"], ratios)
        + "\n"
        + closely(results)
    )


def closely(results: dict) -> str:
    """What a step and a sample take, per method."""
    rows = [
        [
            f"`{row['method']}`" + (", gradient checkpointing" if row["gradient_checkpointing"] else ""),
            row["precision"],
            f"{row['steps_a_second']:.3g}",
            f"{row['customize_seconds']:.1f}",
            f"{row['training_share']:.2f}",
            f"{row['samples_a_second']:.3g}",
            f"{row['sampling_share']:.2f}",
            f"{row['memory_before_gib']:.2f} -> {row['memory_gib']:.2f}",
            f"{row['delta_mb']:.1f}",
        ]
        for row in results["methods"]
    ]
    first, kept = results["methods"][0], results["kept_gib_a_picture"]
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
        f"{first['steps']} steps of batch {first['batch']}, and {first['sample_batch']} samples of {first['solver_steps']} "
        f"solver steps with guidance, {first['resolution']} pixels per side, on {results['device']}. Shares are relative to "
        f"the rate of large matrix products there in the same precision, {first['peak_gflops']:,.0f} GFLOP/s in the first "
        "row. Memory is "
        "that of the process, after loading and at the peak of training.\n\n"
        + table(head, rows)
        + f"\nA training step keeps {kept['plain']:.2g} GiB per image for the backward pass in {kept['precision']}, and "
        f"{kept['gradient checkpointing']:.2g} GiB with gradient checkpointing.\n"
    )


def sd15(results: dict) -> str:
    return (
        "## Stable Diffusion 1.5's shape\n\nThe architecture of SD 1.5 with random weights, to measure time and memory only. "
        "No accelerator was available: these figures are for a CPU, at a smaller batch, and do not apply to a GPU. "
        f"{machine(results['machine'])}\n{closely(results)}"
    )


def quality(results: dict) -> str:
    def with_interval(figure: dict) -> str:
        return f"{figure['mean']:.3f} ({figure['interval'][0]:.3f} to {figure['interval'][1]:.3f})"

    rows = [
        [kind, str(of_kind["n_models"]), f"{of_kind['n_samples']:,}"]
        + [with_interval(of_kind[what]) for what in ("customized", "base", "difference")]
        + [f"{of_kind['chance']:.3f}"]
        for kind, of_kind in results["kinds"].items()
    ]
    n_gallery = results["n_gallery"]
    head = ["kind", "models", "samples", "customized", "base model, same prompts", "difference", "chance"]
    return (
        "## Quality of customization\n\nThe share of samples whose nearest exemplar belongs to their own model, among the "
        f"{n_gallery} exemplars of all models, by {results['encoder']}. {results['base_model']}, with the settings of its "
        "profile, on the models of IconAbC. Mean over models, with the 95 % interval of a bootstrap over models. "
        f"The base model used the same prompts without the token, and the same seeds. {machine(results['machine'])}\n"
        + table(head, rows)
    )


def training(results: dict) -> str:
    sizes, seconds = results["sizes"], results["seconds"]
    says = {
        "loader": "only the loader: the query of an epoch's pairs, and gathering their features",
        "step": "only the step, on one preloaded batch",
        "together": "together, as `attrdb train` does it",
    }
    rows = [[says[way], shown(of, 0)] for way, of in results["rates"].items()]
    return (
        f"## Reading pairs for training\n\n{sizes['pairs']:,} pairs of {sizes['models']:,} models, {sizes['dimension']}-d, "
        f"batches of {sizes['batch']:,}. Once per run, features are gathered into one file ({seconds['prepare']:.1f} s). "
        f"One query draws and orders the pairs of an epoch ({seconds['query']:.1f} s). {machine(results['machine'])}\n"
        + table(["what", "pairs per second, median (range)"], rows)
        + f"\nTogether / the slower of the two, per round: **{shown(results['ratio'])}**. Required: 0.8. Peak memory "
        f"{results['peak_gib']:.2f} GiB.\n"
    )


# The section of each file of figures, and the command that measures them.
def torture(results: dict) -> str:
    """The campaign of tests/torture."""
    rows, wrong = [], []
    for name, part in results.items():
        if name == "machine":
            continue
        n = sum(part["groups"].values())
        trials = ", ".join(f"{group} {count:,}" for group, count in part["groups"].items())
        figures = (f"{n:,}", str(part["n_wrong"]), f"{part['share']:g}", f"{part['seconds']:,}", str(part["seed"]))
        rows.append([name, part["not_run"] or trials, *figures])
        for trial in part["wrong"]:
            problem = trial["problems"][0].strip().splitlines()[-1]
            wrong.append(f"- {name}, {trial['group']}: `{trial['what'].strip()}`: {problem[:200]}")
    return (
        "## The campaign\n\nEvery command is disturbed, given again, and compared with an undisturbed run: rows lost or "
        "doubled, half a model shown, tracebacks, wrong answers. Seconds are of a machine that did other things too. "
        f"{machine(results['machine'])}\n"
        + table(["part", "trials", "in all", "with problems", "share of the whole", "seconds", "seed"], rows)
        + ("\nWhat was wrong:\n\n" + "\n".join(wrong) + "\n" if wrong else "")
    )


def monitoring(results: dict) -> str:
    rows = [
        [
            f"`{row['method']}`",
            str(row["n_images"]),
            f"{row['milliseconds']:.0f}",
            *(shown(row["ratios"][level]) for level in ("steps", "changes", "probes")),
        ]
        for row in results["cost"]
    ]
    found = results["answers"]
    return (
        f"## Monitoring\n\n{results['base_model']}, batch 8, {results['steps']} steps, one thread. Four customizations, "
        "one at each level, take their steps in turn: seconds over those without monitoring, median (range) over ten "
        f"parts of the steps. Required: `changes` at most 1.10, `probes` at most 1.20. {machine(results['machine'])}\n"
        + table(["method", "exemplars", "milliseconds a step", "steps", "changes", "probes"], rows)
        + f"\nThe attribution table of one of {found['n_models']:,} models: {shown(found['one model'], 1, 1000)} ms "
        f"(required: 20). A sum over {found['n_rows']:,} rows of changes, by model: {shown(found['all rows'], 0, 1000)} ms "
        "(required: 1,000).\n"
    )


SECTIONS = {
    "importing": (importing, "benchmarks/importing.py --json importing.json"),
    "appending": (appending, "benchmarks/appending.py --json appending.json"),
    "encoding": (encoding, "benchmarks/encoding.py --json encoding.json"),
    "customizing": (customizing, "benchmarks/customize.py --json customizing.json"),
    "sd15": (sd15, "benchmarks/shapes.py --shape sd15 --steps 250 --json sd15.json"),
    "quality": (quality, "benchmarks/quality.py iconabc.attrdb --models 30 --json quality.json"),
    "monitoring": (monitoring, "benchmarks/monitoring.py --json monitoring.json"),
    "training": (training, "benchmarks/training.py --json training.json"),
    "search": (searching.section, "benchmarks/search.py PART ... --json search.json"),
    "iconabc": (attribution.section, "benchmarks/iconabc/run.py runs/iconabc --json benchmarks/results/iconabc.json"),
    "removals": (truth.section, "benchmarks/removals/run.py figures runs/removals --json removals.json"),
    "torture": (torture, "-m torture --folder ../runs/torture --json ../benchmarks/results/torture.json"),
}


NOT_RUN = {"iconabc": attribution.NOT_RUN}  # the section, where there is no file yet


def page() -> str:
    parts = ["# Results\n\nGenerated by `python benchmarks/report.py` from benchmarks/results; do not edit.\n"]
    for name, (section, command) in SECTIONS.items():
        file = RESULTS / f"{name}.json"
        if file.exists():
            parts.append(f"{section(json.loads(file.read_text()))}\nTo rerun: `python {command}`\n")
        elif name in NOT_RUN:
            parts.append(f"{NOT_RUN[name]}\nTo run: `python {command}`\n")
    return "\n".join(parts)


if __name__ == "__main__":
    if (RESULTS / "iconabc.json").exists():
        attribution.write_plots(json.loads((RESULTS / "iconabc.json").read_text()))
    (HERE / "RESULTS.md").write_text(page(), encoding="utf-8")
