"""Argument checkers (`utils.utils`) and the logger (`utils.log`) of the facade."""
