"""Policy: what may be shown, and what may stand in a definition and in a lock."""

from __future__ import annotations

from ray_envs.policy import redacted


def test_a_secret_with_an_at_sign_is_redacted_whole() -> None:
    assert redacted("at https://user:pa@ss@host/x") == "at https://***@host/x"


def test_what_is_no_credential_is_kept() -> None:
    for text in ("ray @ https://host/ray.whl", "see https://host/@scope/x", "mail a@b.example"):
        assert redacted(text) == text
