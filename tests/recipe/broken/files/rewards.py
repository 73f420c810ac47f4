"""Rewards of the broken recipes."""


def length(completion, example):
    return -len(completion.token_ids)
