"""The reward registry and scorer.

registry   declare rewards, list them, find the one a recipe names
builtin    the rewards that come with posttrain
calling    load a reward's code and call it by its convention
worker     the killable process in which it runs
pool       the processes, replaced when they hang or die
scorer     rollouts in, rewards and a report out
"""
