"""What is wrong with a model's folder is said with the name of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modelpool.engines.vllm.folder import folder_problem
from modelpool.engines.vllm.memory import weights_bytes


def safetensors(file: Path, *, data: int = 100, says: int = 100) -> None:
    header = json.dumps({"__metadata__": {}, "a": {"dtype": "U8", "shape": [says], "data_offsets": [0, says]}}).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    safetensors(tmp_path / "model.safetensors")
    return tmp_path


def test_a_whole_folder_has_no_problem(folder: Path) -> None:
    assert folder_problem(folder, {}) is None


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    assert folder_problem(tmp_path / "no", {}) == f"The model path {tmp_path / 'no'} does not exist."


def test_a_file_is_a_model_only_as_gguf(tmp_path: Path) -> None:
    for name, problem in (("m.gguf", None), ("m.zip", f"The model path {tmp_path / 'm.zip'} is not a folder.")):
        (tmp_path / name).touch()
        assert folder_problem(tmp_path / name, {}) == problem


def test_a_folder_without_a_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in (folder_problem(folder, {}) or "")
    (folder / "params.json").touch()
    assert folder_problem(folder, {}) is None


def test_a_tokenizer_may_be_elsewhere(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in (folder_problem(folder, {}) or "")
    assert folder_problem(folder, {"tokenizer": "/other"}) is None
    assert folder_problem(folder, {"skip-tokenizer-init": True}) is None


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no valid header"),
        (b"\xff" * 5000, "no valid header"),
        ((4).to_bytes(8, "little") + b"nope", "header cannot be read"),
        ((2).to_bytes(8, "little") + b"[]", "header cannot be read"),
    ],
)
def test_damaged_weights_are_named(folder: Path, content: bytes, says: str) -> None:
    (folder / "model-2.safetensors").write_bytes(content)
    problem = folder_problem(folder, {}) or ""
    assert f"{folder / 'model-2.safetensors'} is damaged" in problem
    assert says in problem


def test_weights_that_were_cut_off_are_named_with_both_sizes(folder: Path) -> None:
    safetensors(folder / "model.safetensors", data=99, says=100)
    size = (folder / "model.safetensors").stat().st_size
    assert f"it has {size} bytes, its header speaks of {size + 1}" in (folder_problem(folder, {}) or "")


def test_the_size_of_the_weights_is_that_of_their_files(folder: Path) -> None:
    assert weights_bytes(folder) == (folder / "model.safetensors").stat().st_size
    (folder / "model.bin").write_bytes(bytes(10))
    assert weights_bytes(folder) == (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").unlink()
    assert weights_bytes(folder) == 10
