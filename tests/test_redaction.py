"""What is redacted, and that nothing else is."""

import json
import time

import pytest

from trainer.command_line.secrets import redact, redact_text, without_urls


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        ("--alert_webhook https://x.org/a --lr 1", "--alert_webhook *** --lr 1"),
        ("--alert-webhook=https://x.org/a?b=c run", "--alert-webhook=*** run"),
        ("--hf_token YWJj== --api_key=a=b --d 2", "--hf_token *** --api_key=*** --d 2"),
        ("WANDB_API_KEY=abc --db.Password pw", "WANDB_API_KEY=*** --db.Password ***"),
        ("--max_tokens 5 --tokenizer gpt2 --keep_last 3", "--max_tokens 5 --tokenizer gpt2 --keep_last 3"),
        ("--alert_webhook --quick yes", "--alert_webhook --quick yes"),
        ("--url https://me:pw@host/x --u=http://tok@h", "--url *** --u=***"),
        ("x https://ptb.discord.com/api/webhooks/1/abc https://hooks.slack.com/services/T/B/x", "x *** ***"),
        ("--data https://huggingface.co/datasets/a", "--data https://huggingface.co/datasets/a"),
    ],
)
def test_secrets_are_redacted_and_the_rest_is_kept(argv: str, shown: str) -> None:
    assert redact(argv.split()) == shown.split()


def test_redacted_text_stays_json() -> None:
    text = json.dumps({"a": "https://discord.com/api/v10/webhooks/1/abc", "b": 'see "http://u:p@h/x"', "c": 1})
    assert json.loads(redact_text(text)) == {"a": "***", "b": 'see "***"', "c": 1}


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("https://chat.example.org/x y", "***"),
        ("--alert_webhok=HTTP://x/y", "--alert_webhok=***"),
        ("data/wiki", "data/wiki"),
        ("a: b//c", "a: b//c"),
    ],
)
def test_an_error_repeats_no_url(word: str, shown: str) -> None:
    assert without_urls(word) == shown


def test_a_long_text_takes_no_time() -> None:
    text = "a" * 300_000 + "://x " + "b.c-d" * 100_000
    began = time.process_time()
    assert redact_text(text) == text
    assert time.process_time() - began < 1
