"""How tools look to the policy: in the prompt, where it calls them, and where it reads what they say.

Two protocols. `chat` has the chat template describe the tools and render results as messages; what comes
between two turns of the policy is found once, by rendering a conversation of placeholders. `text` describes
the tools in words and writes results into the running text. Either way results are appended as token ids, and
control tokens in a result are taken for the text they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from posttrain.data.prompts import PromptFormat, encode_prompt, render_prompt, uses_chat
from posttrain.errors import DataError, RecipeError
from posttrain.recipe.tools_schema import ToolsConfig
from posttrain.rollout.tools import Schema
from posttrain.rollout.types import Completion, Example, Message, Prompt, Sampling

_TURN, _RESULT = "turnplaceholder", "resultplaceholder"


@dataclass(frozen=True)
class Call:
    """A call as the policy wrote it; `problem` says why it cannot be read."""

    name: str
    arguments: dict[str, Any]
    written: str
    problem: str | None = None


class ToolFormat:
    """The protocol of a recipe's `tools` section for one tokenizer."""

    def __init__(
        self,
        config: ToolsConfig,
        schemas: Sequence[Schema],
        tokenizer: PreTrainedTokenizerBase,
        prompt_format: PromptFormat = "auto",
    ):
        """Raises:
        RecipeError: the tokenizer's chat template does not know tools and `protocol` is chat, or the tools
            do not fit `calls`.
        """
        self._config = config
        self._schemas = list(schemas)
        self.tokenizer = tokenizer
        self._format = prompt_format
        self._is_chat = uses_chat(tokenizer, prompt_format)
        knows = self._is_chat and "tools" in str(tokenizer.chat_template)
        if config.protocol == "chat" and not knows:
            raise RecipeError("tools.protocol is chat, but the model's chat template does not know tools")
        self._inline = config.protocol == "text" or not knows
        self._argument = _only_argument(self._schemas) if config.calls == "bare" else None
        close = tokenizer(config.close, add_special_tokens=False)["input_ids"]
        self._close_id: int | None = close[0] if len(close) == 1 else None
        self._eos: int | None = tokenizer.eos_token_id
        self._before, self._after = self._around(None if self._inline else "tool")

    # --- the prompt ------------------------------------------------------------------------------------

    def encode(self, example: Example) -> tuple[int, ...]:
        """Token ids of the prompt with the tools."""
        return encode_prompt(self._told(example), self.tokenizer, self._format, self._offered)

    def render(self, example: Example) -> str:
        """The prompt with the tools as text."""
        return render_prompt(self._told(example), self.tokenizer, self._format, self._offered)

    @property
    def _offered(self) -> list[Schema] | None:
        return None if self._inline or not self._schemas else self._schemas

    def _told(self, example: Example) -> Example:
        """The example with the tools described in words, where the protocol wants that."""
        if not self._inline or not self._config.describe or not self._schemas:
            return example
        words = self._description()
        prompt = example.prompt
        if not self._is_chat:
            return replace(example, prompt=f"{words}\n\n{prompt}")
        messages = [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
        if messages[0]["role"] == "system":
            first: Message = {**messages[0], "content": f"{messages[0]['content']}\n\n{words}"}
            return replace(example, prompt=[first, *messages[1:]])
        return replace(example, prompt=[Message(role="system", content=words), *messages])

    def _description(self) -> str:
        config = self._config
        lines = ["You may use these tools:"]
        for schema in self._schemas:
            function = schema["function"]
            arguments = function["parameters"]["properties"]
            signature = ", ".join(f"{name}: {part.get('type', 'any')}" for name, part in arguments.items())
            lines.append(f"- {function['name']}({signature}): {function['description']}")
            lines += [f"    {name}: {part['description']}" for name, part in arguments.items()]
        inside = '{"name": …, "arguments": {…}}' if self._argument is None else f"…{self._argument[1]}…"
        lines.append(f"To call one, write {config.open}{inside}{config.close}.")
        lines.append(f"Its result follows between {config.result[0]} and {config.result[1]}.")
        return "\n".join(lines)

    # --- the policy's turn -----------------------------------------------------------------------------

    def sampling(self, sampling: Sampling) -> Sampling:
        """The same sampling, which also ends where a call does."""
        if self._close_id is not None:  # looking for a token is cheaper than for a text
            return replace(sampling, stop_token_ids=(*sampling.stop_token_ids, self._close_id))
        return replace(sampling, stop=(*sampling.stop, self._config.close))

    def call_in(self, completion: Completion) -> Call | None:
        """The call that a turn ends with, or None."""
        config = self._config
        if completion.finish_reason != "stop" or not self._ends_a_call(completion):
            return None
        # Not the completion's text: that leaves out special tokens, which the tags are in some models.
        text = self.tokenizer.decode(list(completion.token_ids), skip_special_tokens=False)
        body = text.rpartition(config.close)[0]
        if config.open not in body:
            return Call("", {}, text, f"there is no {config.open} before {config.close}")
        return self._read(body.rpartition(config.open)[2])

    def _ends_a_call(self, completion: Completion) -> bool:
        if self._close_id is not None:
            return completion.token_ids[-1] == self._close_id
        return self._config.close in completion.text

    def _read(self, body: str) -> Call:
        if self._argument is not None:
            tool, argument = self._argument
            return Call(tool, {argument: body}, body)
        try:
            call = json.loads(body)
        except (ValueError, RecursionError) as error:
            return Call("", {}, body, f"the call is not valid JSON: {error}")
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return Call("", {}, body, 'a call is {"name": …, "arguments": {…}}')
        arguments = call.get("arguments", {})
        if not isinstance(arguments, dict):
            return Call(call["name"], {}, body, "arguments is not a JSON object")
        return Call(call["name"], arguments, body)

    # --- what the policy reads -------------------------------------------------------------------------

    def result_ids(self, output: str) -> list[int]:
        """Token ids that follow a call: its output and all that surrounds it.

        Of an output of more than `output_cap` tokens the middle is left out.
        """
        return [*self._before, *self._text_ids(output), *self._after]

    def answer_ids(self, text: str, ended: bool) -> list[int]:
        """Token ids of an environment's answer to a turn; `ended` if that has its end-of-sequence token."""
        if not self._is_chat:
            return self._ids(f"\n{text}\n")
        before, after = self._around("user")
        if ended and before and before[0] == self._eos:
            before = before[1:]
        return [*before, *self._text_ids(text), *after]

    def _around(self, role: str | None) -> tuple[list[int], list[int]]:
        """What comes before and after a result: given in words, or as the chat template has it (`role`)."""
        if role is None:
            return self._ids(self._config.result[0]), self._ids(self._config.result[1])
        asked = [Message(role="user", content="q"), Message(role="assistant", content=_TURN)]
        answered = [*asked, Message(role=role, content=_RESULT)]
        try:
            turn = self._rendered(asked, False)
            whole = self._rendered(answered, True)
        except TemplateError as error:
            raise RecipeError(
                f"the chat template cannot render a {role} message after a turn: {error}"
            ) from None
        end = turn.rpartition(_TURN)[2]
        if not whole.startswith(turn) or whole.count(_RESULT) != 1:
            raise RecipeError("the chat template does not append messages: set tools.protocol to text")
        before, _, after = whole[len(turn) :].partition(_RESULT)
        return self._ids(end + before), self._ids(after)

    def _rendered(self, messages: list[Message], prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages, tools=self._offered, add_generation_prompt=prompt, tokenize=False
        )
        return text

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _text_ids(self, text: str) -> list[int]:
        """Ids of a text from outside, in which control tokens are text, without the middle of a long one."""
        options = {"add_special_tokens": False, "split_special_tokens": True}
        ids = list(self.tokenizer(text, **options)["input_ids"])
        cap = self._config.output_cap
        if len(ids) <= cap:
            return ids
        gap = list(self.tokenizer(" … ", **options)["input_ids"])
        half = (cap - len(gap)) // 2
        return [*ids[:half], *gap, *ids[len(ids) - (cap - len(gap) - half) :]]

    # --- demonstrations --------------------------------------------------------------------------------

    def encode_trace(self, example: Example) -> dict[str, list[int]]:
        """A demonstration with tool calls as TRL takes it tokenised: `input_ids` and `completion_mask`.

        The example's `completion` is a text, or messages of the roles assistant and tool by turns. What a
        tool said is written as the engine would write it, and is not learnt.

        Raises:
            DataError: it is something else.
        """
        completion: Prompt | None = example.columns.get("completion")
        messages = (
            [Message(role="assistant", content=completion)] if isinstance(completion, str) else completion
        )
        if not messages or {message["role"] for message in messages} - {"assistant", "tool"}:
            raise DataError(f"demonstration {example.id!r} is not made of assistant and tool messages")
        ids = list(self.encode(example))
        mask = [0] * len(ids)
        for message in messages:
            own = message["role"] == "assistant"
            new = self._ids(message["content"]) if own else self.result_ids(message["content"])
            ids += new
            mask += [int(own)] * len(new)
        if self._eos is not None:
            ids.append(self._eos)
            mask.append(1)
        return {"input_ids": ids, "completion_mask": mask}


def _only_argument(schemas: Sequence[Schema]) -> tuple[str, str]:
    """Names of the only tool and of its only argument, a text."""
    if len(schemas) == 1:
        function = schemas[0]["function"]
        arguments = function["parameters"]["properties"]
        if len(arguments) == 1 and [part.get("type") for part in arguments.values()] == ["string"]:
            return function["name"], next(iter(arguments))
    raise RecipeError("tools.calls bare needs a single tool with a single argument, a text")
