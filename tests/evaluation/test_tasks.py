"""Tasks through lm-evaluation-harness: its scores are those counted here, document by document."""

import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from app.cases import a_model, a_tokenizer
from torch import nn

import fgmp
from fgmp import Recipe
from fgmp.errors import InputError
from fgmp.evaluation.tasks import (
    Difference,
    Score,
    TaskChoice,
    cut_prompts,
    difference,
    load_tasks,
    score,
)

WORDS = ("red", "fox", "sky", "dog", "sea", "oak", "ice", "inn")
DOCUMENTS = [
    {"query": f"{a} and {b}:", "choices": [a, b, "jar"], "gold": i % 3}
    for i, (a, b) in enumerate(zip(WORDS * 4, WORDS[1:] + WORDS * 4, strict=False))
]
"""Answers of equal length, between which quantization decides now and then."""
COUNT = len(DOCUMENTS)

ANSWERS = {
    "task": "answers",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{gold}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write documents and a task file that names them; a field of None is left out."""

    def call(fields: dict[str, Any] | None = None, documents: Any = DOCUMENTS) -> Path:
        data = tmp_path / "documents.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        source = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
        values = {**ANSWERS, "dataset_kwargs": source, **(fields or {})}
        path = tmp_path / "task.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
        return path

    return call


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return a_model().eval()


@pytest.fixture(scope="module")
def packed() -> nn.Module:
    tokens = torch.randint(1, 257, (4, 32), generator=torch.Generator().manual_seed(0))
    return fgmp.quantize(a_model(), tokens, Recipe(policy="nvfp4", compensate=False, clip="off"))


def log_likelihood(model: nn.Module, context: str, answer: str) -> float:
    """Sum of the log-probabilities of the answer's tokens, which are its bytes."""
    tokenizer = a_tokenizer()
    first, second = tokenizer(context).input_ids, tokenizer(answer).input_ids
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([first + second])).logits[0].double()
    rows = logits.log_softmax(-1)[len(first) - 1 : -1]
    return float(rows[torch.arange(len(second)), torch.tensor(second)].sum())


def right_answers(model: nn.Module) -> list[float]:
    chosen = [
        max(range(3), key=lambda i: log_likelihood(model, d["query"], " " + d["choices"][i]))
        for d in DOCUMENTS
    ]
    return [float(c == d["gold"]) for c, d in zip(chosen, DOCUMENTS, strict=True)]


def test_scores_are_those_counted_by_hand(
    model: nn.Module, packed: nn.Module, write: Write
) -> None:
    """Scores of two models on the same tasks, one after the other, and their difference."""
    tasks = load_tasks(TaskChoice(files=[write()], batch_size=5))
    scores = []
    for each in (model, packed):
        expected = right_answers(each)
        (result,) = score(each, a_tokenizer(), tasks)
        assert (result.task, result.metric, result.filter) == ("answers", "acc", "none")
        assert result.by_document == tuple(expected)
        assert result.value == pytest.approx(sum(expected) / COUNT)
        variance = result.value * (1 - result.value) / (COUNT - 1)
        assert result.stderr == pytest.approx(math.sqrt(variance))
        assert result.documents == COUNT and result.higher_is_better is True
        assert "by_document" not in result.to_dict()
        scores.append(result)
    assert cut_prompts(packed, a_tokenizer(), tasks) == 0
    changes = [b - a for a, b in zip(*(s.by_document or () for s in scores), strict=True)]
    mean = sum(changes) / COUNT
    assert any(changes), "else the difference argues nothing"
    squares = sum((change - mean) ** 2 for change in changes)
    paired = difference(scores[1], scores[0])
    assert paired.value == pytest.approx(mean)
    assert paired.stderr == pytest.approx(math.sqrt(squares / (COUNT - 1) / COUNT))


def test_only_the_first_documents(model: nn.Module, write: Write) -> None:
    tasks = load_tasks(TaskChoice(files=[write()], limit=4))
    (result,) = score(model, a_tokenizer(), tasks)
    assert result.documents == 4 and result.by_document == tuple(right_answers(model)[:4])


