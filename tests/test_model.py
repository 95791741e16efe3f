# SPDX-License-Identifier: MIT
"""The protocols (references to frames, the gate, guards), checked by spin: see model/README.md."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    path = Path(__file__).resolve().parent / "model" / "check.py"
    spec = importlib.util.spec_from_file_location("ksmalloc_model_check", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


model = _load()


def _check(name: str) -> None:
    try:
        model.tools()
    except model.Missing as error:
        pytest.fail(f"the model cannot be checked: {error}")
    result = model.check(model.RUNS[name])
    assert result.ok, result.complaint


@pytest.mark.parametrize("name", [run.name for run in model.CONFIGURATIONS])
def test_configuration_holds(name: str) -> None:
    _check(name)


@pytest.mark.parametrize("name", [run.name for run in model.REDUNDANT])
def test_redundant_protection_alone_can_go(name: str) -> None:
    _check(name)


@pytest.mark.parametrize("name", [run.name for run in model.MUTANTS])
def test_mutant_is_caught(name: str) -> None:
    _check(name)


@pytest.mark.parametrize("name", model.MODELS)
def test_every_mutation_of_a_model_is_run(name: str) -> None:
    text = model.MODELS[name].read_text("utf-8")
    written = set(re.findall(r"\bM_[A-Z_]+\b", text))
    runs = [entry for entry in model.RUNS.values() if entry.model == name]
    assert written == {macro for entry in runs for macro in entry.macros if macro.startswith("M_")}
