"""What is redacted, and that nothing else is."""

import json
import time
from pathlib import Path

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


@pytest.mark.parametrize(
    "url",
    [
        "https://discord.com/api/webhooks/1/hunter2",
        "https://canary.discord.com/api/v10/webhooks/1/hunter2/slack",
        "HTTPS://DISCORDAPP.COM:443//api/webhooks/1/hunter2",
        "https://hooks.slack.com/services/T0/B0/hunter2",
        "https://hooks.slack.com/workflows/T0/A0/1/hunter2",
        "https://hooks.slack-gov.com/services/T0/B0/hunter2",
        "https://contoso.webhook.office.com/webhookb2/hunter2@1/IncomingWebhook/a/b",
        "https://outlook.office365.com/webhook/hunter2@1/IncomingWebhook/a/b",
        "https://prod-01.westus.logic.azure.com:443/workflows/a/triggers/manual/paths/invoke?sv=1.0&sig=hunter2",
        "https://default1.2.environment.api.powerplatform.com:443/powerautomate/automations/direct/workflows/a?sig=hunter2",
        "https://chat.example.org/hooks/hunter2",
        "http://localhost:8065/hooks/hunter2",
        "https://rocket.example.org/hooks/1/hunter2",
        "https://chat.googleapis.com/v1/spaces/A/messages?key=a&token=hunter2",
        "https://open.feishu.cn/open-apis/bot/v2/hook/hunter2",
        "https://open.larksuite.com/open-apis/bot/v2/hook/hunter2",
        "https://oapi.dingtalk.com/robot/send?access_token=hunter2",
        "https://qyapi.weixin.qq.com/cgi-bin/webhook/send?key=hunter2",
        "https://api.telegram.org/bot1:hunter2/sendMessage?chat_id=1",
        "https://hooks.zapier.com/hooks/catch/1/hunter2/",
        "https://maker.ifttt.com/trigger/a/with/key/hunter2",
        "https://hook.eu1.make.com/hunter2",
        "https://n8n.example.org/webhook-test/hunter2",
        "https://home.example.org/api/webhook/hunter2",
        "https://zulip.example.org/api/v1/external/json?api_key=hunter2",
        "https://webexapis.com/v1/webhooks/incoming/hunter2",
        "https://hooks.chime.aws/incomingwebhooks/a?token=hunter2",
        "https://events.pagerduty.com/integration/hunter2/enqueue",
        "https://hc-ping.com/hunter2",
        "https://ntfy.sh/hunter2",
        "https://func.azurewebsites.net/api/a?code=hunter2",
        "https://bucket.s3.amazonaws.com/a?X-Amz-Signature=hunter2",
        "hooks.slack.com/services/T0/B0/hunter2",
        "discord.com/api/webhooks/1/hunter2",
    ],
)
def test_every_known_webhook_is_redacted_wherever_it_stands(url: str) -> None:
    for text in (url, f"runs/{Path(url)}: No such file", f'{{"a": "{url}"}}', f"({url})", f"--run_name={url} --lr 1"):
        shown = redact_text(text)
        assert "hunter2" not in shown
        assert len(shown) > 3 or text == url
    assert redact(["--run_name", url, "--lr", "1"]) == ["--run_name", "***", "--lr", "1"]


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/datasets/a/resolve/main/b.txt?download=true",
        "https://github.com/a/webhook-docs",
        "https://discord.com/invite/a",
        "https://wandb.ai/a/b/runs/c",
        "runs/gpt2/hooks/checkpoint_step_4: a.b/c:/d",
        "train/loss 3.5 (12:30:01/eval) s3://bucket/x",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact_text(text) == text


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
    texts = ["a" * 300_000 + "://x " + "b.c-d" * 100_000, "x://y" * 20_000, "a." * 100_000, "www" * 100_000 + "/hooks/"]
    began = time.process_time()
    for text in texts:
        assert redact_text(text) == text
    assert time.process_time() - began < 2
