from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modelpool import home as home_module
from modelpool.home import AlreadyRunning, Home, open_private
from modelpool.process import StartupError


def test_secrets_are_made_once_and_readable_by_their_owner_only(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    with ThreadPoolExecutor(8) as threads:
        keys = set(threads.map(lambda _: Home(tmp_path / "home").admin_key(), range(32)))
    assert keys == {home.admin_key()}
    assert home.admin_key() != home.cluster_token()
    assert stat.S_IMODE((home.path / "admin-key").stat().st_mode) == 0o600
    assert stat.S_IMODE(home.path.stat().st_mode) == 0o700
    assert sorted(path.name for path in home.path.iterdir()) == ["admin-key", "cluster-token", "logs", "run"]


def test_gateways_share_memory_of_the_system_where_it_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(home_module, "_MEMORY", memory)
    monkeypatch.setattr(home_module, "_MEMORY_FREE_MIN", 0)
    home = Home(tmp_path / "home")
    folder = home.shared_memory()
    assert folder == Home(tmp_path / "home").shared_memory()
    (folder / "file").write_text("x")
    (there,) = memory.iterdir()
    assert (there / "file").read_text() == "x"
    assert stat.S_IMODE(there.stat().st_mode) == 0o700
    shutil.rmtree(there)  # as a restart of the machine does
    assert home.shared_memory().is_dir()
    home.give_back()
    assert list(memory.iterdir()) == []
    assert not os.path.lexists(folder)


def test_what_a_home_that_is_gone_left_in_the_systems_memory_goes_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for that of a home that only others see, whose gateways live."""
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(home_module, "_MEMORY", memory)
    monkeypatch.setattr(home_module, "_MEMORY_FREE_MIN", 0)
    there = {}
    for name in ("stays", "ended", "hidden"):
        folder = Home(tmp_path / name).shared_memory()
        (folder / "lock").write_text("")
        there[name] = folder.readlink()
    for name in ("ended", "hidden"):
        shutil.rmtree(tmp_path / name)
    holder = "import fcntl, sys; f = open(sys.argv[1], 'rb+'); fcntl.lockf(f, fcntl.LOCK_EX, 1, 3); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holder, there["hidden"] / "lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        there["new"] = Home(tmp_path / "new").shared_memory().readlink()
        process.communicate(b"\n")
    assert set(memory.iterdir()) == {there["stays"], there["hidden"], there["new"]}


def test_gateways_share_files_of_the_home_where_the_system_has_no_memory_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_module, "_MEMORY", tmp_path / "nowhere")
    home = Home(tmp_path / "home")
    (home.shared_memory() / "file").write_text("x")
    home.give_back()
    assert (home.shared_memory() / "file").read_text() == "x"


def test_what_is_no_folder_of_ours_in_the_systems_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(home_module, "_MEMORY", tmp_path)
    monkeypatch.setattr(home_module, "_MEMORY_FREE_MIN", 0)
    home = Home(tmp_path / "home")
    there = home.shared_memory().readlink()
    shutil.rmtree(there)
    there.symlink_to(home.logs)
    with pytest.raises(PermissionError):
        home.shared_memory()


def test_a_lock_is_held_by_one_and_free_again_afterwards(tmp_path: Path) -> None:
    home = Home(tmp_path)
    with home.lock("up"), pytest.raises(AlreadyRunning, match="up is already running"), home.lock("up"):
        pass
    with home.lock("up"), home.lock("worker-1"):
        pass


def test_the_control_socket_of_a_deep_home_still_fits(tmp_path: Path) -> None:
    deep, other = Home(tmp_path / ("d" * 120)), Home(tmp_path / ("e" * 120))
    path = deep.control_socket
    assert len(str(path)) < 108
    assert path == Home(tmp_path / ("d" * 120)).control_socket
    assert path != other.control_socket
    assert Home(tmp_path).control_socket.parent == tmp_path / "run" or len(str(tmp_path)) > 80
    path.touch()
    deep.give_back()
    assert path.exists(), "it may be in use"
    path.unlink()
    for home in (deep, other):
        home.give_back()
    assert not path.parent.exists()


def test_an_alias_with_a_slash_is_one_log_file(tmp_path: Path) -> None:
    home = Home(tmp_path)
    assert home.instance_log("w/1", "org/model").relative_to(home.logs).parts == (
        "instances",
        "w%2F1",
        "org%2Fmodel.log",
    )


def test_a_home_that_cannot_be_made_says_which_setting_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="cannot be used: Not a directory") as raised:
        Home(tmp_path / "file" / "home")
    assert "MODELPOOL_HOME" in raised.value.hint


def test_a_private_file_is_its_owners_whatever_it_was_before(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("1")
    (tmp_path / "old").chmod(0o644)
    for name in ("old", "new"):
        with open_private(tmp_path / name, "ab") as file:
            file.write(b"2")
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert (tmp_path / "old").read_text() == "12"
