"""Sequences over several devices: measured, read from schedules, and extrapolated."""
