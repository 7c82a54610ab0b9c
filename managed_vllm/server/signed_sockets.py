"""TCP sockets that only answer those who know a key: the kernel signs each segment, and drops what is not signed.

Loopback belongs to every user of the machine, and a program that others wrote can't be made to listen elsewhere. Its
sockets can be signed, though (RFC 2385, `TCP_MD5SIG_EXT`; Linux 4.14, with `CONFIG_TCP_MD5SIG` as distributions have
it): without the key nobody's first segment is answered, so that for all others there is no such port.
"""

from __future__ import annotations

import secrets
import socket
import struct

_TCP_MD5SIG_EXT = 32
_FLAG_PREFIX = 1
_ADDRESS_BYTES = 128  # struct sockaddr_storage
KEY_BYTES = 80
"""The longest that the kernel takes."""


def new_key() -> bytes:
    """A random key."""
    return secrets.token_bytes(KEY_BYTES)


def sign(one: socket.socket, key: bytes) -> None:
    """From now on an IPv4 socket speaks and listens to those with this key only, wherever they are.

    What a listening socket had accepted before stays as it was. Raises `OSError` where the kernel can't do it.
    """
    anywhere = struct.pack("=H", socket.AF_INET).ljust(_ADDRESS_BYTES, b"\0")
    prefix_bits = interface = 0
    how = struct.pack("=BBHi80s", _FLAG_PREFIX, prefix_bits, len(key), interface, key)
    one.setsockopt(socket.IPPROTO_TCP, _TCP_MD5SIG_EXT, anywhere + how)


def why_unsupported() -> str:
    """Why this machine's kernel has no signed sockets; empty if it has."""
    with socket.socket() as probe:
        try:
            sign(probe, new_key())
        except (OSError, AttributeError) as error:
            return f"the kernel can't sign TCP segments (TCP_MD5SIG): {error}"
    return ""
