"""The driver's tests."""

from tests.support.short import tmp_path as tmp_path
