"""SQLAlchemy's pytest plugin, with homeagent's dialect registered.

Not a `conftest.py`: pytest would load that one into homeagent's own tests too.
Source: README.dialects.rst of SQLAlchemy.
"""

import pytest

pytest.register_assert_rewrite("sqlalchemy.testing.assertions")

import sqlalchemy.dialects.sqlite.provision  # noqa: E402, F401
from sqlalchemy.testing.plugin.pytestplugin import *  # noqa: E402, F403

import homeagent.engine.sqlite.dialect  # noqa: E402, F401
