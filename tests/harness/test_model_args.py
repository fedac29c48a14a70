"""The arguments of `--model aft`: strict values, and names that are nearly right."""

import inspect

import pytest
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import simple_parse_args_string

from lm_eval_aft import AFTError
from lm_eval_aft.harness import model_args
from lm_eval_aft.harness.model_args import (
    ARGUMENTS,
    OWN,
    STEERING,
    nearest,
    read_model_args,
    refuse_steering,
)
from lm_eval_aft.lm import AFTLM

SWITCHES = ("fast", "answer_only", "allow_mismatch", "trust_remote_code", "parallelize", "add_bos_token")


def as_typed(text: str):
    return read_model_args(simple_parse_args_string(text))


@pytest.mark.parametrize("name", SWITCHES)
def test_switches_are_read_in_every_spelling(name):
    for word, wanted in {"yes": True, "on": True, "true": True, "1": True}.items():
        for spelling in (word, word.upper(), word.capitalize()):
            assert as_typed(f"{name}={spelling}")[name] is wanted
    for word in ("no", "off", "false", "0", "No", "OFF", "False"):
        assert as_typed(f"{name}={word}")[name] is False
    assert read_model_args({name: True})[name] is True


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("value", ["nope", "2", "y", "", "1.0", "-1", "tru"])
def test_other_words_are_no_switches(name, value):
    with pytest.raises(AFTError, match=f"{name}=.* is neither yes nor no.\nWrite {name}=yes or {name}=no."):
        as_typed(f"{name}={value}")


@pytest.mark.parametrize("value", ["true", "no", "nan", "inf", "-inf", "1_0", "", "0,5", "half", "1e999"])
def test_coefficients_are_finite_numbers(value):
    with pytest.raises(AFTError, match="coefficient=.* is not a number"):
        read_model_args({"coefficient": {"true": True}.get(value, value)})
    assert as_typed("coefficient=-1e-2") == {"coefficient": -0.01}
    assert as_typed("coefficient='0.5'") == {"coefficient": 0.5}
    assert read_model_args({"coefficient": None}) == {"coefficient": None}


def test_names_that_look_like_numbers_are_names_and_booleans_are_not():
    assert as_typed("vector=2024,library=7,route=none") == {"vector": "2024", "library": "7", "route": None}
    with pytest.raises(AFTError, match="vector='True' is not a name.\nIn quotes it is one: vector='true'"):
        as_typed("vector=true")
    assert as_typed("vector='true'") == {"vector": "true"}


@pytest.mark.parametrize("value", ["1.5", "abc", "true", ""])
def test_whole_numbers(value):
    with pytest.raises(AFTError, match="max_length=.* is not a whole number"):
        as_typed(f"max_length={value}")
    assert as_typed("max_length='512'") == {"max_length": 512}


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("coeficient", "coefficient"), ("coef", "coefficient"), ("vectors", "vector"), ("Vector", "vector"),
        ("answer-only", "answer_only"), ("answers_only", "answer_only"), ("position", "positions"),
        ("trust_remote_kode", "trust_remote_code"), ("paralelize", "parallelize"),
        ("atn_implementation", "attn_implementation"), ("add_bos_tokens", "add_bos_token"),
    ],
)  # fmt: skip
def test_misspelt_names_get_the_nearest(wrong, right):
    with pytest.raises(AFTError, match=f"no model argument '{wrong}'.\nDid you mean {right}?"):
        read_model_args({wrong: 1})


def test_settings_of_a_models_config_are_left_to_transformers():
    given = {"rope_theta": 1e4, "num_hidden_layers": 3, "pad_token_id": 0, "attn_implementation": "eager"}
    assert read_model_args(given) == given
    assert nearest("answers") == "answer_only"


def test_the_table_has_the_arguments_of_both_models_with_their_types():
    own = [name for name in inspect.signature(AFTLM.__init__).parameters if name not in ("self", "kwargs")]
    assert set(own) == {"pretrained", *OWN}
    signature = inspect.signature(HFLM.__init__).parameters
    stock = {name: str(each.annotation) for name, each in signature.items() if name not in ("self", "kwargs")}
    assert set(stock) <= set(ARGUMENTS)
    for name, annotation in stock.items():
        kinds = set(annotation.replace(" ", "").split("|")) - {"None"}
        read = ARGUMENTS[name].read
        assert (read in (model_args.switch, model_args.optional_switch)) == (kinds == {"bool"}), name
        assert (read is model_args.whole) == (kinds == {"int"}), name
        if read is model_args.optional_switch:
            assert signature[name].default is None


def test_what_steers_is_refused_where_asked():
    assert {"vector", "coefficient", "positions", "route", "library", "answer_only"} <= set(STEERING)
    with pytest.raises(AFTError, match="arguments vector= and coefficient= have no place here: it is plain"):
        refuse_steering({"coefficient": 3, "vector": "v", "dtype": "float32"}, "it is plain")
    refuse_steering({"dtype": "float32", "fast": "no"}, "it is plain")


@pytest.mark.parametrize("name", ["load_in_4bit", "load_in_8bit", "quantization_config"])
def test_quantisation_of_former_transformers(name):
    with pytest.raises(
        AFTError, match=f"{name}= cannot be given: .*\n.*quantization_config=BitsAndBytesConfig"
    ):
        read_model_args({name: True})
