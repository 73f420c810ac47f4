"""Programs in completions: found, tested and judged. What they must not be able to do is tested elsewhere."""

import json

import pytest
from rewards.scoring import completion, make_rollouts, make_scorer

from posttrain.errors import RecipeError
from posttrain.rewards.builtin import Code
from posttrain.rewards.code_tests import CodeRun, CodeTest, extract_code, parse_tests, same_output, same_value
from posttrain.rewards.sandbox import Limits, Program, Result, Sandbox
from posttrain.rollout.types import Example

ADD = "def add(a, b):\n    return a + b\n"


def fenced(code, mark="python"):
    return f"Here it is:\n```{mark}\n{code}```\nDone."


# --- finding the program


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (fenced("a = 1\n"), "a = 1\n"),
        (fenced("a = 1\n", "Python3 title=x"), "a = 1\n"),
        (fenced("a = 1\n") + fenced("a = 2\n", "py"), "a = 2\n"),
        (fenced("a = 1\n") + fenced("1\n", ""), "a = 1\n"),
        (fenced("a = 1\n") + fenced("1\n", "text"), "a = 1\n"),
        (fenced("a = 1\n", "") + fenced("int a;\n", "c"), "a = 1\n"),
        ("~~~python\na = '```'\n~~~", "a = '```'\n"),
        ("````python\n```\n````", "```\n"),
        ("```python\na = 1\n", "a = 1\n"),
        ("print('`')\n", "print('`')\n"),
        ("```print(1)```\nprint(2)", "```print(1)```\nprint(2)"),
        ("<think>" + fenced("a = 1\n") + "</think>\na = 2", "\na = 2"),
        ("<think>" + fenced("a = 1\n"), None),
        ("<think>hm</think> \n", None),
        ("```python\n\n```", None),
        ("", None),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text) == code


def test_extract_code_takes_linear_time():
    for text in ("```" + " " * 1_000_000 + "x", "```\n" * 300_000, "<think>" * 200_000, "`" * 1_000_000):
        extract_code(text)


# --- reading the tests


def test_parse_tests_reads_every_form():
    code = CodeTest("code", "assert add(1, 2) == 3")
    call = CodeTest("call", "add(1, 2)", 3)
    stdin = CodeTest("stdin", "1 2\n", "3\n")
    pair = {"input": "1 2\n", "output": "3\n"}
    assert parse_tests("assert add(1, 2) == 3") == [code]
    assert parse_tests(["assert add(1, 2) == 3"]) == [code]
    assert parse_tests([{"call": "add(1, 2)", "expected": 3}, pair]) == [call, stdin]
    assert parse_tests(json.dumps([pair, "assert add(1, 2) == 3"])) == [stdin, code]
    assert parse_tests({"inputs": ["1 2\n"], "outputs": ["3\n"]}) == [stdin]
    # Rows of a table have all keys.
    empty = {"call": None, "expected": None}
    assert parse_tests([{**pair, **empty}]) == [stdin]
    assert parse_tests([{"call": "f()", "expected": None, "input": None}]) == [CodeTest("call", "f()", None)]
    assert parse_tests([]) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "neither code nor a list"),
        ([3], "test 1 is neither"),
        (["assert True", {"input": "1"}], "test 2 is neither"),
        ([{"input": "[1]", "output": "1", "fn_name": "f"}], "test 1 is neither"),
        ([{"input": [1], "output": "1"}], "test 1 is neither"),
        ([{"call": "f()"}], "test 1 is neither"),
        ({"inputs": ["1"], "outputs": []}, "argument 2 is shorter"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": "f"}, "neither code nor a list"),
    ],
)
def test_parse_tests_refuses_what_it_does_not_know(value, message):
    with pytest.raises(ValueError, match=message):
        parse_tests(value)


# --- judging


