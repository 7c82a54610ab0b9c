"""The base URL of a server and its key, as callers write them and as the library uses them."""

from __future__ import annotations

import ipaddress
import re
import socket
from urllib.parse import quote, urlsplit

from managed_vllm.errors import ConfigError
from managed_vllm.masking import Secret, without_passwords
from managed_vllm.status import Connection, is_loopback


def normalized_url(url: str) -> str:
    """The URL with scheme and `/v1`, without a trailing slash: `localhost:8000/` → `http://localhost:8000/v1`.

    Raises `ConfigError` (`field` is "base_url") for what is no http(s) URL.
    """
    text = url.strip()
    text = (text if "://" in text else f"http://{text}").rstrip("/")
    parts = urlsplit(text)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(
            f"base_url={without_passwords(url)!r} is no http(s) URL such as http://127.0.0.1:8000/v1", field="base_url"
        )
    return text if text.endswith("/v1") else f"{text}/v1"


def url_with_key(connection: Connection) -> str:
    """The server's URL, without `/v1`, with the key as a password. Raises `ConfigError` if it listens on a socket."""
    if connection.uds is not None:
        raise ConfigError("a server on a Unix socket has no URL that others can use; leave uds= out", field="uds")
    scheme, _, rest = connection.base_url.removesuffix("/v1").partition("://")
    key = connection.api_key.reveal()
    return f"{scheme}://managed:{quote(key, safe='')}@{rest}" if key and "@" not in rest else f"{scheme}://{rest}"


def checked_api_key(key: str | Secret) -> Secret:
    """The key as a secret. Raises `ConfigError` unless it can stand in an HTTP header: printable ASCII, no spaces."""
    if isinstance(key, Secret) and key.left_behind:
        raise ConfigError("api_key was left behind when it was pickled; give it again", field="api_key")
    text: object = key.reveal() if isinstance(key, Secret) else key
    if not isinstance(text, str) or not re.fullmatch(r"[!-~]+", text):
        raise ConfigError("api_key must be a non-empty word of ASCII characters", field="api_key")
    return Secret(text)


def is_this_machine(host: str) -> bool:
    """Whether a host is this very machine, as far as can be told without asking a name server: no proxy gets to see it.

    Loopback, the machine's own name and addresses, and `0.0.0.0`, which stands in vLLM's log.
    """
    bare = host.removeprefix("[").removesuffix("]").removesuffix(".").lower()
    if is_loopback(bare) or bare.endswith(".localhost") or bare == socket.gethostname().lower():
        return True
    try:
        address = ipaddress.ip_address(bare.partition("%")[0])
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified or _is_own(address)


def _is_own(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Only addresses of the machine itself can be bound."""
    try:
        with socket.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True
