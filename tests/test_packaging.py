"""What is installed with the package: ranges and pins agree, and apex is in neither."""

import ast
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parent.parent


def assigned_in_setup(name):
    for node in ast.parse((REPOSITORY / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [name]:
            return ast.literal_eval(node.value)
    raise AssertionError(f"setup.py assigns no {name}")


CORE, EXTRAS = assigned_in_setup("CORE"), assigned_in_setup("EXTRAS")


def pins():
    lines = (REPOSITORY / "requirements-cpu.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonical(item.name): item for item in requirements}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_no_requirement_is_apex():
    every = [Requirement(text) for text in [*CORE, *(text for extra in EXTRAS.values() for text in extra)]]
    assert len(every) > 15
    assert "apex" not in {canonical(item.name) for item in every} | set(pins())
    assert not re.search(r"^[^#]*\bapex\b", (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def test_extras():
    assert set(EXTRAS) == {"gpu", "mining", "eval", "dev"}


@pytest.mark.parametrize("text", [*CORE, *EXTRAS["dev"]])
def test_every_range_has_a_pin_inside_it(text):
    requirement = Requirement(text)
    pin = pins()[canonical(requirement.name)]
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    assert requirement.specifier.contains(specifier.version)


def test_every_pin_is_exact():
    for pin in pins().values():
        assert re.fullmatch(r"==[0-9][0-9A-Za-z.]*", str(pin.specifier)), pin
