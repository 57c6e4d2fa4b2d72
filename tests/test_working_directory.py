"""A test that writes to the working directory fails, by the name of what it leaves."""

from pathlib import Path

import pytest

pytest_plugins = "pytester"

ROOT = Path(__file__).parent.parent


def test_what_is_left_behind_fails_its_test(pytester: pytest.Pytester) -> None:
    pytester.makeconftest((ROOT / "conftest.py").read_text(encoding="utf-8"))
    pytester.makepyfile("""
        from pathlib import Path

        def test_file():
            Path("curvature.jsonl").write_text("{}")

        def test_folder():
            Path("lightning_logs/version_0").mkdir(parents=True)

        def test_neither(tmp_path):
            (tmp_path / "curvature.jsonl").touch()
            assert not list(Path.cwd().iterdir())
    """)
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=3, errors=2)
    result.stdout.fnmatch_lines(["*left in the working directory: curvature.jsonl;*", "*directory: lightning_logs;*"])


def test_tests_run_outside_of_the_checkout() -> None:
    assert ROOT not in (Path.cwd(), *Path.cwd().parents)
