"""SQLAlchemy's tests for dialects. Run by test_sqlalchemy_suite.py: the name keeps pytest from collecting it."""

from sqlalchemy.testing.suite import *  # noqa: F403
