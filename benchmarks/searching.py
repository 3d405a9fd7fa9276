"""The section of RESULTS.md on searches, from what benchmarks/search.py measured."""

from __future__ import annotations

from markdown import machine, shown, table

STAGES = ("partitions", "divide", "index")  # of a build; the first was called "cells" when the stored figures were made


def section(results: dict) -> str:
    parts = ["## Searching\n"]
    for name, stored in sorted(results.items(), key=lambda item: list(SECTIONS).index(item[0].split()[0])):
        part = name.split()[0]
        sizes, limits = stored["sizes"], stored["limits"]
        rates = f"{limits['gflops']:,.0f} GFLOP/s of matrix products, {limits['read_gb_a_second']:.0f} GB/s of reading"
        text = SECTIONS[part](stored["found"], sizes, limits)
        parts.append(f"{text}\nLimits of the machine, in the same run: {rates}. {machine(stored['machine'])}")
    return "\n".join(parts)


def evaluation(results: dict, sizes: dict, limits: dict) -> str:
    memory = results["memory"]
    return (
        f"### Ranks of {results['n_queries']:,} exemplars among {sizes['rows']:,} x {sizes['dimension']}\n\n"
        + table(
            ["what", "seconds"],
            [
                ["attrdb, from disk, median (range)", shown(results["seconds"])],
                [
                    "one matrix-vector product and one argsort per query, in memory",
                    f"{results['reference_seconds']:.1f}",
                ],
            ],
        )
        + f"\nattrdb is **{results['times']:.1f} times** as fast, at {results['gflops'] / limits['gflops']:.2f} of the rate "
        f"of large matrix products. {results['n_ranks_different']} ranks differ. The process takes "
        f"{memory['before_gib']:.2f} GiB before the search and {memory['peak_gib']:.2f} GiB at its peak.\n"
    )


def exact(results: dict, sizes: dict, limits: dict) -> str:
    ways = list(dict.fromkeys(way for block in results["blocks"] for way in block["seconds"]))
    rows = [
        [
            f"{block['n_queries']:,}",
            *(shown(block["seconds"][way]) if way in block["seconds"] else "" for way in ways),
            f"{block['gflops']['attrdb, features in memory'] / limits['gflops']:.2f}",
            f"{block['agrees_with_faiss']:.4f}",
        ]
        for block in results["blocks"]
    ]
    return (
        f"### The exact first ten of {sizes['rows']:,} x {sizes['dimension']}\n\nSeconds per block of queries, median "
        f"(range). faiss holds the features in memory; loading them took {results['faiss_adding_seconds']:.1f} s.\n\n"
        + table(["queries", *ways, "share of the product rate, in memory", "same ids as faiss"], rows)
    )


def approximate(results: list[dict], sizes: dict, limits: dict) -> str:
    rows = []
    for peer in results:
        for number, row in enumerate(peer["settings"]):
            rows.append(
                [
                    peer["what"] if not number else "",
                    f"{peer['build_seconds']:.0f}" if not number else "",
                    f"{peer['bytes'] / 2**20:,.0f} + {peer['bytes_of_features'] / 2**20:,.0f}" if not number else "",
                    row["setting"],
                    f"{row['recall']:.3f}",
                    shown(row["single_ms"], 1),
                    shown(row["batch_ms"], 2),
                ]
            )
    return (
        f"### Approximate search of {sizes['rows']:,} x {sizes['dimension']}\n\nRecall@10 and milliseconds per query, for "
        "single queries and for 256 at once, median (range). attrdb and Lance read from disk, with the role as a prefilter. "
        "The others hold everything in memory and do not filter.\n\n"
        + table(["what", "build, s", "MiB: index + features", "setting", "recall@10", "single, ms", "of 256, ms"], rows)
    )


def real(results: list[dict], sizes: dict, limits: dict) -> str:
    indices = [
        [
            row["encoder_id"],
            row["kind"],
            f"{row['n_rows']:,}",
            f"{row['seconds']:.1f}",
            f"{row['n_probes']:,} of {row['n_partitions']:,}",
            str(row["oversampling"]),
            f"{row['recall']:.3f}",
        ]
        for row in results
    ]
    mappers = [
        [
            mapper["mapper_id"],
            f"{mapper['norms']:.3f}",
            *(f"{mapper['recall_at_the_third'][way]:.3f}" for way in ("plain", "tilted")),
            *_settings(mapper),
        ]
        for row in results
        for mapper in row["mappers"]
    ]
    return (
        "### Indices of IconAbC's features\n\nBuilt with the settings that attrdb chooses; recall@10 against an exact "
        "search, of 200 samples.\n\n"
        + table(["features", "kind", "rows", "build, s", "probes", "hits per answer", "recall@10"], indices)
        + "\nTheir mappers, folded into the query: how uneven n(x) is; recall@10 with twice the probes and four times the "
        "hits of the encoder, without and with the norm correction; the settings that attrdb chose.\n\n"
        + table(
            ["mapper", "std(n) / mean(n)", "without", "with", "chosen: probes", "hits per answer", "recall@10"], mappers
        )
    )


