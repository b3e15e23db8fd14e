"""Rollouts: the specification (`reference`) and the batched implementation behind everything else (`engine`)."""
