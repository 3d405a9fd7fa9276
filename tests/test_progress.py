"""Every job reports in one form."""

import ast

from conftest import docs_script

from attrdb.progress import counted

architecture = docs_script("architecture")


def test_every_job_takes_one_form_of_progress():
    """A parameter `report` is a `Progress`, and its default is to report nothing."""
    annotations, defaults = [], []
    for file in architecture.modules().values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                positional = [*node.args.posonlyargs, *node.args.args]
                unset = [None] * (len(positional) - len(node.args.defaults))
                pairs = [
                    *zip(positional, [*unset, *node.args.defaults], strict=True),
                    *zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True),
                ]
                for parameter, default in pairs:
                    if parameter.arg in ("report", "progress"):
                        annotations.append((file.name, node.name, ast.unparse(parameter.annotation)))
                        defaults += [(file.name, node.name, ast.unparse(default))] if default else []
    assert len(annotations) > 20
    assert [found for found in annotations if found[2] != "Progress"] == []
    assert [found for found in defaults if found[2] != "no_progress"] == []


def test_counted_reports_the_sum():
    reported = []
    add = counted(lambda *units: reported.append(units), "encode", 7)
    for n in (0, 3, 4):
        add(n)
    assert reported == [("encode", 0, 7), ("encode", 3, 7), ("encode", 7, 7)]