def _settings(measured: dict) -> list[str]:
    """Of a mapper's search: cells, hits, and recall."""
    if not measured["used"]:
        return ["exact", "", f"({measured['recall']:.3f} by index)"]
    return [f"{measured['n_probes']:,}", str(measured["oversampling"]), f"{measured['recall']:.3f}"]


def folding(results: list[dict], sizes: dict, limits: dict) -> str:
    rows = []
    for row in results:
        column, folded = row["column"], row["folded"]
        takes = f"{column['storing_seconds'] + column['build_seconds']:.0f} s, {column['bytes'] / 2**20:,.0f} MiB"
        cells = [[f"{way['n_probes']:,}", str(way["oversampling"])] for way in (column, folded)]
        rows.append([f"{row['norms']:.3f}", "its own column", takes, *cells[0], *_search_cells(column)])
        measuring = f"{folded['measuring_seconds']:.0f} s"
        how = "folded into the query" if folded["used"] else "all candidates compared"
        rows.append(["", how, measuring, *(cells[1] if folded["used"] else ["", ""]), *_search_cells(folded)])
    return (
        f"### Mappers, folded or materialised, {sizes['rows']:,} x {sizes['dimension']}\n\nA column of mapped features is "
        "stored and indexed for each mapper; a folded mapper is measured once. Both use the settings that attrdb chose.\n\n"
        + table(
            [
                "std(n) / mean(n)",
                "what",
                "takes",
                "probes",
                "hits per answer",
                "recall@10",
                "single, ms",
                "of 256, ms",
            ],
            rows,
        )
    )


def growth(results: list[dict], sizes: dict, limits: dict) -> str:
    rows = [
        [
            f"{row['rows']:,}",
            f"{row['seconds']:.1f}" if "seconds" in row else "no index",
            f"{row['n_probes']:,} of {row['n_partitions']:,}" if "seconds" in row else "",
            f"{row['bytes'] / 2**20:,.0f}" if "seconds" in row else "",
            *_search_cells(row),
        ]
        for row in results
    ]
    return "### As the gallery grows\n\n" + table(
        ["rows", "build, s", "probes", "index, MiB", "recall@10", "single, ms", "of 256, ms"], rows
    )


def later(results: list[dict], sizes: dict, limits: dict) -> str:
    rows = [[f"{row['appended']:.0%}", *_search_cells(row)] for row in results]
    return f"### Rows appended after the index was built, {sizes['rows']:,} before\n\n" + table(
        ["appended", "recall@10", "single, ms", "of 256, ms"], rows
    )


def predicates(results: list[dict], sizes: dict, limits: dict) -> str:
    rows = [[f"{row['kept']} %", f"{row['n_candidates']:,}", *_search_cells(row)] for row in results]
    return f"### With a predicate, {sizes['rows']:,} rows\n\n" + table(
        ["kept", "candidates", "recall@10", "single, ms", "of 256, ms"], rows
    )


def accelerator(results: dict, sizes: dict, limits: dict) -> str:
    ways = list(dict.fromkeys(way for row in results["ranks"] for way in row["seconds"]))
    peak = results["limits"]
    ranks = [
        [
            row["given"],
            f"{row['n_queries']:,}",
            *(shown(row["seconds"][way], 3) if way in row["seconds"] else "" for way in ways),
            f"{row['tflops'] / peak['tf32']:.2f}",
            *(str(row.get(f"n_ranks_different{product}", "")) for product in ("", "_float32", "_tf32")),
        ]
        for row in results["ranks"]
    ]
    builds = [
        [
            row.get("what", "attrdb"),
            row["device"],
            f"{row['seconds']:.1f}",
            *(
                f"{row['stages'].get(stage, row['stages'].get('cells')):.1f}" if "stages" in row else ""
                for stage in STAGES
            ),
            f"{row['recall']:.3f}" if "recall" in row else "",
        ]
        for row in results["builds"]
    ]
    products = ", ".join(f"{name} {rate:,.0f}" for name, rate in peak.items())
    return (
        f"### On an accelerator, {sizes['rows']:,} x {sizes['dimension']}\n\n{results['gpu']}; large matrix products, in "
        f"TFLOP/s: {products}. Seconds for ranks of one exemplar per query, median (range); number of ranks that differ "
        "from the CPU's, and that would differ if a product in float32 or TF32 decided.\n\n"
        + table(["exemplar", "queries", *ways, "share of TF32", "differ", "by float32", "by TF32"], ranks)
        + "\nSeconds to build an index. Lance does the last stage, on the CPU.\n\n"
        + table(["what", "device", "total", "partitions", "assigning", "Lance's part", "recall@10"], builds)
    )


def _search_cells(row: dict) -> list[str]:
    return [f"{row['recall']:.3f}", shown(row["single_ms"], 1), shown(row["batch_ms"], 2)]


SECTIONS = {
    "evaluation": evaluation,
    "exact": exact,
    "ann": approximate,
    "real": real,
    "folding": folding,
    "growth": growth,
    "later": later,
    "predicates": predicates,
    "accelerator": accelerator,
}
