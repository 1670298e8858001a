"""Which variables the ranks on other hosts get."""

from __future__ import annotations

from launched import PROJECT

from ds_gpt2.supervision.cluster import environment


def test_the_documentation_lists_all_variables_that_are_passed_on() -> None:
    page = (PROJECT / "docs" / "several_machines.md").read_text(encoding="utf-8")
    names = [f"{prefix}*" for prefix in environment._PREFIXES]
    names += [name for name in environment._NAMES if not name.endswith("_PROXY")]  # "also in capitals"
    assert [name for name in names if f"`{name}`" not in page] == []
