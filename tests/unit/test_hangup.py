from __future__ import annotations

import socket

import pytest

from modelpool.engines.hangup import hung_up, on_hangup


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_an_end_is_seen_behind_what_was_sent_before_it(kind: socket.SocketKind) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours:
        assert not hung_up(ours)
        theirs.send(b"unread")
        assert not hung_up(ours)
        theirs.close()
        assert hung_up(ours)
        assert ours.recv(16) == b"unread"


def test_the_end_interrupts_whatever_runs_in_the_block() -> None:
    class Gone(Exception):
        pass

    def act() -> None:
        raise Gone

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.send(b"unread")

    def busy() -> None:
        with on_hangup(ours, act):
            theirs.close()
            while True:
                pass

    with ours, pytest.raises(Gone):
        busy()
