"""What ``import fgmp`` offers: these names, each with words on what it is."""

import inspect

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


def test_each_is_documented() -> None:
    assert inspect.getdoc(fgmp)
    for name in PUBLIC:
        text = inspect.getdoc(getattr(fgmp, name))
        assert text and len(text) > 20, name


def test_functions_document_their_arguments_and_errors() -> None:
    for function in (fgmp.quantize, fgmp.save, fgmp.load):
        text = inspect.getdoc(function)
        for name in inspect.signature(function).parameters:
            assert f"    {name}: " in text, f"{function.__name__} does not say what {name} is"
        assert "Raises:" in text


def test_a_recipe_documents_its_fields() -> None:
    text = inspect.getdoc(fgmp.Recipe)
    for name in inspect.signature(fgmp.Recipe).parameters:
        assert f"    {name}: " in text


def test_errors_form_a_tree() -> None:
    assert issubclass(fgmp.InputError, fgmp.FGMPError) and issubclass(fgmp.InputError, ValueError)
    assert issubclass(fgmp.MemoryLimitError, fgmp.InputError)
    assert issubclass(fgmp.CheckpointError, fgmp.FGMPError)
    assert not issubclass(fgmp.CheckpointError, fgmp.InputError)
