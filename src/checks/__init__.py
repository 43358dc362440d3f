"""Sanity checks: does a figure mean what it says? What each flag means stands in docs/checks.md."""
