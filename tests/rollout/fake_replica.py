"""A stand-in for `vllm serve`: its endpoints, and completions that depend on prompt, seed and weights alone.

A prompt that begins with one of the token ids below is answered as their names say.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from pathlib import Path

from aiohttp import web

REFUSED, BROKEN, BUSY_ONCE, NO_IDS = 900, 901, 902, 903


def tokens_for(weights: str, body: dict) -> list[int]:
    key = f"{weights} {body['model']} {body['prompt']} {body['seed']}".encode()
    return list(hashlib.sha256(key).digest()[: min(body["max_tokens"], 32)])


def make_app(args: argparse.Namespace) -> web.Application:
    state = {"weights": "initial", "busy": set(), "adapters": set()}
    routes = web.RouteTableDef()

    @routes.get("/health")
    async def health(_: web.Request) -> web.Response:
        return web.Response()

    @routes.get("/v1/models")
    async def models(_: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "base", "max_model_len": 64}]})

    @routes.post("/v1/completions")
    async def completions(request: web.Request) -> web.Response:
        body = await request.json()
        if args.log:
            with args.log.open("a") as log:
                log.write(f"{request.headers.get('Authorization')}\n")
        await asyncio.sleep(args.slow)
        first = body["prompt"][0]
        if first == REFUSED:
            return web.json_response({"error": "prompt not liked"}, status=400)
        if first == BROKEN:
            return web.json_response({"error": "cannot"}, status=500)
        if first == BUSY_ONCE and body["seed"] not in state["busy"]:
            state["busy"].add(body["seed"])
            return web.json_response({"error": "busy"}, status=429)
        tokens = tokens_for(state["weights"], body)
        choice = {"token_ids": tokens, "logprobs": {"token_logprobs": [-0.5] * len(tokens)}}
        if first == NO_IDS:
            choice = {"text": "hello"}
        return web.json_response({"choices": [{**choice, "finish_reason": "length"}]})

    @routes.post("/collective_rpc")
    async def collective_rpc(request: web.Request) -> web.Response:
        body = await request.json()
        digest = hashlib.sha256()
        for path in sorted(Path(body["args"][0]).glob("*.safetensors")):
            digest.update(path.read_bytes())
        found = "wrong" if args.wrong else digest.hexdigest()
        if body["method"] == "load_weight_files":
            state["weights"] = found
        return web.json_response({"results": [{"checksum": found}]})

    @routes.post("/reset_prefix_cache")
    async def reset(_: web.Request) -> web.Response:
        return web.json_response({"success": True})

    @routes.post("/v1/{act}_lora_adapter")
    async def adapters(request: web.Request) -> web.Response:
        if not args.lora:
            return web.json_response({"error": "Not Found"}, status=404)
        name = (await request.json())["lora_name"]
        (state["adapters"].add if request.match_info["act"] == "load" else state["adapters"].discard)(name)
        return web.Response(text="done")

    app = web.Application()
    app.add_routes(routes)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--wrong", action="store_true")
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    web.run_app(make_app(options), host="127.0.0.1", port=options.port, print=None)
