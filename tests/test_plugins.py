"""Registries: entries that files add, names that nobody registered, plug-ins that are named in the environment."""

import pytest

from pilon_compress import plugins
from pilon_compress.errors import BadInput
from pilon_compress.plugins import Registry


@pytest.fixture
def named(monkeypatch):
    """Sets PILON_PLUGINS and has plug-ins imported again; afterwards they count as imported, none of them."""

    def name(value):
        monkeypatch.setenv(plugins.PLUGINS, value)
        plugins.import_plugins.cache_clear()

    yield name
    monkeypatch.undo()
    plugins.import_plugins.cache_clear()


def test_entries_keep_their_order_and_names_are_taken_once():
    registry = Registry[int]("number")
    registry.add("one", 1)
    registry.add("two", 2)
    assert dict(registry) == {"one": 1, "two": 2} and "one" in registry and len(registry) == 2
    with pytest.raises(BadInput, match="there is a number 'one' already"):
        registry.add("one", 11)
    assert registry["one"] == 1


def test_an_unknown_name_is_told_which_there_are():
    registry = Registry[int]("number")
    registry.add("seven", 7)
    registry.add("eight", 8)
    with pytest.raises(BadInput, match="no number 'sevn'; did you mean seven\\? there are seven, eight"):
        registry["sevn"]
    assert registry.get("nine") is None and registry.get("seven") == 7


def test_the_files_of_a_package_register_before_a_registry_is_read(tmp_path, monkeypatch):
    folder = tmp_path / "numbers_by_file"
    folder.mkdir()
    (folder / "__init__.py").write_text("from pilon_compress.plugins import Registry\n")
    (folder / "registry.py").write_text(
        "from pilon_compress.plugins import Registry\nNUMBERS = Registry('number', 'numbers_by_file')\n"
    )
    for name, value in (("one", 1), ("two", 2)):
        code = f"from numbers_by_file.registry import NUMBERS\nNUMBERS.add({name!r}, {value})\n"
        (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    from numbers_by_file.registry import NUMBERS

    assert dict(NUMBERS) == {"one": 1, "two": 2}


def test_files_in_the_environment_are_imported(tmp_path, named):
    registry = plugins.__dict__.setdefault("REGISTRY_OF_A_TEST", Registry[int]("number"))
    file = tmp_path / "adds_a_number.py"
    file.write_text("from pilon_compress import plugins\nplugins.REGISTRY_OF_A_TEST.add('three', 3)\n")
    named(f"{file}, json")
    assert registry["three"] == 3
    del plugins.REGISTRY_OF_A_TEST


@pytest.mark.parametrize(
    ("code", "refused"), [(None, "no such plug-in"), ("1 / 0", "cannot be imported: division by zero")]
)
def test_a_plug_in_that_cannot_be_imported_is_named(tmp_path, named, code, refused):
    file = tmp_path / "broken_plug_in.py"
    if code is not None:
        file.write_text(code)
    named(str(file))
    with pytest.raises(BadInput, match=refused) as caught:
        Registry[int]("number").get("any")
    assert "broken_plug_in.py" in str(caught.value)