def test_same_output():
    assert same_output("1 2 \n3\n\n", "1 2\n3")
    assert same_output("1\r\n2\r\n", "1\n2\n")
    assert same_output("", "\n")
    assert not same_output("1  2", "1 2")
    assert not same_output(" 1", "1")
    assert not same_output("1\n\n2", "1\n2")


def test_same_value():
    assert same_value([1, [2.0000001, "x"]], (1, [2, "x"]))
    assert same_value({"1": [None]}, {1: [None]})
    assert same_value(0.1 + 0.2, 0.3)
    assert same_value(1e-12, 0.0)
    for value, expected in [
        (1.0001, 1),
        ("1", 1),
        ("1.0", 1.0),
        ([1], [1, 2]),
        ([2, 1], [1, 2]),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1}, ["a"]),
        (["a"], "a"),
        (None, 0),
        (float("nan"), float("nan")),
    ]:
        assert not same_value(value, expected), (value, expected)


@pytest.mark.parametrize(
    ("result", "passed"),
    [
        (Result("exited", 0, b"SEAL[1, 2]", ""), True),
        (Result("exited", 0, b"SEAL[1, 3]", ""), False),
        (Result("exited", 0, b"[1, 2]", ""), False),
        (Result("exited", 0, b"other[1, 2]", ""), False),
        (Result("exited", 0, b"SEAL" + b"[" * 100_000, ""), False),
        (Result("exited", 0, b"SEAL" + b"9" * 10_000, ""), False),
        (Result("exited", 0, b"SEAL\xff", ""), False),
        (Result("exited", 1, b"SEAL[1, 2]", ""), False),
        (Result("exited", -9, b"SEAL[1, 2]", ""), False),
        (Result("timeout", -9, b"SEAL[1, 2]", ""), False),
        (Result("output", -9, b"SEAL[1, 2]", ""), False),
        (Result("timeout", None, b"", ""), False),
    ],
)
def test_only_a_sealed_answer_of_a_program_that_ended_well_counts(result, passed):
    run = CodeRun(CodeTest("call", "f()", [1, 2]), Program(""), "SEAL")
    assert run.passed(result) is passed


def test_a_value_too_large_to_compare_is_wrong():
    run = CodeRun(CodeTest("call", "f()", 1.5), Program(""), "SEAL")
    assert not run.passed(Result("exited", 0, b"SEAL" + b"9" * 1000, ""))


# --- running


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(limits=Limits(seconds=20.0, total_seconds=100.0))


def outcomes(sandbox, code, *tests):
    runs = [CodeRun.of(code, test) for test in parse_tests(list(tests))]
    results = sandbox.run([run.program for run in runs])
    return [run.passed(result) for run, result in zip(runs, results, strict=True)]


def test_the_kinds_of_tests(sandbox):
    # Every test has the program anew, and no test of a module runs its main block.
    code = ADD + "calls = []\ndef count():\n    calls.append(1)\n    return len(calls)\n"
    code += "if __name__ == '__main__':\n    print(add(*map(int, input().split())))\n    exit()\n"
    assert outcomes(
        sandbox,
        code,
        "assert add(1, 2) == 3",
        "assert add(1, 2) == 4",
        "assert count() == 1 and __name__ == 'program'",
        {"call": "[add(1, 2), (count(), None)]", "expected": [3, [1, None]]},
        {"call": "add", "expected": "add"},
        {"call": "(", "expected": 3},
        {"input": "1 2\n", "output": "3\n"},
        {"input": "1 2\n", "output": "4\n"},
        {"input": "one\n", "output": ""},
    ) == [True, False, True, True, False, False, True, False, False]


@pytest.mark.parametrize(
    "code",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "print('passed')",
        "def add(a, b):\n    import os\n    os._exit(0)",
        "def add(a, b): raise SystemExit(0)",
        "def add(a, b:",
        "nul = '\0'",
        "\ud800",
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'x')\n    except OSError: pass",
    ],
)
def test_ending_early_is_not_passing(sandbox, code):
    tests = ["assert add(1, 2) == 3", {"call": "add(1, 2)", "expected": 3}, {"input": "1 2", "output": "3"}]
    assert outcomes(sandbox, code, *tests) == [False, False, False]


