"""The options of a conversion: defaults, ranges, and what front ends read off them."""

from dataclasses import FrozenInstanceError, fields

import pytest

from rvc_mlx.options import ConversionOptions

FIELDS = {item.name: item for item in fields(ConversionOptions)}
LOWEST = [name for name, item in FIELDS.items() if item.metadata["low"] is not None]
HIGHEST = [name for name, item in FIELDS.items() if item.metadata["high"] is not None]
CHOICES = [name for name, item in FIELDS.items() if item.metadata["choices"]]

# Options that only go together: what else an extreme value needs.
WITH = {"x_query": {"x_center": 200}, "x_center": {"x_query": 0.5}}


def make(name, value):
    return ConversionOptions(**{name: value} | WITH.get(name, {}))


def test_defaults():
    options = ConversionOptions()
    assert (options.pitch, options.index_rate, options.protect) == (0, 0.75, 0.33)
    assert (options.x_pad, options.x_query) == (1, 6)
    assert (options.x_center, options.x_max) == (38, 41)
    assert options.f0_method == "rmvpe"
    asked = (options.f0_threshold, options.f0_onset, options.f0_offset)
    assert asked == (-1, -1, -1)  # as the voice asks


@pytest.mark.parametrize("name", list(FIELDS))
def test_every_option_can_be_offered(name):
    item = FIELDS[name]
    text = item.metadata["help"]
    assert text
    assert text[0] == text[0].lower() or text.split()[0].isupper()
    assert not text.endswith(".")
    assert type(item.default) in (bool, int, float, str)
    numeric = type(item.default) in (int, float)
    assert numeric == (item.metadata["low"] is not None)
    if item.metadata["choices"]:
        assert item.default in item.metadata["choices"]


def test_names_and_aliases_are_distinct():
    names = list(FIELDS)
    for item in FIELDS.values():
        names += item.metadata["aliases"]
    assert len(names) == len(set(names))
    assert not any(name.startswith("-") for name in names)


@pytest.mark.parametrize("name", LOWEST)
def test_lowest_value(name):
    low = FIELDS[name].metadata["low"]
    assert getattr(make(name, low), name) == low
    with pytest.raises(ValueError, match=rf"{name} is .*; expected {low}"):
        make(name, low - 1e-3)


@pytest.mark.parametrize("name", HIGHEST)
def test_highest_value(name):
    high = FIELDS[name].metadata["high"]
    assert getattr(make(name, high), name) == high
    with pytest.raises(ValueError, match=rf"{name} is .*; expected .* to {high}"):
        make(name, high * (1 + 1e-6))


@pytest.mark.parametrize("name", LOWEST)
def test_nan_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is nan"):
        make(name, float("nan"))


@pytest.mark.parametrize("name", CHOICES)
def test_other_choices_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is 'harvest'; expected one of"):
        make(name, "harvest")
    for choice in FIELDS[name].metadata["choices"]:
        assert getattr(make(name, choice), name) == choice


@pytest.mark.parametrize("rate", [1, 7999])
def test_output_rate_is_0_or_8000_and_more(rate):
    with pytest.raises(ValueError, match=f"output_rate is {rate} Hz"):
        ConversionOptions(output_rate=rate)
    for good in (0, 8000, 44100):
        assert ConversionOptions(output_rate=good).output_rate == good


def test_cuts_cannot_go_backwards():
    with pytest.raises(ValueError, match=r"x_query is 6\.0 s; expected .*x_center"):
        ConversionOptions(x_center=11)
    assert ConversionOptions(x_center=12).x_center == 12


def test_options_do_not_change():
    with pytest.raises(FrozenInstanceError):
        ConversionOptions().pitch = 3


def test_unknown_option():
    with pytest.raises(TypeError, match="filter_radius"):
        ConversionOptions(filter_radius=3)
