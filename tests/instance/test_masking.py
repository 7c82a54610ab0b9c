"""Secrets: what is one, and that none is shown, stored or sent by accident."""

from __future__ import annotations

import copy
import json
import pickle
import random

import pytest

from managed_vllm.errors import ConfigError
from managed_vllm.masking import (
    Redactor,
    Secret,
    is_secret_name,
    masked,
    masked_words,
    passwords_in,
    protect,
    reveal,
    starred,
    without_passwords,
)
from managed_vllm.urls import checked_api_key

VALUE = "s3cr3t-value"


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN HUGGING_FACE_HUB_TOKEN hf_token token access_token AWS_SESSION_TOKEN",
        "api_key apiKey APIKey OPENAI_API_KEY --api-key X-Api-Key api_keys key license_key",
        "AWS_SECRET_ACCESS_KEY awsSecretAccessKey client_secret DB_PASSWORD MYSQL_PWD ssh_passphrase",
        "Authorization SENTRY_DSN GOOGLE_CREDENTIALS",
    ],
)
def test_these_names_are_secrets(name: str) -> None:
    assert [word for word in name.split() if not is_secret_name(word)] == []


@pytest.mark.parametrize(
    "name",
    [
        "max_num_batched_tokens max_tokens num_speculative_tokens long_prefill_token_threshold",
        "tokenizer tokenizer_mode skip_tokenizer_init TOKENIZERS_PARALLELISM return_tokens_as_token_ids",
        "eos_token image_token image_token_id stop_token_ids",
        "HF_TOKEN_PATH ssl_keyfile PWD OLDPWD keep_alive cache_key monkey SSH_AUTH_SOCK AWS_ACCESS_KEY_ID",
    ],
)
def test_these_names_are_no_secrets(name: str) -> None:
    assert [word for word in name.split() if is_secret_name(word)] == []


def test_a_secret_prints_as_stars_and_only_reveal_gives_it() -> None:
    secret = Secret(VALUE)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r:>20}", "%s" % secret, repr({"a": [secret]})]  # noqa: UP031
    assert VALUE not in " ".join(shown)
    assert secret.reveal() == VALUE
    assert Secret(secret) == secret == Secret(VALUE) != Secret("another")
    assert copy.deepcopy(secret).reveal() == VALUE
    with pytest.raises(TypeError):
        json.dumps(secret)


def test_a_pickled_secret_is_left_behind_and_says_so() -> None:
    data = pickle.dumps(Secret(VALUE))
    assert VALUE.encode() not in data
    left_behind = pickle.loads(data)
    assert repr(left_behind) == "***"
    with pytest.raises(LookupError, match="left behind"):
        left_behind.reveal()
    with pytest.raises(ConfigError, match="left behind"):
        checked_api_key(left_behind)


def test_nested_secrets_are_protected_masked_and_revealed() -> None:
    plain = {
        "max_num_batched_tokens": 4096,
        "kv_transfer_config": {"extra": [{"api_key": VALUE}], "engine_id": "one"},
        "watermark_config": {"key": 123456},
        "hf_token": True,
        "proxies": {"https": f"http://user:{VALUE}@proxy:1"},
    }
    protected = protect(plain)
    assert reveal(protected) == plain
    assert isinstance(protected["watermark_config"]["key"], Secret)
    hidden = masked(protected)
    assert VALUE not in json.dumps(hidden)
    assert "123456" not in json.dumps(hidden)
    assert hidden == masked(plain) == masked(hidden)
    assert (hidden["max_num_batched_tokens"], hidden["hf_token"]) == (4096, True)
    assert "sha256" not in json.dumps(starred(hidden))
    assert masked({"api_key": "one"}) != masked({"api_key": "two"})
    assert "sha256:abc" not in str(masked({"api_key": "sha256:abc"}))


def test_a_url_with_a_password_is_a_secret_whatever_its_name() -> None:
    url = f"https://me:{VALUE}@host/x"
    assert protect({"HTTPS_PROXY": url, "HF_ENDPOINT": "https://host"}) == {
        "HTTPS_PROXY": Secret(url),
        "HF_ENDPOINT": "https://host",
    }
    assert passwords_in(f"{url} http://a:b@c") == [VALUE, "b"]


def test_a_command_line_is_shown_with_stars() -> None:
    words = f"""serve --model m --api-key {VALUE} --hf-token={VALUE} HF_TOKEN={VALUE} --max-num-seqs=4
        --kv-transfer-config {{"api_key":"{VALUE}"}} --x={{"a":{{"password":"{VALUE}"}}}} --proxy=http://u:{VALUE}@p/
        --hf-token --enforce-eager""".split()
    for in_file in (False, True):
        shown = masked_words(words, in_file=in_file)
        assert VALUE not in " ".join(shown)
        assert [word for word in words if VALUE not in word] == [word for word in shown if word in words]
    assert VALUE not in masked_words([f"Authorization: Bearer {VALUE}"])[0]
    assert without_passwords("http://host:80/a@b") == "http://host:80/a@b"


def test_a_redactor_finds_secrets_wherever_a_stream_is_cut() -> None:
    secrets = [VALUE, f"{VALUE}-longer", "other-secret"]
    text = f"a {VALUE} b {VALUE}-longer other-secret s3cr3t {VALUE[:-1]}!{VALUE}{VALUE} s3cr3t-v".encode()
    whole = Redactor(secrets)
    expected = whole.feed(text) + whole.rest()
    assert expected.count(b"***") == 5
    for seed in range(200):
        cuts = sorted(random.Random(seed).choices(range(len(text)), k=6))
        redactor = Redactor(secrets)
        parts = [redactor.feed(text[i:j]) for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert b"".join(parts) + redactor.rest() == expected
    assert Redactor([]).feed(text) == text
    assert Redactor(["short"]).feed(b"a short word") == b"a short word"
