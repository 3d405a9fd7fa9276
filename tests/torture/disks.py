"""A small file system of its own, which can be filled. Mounting one needs rights that not every machine gives."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NotPermitted(Exception):
    """Mounting is not permitted here."""


class Disk:
    def __init__(self, path: Path):
        self.path = path

    def mount(self, options: str) -> None:
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", self.path], check=True, capture_output=True)

    def change(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.path], check=True, capture_output=True)


@contextmanager
def small_disk(path: Path, options: str) -> Iterator[Disk]:
    """raises: NotPermitted"""
    path.mkdir()
    disk = Disk(path)
    try:
        disk.mount(options)
    except (OSError, subprocess.CalledProcessError) as error:
        raise NotPermitted("mounting a file system is not permitted here") from error
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)
