"""The Gymnasium environments: single, batched, and for Stable-Baselines3."""
