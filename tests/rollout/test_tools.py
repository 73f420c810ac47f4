"""Tools by themselves: finding them, describing them, calling them, the built-in ones."""

import json
from pathlib import Path

import pytest

from posttrain.errors import RecipeError
from posttrain.recipe.tools_schema import ToolsConfig, ToolSpec
from posttrain.rollout.tools import call_tool, environment_factory, load_tool, schemas_of, shorten
from posttrain.rollout.tools_builtin import Bm25, evaluate, make_calculator, make_python, make_search

USER = str(Path(__file__).with_name("user_tools.py"))


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12+3", "15"),
        ("2*(3-5)", "-4"),
        ("7/2", "3.5"),
        ("6/2", "3"),
        ("7//2 + 7%2", "4"),
        ("2**10", "1024"),
        ("sqrt(16)+max(1,2)", "6"),
        ("1/3", "0.333333333333"),
        (" -5 ", "-5"),
    ],
)
def test_calculator(expression, value):
    assert make_calculator()(expression) == value


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("", "not an arithmetic"),
        ("12+", "not an arithmetic"),
        ("__import__('os').getcwd()", "cannot evaluate"),
        ("(1).__class__", "cannot evaluate"),
        ("open('x')", "cannot evaluate"),
        ("'a'*3", "cannot evaluate"),
        ("True+1", "cannot evaluate"),
        ("x+1", "cannot evaluate"),
        ("[1,2]", "cannot evaluate"),
        ("1/0", "division by zero"),
        ("9**9**9", "too large"),
        ("2.0**5000", "too large"),
        ("(-8)**0.5", "not a real number"),
        ("sqrt(1,2)", "does not take"),
        ("1+" * 150 + "1", "at most 200"),
        ("-" * 199 + "1", ""),
        ("(" * 100 + "1" + ")" * 99, "not an arithmetic"),
    ],
)
def test_calculator_refuses(expression, problem):
    if not problem:
        assert evaluate(expression) == -1
        return
    with pytest.raises(ValueError, match=problem):
        evaluate(expression)


def test_bm25_by_hand():
    # N = 3, mean length 2; "cat" is in two documents: idf = log(1 + 1.5 / 2.5) = log 1.6.
    index = Bm25(["the cat", "cat cat cat dog", ""])
    assert index.best("cat", 5) == [1, 0]  # three times beats once, in spite of the length
    assert index.best("the cat", 5) == [0, 1]  # the rare word counts more
    assert index.best("bird", 5) == []
    assert index.best("cat", 1) == [1]


def test_search(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"title": "Cats", "text": "x" * 600 + " a cat purrs"}, {"text": "A dog barks"}]
    corpus.write_text("\n".join(map(json.dumps, rows)) + "\n")
    search = make_search(str(corpus), snippet=40)
    assert search("dog") == "[1] A dog barks"
    assert search("cat").startswith("[1] Cats: …")
    assert "cat purrs" in search("cat")
    assert search("unicorn") == "No document matches."
    corpus.write_text('{"body": "x"}\n')
    with pytest.raises(RecipeError, match=r"corpus\.jsonl:1 has no column 'text'"):
        make_search(str(corpus))
    with pytest.raises(RecipeError, match=r"there is no file nowhere\.jsonl"):
        make_search("nowhere.jsonl")


def test_python_runs_in_the_sandbox():
    python = make_python(seconds=5, isolation="none")
    assert python("print(6 * 7)") == "42\n"
    assert "ZeroDivisionError" in python("1/0")
    assert python("x = 1") == "(nothing was printed)"


def test_schemas_come_from_the_signature():
    tools = [load_tool(ToolSpec(name="calculator")), load_tool(ToolSpec(name=f"{USER}:double"))]
    calculator, double = schemas_of(tools)
    assert calculator["function"]["name"] == "calculator"
    assert calculator["function"]["parameters"]["required"] == ["expression"]
    assert double["function"]["parameters"]["properties"]["number"] == {
        "type": "integer",
        "description": "Any whole number.",
    }


@pytest.mark.parametrize(
    ("spec", "problem"),
    [
        ({"name": "calclator"}, "no tool is called calclator; there are calculator, python, search"),
        ({"name": f"{USER}:nothing"}, "defines no nothing"),
        ({"name": "nowhere.py:tool"}, "there is no file nowhere.py"),
        ({"name": "calculator", "args": {"size": 3}}, "does not take its args"),
        ({"name": f"{USER}:Guessing", "args": {"tries": 1}}, "is a Guessing, not a function"),
    ],
)
def test_tools_that_cannot_be_loaded(spec, problem):
    with pytest.raises(RecipeError, match=problem):
        load_tool(ToolSpec(**spec))


def test_tools_that_cannot_be_described():
    with pytest.raises(RecipeError, match="tool undocumented cannot be described"):
        schemas_of([load_tool(ToolSpec(name=f"{USER}:undocumented"))])
    double = load_tool(ToolSpec(name=f"{USER}:double"))
    with pytest.raises(RecipeError, match="two tools have the same name"):
        schemas_of([double, double])


@pytest.mark.parametrize(
    ("name", "arguments", "output", "error"),
    [
        ("double", {"number": 4}, "8", None),
        ("double", {"number": "4"}, "8", None),  # as models often write it
        ("double", {"number": "four"}, "Error: argument number: ", "arguments"),
        ("double", {}, "Error: missing a required argument: 'number'", "arguments"),
        ("double", {"number": 1, "other": 2}, "Error: got an unexpected keyword argument", "arguments"),
        ("triple", {}, "Error: there is no tool 'triple'; there are: double, end, multiply", "unknown"),
        ("end", {"how": "raise"}, "Error: KeyError: 'raise'", "exception"),
        ("multiply", {"number": 4}, "12", None),
    ],
)
def test_calls(name, arguments, output, error):
    specs = [
        {"name": f"{USER}:double"},
        {"name": f"{USER}:end"},
        {"name": f"{USER}:times", "args": {"factor": 3}},
    ]
    outcome = call_tool([load_tool(ToolSpec(**spec)) for spec in specs], name, arguments)
    assert outcome.output.startswith(output)
    assert outcome.error == error


def test_environments_are_made_with_their_arguments():
    config = ToolsConfig(environment=f"{USER}:Guessing", environment_args={"tries": 1})
    make = environment_factory(config)
    assert make() is not make()
    assert schemas_of(make().tools)[0]["function"]["name"] == "peek"
    wrong = ToolsConfig(environment=f"{USER}:Guessing", environment_args={"attempts": 1})
    with pytest.raises(RecipeError, match="unexpected keyword argument"):
        environment_factory(wrong)


def test_shorten():
    assert shorten("abcdef", 6) == "abcdef"
    assert shorten("abcdefg", 6) == "ab…efg"
