"""What ``import fgmp`` offers: these names, each with words on what it is."""

import inspect

import pytest

import fgmp

PUBLIC = [
    "CheckpointError",
    "FGMPError",
    "InputError",
    "MemoryLimitError",
    "Recipe",
    "calibration_text",
    "evaluation_windows",
    "load",
    "quantize",
    "save",
]


def test_the_public_names() -> None:
    assert fgmp.__all__ == PUBLIC


def test_names_are_found_though_they_are_imported_late() -> None:
    """By completion and ``from fgmp import *``, and no other name is."""
    assert set(PUBLIC) <= set(dir(fgmp))
    assert {name for names in fgmp._MODULES.values() for name in names} == set(PUBLIC)
    with pytest.raises(AttributeError, match="module 'fgmp' has no attribute 'quantise'"):
        fgmp.quantise  # noqa: B018


def test_each_is_documented() -> None:
    assert inspect.getdoc(fgmp)
    for name in PUBLIC:
        text = inspect.getdoc(getattr(fgmp, name))
        assert text and len(text) > 20, name


def test_functions_document_their_arguments_and_errors() -> None:
    for function in (fgmp.quantize, fgmp.save, fgmp.load):
        text = inspect.getdoc(function)
        parameters = inspect.signature(function).parameters
        for name in parameters:
            assert f"    {name}: " in text, f"{function.__name__} does not say what {name} is"
        assert "Raises:" in text
        documented = text.partition("Args:\n")[2].partition("\n\n")[0].splitlines()
        names = [line.partition(":")[0].strip() for line in documented if line[4:5] != " "]
        assert names == list(parameters), f"{function.__name__}: in the order of its signature"


def test_quantize_takes_these() -> None:
    """Options are keywords, each with a default that a newcomer need not know."""
    model, samples, recipe, *options = inspect.signature(fgmp.quantize).parameters.values()
    assert [p.name for p in (model, samples, recipe)] == ["model", "samples", "recipe"]
    assert recipe.default is None
    assert [option.name for option in options] == [
        *("loss", "held_out", "groups", "calibration", "resume", "methods", "dtype"),
        *("progress", "report"),
    ]
    for option in options:
        assert option.kind is option.KEYWORD_ONLY and option.default is not option.empty


def test_a_recipe_documents_its_fields() -> None:
    text = inspect.getdoc(fgmp.Recipe)
    for name in inspect.signature(fgmp.Recipe).parameters:
        assert f"    {name}: " in text


def test_errors_form_a_tree() -> None:
    assert issubclass(fgmp.InputError, fgmp.FGMPError) and issubclass(fgmp.InputError, ValueError)
    assert issubclass(fgmp.MemoryLimitError, fgmp.InputError)
    assert issubclass(fgmp.CheckpointError, fgmp.FGMPError)
    assert not issubclass(fgmp.CheckpointError, fgmp.InputError)
