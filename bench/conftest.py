"""Options of `pytest bench`."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--case",
        action="append",
        dest="bench_cases",
        help="time this case of bench/cases.py (repeatable); default: a small one",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case_name" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("bench_cases") or ["smollm2-135m-4k"]
        metafunc.parametrize("case_name", chosen)
