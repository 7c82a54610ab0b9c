"""The base URL of a server, as callers write it and as the library uses it."""

from __future__ import annotations

from urllib.parse import urlsplit

from managed_vllm.errors import ConfigError


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
        raise ConfigError(f"base_url={url!r} is no http(s) URL such as http://127.0.0.1:8000/v1", field="base_url")
    return text if text.endswith("/v1") else f"{text}/v1"
