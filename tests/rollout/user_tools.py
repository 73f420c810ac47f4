"""Tools and environments as a user would write them, good and bad."""

import os
import time
from pathlib import Path


def double(number: int) -> int:
    """Double a number.

    Args:
        number: Any whole number.
    """
    return 2 * number


def wait(seconds: float) -> str:
    """Wait.

    Args:
        seconds: How long.
    """
    time.sleep(seconds)
    return f"waited {seconds:g}"


def wait_for(file: str) -> str:
    """Wait until there is a file.

    Args:
        file: Its path.
    """
    while not Path(file).exists():
        time.sleep(0.01)
    return "found"


def end(how: str) -> str:
    """End badly.

    Args:
        how: raise or exit.
    """
    if how == "exit":
        os._exit(3)
    raise KeyError(how)


def undocumented(number):
    return number


def wait_by_length(text: str) -> str:
    """Takes longer for shorter texts.

    Args:
        text: Anything.
    """
    time.sleep(0.05 / (1 + len(text)))
    return f"[{text}]"


def times(factor: int):
    """A tool that multiplies by a factor."""

    def multiply(number: int) -> int:
        """Multiply.

        Args:
            number: Any whole number.
        """
        return factor * number

    return multiply


class Guessing:
    """Guess the example's answer by saying numbers; `peek` shows it and counts."""

    def __init__(self, tries: int = 3):
        self.tools = [self.peek]
        self._tries = tries

    def reset(self, example):
        self._secret, self._left, self._peeks = int(example.answer), self._tries, 0

    def step(self, text):
        self._left -= 1
        guess = int(text)
        if guess == self._secret or self._left == 0:
            return None
        return "higher" if guess < self._secret else "lower"

    def peek(self, digits: int) -> str:
        """Look at the last digits of the number.

        Args:
            digits: How many.
        """
        self._peeks += 1
        return f"{str(self._secret)[-digits:]} ({self._peeks})"
