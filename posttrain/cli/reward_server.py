"""`posttrain rewards serve`: a reward model over HTTP, for any number of runs on any machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from posttrain.errors import RecipeError
from posttrain.recipe.rewards_schema import SERVER_SETTINGS, RewardModelConfig
from posttrain.recipe.spelling import did_you_mean
from posttrain.rewards.listen import bind_port, bind_socket

if TYPE_CHECKING:
    from posttrain.recipe.schema import Recipe
    from posttrain.rewards.model import RewardModel

PORT = 8000


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `serve`: where to listen, and the settings of a recipe's `reward_models`."""
    group = parser.add_argument_group("serve")
    group.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1)")
    group.add_argument("--port", type=int, default=PORT, help=f"port to listen at ({PORT})")
    group.add_argument("--socket", metavar="PATH", help="listen at a Unix domain socket instead")
    group.add_argument(
        "--token-env", metavar="NAME", help="environment variable: requests need its bearer token"
    )
    for name in SERVER_SETTINGS:
        about = "as the key of reward_models in a recipe"
        if name == "trust_remote_code":
            group.add_argument("--trust-remote-code", action="store_true", default=None, help=about)
        else:
            group.add_argument(f"--{name.replace('_', '-')}", metavar="VALUE", help=about)


def serve_model(args: argparse.Namespace, recipe: Recipe | None) -> None:
    """Load the model and serve it until a signal.

    Raises:
        RecipeError: a setting is wrong, or the address is taken.
        RewardError: the model cannot be loaded.
    """
    config = _config(args, recipe)
    token = None
    if args.token_env is not None and not (token := os.environ.get(args.token_env)):
        raise RecipeError(f"posttrain rewards serve: the environment variable {args.token_env} is not set.")
    listener = bind_socket(Path(args.socket)) if args.socket else bind_port(args.host, args.port)
    host = f"[{args.host}]" if ":" in args.host else args.host
    place = args.socket or f"http://{host}:{listener.getsockname()[1]}"

    from posttrain.rewards.serve import serve  # imports torch

    def ready(model: RewardModel) -> None:
        print(f"Serving {config.path} ({model.head}, {model.dtype} on {model.device}) at {place}", flush=True)

    serve(config, listener, token=token, ready=ready)


def _config(args: argparse.Namespace, recipe: Recipe | None) -> RewardModelConfig:
    """The model: of the recipe, or at a path, with what the options say."""
    name = args.words[0]
    given = {key: value for key in SERVER_SETTINGS if (value := getattr(args, key)) is not None}
    settings: dict[str, Any] = {"path": name}
    if recipe is not None:
        models = recipe.reward_models
        if name not in models:
            known = f"there are {', '.join(models)}" if models else "it has none"
            raise RecipeError(
                f"the recipe has no reward model {name!r}; {known}.{did_you_mean(name, list(models))}"
            )
        settings = models[name].model_dump()
        if settings["path"] is None:
            raise RecipeError(f"reward model {name!r} is served at {settings['url']} already.")
    if isinstance(label := given.get("label"), str) and label.isdecimal():
        given["label"] = int(label)
    try:
        return RewardModelConfig.model_validate({**settings, **given})
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + ".".join(map(str, first["loc"][:1])).replace("_", "-")
        raise RecipeError(f"posttrain rewards serve: {option}: {first['msg']}.") from error
