from __future__ import annotations

from pathlib import Path

import pytest

from modelpool.cli.model_path import as_workers_find_it


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen3-0.6B", "/srv/models/m", "s3://bucket/models/m"])
def test_names_urls_and_absolute_paths_stay(name: str) -> None:
    assert as_workers_find_it(name) == name


@pytest.mark.parametrize("path", ["./m", "models/llama/8b", "src/modelpool/demo/model"])
def test_a_path_is_relative_to_whoever_types_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert as_workers_find_it(path) == str(tmp_path / path)


def test_the_home_folder_has_its_short_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert as_workers_find_it("~/m") == "/home/me/m"
