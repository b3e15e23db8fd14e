"""Experiment configurations that ship with the package; `far_env.config` finds them by name."""
