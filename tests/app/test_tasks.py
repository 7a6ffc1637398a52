"""``--tasks`` and ``--task-file`` of ``eval`` and ``compare``, on a tiny model and a local task."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fgmp.app import commands
from fgmp.app.commands import Reporter
from fgmp.app.records import (
    CompareSummary,
    EvalSummary,
    TaskComparison,
    TaskRow,
    TaskScores,
    score_table,
    task_table,
)
from fgmp.errors import InputError
from fgmp.evaluation.tasks import Difference, Score, TaskChoice

from .cases import Place, Run


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Task file of 32 documents, two of which are too long for the model's context."""
    data, path = tmp_path / "documents.jsonl", tmp_path / "task.yaml"
    long = [{"query": "x" * 70, "choices": [" a", " b"], "gold": 0}] * 2
    short = [{"query": f"{i}:", "choices": [" a", " b"], "gold": i % 2} for i in range(30)]
    data.write_text("".join(json.dumps(document) + "\n" for document in [*long, *short]))
    fields = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path.write_text(yaml.safe_dump(fields))
    return path


def test_eval(run: Run, place: Place, task: Path) -> None:
    done = run("eval", place.checkpoint, "--task-file", task, "--batch-size", "3", "--json")
    facts = done.json
    assert facts.keys() == {"tasks", "limit"} and facts["limit"] is None
    (letters,) = facts["tasks"]
    value, stderr = letters.pop("value"), letters.pop("stderr")
    assert letters == {
        "task": "letters",
        "metric": "acc",
        "filter": "none",
        "documents": 32,
        "higher_is_better": True,
    }
    assert stderr == pytest.approx((value * (1 - value) / 31) ** 0.5)
    assert "4 prompts of tasks are longer than the model's context of 64 tokens" in done.words


def test_eval_of_a_text_and_a_task(run: Run, place: Place, task: Path) -> None:
    options = ("--data", place.text, "--tasks", "letters", "--task-file", task, "--limit", "3")
    facts = run("eval", place.checkpoint, *options, "--json").json
    text = run("eval", place.checkpoint, "--data", place.text, "--json").json
    assert facts.items() >= text.items()
    assert facts["limit"] == 3 and facts["tasks"][0]["documents"] == 3
    shown = run("eval", place.checkpoint, *options)
    assert "perplexity" in shown.out and "letters acc" in " ".join(shown.out.split())


def test_compare(run: Run, place: Place, task: Path) -> None:
    command = ("compare", place.model, place.checkpoint, "--task-file", task, "--limit", "30")
    facts = run(*command, "--json").json
    assert facts.keys() == {"tasks", "limit"} and facts["limit"] == 30
    (letters,) = facts["tasks"]
    models = letters.pop("models")
    assert letters == {
        "task": "letters",
        "metric": "acc",
        "filter": "none",
        "documents": 30,
        "higher_is_better": True,
    }
    assert list(models) == ["original", "fp8", "nvfp4", "fgmp"]
    assert models["original"].pop("difference") is None
    original = models.pop("original")
    for name, folder in (("fgmp", place.checkpoint), ("original", place.model)):
        alone = run("eval", folder, "--task-file", task, "--limit", "30", "--json").json["tasks"][0]
        expected = models.get(name, original)
        assert (expected["value"], expected["stderr"]) == (alone["value"], alone["stderr"])
    for values in models.values():
        change = values["difference"]["value"]
        assert change == pytest.approx(values["value"] - original["value"])
        assert values["difference"]["stderr"] >= 0
    assert any(values["difference"]["value"] for values in models.values())


def test_compare_of_a_text_and_a_task(run: Run, place: Place, task: Path) -> None:
    command = ("compare", place.model, place.checkpoint, "--data", place.text, "--task-file", task)
    facts = run(*command, "--json").json
    assert {"rows", "tasks", "quantized_share"} <= facts.keys()
    shown = " ".join(run(*command).out.split())
    assert "perplexity" in shown and "letters acc original" in shown


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ((), 2, "give --data TEXT, --tasks NAMES or --task-file FILE"),
        (("--task-file", "absent.yaml"), 1, "absent.yaml: cannot be read"),
        (("--tasks", ","), 1, "name at least one, or a task file"),
    ],
)
def test_refusals_come_before_a_model(
    run: Run,
    place: Place,
    options: tuple[str, ...],
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(commands.Source, "load", load)
    for command in (("eval", place.checkpoint), ("compare", place.model, place.checkpoint)):
        done = run(*command, *options)
        assert done.code == code and message in " ".join(done.words.replace("│", " ").split())


def test_a_bad_task_is_refused_before_a_text_is_evaluated(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(commands.Source, "load", load)
    choice = TaskChoice(files=[Path("absent.yaml")])
    with pytest.raises(InputError, match="cannot be read"):
        commands.evaluate(place.checkpoint, place.text, tasks=choice)
    with pytest.raises(InputError, match="cannot be read"):
        commands.compare(place.model, Path(place.checkpoint), place.text, tasks=choice)


def test_a_packed_cache_needs_a_text(run: Run, place: Place, task: Path) -> None:
    done = run("eval", place.checkpoint, "--task-file", task, "--kv-cache", "fp8")
    assert done.code == 1 and "--kv-cache is for --data" in done.words


def test_models_are_named_while_they_run(place: Place, task: Path) -> None:
    messages: list[str] = []
    reporter = Reporter(message=messages.append)
    choice = TaskChoice(files=[task], limit=2)
    commands.compare(place.model, Path(place.checkpoint), None, reporter=reporter, tasks=choice)
    named = [text for text in messages if text.startswith("tasks: ")]
    assert named == ["tasks: original", "tasks: fp8", "tasks: nvfp4", "tasks: fgmp"]


PLAIN = Score("letters", "acc", "none", 0.5, 0.125, 16, True)
FILTERED = Score("sums", "exact_match", "strict", 0.25, None, 1600, None)


def test_tables() -> None:
    assert score_table(TaskScores([PLAIN, FILTERED], None))[1:] == [
        ["letters", "acc", "16", "0.5000", "0.1250"],
        ["sums", "exact_match, strict", "1,600", "0.2500", "-"],
    ]
    worse = Score("letters", "acc", "none", 0.375, 0.12, 16, True)
    row = TaskRow({"original": PLAIN, "fgmp": worse}, {"fgmp": Difference(-0.125, 0.0625)})
    unpaired = TaskRow({"original": PLAIN, "fgmp": worse}, {"fgmp": Difference(-0.125, None)})
    lines = task_table(TaskComparison([row, unpaired], 16))
    assert lines[1] == ["letters", "acc", "original", "0.5000", "0.1250", "-", "-"]
    assert lines[2] == ["letters", "acc", "fgmp", "0.3750", "0.1200", "-0.1250", "0.0625"]
    assert lines[4][-2:] == ["-0.1250", "-"]
    assert all(len(line) == len(lines[0]) for line in lines)


def test_summaries_hold_what_was_asked_for() -> None:
    scores = TaskScores([PLAIN], 16)
    assert EvalSummary(None, None).to_dict() == {}
    assert EvalSummary(None, scores).to_dict() == {"tasks": [PLAIN.to_dict()], "limit": 16}
    rows = TaskComparison([TaskRow({"original": PLAIN}, {})], None)
    (facts,) = CompareSummary(None, rows).to_dict()["tasks"]
    value = {"value": 0.5, "stderr": 0.125, "difference": None}
    assert facts["models"] == {"original": value} and facts["documents"] == 16