def test_what_is_expected_is_not_in_the_sandbox():
    runs = [
        CodeRun.of(ADD, CodeTest("call", "add(1, 2)", "secret")),
        CodeRun.of(ADD, CodeTest("stdin", "", "secret")),
    ]
    for run in runs:
        assert b"secret" not in run.program.stdin + run.program.source.encode()


def test_the_total_time_ends_a_call_and_failures_can(sandbox):
    limits = Limits(seconds=20.0, total_seconds=1.0)
    endless, good = Program("while True: pass"), Program("print(1)")
    first, second = sandbox.run([endless, good], limits)
    assert (first.status, second.status, second.code) == ("timeout", "timeout", None)
    results = sandbox.run([good, Program("1 / 0"), good], stop_at_failure=True)
    assert [result.code for result in results] == [0, 1]
    assert "ZeroDivisionError" in results[1].stderr


def test_what_a_program_leaves_is_gone_in_the_next(sandbox):
    first, second = sandbox.run(
        [
            Program("open('/tmp/left', 'w').write('x')"),
            Program("import os; print(sorted(os.listdir('/tmp')))"),
        ]
    )
    assert (first.code, second.stdout) == (0, b"['main.py', 'stdin']\n")


# --- the reward


@pytest.fixture(scope="module")
def reward():
    return Code(test_timeout=20.0)


def example(tests, **columns):
    return Example("row", "Add.", None, {"tests": tests, **columns})


def test_the_score_is_the_share_of_tests_passed(reward):
    tests = ["assert add(1, 2) == 3", "assert add(1, 2) == 4", {"call": "add(2, 2)", "expected": 4}]
    assert reward(completion(fenced(ADD)), example(tests)) == pytest.approx(2 / 3)
    assert reward(completion("I do not know."), example(tests)) == 0.0
    assert reward(completion("<think>"), example(tests)) == 0.0
    assert reward(completion(fenced(ADD)), example(None)) is None
    assert reward(completion(fenced(ADD)), example([])) is None
    with pytest.raises(ValueError, match="no column 'tests'"):
        reward(completion(fenced(ADD)), Example("row", "Add."))


def test_all_or_nothing_and_another_column():
    reward = Code(column="checks", all_or_nothing=True, test_timeout=20.0)
    right, wrong = {"call": "add(1, 2)", "expected": 3}, {"call": "add(1, 2)", "expected": 4}
    assert reward(completion(ADD), Example("row", "", None, {"checks": [right, right]})) == 1.0
    assert reward(completion(ADD), Example("row", "", None, {"checks": [right, wrong]})) == 0.0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"isolation": "off"}, "required or none"),
        ({"test_timeout": 31.0}, "test_timeout <= total_timeout"),
        ({"test_timeout": 0.0}, "0 < test_timeout"),
        ({"memory_mib": 1}, "memory_mib"),
    ],
)
def test_wrong_arguments(args, message):
    with pytest.raises(RecipeError, match=message):
        Code(**args)


def test_in_a_scorer_a_hanging_program_is_wrong_and_a_bad_test_is_an_error():
    spec = {"name": "code", "args": {"test_timeout": 4.0, "total_timeout": 8.0}}
    with make_scorer(spec, workers=1) as scorer:
        rollouts = make_rollouts(
            [fenced(ADD), fenced("while True: pass\n")], group_size=2, tests=["assert add(1, 2) == 3"]
        )
        rollouts += make_rollouts([fenced(ADD)], group_size=1, tests=[3])
        report = scorer.score(rollouts)
    assert [rollout.reward for rollout in rollouts] == [1.0, 0.0, None]
    assert report.rewards["code"].errors == {"exception": 1}
    assert "test 1 is neither" in rollouts[2].reward_errors["code"]
