from __future__ import annotations

from pathlib import Path

import pytest

from modelpool.settings import ENVIRONMENT, GatewaySettings, Settings, SettingsError, load, pool_url, to_environ


def test_flags_win_over_environment_and_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text("gateway: {port: 1}\nworker: {port: 1}\nmanager: {port: 1}\n")
    settings = load({"SERVE_PORT": "2", "WORKER_PORT": "2"}, file=file, flags={"gateway.port": 3, "worker.host": None})
    assert (settings.gateway.port, settings.worker.port, settings.manager.port) == (3, 2, 1)
    assert settings.worker.host == "127.0.0.1"


def test_serve_port_wins_over_its_older_name() -> None:
    assert load({"ROUTER_PORT": "1", "SERVE_PORT": "2"}).gateway.port == 2
    assert load({"ROUTER_PORT": "1"}).gateway.port == 1


def test_what_a_parent_hands_to_its_children_comes_out_the_same() -> None:
    settings = load({"MODELPOOL_INSECURE_NO_AUTH": "true", "MODEL_INSTANCE_CAPACITY": "3", "WORKER_ID": "w"})
    assert load(to_environ(settings)) == settings
    assert load(to_environ(Settings())) == Settings()


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({"SERVE_PORT": "81000"}, "SERVE_PORT='81000': Expected `int` <= 65535"),
        ({"WORKER_PORT": "x"}, "WORKER_PORT='x': Expected `int`"),
        ({"MODELPOOL_HEARTBEAT_TIMEOUT": "0"}, "> 0"),
    ],
)
def test_a_bad_variable_is_named_with_its_value(environ: dict[str, str], says: str) -> None:
    with pytest.raises(SettingsError, match=says.replace("(", r"\(")):
        load(environ)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("worker: {prot: 1}", "unknown field `prot`"),
        ("worker: {port: x}", r"worker.port"),
        ("a: [", "pool.yaml"),
        ("worker: {port: 2024-13-01}", "pool.yaml:1: month must be in 1..12"),
        ("worker: {port: 1}\nworker: {port: 2}\n", "pool.yaml:2: `worker` is there twice"),
        ("[" * 5000 + "]" * 5000, "pool.yaml: "),
    ],
)
def test_a_bad_file_is_named_with_the_path_of_the_value(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "pool.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=says):
        load({"MODELPOOL_CONFIG": str(file)})


def test_every_variable_reaches_a_setting() -> None:
    given = {name: "1" for name, _ in ENVIRONMENT} | {"MODELPOOL_MAX_BODY_BYTES": "4096", "MODELPOOL_ROOT_PATH": "/1"}
    assert set(to_environ(load(given))) == set(given)


@pytest.mark.parametrize(
    ("host", "port", "urls"),
    [
        ("10.0.0.7", 8000, ("http://10.0.0.7:8000",)),
        ("pool", 80, ("http://pool:80",)),
        ("fd00::7", 8000, ("http://[fd00::7]:8000",)),
        ("0.0.0.0", 8000, ()),
        ("::", 8000, ()),
        ("127.0.0.1", 8000, ()),
        ("localhost", 8000, ()),
        ("10.0.0.7", 0, ()),
    ],
)
def test_a_worker_elsewhere_is_told_only_of_gateways_that_it_can_reach(
    host: str, port: int, urls: tuple[str, ...]
) -> None:
    assert GatewaySettings(host=host, port=port).urls_elsewhere == urls


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("pool:8000", "http://pool:8000"),
        ("http://pool:8000/", "http://pool:8000"),
        ("https://pool/v1/", "https://pool"),
        ("unix:/run/control.sock", "unix:/run/control.sock"),
    ],
)
def test_a_pools_address_may_be_written_as_people_write_it(text: str, url: str) -> None:
    assert pool_url(text) == url
