"""The house rules, read off the source: floors, documented signatures, sizes, names, nothing unsafe."""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "fewscan"
PACKAGE = sorted(SRC.rglob("*.py"))
PYTHON = [
    *PACKAGE,
    *(p for folder in ("tests", "benchmarks", "scripts") for p in sorted((ROOT / folder).rglob("*.py"))),
]

FLOORS = {
    "errors": 0,
    "quantity": 0,
    "space": 1,
    "data": 2,
    "learn": 3,
    "judge": 4,
    "naming": 4,
    "tracts": 5,
    "methods": 6,
    "deliver": 7,
    "drafting": 8,
    "prediction": 8,
    "recording": 8,
    "registration": 8,
    "rows": 8,
    "surroundings": 8,
    "training": 8,
    "white_matter": 8,
    "personalization": 9,
    "exporting": 10,
    "meshing": 10,
    "reporting": 10,
    "api": 11,
    "runs": 12,
    "shifting": 12,
    "transferring": 12,
    "forecasting": 13,
    "options": 13,
    "progress": 13,
    "suggesting": 13,
    "tables": 13,
    "cli_export": 14,
    "cli_mesh": 14,
    "cli_registration": 14,
    "cli_scores": 14,
    "cli_suggest": 14,
    "cli_tracts": 14,
    "cli_transfer": 14,
    "cli_view": 14,
    "cli": 15,
    "__main__": 16,
}
LINES_OF_FUNCTION, LINES_OF_MODULE, ARGUMENTS, POSITIONAL = 60, 400, 8, 2
MORE_ARGUMENTS = {  # "module:function": reason
    "api:train": "mirrors the flags of the verb",
    "meshing:mesh": "mirrors the flags of the verb",
    "personalization:personalize": "mirrors the flags of the verb",
    "prediction:predict": "mirrors the flags of the verb",
    "registration:register": "mirrors the flags of the verb",
    "runs:crossval": "mirrors the flags of the verb",
    "suggesting:suggest": "mirrors the flags of the verb",
    "transferring:transfer": "mirrors the flags of the verb",
}
MORE_POSITIONAL = {
    "personalization:personalize": "as predict",
    "prediction:predict": "model, what and where, in the order of the command line",
    "registration:register": "fixed, moving and where, in the order of the command line",
    "shifting:shift": "model, source, target and where, in the order of the command line",
    "transferring:transfer": "model, data and where, in the order of the command line",
}
LONGER: dict[str, str] = {  # "module" or "module:function": reason
    "benchmarks.peers.nnunet:main": "runs in the peer's own environment, top to bottom, without fewscan",
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "misc", "base", "common", "legacy"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NETWORK = {"requests", "urllib", "urllib3", "socket", "http", "httpx", "aiohttp", "ftplib", "smtplib", "ssl"}
LISTENS = {"deliver.serve": {"http"}}  # to this machine alone, when a user asks for it
OLDEST = (3, 10)  # Python of pyproject.toml, as which everything is parsed
NEWER = {  # than that, which linters and types do not see
    "asyncio.TaskGroup", "contextlib.chdir", "datetime.UTC", "enum.StrEnum", "hashlib.file_digest", "itertools.batched",
    "math.cbrt", "math.exp2", "math.sumprod", "tomllib", "typing.LiteralString", "typing.Never", "typing.NotRequired",
    "typing.Required", "typing.Self", "typing.TypeVarTuple", "typing.Unpack", "typing.assert_never",
    "typing.assert_type", "typing.override", "typing.reveal_type", "BaseExceptionGroup", "ExceptionGroup",
}  # fmt: skip
HEAVY = {"torch", "monai", "numpy", "scipy", "SimpleITK", "nibabel", "matplotlib", "pydicom", "PIL"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), feature_version=OLDEST)


