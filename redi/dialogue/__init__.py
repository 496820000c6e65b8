"""Situational dialogue."""
