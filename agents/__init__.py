"""Learned retention policies: network, action distribution, training, adapters and export."""
