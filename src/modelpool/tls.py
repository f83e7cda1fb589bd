"""TLS of the gateway, and of those who connect to it."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

from modelpool.process import StartupError

log = logging.getLogger(__name__)

_HINT = "MODELPOOL_TLS_CERT_FILE and MODELPOOL_TLS_KEY_FILE name a certificate (with its chain) and its key, as PEM."


def server_context(cert_file: str, key_file: str) -> ssl.SSLContext | None:
    """None where neither is set. Raises StartupError that names the file at fault."""
    if not cert_file and not key_file:
        return None
    if not cert_file or not key_file:
        missing, there = ("key", cert_file) if cert_file else ("certificate", key_file)
        raise StartupError(f"{there} is set without a {missing}.", _HINT)
    cert, key = _readable(cert_file), _readable(key_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(cert, key, password=_no_password)
    except ssl.SSLError as error:
        raise StartupError(f"{_at_fault(cert, key, error)} ({error.reason or error}).", _HINT) from error
    return context


async def keep_current(context: ssl.SSLContext, cert_file: str, key_file: str, *, every_s: float = 5.0) -> None:
    """Have new connections see the files as they are by then, until cancelled. What cannot be used changes nothing."""
    seen = _versions(cert_file, key_file)
    while True:
        await asyncio.sleep(every_s)
        if (versions := _versions(cert_file, key_file)) == seen:
            continue
        seen = versions
        try:
            server_context(cert_file, key_file)  # tried elsewhere first: it might take the certificate and not the key
            context.load_cert_chain(_readable(cert_file), _readable(key_file), password=_no_password)
        except (StartupError, OSError) as error:  # also ssl's own, where they changed in between
            log.error("the certificate stays what it was: %s", error)
        else:
            log.info("%s was read again", cert_file)


def _versions(*files: str) -> list[tuple[int, ...] | None]:
    """What tells one content of each file from the next; None for one that is not there."""

    def version(path: Path) -> tuple[int, ...] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    return [version(Path(each).expanduser()) for each in files]


def client_context(ca_file: str) -> ssl.SSLContext | bool:
    """For httpx: trust those who are known, or only who is in `ca_file`. Raises StartupError."""
    if not ca_file:
        return True
    path = _readable(ca_file)
    try:
        return ssl.create_default_context(cafile=path)
    except ssl.SSLError as error:
        raise StartupError(
            f"{path} holds no certificates ({error.reason}).", "Correct MODELPOOL_TLS_CA_FILE."
        ) from error


def own_context(cert_file: str) -> ssl.SSLContext:
    """For httpx: trust just this certificate, whatever name it is for. Raises StartupError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    path = _readable(cert_file)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise StartupError(f"{path} holds no certificate ({error.reason}).", _HINT) from error
    return context


def _readable(file: str) -> Path:
    path = Path(file).expanduser().absolute()
    try:
        path.open("rb").close()
    except OSError as error:
        raise StartupError(f"{path} cannot be read: {error.strerror}.", _HINT) from error
    return path


def _at_fault(cert: Path, key: Path, error: ssl.SSLError) -> str:
    """Which of the two it is: OpenSSL does not say."""
    if error.reason == "KEY_VALUES_MISMATCH":
        return f"{key} is not the key of {cert}"
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cert)
    except ssl.SSLError:
        return f"{cert} holds no certificate"
    return f"{key} holds no key that can be read without a password"


def _no_password() -> str:
    """Instead of asking at the terminal, where nobody may be."""
    return ""
