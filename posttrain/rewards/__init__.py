"""The reward registry and scorer.

registry   declare rewards, list them, find the one a recipe names
builtin    the rewards that come with posttrain
maths      what math-verify would say, where asking it is not needed
code_tests and sandbox   what model-written programs are judged by, and where they run
http       what a server says, by client (requests: retries, rate, servers that are away)
judge      what a language model says; judge_text: how it is asked and read; judge_rounds: in what order
shared     a judge that is the policy itself, on the run's engine
model_reward   rewards that are reward models; model_server and lease: their servers, as the trainer sees them
serve      such a server; model and checkpoint: the model in it; vllm_endpoints: or one of vLLM's
calling    load a reward's code and call it by its convention
worker     the killable process in which it runs
pool       the processes, replaced when they hang or die
cache      values that deterministic rewards have given before
counts     what rewards use besides time: requests, tokens
outage     waiting for servers that are away
combine    from several values to one: weights, schedules, clips, gates
scorer     rollouts in, rewards and a report out
trial      gold and adversarial samples, before a run
rescore    saved rollouts again, after it
"""
