"""closure.py counts what a reader must open: module-level imports, without the optional folders."""

import ast

import closure


def test_imports_inside_functions_are_not_followed():
    tree = ast.parse("import a\nif True:\n    import b\nclass C:\n    import c\ndef f():\n    import d")
    assert [node.names[0].name for node in closure.module_level(tree)] == ["a", "b", "c"]


def test_a_closure_holds_its_entries_and_what_they_import(tmp_path, monkeypatch):
    texts = {
        "one": "from nanochameleon.two import f\n",
        "two": "import nanochameleon.bench.rows\n\n\ndef f():\n    import nanochameleon.three\n",
        "three": "x = 1\n",
        "bench.rows": "y = 2\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(closure, "modules", lambda: {name: tmp_path / name for name in texts})
    assert closure.closure(["one"]) == {"one": 1, "two": 5}


def test_every_entry_and_every_optional_folder_exists():
    known = closure.modules()
    entries = {name for names in closure.ENTRIES.values() for name in names}
    assert entries | set(closure.OPTIONAL) <= known.keys()
    assert all(path.exists() for path in closure.core_files()) and len(closure.core_files()) > len(closure.CORE)


def test_lines_with_a_comment_are_counted_once(tmp_path):
    (tmp_path / "x.py").write_text('x = 1  # one\n# two\ny = "# no comment"\n\n')
    assert closure.comment_share([tmp_path / "x.py"]) == 0.5


def test_the_report_names_each_question(capsys):
    report = closure.report()
    assert all(question in report for question in closure.ENTRIES) and "comment lines in the core" in report


def test_no_file_is_longer_than_500_lines():
    source = closure.tracked("*.py", "*.cu", "*.cuh", "*.h")
    assert [path.name for path in source if closure.lines([path]) > 500] == []


def test_no_two_test_files_share_a_name():
    """pytest imports them by their bare names, so it would collect neither."""
    names = [path.name for path in closure.tracked("tests/test_*.py", "tests/**/test_*.py")]
    assert sorted(set(names)) == sorted(names)
