"""What counts as another version: other code, whatever it calls itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import modelpool
from modelpool.cluster.code import deployed_code, running_code
from modelpool.process import StartupError


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with this code in it."""
    shutil.copytree(Path(modelpool.__file__).parent, tmp_path / "modelpool")
    return tmp_path


def test_a_copy_is_the_same_code_and_what_python_makes_of_it_does_not_count(copied: Path) -> None:
    assert deployed_code("") == deployed_code(str(copied)) == running_code()
    (copied / "modelpool" / "__pycache__").mkdir(exist_ok=True)
    (copied / "modelpool" / "__pycache__" / "new.pyc").write_bytes(b"1")
    assert deployed_code(str(copied)) == running_code()


def test_every_file_counts_with_its_name_and_content(copied: Path) -> None:
    seen = {running_code()}
    file = copied / "modelpool" / "home.py"
    for change in (
        lambda: file.write_text(file.read_text() + "\n"),
        lambda: file.rename(file.with_name("house.py")),
        lambda: (copied / "modelpool" / "new.txt").touch(),
    ):
        change()
        seen.add(deployed_code(str(copied)))
    assert len(seen) == 4


def test_an_archive_counts_by_its_content_and_an_address_by_itself(tmp_path: Path) -> None:
    archive = tmp_path / "code.zip"
    archive.write_bytes(b"1")
    before = deployed_code(str(archive))
    archive.write_bytes(b"2")
    assert deployed_code(str(archive)) != before
    assert deployed_code("s3://bucket/code.zip") == ""


def test_a_folder_without_the_code_is_refused_with_the_one_that_is_meant(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="has no package `modelpool`") as raised:
        deployed_code(str(tmp_path))
    assert "RAY_WORKING_DIR" in raised.value.hint
