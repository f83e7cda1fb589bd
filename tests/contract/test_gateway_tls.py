"""The gateway over TLS: requests, streams, WebSockets, slow and rude clients; the process, the commands, a worker."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import json
import ssl
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID
from websockets.asyncio.client import connect

from modelpool.cli.client import PoolClient, Trouble
from modelpool.gateway.client_limits import Limits
from modelpool.pool_address import PoolAddress, address_file
from modelpool.process import NotStarted, Ready, StartupError
from modelpool.settings import GatewaySettings, Settings
from modelpool.tls import client_context, keep_current, own_context, server_context
from tests.contract.test_gateway_passing import EVENT_STREAM, Upstream
from tests.contract.test_gateway_process import started
from tests.contract.test_gateway_responses import fakes
from tests.gateway_world import Client, World, chat, entry, gateway, request
from tests.wire import chunk, on_uvloop, serving

BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


class Files(NamedTuple):
    cert: Path
    key: Path

    def server(self) -> ssl.SSLContext:
        context = server_context(str(self.cert), str(self.key))
        assert context is not None
        return context


def made(folder: Path, name: str = "localhost", *, password: bytes | None = None) -> Files:
    """A certificate that signs itself, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    names = [x509.DNSName(name), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    cert = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(names if name == "localhost" else names[:1]), critical=False)
        .sign(key, SHA256())
    )
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    files = Files(folder / f"{name}.pem", folder / f"{name}.key")
    files.cert.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return made(tmp_path_factory.mktemp("tls"))


async def connected(world: World, files: Files) -> Client:
    return Client(*await asyncio.open_connection(*world.endpoint, ssl=own_context(str(files.cert))))


@on_uvloop
async def _requests(files: Files) -> None:
    stream = EVENT_STREAM + b"".join(chunk(b"data: %d\n\n" % n) for n in range(200)) + b"0\r\n\r\n"
    async with serving(Upstream(stream)) as endpoint, gateway(entry("m", [endpoint]), tls=files.server()) as world:
        client = await connected(world, files)
        client.send(request("GET", "/health") * 50)
        for _ in range(50):
            assert (await client.answer()).json["status"] == "ok"
        for _ in range(3):
            assert (await client.ask(chat(stream=True))).body.count(b"data: ") == 200
        assert (await client.ask(b"garbage\r\n\r\n")).code == "invalid_http"
        big = await connected(world, files)
        answer = await big.ask(chat(filler="x" * 900_000))
        assert answer.status == 200
        async with openai.AsyncOpenAI(
            base_url=f"https://localhost:{world.endpoint.port}/v1",
            api_key="none",
            http_client=openai.DefaultAsyncHttpxClient(verify=client_context(str(files.cert))),
        ) as sdk:
            assert [model.id async for model in sdk.models.list()] == ["m"]


def test_requests_pipelined_streamed_large_and_wrong(files: Files) -> None:
    _requests(files)


@on_uvloop
async def _websocket(files: Files) -> None:
    async with fakes(1) as endpoints, gateway(entry("m", endpoints), tls=files.server()) as world:
        url = f"wss://localhost:{world.endpoint.port}/v1/realtime"
        async with connect(url, ssl=own_context(str(files.cert)), proxy=None) as client:
            assert json.loads(await client.recv())["type"] == "session.created"
            await client.send(json.dumps({"type": "session.update", "model": "m"}))
            await client.send(json.dumps({"type": "what"}))
            assert json.loads(await client.recv())["code"] == "unknown_event"
        assert client.close_code == 1000
        await world.until_idle()


def test_a_websocket(files: Files) -> None:
    _websocket(files)


@on_uvloop
async def _rude(files: Files) -> None:
    limits = Limits(body_bytes=1000, head_s=0.2, idle_s=0.2, check_s=0.01, linger_s=0.2)
    async with gateway(limits=limits, tls=files.server()) as world:
        plain = await world.connect()
        plain.send(request("GET", "/health"))
        assert await plain.at_end()
        silent = await world.connect()  # never begins its handshake
        assert await silent.at_end()
        idle = await connected(world, files)
        assert await idle.at_end()
        gone = await connected(world, files)
        gone.send(request("GET", "/health")[:-2])
        gone.abort()
        client = await connected(world, files)
        assert (await client.ask(request("GET", "/health"))).status == 200
        client.close()
        while world.listener.connections:
            await asyncio.sleep(0.01)


def test_clients_that_do_not_speak_it_say_nothing_or_leave(files: Files) -> None:
    _rude(files)


def healthy(client: PoolClient) -> bool:
    with client.stream("GET", "/health") as response:
        return response.status_code == 200


