"""The benchmark harness, and the page made from its rows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


harness = load("benchmarks/harness.py")
docs = load("scripts/make_benchmark_docs.py")


def measure(file: Path, k: int, *, code: str, dice: float) -> bool:
    with harness.rows(file, {"k": k}, code=code) as row:
        if row is not None:
            row["dice"] = dice
        return row is not None


def test_a_row_is_measured_once_for_the_same_code(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    assert measure(file, 5, code="a", dice=0.8)
    assert not measure(file, 5, code="a", dice=0.1)
    assert measure(file, 1, code="a", dice=0.7)
    assert [(row["key"], row["dice"]) for row in harness.load(file)] == [({"k": 5}, 0.8), ({"k": 1}, 0.7)]


def test_newer_code_replaces_its_row_alone(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    for k in (1, 5):
        measure(file, k, code="a", dice=0.5)
    assert measure(file, 5, code="b", dice=0.9)
    assert [(row["code"], row["dice"]) for row in harness.load(file)] == [("a", 0.5), ("b", 0.9)]


def test_an_interrupted_measurement_leaves_the_rows_before_it(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    measure(file, 1, code="a", dice=0.5)
    before = file.read_bytes()
    with pytest.raises(KeyboardInterrupt), harness.rows(file, {"k": 5}, code="a"):
        raise KeyboardInterrupt
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_rows_say_where_they_were_measured_and_name_no_folder(tmp_path: Path) -> None:
    measure(tmp_path / "r.json", 1, code="a", dice=0.5)
    origin = harness.load(tmp_path / "r.json")[0]["provenance"]
    assert origin.keys() == {"date", "command", "commit", "machine", "versions"}
    assert origin["machine"]["cores"] >= 1
    assert str(ROOT) not in json.dumps(origin)


def test_the_code_hash_follows_every_file_and_name(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = harness.code_hash(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    second = harness.code_hash(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    assert len({first, second, harness.code_hash(tmp_path)}) == 3


def test_a_result_file_becomes_a_sorted_table(tmp_path: Path) -> None:
    for k, dice in ((20, 0.875), (5, 0.85)):
        measure(tmp_path / "some_task.json", k, code="0123456789", dice=dice)
    lines = docs.page(tmp_path).splitlines()
    assert lines[lines.index("## some task") + 2 :][:4] == [
        "| k | dice |",
        "| --- | --- |",
        "| 5 | 0.85 |",
        "| 20 | 0.875 |",
    ]
    assert any(line.startswith("Measured on ") and "code 01234567" in line for line in lines)


def test_the_benchmark_page_is_up_to_date() -> None:
    assert docs.PAGE.read_text(encoding="utf-8") == docs.page(docs.RESULTS), "run make docs"


def test_the_figures_in_the_readme_are_those_of_the_result_file() -> None:
    rows = [row for row in harness.load(docs.RESULTS / "few_label.json") if row["key"]["minutes"] == 5]
    text = docs.README.read_text(encoding="utf-8")
    assert rows
    assert text == docs.readme_with_figures(text, rows), "run make docs"


def test_the_code_hash_follows_imports_and_nothing_else(tmp_path: Path) -> None:
    root = tmp_path / "pack"
    (root / "sub").mkdir(parents=True)
    (root / "start.py").write_text("from pack.sub import used\n")
    (root / "sub" / "used.py").write_text("from pack.deep import x\n")
    (root / "deep.py").write_text("x = 1\n")
    (root / "other.py").write_text("y = 1\n")
    first = harness.code_hash(root, parts=("start.py",))
    (root / "other.py").write_text("y = 2\n")
    assert harness.code_hash(root, parts=("start.py",)) == first
    (root / "deep.py").write_text("x = 2\n")
    assert harness.code_hash(root, parts=("start.py",)) != first