def test_one_document_has_no_standard_error(model: nn.Module, write: Write) -> None:
    (result,) = score(model, a_tokenizer(), load_tasks(TaskChoice(files=[write()], limit=1)))
    assert result.stderr is None and difference(result, result) == Difference(0.0, None)


def test_a_metric_that_is_no_mean_has_no_paired_error(model: nn.Module, write: Write) -> None:
    """Perplexity per byte of texts; it is a ratio of two sums over documents."""
    metric = {"metric": "byte_perplexity", "aggregation": "weighted_perplexity"}
    fields = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{query}}",
        "doc_to_choice": None,
        "metric_list": [{**metric, "higher_is_better": False}],
    }
    (result,) = score(model, a_tokenizer(), load_tasks(TaskChoice(files=[write(fields)])))
    texts = [document["query"] for document in DOCUMENTS]
    total = sum(log_likelihood(model, "<|end|>", text) for text in texts)
    assert result.value == pytest.approx(math.exp(-total / sum(map(len, texts))))
    assert result.by_document is None and result.higher_is_better is False
    higher = Score("answers", "byte_perplexity", "none", result.value + 1, None, 12, False)
    assert difference(higher, result) == Difference(pytest.approx(1.0), None)


def test_a_median_has_no_paired_error(model: nn.Module, write: Write) -> None:
    """One number per document, of which the score is not the mean."""
    metric = {"metric": "acc", "aggregation": "median", "higher_is_better": True}
    (result,) = score(
        model, a_tokenizer(), load_tasks(TaskChoice([], [write({"metric_list": [metric]})]))
    )
    assert result.value in (0, 1) and 0 < sum(right_answers(model)) < COUNT
    assert result.by_document is None


