"""The base URL of a server and its key, as callers write them and as the library uses them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from managed_vllm.errors import ConfigError
from managed_vllm.masking import Secret, without_passwords


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


def checked_api_key(key: str | Secret) -> Secret:
    """The key as a secret. Raises `ConfigError` unless it can stand in an HTTP header: printable ASCII, no spaces."""
    if isinstance(key, Secret) and key.left_behind:
        raise ConfigError("api_key was left behind when it was pickled; give it again", field="api_key")
    text: object = key.reveal() if isinstance(key, Secret) else key
    if not isinstance(text, str) or not re.fullmatch(r"[!-~]+", text):
        raise ConfigError("api_key must be a non-empty word of ASCII characters", field="api_key")
    return Secret(text)
