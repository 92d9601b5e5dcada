"""The models are complete after the import of the package: no thread and no forked child builds one later."""

from __future__ import annotations

import homeagent
from homeagent.models.base import Model


def test_import_builds_every_model() -> None:
    """After the import, Pydantic has built the validator and the serialiser of each public model."""
    public = [getattr(homeagent, name) for name in homeagent.__all__]
    models = [each for each in public if isinstance(each, type) and issubclass(each, Model)]
    assert len(models) > 10
    assert all(model.__pydantic_complete__ for model in models)
