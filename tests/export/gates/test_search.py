"""The search for modules that stay in float32."""

from __future__ import annotations

from spdtool.export.gates.search import Modules, search_float32_modules

MODULES = ("a", "b", "c", "d")


def test_the_fewest_of_the_worst_modules_stay_in_float32() -> None:
    """Rounding `c` does most damage, then `a`; the budget is met once both stay in float32."""
    damages = {"a": 2.0, "b": 0.1, "c": 5.0, "d": 0.2}
    calls: list[Modules] = []

    def damage(float32_modules: Modules) -> float:
        calls.append(float32_modules)
        (rounded,) = set(MODULES) - set(float32_modules)
        return damages[rounded]

    def meets_budget(float32_modules: Modules) -> bool:
        calls.append(float32_modules)
        return {"a", "c"} <= set(float32_modules)

    result = search_float32_modules(MODULES, damage, meets_budget, tries=24)
    assert result.float32_modules == ("a", "c"), "in the order of the model"
    assert result.damage == damages
    assert result.tries == len(calls)


def test_the_search_fails_if_no_selection_meets_the_budget() -> None:
    result = search_float32_modules(MODULES, lambda _: 1.0, lambda _: False, tries=24)
    assert result.float32_modules is None


def test_neighbouring_modules_are_tried_together_if_tries_are_few() -> None:
    result = search_float32_modules(MODULES, lambda modules: float("a" not in modules), lambda _: True, tries=4)
    assert result.damage == {"a b": 1.0, "c d": 0.0}
    assert result.float32_modules == ("a", "b")
    assert result.tries <= 4
