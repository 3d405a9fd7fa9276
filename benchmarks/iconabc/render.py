"""Fetch and render the icons of IconAbC: python benchmarks/iconabc/render.py FOLDER

The drawings come from two packages: `@iconify/json` of npm and Debian's `openclipart-svg`. Both are fetched and unpacked into
FOLDER/package and FOLDER/clipart; the result is FOLDER/icons.parquet. Folders and files that exist are kept.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import click
from plan import icon_sets

from attrdb.training.icon_sd.icons import Drawing, build, iconify_drawings, openclipart_drawings

ICONIFY = "2.2.535"  # of @iconify/json
CLIPART = "openclipart-svg"  # 1:0.18+dfsg-19 when the benchmark was made
WORKERS = 2


def fetch(folder: Path) -> tuple[Path, Path]:
    """The unpacked packages.

    raises: click.ClickException if one is missing and cannot be downloaded
    """
    icons, clipart = folder / "package", folder / "clipart"
    if not icons.exists():
        _run(folder, "npm", "pack", f"@iconify/json@{ICONIFY}")
        with tarfile.open(next(folder.glob("iconify-json-*.tgz"))) as archive:
            archive.extractall(folder, filter="data")
    if not clipart.exists():
        _run(folder, "apt-get", "download", CLIPART)
        _run(folder, "dpkg-deb", "-x", next(folder.glob(f"{CLIPART}_*.deb")).name, "clipart")
    return icons, clipart


def _run(folder: Path, *command: str) -> None:
    advice = f"fetch and unpack it by hand into {folder} (see this script's first lines)"
    if shutil.which(command[0]) is None:
        raise click.ClickException(f"{command[0]} is not installed; {advice}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}; {advice}")


def rendered(folder: Path) -> Path:
    """FOLDER/icons.parquet."""
    out = folder / "icons.parquet"
    if out.exists():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    icons, clipart = fetch(folder)

    def drawings() -> Iterator[Drawing]:
        yield from iconify_drawings(icons, icon_sets())
        yield from openclipart_drawings(clipart)

    part = out.with_suffix(".part")
    for outcome, count in build(drawings(), part, WORKERS).items():
        click.echo(f"{outcome}: {count}")
    part.replace(out)
    return out


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
def main(folder: Path) -> None:
    """Render the icons into FOLDER/icons.parquet."""
    click.echo(rendered(folder))


if __name__ == "__main__":
    main()
