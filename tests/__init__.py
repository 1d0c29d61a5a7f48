"""The tests, as a package: `tests.support` is what they share, and no test module is imported by another."""