@on_uvloop
async def _process(tmp_path: Path) -> None:
    files = made(tmp_path, "pool.example")
    environ = {"MODELPOOL_TLS_CERT_FILE": str(files.cert), "MODELPOOL_TLS_KEY_FILE": str(files.key)}
    async with started(tmp_path / "home", **environ) as running:
        assert isinstance(running.said, Ready)
        assert running.said.url.startswith("https://127.0.0.1:")
        async with httpx.AsyncClient(verify=own_context(str(files.cert)), trust_env=False) as client:
            assert (await client.get(f"{running.said.url}/health")).json()["status"] == "ok"
        # The commands of its home trust it by its certificate, whatever name that is for; others do not.
        settings = Settings(home=str(tmp_path / "home"))
        here = PoolAddress(url=running.said.url, run_id="r", cert_file=str(files.cert))
        address_file(settings).write_bytes(msgspec.json.encode(here))
        assert await asyncio.to_thread(healthy, PoolClient(settings, None))
        elsewhere = Settings(home=str(tmp_path / "elsewhere"), tls_ca_file=str(files.cert))
        for other in (elsewhere, Settings(home=str(tmp_path / "elsewhere"))):
            with pytest.raises(Trouble, match="is not trusted"):
                await asyncio.to_thread(healthy, PoolClient(other, running.said.url))


def test_the_process_says_its_address_and_its_commands_reach_it(tmp_path: Path) -> None:
    (tmp_path / "home" / "run").mkdir(parents=True)
    _process(tmp_path)


@on_uvloop
async def _refused(tmp_path: Path, cert: str, key: str, said: str) -> None:
    environ = {"MODELPOOL_TLS_CERT_FILE": cert, "MODELPOOL_TLS_KEY_FILE": key}
    async with started(tmp_path, **environ) as running:
        assert isinstance(running.said, NotStarted)
        assert said in running.said.reason
        assert "MODELPOOL_TLS_CERT_FILE" in running.said.hint
        assert await running.process.wait() == 1


def test_a_process_that_cannot_use_its_files_names_the_one_at_fault(tmp_path: Path) -> None:
    files = made(tmp_path)
    _refused(
        tmp_path / "home", str(files.cert), str(tmp_path / "none"), f"{tmp_path}/none cannot be read: No such file"
    )


def test_files_that_do_not_fit_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, other, locked = made(tmp_path), made(tmp_path, "other"), made(tmp_path, "locked", password=b"secret")
    garbage = tmp_path / "garbage"
    garbage.write_text("garbage")
    for cert, key, said in [
        (files.cert, other.key, f"{other.key} is not the key of {files.cert}"),
        (garbage, files.key, f"{garbage} holds no certificate"),
        (files.cert, garbage, f"{garbage} holds no key"),
        (files.cert, locked.key, f"{locked.key} holds no key that can be read without a password"),
        (tmp_path, files.key, f"{tmp_path} cannot be read"),
        (files.cert, "", "set without a key"),
        ("", files.key, "set without a certificate"),
    ]:
        with pytest.raises(StartupError) as refused:
            server_context(str(cert), str(key))
        assert said in refused.value.reason
    assert server_context("", "") is None
    with pytest.raises(StartupError, match="garbage"):
        client_context(str(garbage))
    assert client_context("") is True
    monkeypatch.chdir(tmp_path)
    assert server_context("localhost.pem", "localhost.key") is not None


async def serial(world: World, trusted: Path) -> int:
    """Of the certificate that a new connection is shown."""
    _, writer = await asyncio.open_connection(*world.endpoint, ssl=own_context(str(trusted)))
    shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(shown).serial_number


@on_uvloop
async def _renewed(files: Files, other: Files) -> None:
    context = files.server()
    async with asyncio.TaskGroup() as tasks, gateway(tls=context) as world:
        keeping = tasks.create_task(keep_current(context, str(files.cert), str(files.key), every_s=0.005))
        client = await connected(world, files)
        first = await serial(world, files.cert)
        files.cert.write_bytes(other.cert.read_bytes())  # for a moment it does not fit the key
        await asyncio.sleep(0.05)
        files.key.write_bytes(other.key.read_bytes())
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(ssl.SSLCertVerificationError):
                    if (second := await serial(world, other.cert)) != first:
                        break
        assert (await client.ask(request("GET", "/health"))).status == 200
        for wrong in (b"garbage", b""):
            files.key.write_bytes(wrong)
            await asyncio.sleep(0.05)
            assert await serial(world, other.cert) == second
        files.cert.unlink()
        await asyncio.sleep(0.05)
        assert await serial(world, other.cert) == second
        keeping.cancel()


def test_a_certificate_that_is_renewed_is_shown_to_new_clients_and_a_wrong_one_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    _renewed(made(tmp_path), made(tmp_path / "other"))


def test_workers_elsewhere_are_told_https() -> None:
    here = GatewaySettings(host="10.0.0.1", tls_cert_file="a", tls_key_file="b")
    assert here.urls_elsewhere == ("https://10.0.0.1:8000",)
