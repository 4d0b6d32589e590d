"""Credentials: hidden where a text is shown, refused where one stands in a definition."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envs.decisions.credentials import check_credentials, check_env_vars, redacted
from ray_envs.decisions.policy import check_definition
from ray_envs.errors import InvalidInput, InvalidPackages
from ray_envs.settings import Settings
from ray_envs.specs import Definition

COMMIT = "0123456789abcdef0123456789abcdef01234567"


# -- what is shown


def test_a_secret_with_an_at_sign_is_redacted_whole() -> None:
    assert redacted("at https://user:pa@ss@host/x") == "at https://***@host/x"


def test_what_is_no_credential_is_kept() -> None:
    for text in (
        "ray @ https://host/ray.whl",
        "see https://host/@scope/x",
        "mail a@b.example",
        f"git+https://host:8443/x@{COMMIT}",
        f"git+https://[::1]:80/x@{COMMIT}",
        '{"url": "http://h:8000", "mail": "a@b"}',
        "https://host/x?page=2&monkey=1&signed=no#sha256=ab",
        "password=kept outside of a URL; authorization failed",
    ):
        assert redacted(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("`http://u:a/b@h/s`: invalid port", "`http://***@h/s`: invalid port"),
        ("url (http://h/s?token=s3cret) for", "url (http://h/s?token=***) for"),
        ("http://h/s?a=1&sig=s3cret&b=2#c", "http://h/s?a=1&sig=***&b=2#c"),
        ("http://h/s?X-Amz-Signature=s3cret", "http://h/s?X-Amz-Signature=***"),
        ("http://h/s?private_token=****", "http://h/s?private_token=***"),
        ("> Authorization: Basic czNjcmV0", "> Authorization: Basic ***"),
        ("'Proxy-Authorization: s3cret'", "'Proxy-Authorization: ***'"),
    ],
)
def test_what_lets_somebody_in_is_redacted_and_the_rest_stays_readable(
    text: str, shown: str
) -> None:
    assert redacted(text) == shown


secrets = st.from_regex(r"[A-Za-z0-9%._~!$*+=-]{4,20}", fullmatch=True).map("s3cret".__add__)
paths = st.from_regex(r"(/[a-z]{1,5}){0,3}", fullmatch=True)
hosts = st.from_regex(r"[a-z]{1,8}(\.[a-z]{2,5})?(:[0-9]{2,4})?", fullmatch=True)


@given(
    st.text(alphabet="ab :/@?&`'(),\n", max_size=8),
    secrets,
    hosts,
    paths,
    st.sampled_from(
        ["{0}@{1}{2}", "u:{0}@{1}{2}", ":{0}@{1}{2}", "u:{0}/x@{1}{2}", "{1}{2}?token={0}"]
    ),
)
def test_no_secret_of_a_url_is_shown_or_accepted_wherever_it_stands(
    around: str, secret: str, host: str, path: str, form: str
) -> None:
    text = f"{around} https://{form.format(secret, host, path)} {around}"
    shown = redacted(text)
    assert "s3cret" not in shown
    assert host.partition(":")[0] in shown
    assert redacted(shown) == shown
    with pytest.raises(InvalidPackages, match="credentials") as caught:
        check_credentials(text.strip(), InvalidPackages, where="x")
    assert "s3cret" not in str(caught.value)


# -- variables


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE", "postgresql://me:s3cret@h/db"),
        ("HTTPS_PROXY", "http://me:s3cret@h:3128"),
        ("INDEX", "https://s3cret@h/simple"),
        ("ENDPOINT", "https://h/x?access_token=s3cret"),
        ("UV_INDEX_MINE_PASSWORD", "s3cret"),
        ("UV_INDEX_MINE_USERNAME", "s3cret"),
        ("UV_PUBLISH_TOKEN", "pypi-s3cret"),
        ("HF_TOKEN", "hf_s3cret00"),
        ("AWS_SECRET_ACCESS_KEY", "s3cret"),
        ("OPENAI_API_KEY", "s3cret"),
        ("PGPASSWORD", "s3cret"),
        ("password", "s3cret"),
        ("CLIENT_SECRET", "s3cret"),
        ("TLS_PRIVATE_KEY", "-----BEGIN\ns3cret"),
    ],
)
def test_a_secret_among_the_variables_is_refused_and_not_repeated(name: str, value: str) -> None:
    given_one = Definition(env_vars={"A": "1", name: value})
    with pytest.raises(InvalidInput) as caught:
        check_definition(given_one, Settings.from_environment({}), where="a.toml")
    assert caught.value.where == f"a.toml: env_vars.{name}"
    assert "s3cret" not in f"{caught.value} {caught.value.to_dict()}"
    assert "nodes" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"),
        ("PAD_TOKEN", "<|endoftext|>"),
        ("MASK_TOKEN", "[MASK]"),
        ("DB_PASSWORD", ""),
        ("API_KEY", "/run/secrets/key"),
        ("GITHUB_TOKEN", "~/.token-of-mine"),
        ("CLIENT_SECRET", "file:///run/secret"),
        ("PRIMARY_KEY", "customer_id"),
        ("CACHE_KEY", "abcdefghijkl"),
        ("AWS_ACCESS_KEY_ID_FILE", "abcdefgh"),
        ("MLFLOW_TRACKING_URI", "http://tracking:5000"),
        ("STORAGE", "abfss://container@account.example/x"),
        ("BROKERS", "redis://a:6379,b:6380/0"),
        ("LOGIN", "ssh://git@h/x"),
        ("DATABASE", "postgresql://reader@h/db"),
    ],
)
def test_a_variable_that_may_be_harmless_is_accepted(name: str, value: str) -> None:
    check_env_vars({name: value}, where="x")
