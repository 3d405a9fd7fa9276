"""Which heavy packages an import loads: torch and what builds on it only where a network runs."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "lance", "duckdb", "matplotlib")
CORE = {"lance", "duckdb"}


@pytest.mark.parametrize(
    ("module", "loaded"),
    [
        ("attrdb", set()),
        ("attrdb.cli", set()),
        ("attrdb.ingest.options", set()),
        ("attrdb.database", CORE),
        ("attrdb.training.evaluate", CORE),
        ("attrdb.ingest.score", CORE),
        ("attrdb.ingest.encode.add_encoder", CORE),
        # What workers fork from: neither Lance nor DuckDB, which would not survive it.
        ("attrdb.ingest.customize.customize", {"torch", "diffusers", "transformers"}),
    ],
)
def test_heavy_packages_that_an_import_loads(module, loaded):
    program = f"import sys, {module}; print(*(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == loaded
