"""A task names its partial results by all that they depend on, and by nothing else."""


def test_what_was_packed_is_taken_up_by_the_same_run_only(
    tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []

    class Watched(Unfinished):
        def __init__(self, folder: Path, key: str) -> None:
            keys.append(key)
            super().__init__(folder, key)

    monkeypatch.setattr("fgmp.quantization.task.Unfinished", Watched)

    def key(model: nn.Module, tokens: Tensor = tokens, **recipe: object) -> str:
        asked = Recipe(**{"clip": "off", **recipe})
        keys.clear()
        fgmp.quantize(model, tokens, asked, held_out=tokens[:1], unfinished=tmp_path)
        return keys[0]

    expected = key(make_model("llama"))
    other = make_model("llama")  # by what no gradient shows
    other.register_buffer("unused", torch.zeros(1))
    assert key(make_model("llama"), tune=1) == expected  # it comes after
    made = [
        key(other),
        key(make_model("llama"), tokens[:-1]),
        key(make_model("llama"), fp4=0.5),
        key(make_model("llama"), clip="on"),
        key(make_model("llama"), fp4_activations=0.5),
    ]
    assert len({expected, *made}) == 1 + len(made)
