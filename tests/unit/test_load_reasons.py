"""An exception of vLLM as a line for people, also from another process."""

from __future__ import annotations

import logging
import os

import pytest

from modelpool.engines.vllm.reasons import RootCauses, is_generic, reason


class SafetensorError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("too long"), "too long"),
        (ValueError("first\n\n  second \nthird"), "first second"),
        (IndexError("list index out of range"), "IndexError: list index out of range"),
        (KeyError("no such parser"), "KeyError: no such parser"),
        (RuntimeError(), "RuntimeError"),
        (MemoryError(), "Out of memory: an allocation failed"),
        (SafetensorError("HeaderTooLarge"), "A weights file is damaged: HeaderTooLarge"),
        (RuntimeError("in a process:\nTraceback (most recent call last):\n  File x\nOSError: gone"), "OSError: gone"),
        (ValueError("Not supported. Supported architectures: a, b, c"), "Not supported."),
    ],
)
def test_an_error_becomes_a_line(error: Exception, says: str) -> None:
    assert reason(error) == says


def test_a_long_text_is_cut() -> None:
    assert len(reason(ValueError("x" * 10_000))) == 400


def test_what_vllm_says_of_a_process_that_failed_is_no_reason() -> None:
    assert is_generic(RuntimeError("Engine core initialization failed. See root cause above."))
    assert not is_generic(ValueError("too long"))


def _log(name: str, error: Exception) -> None:
    try:
        raise error
    except Exception:
        logging.getLogger(name).exception("failed")


def test_the_first_cause_in_a_child_process_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    causes = RootCauses()
    with causes.collected():
        pid = os.fork()
        if pid == 0:
            try:
                _log("vllm.v1.executor.multiproc_executor", ValueError("the real one"))
                _log("vllm.v1.engine.core", RuntimeError("WorkerProc initialization failed"))
                _log("vllm.v1.engine.core", ValueError("a later one"))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    assert causes.first() == "the real one"
    assert causes.first() is None


def test_nothing_is_collected_afterwards(caplog: pytest.LogCaptureFixture) -> None:
    causes = RootCauses()
    with causes.collected():
        pass
    _log("vllm.v1.engine.core", ValueError("another engine's"))
    assert causes.first() is None
