"""The command ``far-env``: one module per command. None of them imports torch or Gymnasium before its options are parsed."""

from far_env.cli.main import main, run_guarded

__all__ = ["main", "run_guarded"]
