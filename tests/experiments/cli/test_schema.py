"""The schemas have the constructors' names, types and defaults."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError, ValidationError

from lightning_gradnorm import GradNorm
from lightning_gradnorm.experiments.cli import signatures
from lightning_gradnorm.experiments.cli.build import build
from lightning_gradnorm.experiments.cli.config import left_out, register, schema_named, with_schema
from lightning_gradnorm.experiments.cli.schema import schema_of
from lightning_gradnorm.experiments.registry import made_for_tasks


class Example:
    def __init__(
        self,
        size: int,
        *args: Any,
        rate: float = 0.5,
        limit: Union[int, float, None] = None,  # noqa: UP007
        name: Optional[str] = "x",  # noqa: UP045
        kind: Literal["a", "b"] = "a",
        sigmas: Sequence[float] = (1.0, 2.0),
        weights: Mapping[str, float] | None = None,
        optimizer: Callable[[], None] = partial(print, 1),
        **kwargs: Any,
    ) -> None: ...


Example.__module__ = __name__


@pytest.fixture
def schema(monkeypatch: pytest.MonkeyPatch) -> type:
    monkeypatch.setattr(
        "lightning_gradnorm.experiments.cli.schema._dotted_name", lambda constructor: "somewhere.Example"
    )
    return schema_of(Example, leave_out=["weights"])


def test_plain_parameters_are_typed_and_others_are_any(schema: type) -> None:
    types = {field.name: field.type for field in dataclasses.fields(schema)}
    assert types == {
        "_target_": str,
        "size": int,
        "rate": float,
        "limit": Optional[Union[int, float]],  # noqa: UP007, UP045
        "name": Optional[str],  # noqa: UP045
        "kind": Any,
        "sigmas": Any,
        "optimizer": Any,
    }


def test_values_that_yaml_can_express_are_defaults_and_the_rest_is_missing(schema: type) -> None:
    config = OmegaConf.structured(schema)
    values = {name: value for name, value in OmegaConf.to_container(config).items() if name != "_target_"}
    assert values == {
        "size": MISSING,
        "rate": 0.5,
        "limit": None,
        "name": "x",
        "kind": "a",
        "sigmas": [1.0, 2.0],
        "optimizer": MISSING,
    }


def test_a_schema_refuses_other_names_and_types(schema: type) -> None:
    config = OmegaConf.structured(schema)
    with pytest.raises(ConfigKeyError, match="sise"):
        OmegaConf.merge(config, {"sise": 3})
    with pytest.raises(ValidationError, match="big"):
        OmegaConf.merge(config, {"rate": "big"})


@pytest.mark.parametrize("constructor", with_schema().values(), ids=with_schema())
def test_every_schema_names_its_constructor_and_all_its_parameters(constructor: Callable[..., Any]) -> None:
    schema = OmegaConf.structured(schema_of(constructor, leave_out=left_out(constructor)))
    assert get_object(schema._target_) is constructor
    parameters = {
        name
        for name, parameter in inspect.signature(constructor).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    assert {str(key) for key in schema} == (parameters | {"_target_"}) - set(left_out(constructor))


@pytest.mark.parametrize("name", with_schema())
def test_a_schema_that_is_read_from_the_source_is_that_of_the_imported_constructor(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    constructor = with_schema()[name]
    hidden = left_out(constructor)
    expected = schema_of(constructor, leave_out=hidden, partial=bool(made_for_tasks(constructor)))

    def imported() -> None:
        raise AssertionError(f"{name} was imported")

    monkeypatch.setattr("lightning_gradnorm.experiments.cli.config.with_schema", imported)
    schema_named.cache_clear()
    read = schema_named(name)
    assert read is not None
    fields = [[(field.name, field.type) for field in dataclasses.fields(one)] for one in (read, expected)]
    assert fields[0] == fields[1]
    assert OmegaConf.structured(read) == OmegaConf.structured(expected)


def test_a_schema_that_the_source_does_not_state_plainly_is_made_by_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unusual").mkdir()
    (tmp_path / "unusual" / "__init__.py").write_text(
        "import math\n\nLIMITS = (1, 2, 3)\nSize = int | None\n\n\n"
        "class Base:\n    def __init__(self, size: Size = None, limits: tuple = LIMITS[:2]): ...\n\n\n"
        "class Plain(Base): ...\n\n\n"
        "class Odd:\n    def __init__(self, rate: float = math.pi): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = signatures.parameters(signatures.find("unusual.Plain"))
    assert [(one.name, one.hint, one.default) for one in found] == [
        ("size", Optional[int], None),  # noqa: UP045
        ("limits", Any, (1, 2)),
    ]
    with pytest.raises(signatures.UnreadableError, match=r"^math\.pi$"):
        signatures.parameters(signatures.find("unusual.Odd"))
    with pytest.raises(signatures.UnreadableError, match="Even"):
        signatures.find("unusual.Even")
    monkeypatch.setattr("lightning_gradnorm.experiments.cli.config._OURS", ("unusual.Odd",))
    monkeypatch.setattr(
        "lightning_gradnorm.experiments.cli.config.with_schema", lambda: {"Odd": get_object("unusual.Odd")}
    )
    schema_named.cache_clear()
    made = schema_named("Odd")
    assert made is not None
    assert OmegaConf.structured(made).rate == math.pi
    assert schema_named("Even") is None


def test_a_schema_alone_builds_the_constructors_defaults() -> None:
    gradnorm = build(OmegaConf.create({"balancing": schema_of(GradNorm)}), "balancing")
    bare = GradNorm()
    for name in ("alpha", "update_every", "norm_of", "min_weight", "initial_losses", "stop_after"):
        assert getattr(gradnorm, name) == getattr(bare, name)
    assert gradnorm.optimizer is bare.optimizer


def test_nested_nodes_are_checked_against_their_constructors() -> None:
    node = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Linear", "in_feature": 3}]}
    with pytest.raises(ValueError, match=r"model\._args_\[0\]: torch.nn.Linear has no parameter 'in_feature'; did you"):
        build(OmegaConf.create({"model": node}), "model")
    with pytest.raises(ValueError, match=r"head\.out_features should be set"):
        build(
            OmegaConf.create({"head": {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": "???"}}), "head"
        )


def test_a_group_without_target_makes_nothing() -> None:
    assert build(OmegaConf.create({"balancing": {}}), "balancing") is None


def test_hydra_copies_a_schema_that_it_loads_and_not_all_of_them() -> None:
    """It copies the store each time it composes, and for --help once a group."""
    register()
    store = ConfigStore.instance()
    assert copy.deepcopy(store).repo is store.repo
    first, second = (store.load("schema/GradNorm.yaml").node for _ in range(2))
    first.alpha = 7.0
    assert second.alpha == GradNorm().alpha
