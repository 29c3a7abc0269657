from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from saelab import config
from saelab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Cat:
    arch: ClassVar[str] = "cat"
    lives: int = 9
    """How many are left."""


@dataclass(frozen=True, kw_only=True)
class Dog:
    arch: ClassVar[str] = "dog"
    tricks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class House:
    pet: Cat | Dog
    """Who lives here."""
    street: str
    number: int = 1
    """Where on
    the street."""
    colour: Literal["red", "blue"] = "red"
    rent: float | None = None
    plan: Path = Path("plan.txt")
    size: tuple[int, int] = (3, 4)
    cat: Cat = field(default_factory=Cat)


HOUSE = House(pet=Dog(tricks=("sit", 'say "hi"')), street="Elm", rent=3.5)


def test_mapping_and_toml_round_trip(tmp_path: Path):
    assert config.from_mapping(House, config.to_mapping(HOUSE)) == HOUSE
    file = tmp_path / "house.toml"
    file.write_text(config.to_toml(HOUSE), "utf-8")
    assert config.load(House, file) == HOUSE
    assert "# Where on\n# the street." in file.read_text()


def test_what_is_off_stands_as_a_comment():
    assert "# rent =" in config.to_toml(House(pet=Cat(), street="Elm"))


def test_later_sources_win(tmp_path: Path):
    file = tmp_path / "house.toml"
    file.write_text('street = "Elm"\nnumber = 2\n[pet]\narch = "cat"\n')
    house = config.load(House, file, ["number=3", "pet.lives=7", "rent=none"], number=4, street=None)
    assert (house.number, house.pet, house.street, house.rent) == (4, Cat(lives=7), "Elm", None)


def test_a_bare_word_needs_no_quotes():
    assert config.load(House, None, ["pet.arch=dog", "street=Elm", "colour=blue"]).colour == "blue"


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({"stret": "Elm"}, r"stret is not a setting of House; did you mean street"),
        ({"pet": {"arch": "cat"}}, r"street must be set"),
        ({"pet": {"arch": "cow"}, "street": "x"}, r"pet.arch 'cow' is unknown"),
        ({"pet": {"lives": 3}, "street": "x"}, r"pet.arch must be set; it is one of cat, dog"),
        ({"pet": {"arch": "cat", "tricks": []}, "street": "x"}, r"pet.tricks is not a setting of Cat"),
        ({"pet": {"arch": "cat", "lives": "nine"}, "street": "x"}, r"pet.lives must be of type int, got 'nine'"),
        ({"pet": {"arch": "cat", "lives": True}, "street": "x"}, r"pet.lives must be of type int, got True"),
        (
            {"pet": {"arch": "cat"}, "street": "x", "colour": "blu"},
            r"colour must be one of 'red', 'blue', got 'blu'; did you mean blue",
        ),
        ({"pet": {"arch": "cat"}, "street": "x", "size": [1]}, r"size must have 2 entries, got 1"),
        ({"pet": {"arch": "cat"}, "street": "x", "cat": 3}, r"cat must be a table of settings, got 3"),
        (
            {"pet": {"arch": "cat"}, "street": "x", "cat": {"arch": "dog"}},
            r"cat.arch is 'dog', but these settings are for 'cat'",
        ),
    ],
)
def test_a_wrong_setting_is_named_with_its_cure(mapping: dict, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        config.from_mapping(House, mapping)


@pytest.mark.parametrize("content", [b"street = ", b"\xff\xfe", b"street = 'a'\nstreet = 'b'"])
def test_an_unreadable_file_is_named(tmp_path: Path, content: bytes):
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"broken\.toml is not readable as \.toml"):
        config.load(House, file)


def test_a_missing_file_and_a_malformed_override_are_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="no config file"):
        config.load(House, tmp_path / "none.toml")
    with pytest.raises(ConfigError, match="--set needs key=value"):
        config.load(House, None, ["number"])
    with pytest.raises(ConfigError, match="cannot be set, because number is a single value"):
        config.load(House, None, ["number=1", "number.x=2"])
