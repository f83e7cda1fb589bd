"""Forms are read as python-multipart reads them, by which vLLM does."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from python_multipart.multipart import MultipartParser, parse_options_header

from modelpool.errors import InvalidRequest
from modelpool.gateway.body import model_of_form
from modelpool.relay.form import LOOKALIKES_MAX, MalformedForm, fields

TYPE = b"multipart/form-data; boundary=b0"

VALUES = st.binary(max_size=40) | st.sampled_from([b"--b0", b"\r\n--b", b"\r\n--b0x", b"\r\n", b"\r\n\r\n", b"--"])


def field(name: str, value: bytes, *, more: str = "") -> bytes:
    return f'--b0\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b0--\r\n"


def read(body: bytes, content_type: bytes = TYPE) -> list[tuple[str, str | None, bytes]]:
    return [(each.name, each.filename, body[each.start : each.end]) for each in fields(content_type, body)]


def read_by_vllm(body: bytes) -> list[tuple[str, str | None, bytes]]:
    """The same by python-multipart. Raises ValueError."""
    found: list[tuple[str, str | None, bytes]] = []
    header, disposition, value = b"", b"", b""

    def on_part_begin() -> None:
        nonlocal disposition, value
        disposition = value = b""

    def on_header_begin() -> None:
        nonlocal header
        header = b""

    def on_header_field(data: bytes, start: int, end: int) -> None:
        nonlocal header
        header += data[start:end]

    def on_header_value(data: bytes, start: int, end: int) -> None:
        nonlocal disposition
        if header.lower() == b"content-disposition":
            disposition += data[start:end]

    def on_part_data(data: bytes, start: int, end: int) -> None:
        nonlocal value
        value += data[start:end]

    def on_part_end() -> None:
        _, options = parse_options_header(disposition)
        name = options.get(b"filename")
        found.append((options[b"name"].decode(), None if name is None else name.decode(), value))

    parser = MultipartParser(
        b"b0",
        {
            "on_part_begin": on_part_begin,
            "on_header_begin": on_header_begin,
            "on_header_field": on_header_field,
            "on_header_value": on_header_value,
            "on_part_data": on_part_data,
            "on_part_end": on_part_end,
        },
    )
    parser.write(body)
    parser.finalize()
    return found


@given(st.lists(st.tuples(st.sampled_from(["model", "file", "a b", "ü"]), VALUES), max_size=4), st.binary(max_size=9))
def test_what_is_read_is_what_vllm_reads(parts: list[tuple[str, bytes]], behind: bytes) -> None:
    body = form(*(field(name, value) for name, value in parts)) + behind
    try:
        ours = read(body)
    except MalformedForm:
        with pytest.raises((ValueError, KeyError)):
            read_by_vllm(body)  # a value may hold a boundary
        return
    assert ours == read_by_vllm(body)


@given(st.binary(max_size=120))
def test_no_bytes_do_anything_else_than_be_read_or_refused(noise: bytes) -> None:
    for body in (noise, form(field("file", noise)), b"--b0" + noise, field("a", b"")[:-6] + noise):
        try:
            read(body)
        except MalformedForm:
            continue


@pytest.mark.parametrize(
    "content_type",
    [
        b'multipart/form-data; boundary="b0"',
        b"Multipart/Form-Data;boundary=b0",
        b"multipart/form-data; charset=utf-8; boundary=b0;",
    ],
)
def test_the_boundary_is_found_however_it_is_written(content_type: bytes) -> None:
    assert read(form(field("model", b"m")), content_type) == [("model", None, b"m")]


def test_parameters_are_read_whole() -> None:
    hidden = '; filename="x; name=\\"model\\".wav"'
    extended = "; filename*=utf-8''%e2%82.wav"
    body = form(field("file", b"1", more=hidden), field("file", b"2", more=extended), field("file", b"3"))
    names = [(name, filename) for name, filename, _ in read(body)]
    assert names == [("file", 'x; name="model".wav'), ("file", "utf-8''%e2%82.wav"), ("file", None)]


@pytest.mark.parametrize("first", ["model", "file"])
def test_the_model_is_found_before_and_after_the_file(first: str) -> None:
    request = httpx.Request(
        "POST", "http://x", files=[("file", ("a.wav", b"\r\n--" * 100)), ("model", (None, b"org/whisper"))]
    )
    if first == "model":
        request = httpx.Request("POST", "http://x", data={"model": "org/whisper"}, files={"file": b"x" * 1000})
    content_type = request.headers["content-type"].encode()
    assert model_of_form(content_type, request.read()) == "org/whisper"


@pytest.mark.parametrize(
    ("content_type", "body", "said", "param"),
    [
        (TYPE, form(field("file", b"x")), "`model` is missing", "model"),
        (TYPE, form(field("model", b"")), "`model` is missing", "model"),
        (TYPE, form(field("model", b"\xff")), "UTF-8", "model"),
        (TYPE, form(field("model", b"m"), field("model", b"n")), "more than once", "model"),
        (TYPE, form(field("model", b"m", more='; filename="m"')), "got a file", "model"),
        (TYPE, form(*[field("x", b"")] * 1001), "more than 1000 fields", None),
        (TYPE, field("model", b"m"), "breaks off", None),
        (TYPE, form(field("file", b"\r\n--b0x" * LOOKALIKES_MAX)), "breaks off", None),
        (TYPE, b"", "does not begin", None),
        (TYPE, b"--b0\r\nContent-Type: text/plain\r\n\r\nx\r\n--b0--\r\n", "no name", None),
        (TYPE, b"--b0\r\nContent-Disposition: form-data; name=\r\n\r\nx\r\n--b0--\r\n", "makes no sense", None),
        (TYPE, b"--b0\r\nContent-Disposition: form-data; name=a; name=b\r\n\r\nx\r\n--b0--\r\n", "twice", None),
        (TYPE, b"--b0\r\n" + b"x" * 20_000, "no end", None),
        (TYPE, b"--b0 x\r\n", "behind its boundary", None),
        (b"multipart/form-data", form(), "no boundary", None),
        (b"application/json", b'{"model": "m"}', "not multipart/form-data", None),
        (b"", b"", "not multipart/form-data", None),
    ],
)
def test_a_refusal_says_what_is_wrong(content_type: bytes, body: bytes, said: str, param: str | None) -> None:
    with pytest.raises(InvalidRequest, match=said) as refusal:
        model_of_form(content_type, body)
    assert refusal.value.param == param
    assert refusal.value.code == ("invalid_request" if param else "invalid_form")