def module_name(path: Path) -> str:
    """Dotted, without the package's own name: "space.geometry"; other folders keep theirs."""
    inside = path.relative_to(SRC if path.is_relative_to(SRC) else ROOT).with_suffix("")
    return ".".join(part for part in inside.parts if part != "__init__")


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, Function):
            yield f"{module_name(path)}:{node.name}", node


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, relative ones resolved, wherever the statement stands."""
    package = path.relative_to(SRC.parent).parent.parts if path.is_relative_to(SRC) else ()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{start}.{alias.name}" for alias in node.names)


def arguments(node: Function) -> tuple[list[str], list[str]]:
    """Names of the positional and of all parameters, without self; stars as a signature writes them."""
    positional = [a.arg for a in [*node.args.posonlyargs, *node.args.args] if a.arg not in ("self", "cls")]
    extra = [f"*{node.args.vararg.arg}"] if node.args.vararg else []
    keyword = [a.arg for a in node.args.kwonlyargs]
    return positional, positional + extra + keyword + ([f"**{node.args.kwarg.arg}"] if node.args.kwarg else [])


def fields(node: ast.ClassDef) -> list[str]:
    """What a class is made from: its fields where it is a dataclass or a named tuple, else what ``__init__`` takes."""
    marks = {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list}
    bases = {ast.unparse(b).split(".")[-1] for b in node.bases}
    if "dataclass" in marks or "NamedTuple" in bases:
        rows = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
        made = [n for n in rows if "ClassVar" not in ast.unparse(n.annotation) and "init=False" not in ast.unparse(n)]
        return [ast.unparse(n.target) for n in made]
    starts = [n for n in node.body if isinstance(n, Function) and n.name == "__init__"]
    return arguments(starts[0])[1] if starts else []


def parameters_section(node: Function | ast.ClassDef) -> str:
    text = ast.get_docstring(node) or ""
    match = re.search(r"^Parameters\n-+\n(.*?)(?=^\w[\w ]*\n-{3,}$|\Z)", text, re.M | re.S)
    return match[1] if match else ""


def documented(node: Function | ast.ClassDef) -> list[str]:
    heads = re.findall(r"^([*\w][*\w, ]*?) : ", parameters_section(node), re.M)
    return [name.strip() for head in heads for name in head.split(",")]


def is_verb(node: Function) -> bool:
    """Whether the command line documents it by the help of its options."""
    return any("command" in ast.unparse(d) or "callback" in ast.unparse(d) for d in node.decorator_list)


def public(path: Path) -> Iterator[tuple[str, Function | ast.ClassDef, list[str]]]:
    """Public functions and classes at the top of a file, and the parameters they must document."""
    for node in tree(path).body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            yield node.name, node, fields(node)
        elif not is_verb(node):
            yield node.name, node, arguments(node)[1]


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_imports_only_go_down(path: Path) -> None:
    own = module_name(path).split(".")[0]
    if not own:  # the package's own list of public names may reach any floor
        return
    wanted = [name.split(".")[1] for name in imports(path) if name.startswith("fewscan.")]
    unknown = {own, *wanted} - FLOORS.keys()
    assert not unknown, f"{unknown} have no floor in FLOORS"
    assert not [name for name in wanted if FLOORS[name] > FLOORS[own]]


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_documented_parameters_are_those_of_the_signature(path: Path) -> None:
    drifted = {name: (documented(n), wanted) for name, n, wanted in public(path) if documented(n) != wanted}
    assert not drifted, "documented, in the signature: " + str(drifted)


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_parameter_docs_repeat_no_default(path: Path) -> None:
    told = {n: parameters_section(node) for n, node, _ in public(path)}
    assert not [n for n, text in told.items() if re.search(r"\bdefaults? (to|is|of)\b|\(default|by default", text)]


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_everything_public_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(tree(path)), "the module has no docstring"
    assert not [name for name, node, _ in public(path) if not ast.get_docstring(node)]


def test_public_names_are_listed_sorted_and_resolve() -> None:
    package = importlib.import_module("fewscan")
    typed = [
        n for n in tree(SRC / "__init__.py").body if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
    ]
    declared = {alias.name for n in ast.walk(typed[0]) if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert list(package.__all__) == sorted(declared)
    assert not [name for name in package.__all__ if not hasattr(package, name)]


@pytest.mark.parametrize("path", PYTHON, ids=module_name)
def test_functions_and_modules_stay_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LINES_OF_MODULE or module_name(path) in LONGER, f"{lines} lines"
    long = {name: size for name, node in functions(path) if (size := code_lines(node)) > LINES_OF_FUNCTION}
    assert not long.keys() - LONGER.keys(), long


def code_lines(node: Function) -> int:
    """Lines of a function without its decorators and docstring."""
    first = node.body[0]
    told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if told else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_few_arguments_and_keywords_after_the_second(path: Path) -> None:
    for name, node in functions(path):
        positional, every = arguments(node)
        if is_verb(node) or node.name.startswith("_"):
            continue
        assert len(every) <= ARGUMENTS or name in MORE_ARGUMENTS, f"{name} takes {len(every)} arguments"
        assert len(positional) <= POSITIONAL or name in MORE_POSITIONAL, (
            f"{name} takes {positional} by position; put a * after the second"
        )


def test_exceptions_to_the_rules_are_still_needed() -> None:
    listed = [(name, node) for path in PACKAGE for name, node in functions(path)]  # a method may share its name
    everything = dict(sorted(listed, key=lambda item: len(arguments(item[1])[1])))
    assert all(len(arguments(everything[n])[1]) > ARGUMENTS for n in MORE_ARGUMENTS if n in everything)
    assert all(code_lines(everything[n]) > LINES_OF_FUNCTION for n in LONGER if n in everything)


@pytest.mark.parametrize("path", PYTHON, ids=module_name)
def test_names_say_what_things_are(path: Path) -> None:
    nodes = [n for n in ast.walk(tree(path)) if isinstance(n, Function | ast.ClassDef)]
    names = [path.stem, path.parent.name, *(n.name for n in nodes)]
    assert not [name for name in names if name.lower() in FORBIDDEN_NAMES or re.search(r"_v\d+$", name)]


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_nothing_is_pickled_fetched_or_read_from_the_environment(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & (PICKLES | NETWORK) - LISTENS.get(module_name(path), set())
    code = ast.unparse(tree(path))
    assert not re.findall(r"\btorch\.(?:load|save)\(|allow_pickle=True|\bos\.(?:environ|getenv)\b", code)


def newer(code: ast.Module, imported: Iterable[str]) -> set[str]:
    """What of `NEWER` a file names."""
    named = {*imported, *(name.split(".")[0] for name in imported)}
    for node in ast.walk(code):
        if isinstance(node, ast.Name):
            named.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            named.add(f"{node.value.id}.{node.attr}")
    return NEWER & named


@pytest.mark.parametrize("path", PACKAGE, ids=module_name)
def test_nothing_needs_a_newer_python_than_is_promised(path: Path) -> None:
    assert not newer(tree(path), list(imports(path)))


def test_what_is_too_new_is_found_however_it_is_named() -> None:
    assert f'requires-python = ">={OLDEST[0]}.{OLDEST[1]}"' in (ROOT / "pyproject.toml").read_text()
    with pytest.raises(SyntaxError):
        ast.parse("try: pass\nexcept* OSError: pass", feature_version=OLDEST)
    code = "import hashlib, tomllib\nfrom typing import Self\nhashlib.file_digest(f, 'sha256')\nraise ExceptionGroup"
    found = newer(ast.parse(code), ["hashlib", "tomllib", "typing.Self"])
    assert found == {"hashlib.file_digest", "tomllib", "typing.Self", "ExceptionGroup"}


def test_no_file_names_a_folder_of_the_machine_it_was_written_on() -> None:
    folders = (".ci", "benchmarks", "decisions", "docs", "scripts", "src/fewscan", "tests")
    paths = [*ROOT.glob("*.*"), ROOT / "Makefile", *(path for name in folders for path in (ROOT / name).rglob("*"))]
    texts = {".py", ".md", ".toml", ".txt", ".json", ".cff", ".html", ""}
    places = re.compile(rf"(?<![\w.])/(?:work|root)/|{re.escape(str(ROOT))}|{re.escape(str(Path.home()))}/")
    read = [p for p in paths if p.is_file() and p.suffix in texts and p.name != ".gitignore"]
    assert not [p.relative_to(ROOT).as_posix() for p in read if places.search(p.read_text("utf-8"))]


def test_files_that_are_not_python_are_listed_as_package_data() -> None:
    listed = re.search(
        r"^\[tool.setuptools.package-data\]\nfewscan = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M
    )
    assert listed is not None
    found = {path for pattern in re.findall(r'"(.*?)"', listed[1]) for path in SRC.glob(pattern)}
    rest = {
        path for path in SRC.rglob("*") if path.is_file() and path.suffix != ".py" and path.parent.name != "__pycache__"
    }
    assert not rest - found


def test_the_command_line_imports_nothing_heavy() -> None:
    code = "import sys, fewscan.cli; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.split())


def test_help_answers_within_a_second() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fewscan", "--help"], capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 1