def test_generated_answers(model: nn.Module, write: Write) -> None:
    """The expected answer of every second document is what the model writes."""
    tokenizer = a_tokenizer()
    documents = []
    for i, document in enumerate(DOCUMENTS[:4]):
        ids = torch.tensor([tokenizer(document["query"]).input_ids])
        with torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False
            )
        text = tokenizer.decode(output[0, ids.shape[1] :])
        documents.append({"query": document["query"], "answer": text if i % 2 else "nothing"})
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}
    fields = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": None,
        "generation_kwargs": {"until": ["<|never|>"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [metric],
    }
    tasks = load_tasks(TaskChoice(files=[write(fields, documents)]))
    (result,) = score(model, tokenizer, tasks)
    assert result.by_document == (0.0, 1.0, 0.0, 1.0)


def test_prompts_beyond_the_context_are_counted(model: nn.Module, write: Write) -> None:
    """64 tokens fit, and the last one is predicted and not read: 65 of prompt and answer."""
    lengths = (55, 62, 63, 64)
    documents = [{**DOCUMENTS[0], "query": "q" * n, "choices": ["a", "bb"]} for n in lengths]
    tasks = load_tasks(TaskChoice(files=[write({}, [{**d, "gold": 0} for d in documents])]))
    score(model, a_tokenizer(), tasks)
    totals = [n + 1 + answer for n in lengths for answer in (1, 2)]  # a space before the answer
    assert cut_prompts(model, a_tokenizer(), tasks) == sum(total > 65 for total in totals) == 3


# --- what is refused before a model is loaded ----------------------------------------------------


@pytest.mark.parametrize("key", ["task", "dataset_path", "doc_to_text", "doc_to_target"])
def test_a_field_is_missing(write: Write, key: str) -> None:
    with pytest.raises(InputError, match=f"it must have the field {key}"):
        load_tasks(TaskChoice(files=[write({key: None})]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"test_split": None}, "must have the field test_split or validation_split"),
        ({"doc_to_choice": None}, "must have the field doc_to_choice"),
        ({"task": ["a", "b"]}, "task must be one name, got"),
        ({"metric_list": [{"metric": "accuracy"}]}, "must list metrics of lm-evaluation-harness"),
        ({"metric_list": ["acc"]}, "must list metrics of lm-evaluation-harness"),
        ({"doc_to_text": "{{question}}"}, "UndefinedError: 'question' is undefined"),
        ({"doc_to_text": "{{query"}, "TemplateSyntaxError"),
        ({"test_split": "train"}, "KeyError: 'train'"),
        ({"output_typo": "x"}, "unexpected keyword argument 'output_typo'"),
        ({"dataset_kwargs": {"data_files": {"test": "/no/such.jsonl"}}}, "cannot be loaded: File"),
        ({"unsafe_code": True}, "it runs code that the model writes"),
        ({"include": "task.yaml"}, "it includes itself"),
        ({"include": "absent.yaml"}, "absent.yaml: cannot be read"),
    ],
)
def test_a_malformed_task_file(write: Write, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as refusal:
        load_tasks(TaskChoice(files=[write(fields)]))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"- a\n", "must be a mapping, got list"),
        (b"a: [1\n", "not YAML: ParserError"),
        (b"\xff\xfe\xff", "cannot be read"),
        (b"[" * 100_000, "not YAML"),
        (b"task: !!python/object/apply:os.getcwd []\n", "not YAML: ConstructorError"),
    ],
)
def test_a_file_that_is_no_task(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "task.yaml"
    path.write_bytes(text)
    with pytest.raises(InputError, match=message):
        load_tasks(TaskChoice(files=[path]))


def test_fields_of_included_files_count(write: Write, model: nn.Module) -> None:
    path = write()
    common = path.with_name("common.yaml")
    path.rename(common)
    path.write_text("include: common.yaml\ntask: renamed\n")
    (result,) = score(model, a_tokenizer(), load_tasks(TaskChoice(files=[path])))
    assert result.task == "renamed" and result.by_document == tuple(right_answers(model))


def test_functions_run_only_if_they_are_trusted(write: Write, model: nn.Module) -> None:
    path = write()
    ran = path.with_name("ran")
    path.with_name("own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\ndef text(document):\n    return document['query']\n"
    )
    path.write_text(path.read_text().replace("'{{query}}'", "!function own.text"))
    with pytest.raises(InputError, match="names the Python function own"):
        load_tasks(TaskChoice(files=[path]))
    assert not ran.exists()
    tasks = load_tasks(TaskChoice(files=[path]), trust_remote_code=True)
    assert ran.exists()
    assert score(model, a_tokenizer(), tasks)[0].by_document == tuple(right_answers(model))


def test_an_unknown_name_is_refused_and_a_similar_one_named() -> None:
    with pytest.raises(InputError, match=r"task arc_eazy: .* similar: .*arc_easy"):
        load_tasks(TaskChoice(names=["arc_eazy"]))


def test_a_name_may_be_that_of_a_file(write: Write, model: nn.Module) -> None:
    """The harness's own files are not read for it."""
    tasks = load_tasks(TaskChoice(names=["answers"], files=[write()], limit=2))
    assert list(tasks.loaded["tasks"]) == ["answers"]


@pytest.mark.parametrize("package", ["lm_eval", "accelerate"])
def test_a_missing_package_is_named(
    write: Write, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    with pytest.raises(InputError, match=rf"the package {package}, .* pip install 'fgmp\[eval\]'"):
        load_tasks(TaskChoice(files=[write()]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name at least one"),
        ({"names": ["a"], "limit": 0}, "limit must be at least 1, got 0"),
        ({"names": ["a"], "batch_size": -1}, "batch size must be at least 1, got -1"),
    ],
)
def test_choices_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TaskChoice(**options)


def test_a_document_that_fails_later_is_one_error(model: nn.Module, write: Write) -> None:
    """A choice that the document lacks, which only the answer's score reads."""
    documents = [*DOCUMENTS[:3], {**DOCUMENTS[3], "choices": []}]
    tasks = load_tasks(TaskChoice(files=[write({}, documents)]))
    with pytest.raises(InputError, match="tasks answers: lm-evaluation-harness fails: "):
        score(model, a_tokenizer(), tasks)
