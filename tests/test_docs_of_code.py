"""What the style guide asks of docstrings, comments and the length of functions, checked."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = [
    p
    for room in (
        *("corl_dare", "corl"),
        *("transition_diffusion", "adaptive_regularization", "policy_family"),
        "online_pretraining",
    )
    for p in ROOT.glob(f"{room}/**/*.py")
]
ALGORITHMS = [*ROOT.glob("algorithms/*.py")]
OTHERS = [
    *(p for room in ("experiments", "benchmarks") for p in ROOT.glob(f"{room}/**/*.py")),
    *ROOT.glob("scripts/*.py"),
]
LONGEST = 60  # lines of a function without its docstring
# Function that may be longer -> why.
LONGER = {
    "corl_dare/exchange.py exchange": "one exchange from scores to rows, in the paper's order",
    "scripts/make_patches.py iql_patch": "a table: line number -> text to insert",
    "scripts/make_patches.py cal_ql_patch": "a table: line number -> text to insert",
    "scripts/make_patches.py awac_patch": "a table: line number -> text to insert",
}
# A comment that the formatter has put in parentheses with the value it belonged to:
#     x = (
#         None  # why
#     )
BROKEN_COMMENT = re.compile(r"=\s*\(\n[^\n]+\S  #[^\n]*\n[ \t]*\)$", re.MULTILINE)

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def every(paths):
    return pytest.mark.parametrize("path", sorted(paths), ids=name_of)


def definitions(tree, prefix=""):
    """(qualified name, node) of classes, their methods and module-level functions."""
    for node in tree.body:
        if isinstance(node, Definition):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{prefix}{node.name}.")


def is_public(name):
    return not any(part.startswith("_") for part in name.split("."))


def is_setter(node):
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(d).endswith(".setter") for d in decorators)


def undocumented(source, classes_only=False):
    """Public definitions of a module's source that have no docstring."""
    kinds = ast.ClassDef if classes_only else Definition
    return [
        name
        for name, node in definitions(ast.parse(source))
        if isinstance(node, kinds) and is_public(name) and not is_setter(node)
        if not ast.get_docstring(node)
    ]


def long_functions(source):
    """Name -> lines without the docstring, of functions above the limit, nested ones too."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node):
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        if lines > LONGEST:
            found[node.name] = lines
    return found


@every(PACKAGES)
def test_every_public_function_class_and_method_has_a_docstring(path):
    assert undocumented(path.read_text()) == []


@every(ALGORITHMS)
def test_every_class_of_an_algorithm_file_has_a_docstring(path):
    assert undocumented(path.read_text(), classes_only=True) == []


@every([*PACKAGES, *ALGORITHMS, *OTHERS])
def test_every_module_says_what_it_is_and_leaves_nothing_to_do(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text or path.name == "__init__.py"
    assert not re.search(r"TODO|FIXME", text or "")


@every([*PACKAGES, *ALGORITHMS, *OTHERS])
def test_no_function_is_longer_than_a_screen(path):
    found = long_functions(path.read_text())
    assert [n for n in found if f"{name_of(path)} {n}" not in LONGER] == [], found


def test_every_function_that_may_be_longer_is_longer():
    for entry in LONGER:
        path, name = entry.split()
        assert name in long_functions((ROOT / path).read_text()), entry


@every([*PACKAGES, *ALGORITHMS, *OTHERS])
def test_comments_stand_above_the_line_that_they_explain(path):
    assert BROKEN_COMMENT.findall(path.read_text()) == []


def test_the_checks_find_what_they_look_for():
    source = (
        "def plain(): pass\n"
        "def _private(): pass\n"
        "class Documented:\n"
        '    "what it is"\n'
        "    def method(self): pass\n"
        "    @plain.setter\n"
        "    def plain(self, value): pass\n"
        "class _Private:\n"
        "    def method(self): pass\n"
    )
    assert undocumented(source) == ["plain", "Documented.method"]
    assert undocumented("class Bare: pass", classes_only=True) == ["Bare"]
    longer = "def f():\n" + '    """one\n    two"""\n' + "    x = 1\n" * LONGEST
    assert long_functions(longer) == {"f": LONGEST + 1}
    assert long_functions(longer.removesuffix("    x = 1\n")) == {}
    assert BROKEN_COMMENT.search("x: int = (\n    None  # why\n)\n")
    assert BROKEN_COMMENT.search("    x = (\n        f(a)  # why\n    )\n")
    assert not BROKEN_COMMENT.search("x = (\n    a  # why\n    + b\n)\n")
    assert not BROKEN_COMMENT.search("# why\nx = (\n    a\n)\n")
