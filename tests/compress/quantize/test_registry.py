import inspect
from importlib import import_module
from types import FunctionType

import pytest

from llmpare.compress import quantize
from llmpare.compress.errors import UsageError
from llmpare.compress.quantize import METHODS


def function(name: str) -> FunctionType:
    module, _, attribute = name.partition(":")
    return vars(import_module(f"llmpare.compress.quantize.{module}"))[attribute]


def keywords(solver: FunctionType) -> set[str]:
    return {p.name for p in inspect.signature(solver).parameters.values() if p.kind is p.KEYWORD_ONLY}


def positional(solver: FunctionType) -> list[str]:
    return [p.name for p in inspect.signature(solver).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("name", METHODS)
def test_options_are_the_keyword_only_parameters_of_the_solver(name: str) -> None:
    method = METHODS[name]
    solver = function(method.solver)
    assert positional(solver) == ["weights", "statistics", "grid", "group_size"]
    assert keywords(solver) == set(method.options)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.tuner])
def test_options_of_a_tuner_are_its_keyword_only_parameters(name: str) -> None:
    tuner = METHODS[name].tuner
    assert tuner is not None
    assert keywords(function(tuner)) == {*METHODS[name].tuner_options, "windows", "seed"}
    assert METHODS[name].tuner_options.keys().isdisjoint(METHODS[name].options)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_does(name: str) -> None:
    assert quantize.find(name) is METHODS[name]
    assert METHODS[name].summary


def test_some_method_needs_no_text_and_has_no_options() -> None:
    assert [name for name, method in METHODS.items() if not method.needs_text] == ["rtn"]
    assert quantize.resolve("rtn", {}) == ()


def test_an_unknown_method_is_told_the_nearest_and_all() -> None:
    with pytest.raises(UsageError, match="unknown method 'gtpq'") as caught:
        quantize.find("gtpq")
    assert caught.value.hint == "did you mean gptq? --method takes one of rtn, gptq, tuned"
    with pytest.raises(UsageError) as caught:
        quantize.resolve("xyz", {})
    assert caught.value.hint == "--method takes one of rtn, gptq, tuned"


def test_given_options_take_the_place_of_defaults_in_a_fixed_order() -> None:
    assert quantize.resolve("gptq", {"sweeps": 5.0, "damping": 0.1}) == (
        ("correction", METHODS["gptq"].options["correction"]),
        ("damping", 0.1),
        ("rounds", METHODS["gptq"].options["rounds"]),
        ("sweeps", 5.0),
    )
    assert dict(quantize.resolve("tuned", {})) == METHODS["tuned"].defaults
    assert METHODS["gptq"].options["sweeps"] != 5.0


@pytest.mark.parametrize(
    ("method", "option", "said", "hint"),
    [
        ("gptq", "dampin", "method gptq has no option --dampin", "did you mean --damping? "),
        ("gptq", "step_size", "method gptq has no option --step-size", "--step-size belongs to tuned; "),
        (
            "rtn",
            "damping",
            "method rtn has no option --damping",
            "--damping belongs to gptq, tuned; rtn takes no options",
        ),
        ("tuned", "zzz", "method tuned has no option --zzz", "tuned takes --damping, --rounds, --sweeps, "),
    ],
)
def test_an_option_the_method_does_not_have(method: str, option: str, said: str, hint: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        quantize.resolve(method, {option: 1.0})
    assert caught.value.hint.startswith(hint)
