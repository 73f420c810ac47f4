"""The client of remote rewards against a real server that does as the script of each test says."""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate

import pytest
from aiohttp import web
from rewards.score_server import Server, script

from posttrain.errors import RecipeError, RewardError, RewardUnavailable
from posttrain.rewards.client import BACKOFF_BASE, BACKOFF_CAP, RETRY_AFTER_CAP, JsonClient, _retry_after
from posttrain.rewards.counts import counting

TIMEOUT = 0.2


def play(acts, calls=1, path="", check=None, **options):
    """Answers or errors of concurrent calls, what was counted, and the server."""

    async def run():
        async with Server(script(*acts)) as server:
            client = JsonClient("mine", server.url, timeout=TIMEOUT, **options)
            with counting() as counts:
                answers = await asyncio.gather(
                    *(client.post({"n": n}, path, check) for n in range(calls)), return_exceptions=True
                )
            await client.close()
            return answers, dict(counts), server

    return asyncio.run(run())


def test_an_answer_and_what_was_sent(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "tok-canary")
    answers, counts, server = play([{"score": 0.5}], path="/v1", token_env="MY_TOKEN", headers={"X-A": "b"})
    assert answers == [{"score": 0.5}]
    assert counts == {"requests": 1}
    method, path, body, headers = server.seen[0]
    assert (method, path, body) == ("POST", "/v1", {"n": 0})
    assert (headers["Authorization"], headers["X-A"]) == ("Bearer tok-canary", "b")
    assert headers["Content-Type"] == "application/json"


def test_every_fault_is_repeated_and_counted():
    faults = [503, "hang", "{", "drop", 500, 429, 408, "[]"]
    answers, counts, _ = play(faults, calls=8, retries=9, check=lambda answer: answer["score"])
    assert answers == [1] * 8
    assert counts == {
        "requests": 16,
        "retries": 8,
        "http_503": 1,
        "timeouts": 1,
        "garbage": 2,  # no JSON, and JSON that the check refuses
        "connection_errors": 1,
        "http_500": 1,
        "http_429": 1,
        "http_408": 1,
    }


@pytest.mark.parametrize("status", [400, 401, 404, 422, 302])
def test_what_will_not_get_better_is_not_repeated(status):
    (error,), counts, _ = play([(status, "no  such\nmodel" + "x" * 999, {"Location": "/"})])
    assert type(error) is RewardError
    assert f"status {status}" in str(error)
    assert "no such modelxxx" in str(error)
    assert len(str(error)) < 400
    assert counts == {"requests": 1, f"http_{status}": 1}


@pytest.mark.parametrize("fault", [503, 502, 504, 429, "hang", "drop"])
def test_a_server_that_is_away(fault):
    (error,), counts, server = play([fault] * 2, retries=1)
    assert type(error) is RewardUnavailable
    assert str(error).startswith(f"{server.url} failed (2 attempts in ")
    assert counts["requests"] == 2


def test_nobody_is_listening():
    client = JsonClient("mine", "http://127.0.0.1:9/score?key=k1", timeout=TIMEOUT, retries=1)
    with pytest.raises(RewardUnavailable, match=r"^http://127.0.0.1:9/score failed .*Connect"):
        asyncio.run(client.get())


@pytest.mark.parametrize("script", [[500, 500], ["{", "{"], [503, 500], ["{", 503]])
def test_a_server_that_is_there_and_fails(script):
    (error,), _, _ = play(script, retries=1)
    assert type(error) is RewardError


def test_one_bad_sample_among_good_ones_is_no_outage():
    async def run():
        async with Server(lambda body: 503 if body["n"] == 0 else {"score": 1}) as server:
            client = JsonClient("mine", server.url, timeout=TIMEOUT)
            bad = asyncio.ensure_future(client.post({"n": 0}))
            while not bad.done():
                await client.post({"n": 1})
                await asyncio.sleep(0.01)
            await client.close()
            return bad.exception()

    error = asyncio.run(run())
    assert type(error) is RewardError
    assert "status 503" in str(error)


