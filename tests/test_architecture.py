"""The house: imports go one way, one YAML one module, and an attack or a defense is two files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from src.build import FROM_PIPELINE, asked
from src.train import CONF
from tests.conftest import ROOT, choices

# What a package of src may import from src. Anything absent here (pipeline, job, train …) knows everyone.
MAY_IMPORT = {
    "threat": {"errors"},
    "errors": set(),
    "build": {"errors"},
    "keys": set(),
    "recipe": set(),
    "records": {"errors"},
    "variant": {"records"},
    "checks": {"attacks", "data", "defenses", "threat", "errors", "keys", "records", "uncertainty", "checks"},
    "uncertainty": {"records", "variant"},
    "tables": {"records", "variant", "checks"},
    "terminal": {"records", "tables"},
    "sidecars": {"records"},
    "worst": {"records", "variant", "sidecars", "checks"},
    "frame": {"records", "variant", "checks", "sidecars", "worst", "errors"},
    "report": {"records", "sidecars", "worst", "frame", "tables", "uncertainty", "checks", "errors", "analysis"}
    | {"keys", "variant", "report", "retry", "several", "terminal", "tracking"},
    "several": {"errors"},
    "tracking": {"records", "variant", "keys", "worst", "frame", "errors", "analysis", "checks", "tracking"},
    "analysis": {"records", "variant", "sidecars", "tables", "checks", "errors", "analysis"},
    "data": {"threat", "errors", "records", "data"},
    "classifiers": {"errors", "keys", "recipe", "classifiers"},
    "attacks": {"threat", "errors", "build", "attacks"},
    "defenses": {"threat", "errors", "recipe", "defenses"},
    "callbacks": {"attacks", "checks", "threat", "errors", "keys", "records", "report", "tracking"}
    | {"leaving", "plan", "retry", "sidecars", "sweep", "terminal", "variant", "callbacks"},
}


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "src":
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("src.")}
    return found


def test_imports_go_one_way() -> None:
    """Each package imports what it may, and may no more than it does."""
    found: dict[str, set[str]] = {package: set() for package in MAY_IMPORT}
    for path in sorted((ROOT / "src").rglob("*.py")):
        package = path.relative_to(ROOT / "src").parts[0].removesuffix(".py")
        if package in MAY_IMPORT:
            found[package] |= imports_of(path)
    assert found == MAY_IMPORT


@pytest.mark.parametrize("group", ["attack", "defense", "dataset", "classifier"])
def test_one_yaml_one_module_of_the_same_name(group: str) -> None:
    for name in choices(group):
        node = OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml")
        if "_target_" in node:  # a variant of another choice has none of its own
            assert str(node["_target_"]).split(".")[-2] == name


@pytest.mark.parametrize("group", ["attack", "classifier"])
def test_every_argument_has_a_line_in_its_yaml(group: str) -> None:
    elsewhere = {"worst_case": ["members"], "own": ["arguments"]}  # of its defaults; added by a person
    for name in choices(group):
        node = OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml")
        if "_target_" in node:
            arguments = set(asked(node, group)) - FROM_PIPELINE
            assert sorted(arguments - set(node)) == sorted(elsewhere.get(name, [])), name


@pytest.mark.parametrize("group", ["attack", "defense"])
def test_every_attack_and_defense_says_its_shapes_and_errors(group: str) -> None:
    """Read, not imported: some take seconds."""
    for name in choices(group):
        target = re.search(r"^_target_: (\S+)\.(\w+)$", (ROOT / "conf" / group / f"{name}.yaml").read_text(), re.M)
        if target is None:
            continue
        module, own = target.groups()
        tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
        made = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == own)
        said = ast.get_docstring(made) or ""
        assert "``(B, C, H, W)`` in [0, 1]" in said, name
        fails = [node for node in ast.walk(made) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
        assert not fails or "Raises:" in said, name


@pytest.mark.parametrize("path", sorted((ROOT / "conf").rglob("*.yaml")), ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_yaml_opens_with_its_purpose_and_a_command(path: Path) -> None:
    head = [line for line in path.read_text().splitlines() if line.startswith("#") and "@package" not in line][:2]
    assert head
    assert "python -m src." in " ".join(head)


def test_the_command_starts_without_heavy_imports() -> None:
    code = "import sys, src.train; print(*sorted({'torch', 'pytorch_lightning', 'wandb', 'pandas'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    "name", ["requirements.txt", "requirements-peers.txt", "environment.yml", "pyproject.toml", "Makefile"]
)
def test_no_registry_host_where_packages_are_named(name: str) -> None:
    assert re.findall(r"--(?:extra-)?index-url|://[^ \n]*/simple", (ROOT / name).read_text()) == []


@pytest.mark.parametrize("name", choices("sweep"))
def test_every_sweep_names_choices_that_exist(name: str) -> None:
    """As the sweeper takes the list apart; the last of its jobs composes, what they choose is tried elsewhere."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose("train", overrides=[f"+sweep={name}"], return_hydra_config=True)
        for group, listed in whole.hydra.sweeper.params.items():
            override = OverridesParser.create().parse_override(f"{group}={listed}")
            assert override.is_sweep_override()
            listed = list(override.sweep_string_iterator())
            assert set(listed) <= set(choices(group))
            compose("train", overrides=[f"+sweep={name}", f"{group}={listed[-1]}"])