def test_a_token_is_in_no_message(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "tok-canary")
    (error,), _, _ = play([(401, "bad token tok-canary", {})], token_env="MY_TOKEN")
    assert "bad token …" in str(error)
    assert "canary" not in str(error)
    client = JsonClient("mine", "http://me:canary@127.0.0.1:9/?key=canary", timeout=TIMEOUT, retries=0)
    with pytest.raises(RewardUnavailable) as away:
        asyncio.run(client.get())
    assert "canary" not in str(away.value)
    monkeypatch.delenv("MY_TOKEN")
    with pytest.raises(RecipeError, match="'mine': the environment variable MY_TOKEN is not set"):
        JsonClient("mine", "http://a", token_env="MY_TOKEN")


@pytest.mark.parametrize("url", ["node1:8000", "ftp://node1", "http://", "score"])
def test_what_is_no_address(url):
    with pytest.raises(RecipeError, match="is not an address like"):
        JsonClient("mine", url)


def test_a_server_says_when_to_come_back():
    (answer,), _, server = play([(503, "", {"Retry-After": "1"})])
    assert answer == {"score": 1}
    assert server.times[1] - server.times[0] >= 1.0


def test_retry_after_is_a_number_or_a_date():
    assert _retry_after(None) == 0.0
    assert _retry_after("2.5") == 2.5
    assert _retry_after("86400") == RETRY_AFTER_CAP
    assert 15 < _retry_after(formatdate(time.time() + 20, usegmt=True)) <= 20
    assert _retry_after(formatdate(time.time() - 20, usegmt=True)) == 0.0
    for nonsense in ("soon", "nan", "inf", "-1", ""):
        assert _retry_after(nonsense) == 0.0


def test_waits_are_spread_over_a_range_that_doubles():
    client = JsonClient("mine", "http://a")
    for attempt, longest in enumerate([BACKOFF_BASE, 2 * BACKOFF_BASE, 4 * BACKOFF_BASE]):
        waits = [client._backoff(attempt) for _ in range(400)]
        assert min(waits) < 0.1 * longest
        assert 0.9 * longest < max(waits) <= longest
    assert max(client._backoff(50) for _ in range(400)) <= BACKOFF_CAP


def test_a_rate_is_kept_by_all_calls_together():
    answers, _, server = play([503], calls=5, rate=20.0)
    assert answers == [{"score": 1}] * 5
    assert len(server.times) == 6
    # However late a request is, it is never early: the last starts after five twentieths of a second.
    assert server.times[-1] - server.times[0] >= 0.2


def test_patience_covers_every_attempt_and_wait():
    assert JsonClient("mine", "http://a", timeout=10, retries=0).patience() == 10
    assert JsonClient("mine", "http://a", timeout=10, retries=2).patience() == 3 * 10 + 2 * RETRY_AFTER_CAP
    assert JsonClient("mine", "http://a", timeout=10, retries=0, rate=2).patience(32) == 10 + 16


def test_over_a_unix_socket(tmp_path):
    async def run():
        app = web.Application()
        app.router.add_get("/health", lambda request: web.json_response({"ok": True}))
        runner = web.AppRunner(app)
        await runner.setup()
        path = str(tmp_path / "s")
        await web.UnixSite(runner, path).start()
        client = JsonClient("mine", "http://localhost", socket=path, timeout=TIMEOUT)
        answer = await client.get("/health")
        await client.close()
        await runner.cleanup()
        return answer

    assert asyncio.run(run()) == {"ok": True}


@pytest.mark.parametrize("retries", [0, 1])
def test_a_request_that_hangs_while_others_are_answered_is_no_outage(retries):
    """What a server cannot answer must not be waited for: it will not be answered later either."""

    async def run():
        async with Server(lambda body: "hang" if body["n"] == 0 else {"score": 1}) as server:
            client = JsonClient("mine", server.url, timeout=TIMEOUT, retries=retries)
            answers = await asyncio.gather(*(client.post({"n": n}) for n in range(3)), return_exceptions=True)
            await client.close()
            return answers

    error, *others = asyncio.run(run())
    assert type(error) is RewardError
    assert others == [{"score": 1}] * 2
